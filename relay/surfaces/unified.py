"""The unified surface: `/v1/…`, where the model of a call picks its provider.

Owns these URLs, and the lists of models in the three shapes that SDKs and agents ask for.
calls/unified.py chooses the target of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from relay.calls.call import Call
from relay.core.access import Client
from relay.core.errors import BadRequest, ModelNotFound
from relay.core.paths import split_endpoint
from relay.core.text import quoted
from relay.core.unified import SOCKETS, error_format, is_endpoint
from relay.gate.model_access import model_access
from relay.gateway import Gateway
from relay.rest import relay_rest
from relay.sessions.explanation import explain_refusal
from relay.surfaces.cors import is_preflight
from relay.surfaces.management import limit_of
from relay.surfaces.native import (
    CALL_PREFIXES,
    CLAUDE_CODE_PROBE,
    CallPrefix,
    Calls,
    unknown_route,
    wants_websocket,
)
from relay.upstream.codex_lists import Description
from relay.websocket import relay_websocket

PREFIX = "/v1"
_LIST = "models"
_MAX_PAGE = 1000
_CREATED_S = 0
"""The relay does not know when a provider has published a model."""


def add_routes(app: web.Application, own: str) -> None:
    """Add the surface. `own` is the path of the relay's own URLs, empty for a mounted relay."""
    calls = _UnifiedCalls(PREFIX, app, own)
    app.router.register_resource(calls)
    # Claude Code sends it to the root of its base URL, which has no version.
    app.router.add_route("HEAD", f"/{CLAUDE_CODE_PROBE}", calls.answer_probe)
    app[CALL_PREFIXES].append(CallPrefix(f"{PREFIX}/", calls.route))


class _UnifiedCalls(Calls):
    """Every endpoint below /v1 that core/unified.py lists."""

    def __init__(self, prefix: str, app: web.Application, own: str) -> None:
        """`own` is the path of the relay's own URLs, empty for a mounted relay."""
        self._own = own
        super().__init__(prefix, app)

    def _take_prefix(self) -> None:
        mounted = self.canonical.removesuffix(PREFIX)
        self._path, self._root = f"{self.canonical}/", f"{mounted}{self._own}/providers/"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if is_preflight(request):
            return await self._cors.preflight(request)
        call = self._call(request)
        if wants_websocket(request):
            return await relay_websocket(request, self._gateway, call)
        if call.method == "GET" and call.endpoint in SOCKETS:
            await explain_refusal(call, self._gateway)
        first = call.endpoint.partition("/")[0]
        if first == _LIST and call.method in ("GET", "HEAD"):
            return self._answer_list(request, call)
        if is_endpoint(call.endpoint):
            return await relay_rest(request, self._gateway, call)
        if call.method == "HEAD" and call.endpoint == CLAUDE_CODE_PROBE:
            return await self.answer_probe(request)
        raise unknown_route(request)

    async def answer_probe(self, request: web.Request) -> web.Response:
        """Answer the probe of a connection, for a caller that may call."""
        places = self._gateway.unified.places
        (caller, _, _), _ = self._identify(request, request.query_string, places)
        self._gateway.callers.authorize(caller, request.headers, "")
        return web.Response()

    def _call(self, request: web.Request) -> Call:
        _, endpoint, query = split_endpoint(f"/{self._tail(request)}")
        places = self._gateway.unified.places
        (caller, query, secrets), offered = self._identify(request, query, places)
        return Call(
            request.method, "", endpoint, query, request.headers, self._root, caller, offered,
            secrets, error_format(endpoint), "unified",
        )  # fmt: skip

    def _answer_list(self, request: web.Request, call: Call) -> web.Response:
        gateway = self._gateway
        gateway.callers.authorize(call.caller, call.headers, "")
        found = _models(gateway, call)
        # SDKs send the slash of `PROVIDER/MODEL` as %2F.
        wanted = unquote(call.endpoint.partition("/")[2])
        if wanted:
            owner = found.get(wanted)
            if owner is None:
                raise ModelNotFound(wanted)
            return web.json_response(_entry(wanted, owner, call))
        if "client_version" in request.query:
            version = request.query["client_version"]
            return web.json_response({"models": _for_codex(found, version, gateway)})
        return web.json_response(_list(found, call, request.query))


def _models(gateway: Gateway, call: Call) -> dict[str, str]:
    """Return the models that the caller may use: aliases, then those of each provider, by name,
    with the provider. A name that an earlier provider has is listed with its prefix too.
    """
    unified, lists = gateway.unified, gateway.model_lists
    lists.refresh(unified.providers)
    record: Client | None = call.caller.record
    access = model_access(call.caller)
    found = {name: alias.members[0].provider for name, alias in unified.aliases.items()}
    for provider in unified.providers:
        for model in lists.models(provider):
            found.setdefault(model, provider.name)
            found.setdefault(f"{provider.name}/{model}", provider.name)
    allowed = {}
    for name, provider_name in found.items():
        if record is not None and record.rights.providers:
            if provider_name not in record.rights.providers:
                continue
        if access is not None and not access.allows(name):
            continue
        allowed[name] = provider_name
    return allowed


def _for_codex(found: Mapping[str, str], version: str, gateway: Gateway) -> list[Description]:
    """Return the models for Codex, as their providers describe them; an alias as its first target.
    A model that no provider describes is left out: Codex knows it, or takes a default.
    """
    unified = gateway.unified
    of_provider = {each.name: gateway.codex_lists.of(each, version) for each in unified.providers}
    entries: list[Description] = []
    for name, provider_name in found.items():
        alias = unified.aliases.get(name)
        model = alias.members[0].model if alias is not None else name
        described = of_provider.get(provider_name, {}).get(model)
        if described is not None:
            shown = {"slug": name, "display_name": name} if alias is not None else {}
            entries.append({**described, **shown})
    return entries


def _list(found: dict[str, str], call: Call, query: Any) -> dict[str, Any]:
    """Return the list in the shape of the client: Anthropic's or OpenAI's."""
    entries = [_entry(name, owner, call) for name, owner in found.items()]
    if "anthropic-version" in call.headers:
        return _page(entries, query)
    return {"object": "list", "data": entries}


def _page(entries: Sequence[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """Return a page of Anthropic's list: `limit` entries after the model `after_id` or before
    `before_id`; without a `limit`, all. Raises BadRequest.
    """
    limit = limit_of(query, len(entries), _MAX_PAGE)
    ids = [entry["id"] for entry in entries]
    for name in ("after_id", "before_id"):
        if name in query and query[name] not in ids:
            raise BadRequest(f"{name} is not a model of the list: {quoted(query[name])}")
    if "before_id" in query:
        end = ids.index(query["before_id"])
        begin = max(0, end - limit)
        has_more = begin > 0
    else:
        begin = ids.index(query["after_id"]) + 1 if "after_id" in query else 0
        end = begin + limit
        has_more = end < len(ids)
    page = entries[begin:end]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"data": page, "has_more": has_more, "first_id": first, "last_id": last}


def _entry(name: str, owner: str, call: Call) -> dict[str, Any]:
    if "anthropic-version" in call.headers:
        return {
            "type": "model", "id": name, "display_name": name,
            "created_at": "1970-01-01T00:00:00Z",
        }  # fmt: skip
    return {"id": name, "object": "model", "created": _CREATED_S, "owned_by": owner}
