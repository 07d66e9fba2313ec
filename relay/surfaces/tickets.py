"""POST …/tickets: a client's backend gets a ticket, with which a web page opens one session.

Owns the fields of the request and of the answer, and that a ticket allows no more than its client
may do. gate/tickets.py issues the ticket.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay import log
from relay.core.access import Client, TicketTerms
from relay.core.errors import BadRequest, ModelNotAllowed
from relay.core.model_patterns import allowed
from relay.core.paths import check_target, collapse_slashes
from relay.core.provider import Route
from relay.core.text import clean
from relay.gate.identify import Sent, check_provider
from relay.gate.rights import route_of_client
from relay.gate.tickets import Issued
from relay.gateway import GATEWAY, Gateway
from relay.surfaces.logs import client_errors
from relay.surfaces.management import read_json

_ORIGIN = re.compile(r"https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?\Z")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_MAX_S, _MAX_MESSAGES = 7 * 86400, 10**9
_MAX_MODELS = 50
_Text = Annotated[str, msgspec.Meta(max_length=200)]


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of the request."""

    provider: _Text
    endpoint: Annotated[str, msgspec.Meta(max_length=512)] | None = None
    models: Annotated[list[_Text], msgspec.Meta(max_length=_MAX_MODELS)] | None = None
    origin: _Text | None = None
    max_session_s: Annotated[float, msgspec.Meta(ge=1, le=_MAX_S)] | None = None
    max_messages: Annotated[int, msgspec.Meta(ge=1, le=_MAX_MESSAGES)] | None = None


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the route under `prefix`."""
    app.router.add_post(f"{prefix}/tickets", issue)


async def issue(request: web.Request) -> web.Response:
    """Issue a ticket to the client whose key the request has. 201 with the ticket, until when it
    can be used, and what a page passes to `new WebSocket`.

    Raises BadRequest, what refuses a client's call, RateLimited, StoreUnavailable.
    """
    gateway, headers = request.app[GATEWAY], request.headers
    callers = gateway.callers
    sent = Sent(headers, request.raw_path.partition("?")[2])
    caller = callers.identify(request, sent, None).caller
    key = callers.require_key(caller, headers)
    with client_errors():
        wanted = _wanted(await read_json(request, dict))
        own = callers.public_url(caller, headers)
        terms, route = _terms(wanted, key.client, own, gateway)
        issued = await gateway.tickets.issue(key, terms)
    log.event("ticket.issued", client=key.client.name, key_id=key.id, provider=terms.provider)
    resource = request.match_info.route.resource
    assert resource is not None
    root = f"{own}{resource.canonical.removesuffix('/tickets')}"
    answer = _answer(issued, terms, route, f"{root}/ws/")
    return web.json_response(answer, status=201, headers={"Cache-Control": "no-store"})


def _wanted(fields: dict[str, Any]) -> _Wanted:
    try:
        return msgspec.convert(fields, _Wanted)
    except msgspec.ValidationError as error:
        raise BadRequest(clean(str(error))) from None


def _terms(
    wanted: _Wanted, client: Client, own: str, gateway: Gateway
) -> tuple[TicketTerms, Route]:
    """Return the terms of the ticket, and the route of its session as far as it is known. Raises
    BadRequest, and the error for what the client itself may not do.
    """
    check_provider(client, wanted.provider)
    prefix = collapse_slashes(wanted.endpoint or "").strip("/")
    check_target(f"/{prefix}")
    if "?" in prefix:
        raise BadRequest("endpoint is a path without a query")
    route = gateway.registry.match_websocket(wanted.provider, prefix)
    if route.provider.websocket_rules is None:
        raise BadRequest(f"the provider '{route.provider.name}' has no WebSockets")
    route = route_of_client(client, route)
    models = tuple(wanted.models or ())
    own_models = client.rights.models
    for model in models if own_models else ():
        if not allowed(own_models, model):
            raise ModelNotAllowed(client.name, model)
    origin = ""
    if wanted.origin is not None:
        origin = _origin(wanted.origin)
        gateway.callers.check_origin(client, origin, _plain(own))
    terms = TicketTerms(
        wanted.provider, prefix, models, origin, wanted.max_session_s, wanted.max_messages
    )
    return terms, route


def _origin(text: str) -> str:
    """Return an origin as browsers write it. Raises BadRequest."""
    if not _ORIGIN.fullmatch(origin := _plain(text)):
        raise BadRequest("origin is such as https://app.example.com, without a path")
    return origin


def _plain(origin: str) -> str:
    origin = origin.lower().removesuffix("/")
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition("://")[0], ""))


def _answer(issued: Issued, terms: TicketTerms, route: Route, root: str) -> dict[str, Any]:
    rules = route.provider.websocket_rules
    assert rules is not None
    endpoint = f"/{terms.path_prefix}" if terms.path_prefix else ""
    named = [name for name, use in rules.subprotocols.items() if use == "pass" and name[-1] != "."]
    answer = {
        "ticket": issued.ticket,
        "expires_at": issued.expires_s,
        "websocket_url": f"ws{root.removeprefix('http')}{terms.provider}{endpoint}",
        "subprotocols": [*named, f"cf-aig-authorization.{issued.ticket}"],
    }
    if route.format == "openai":
        answer["openai_ticket"] = issued.openai_ticket
    return answer
