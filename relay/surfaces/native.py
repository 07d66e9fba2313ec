"""The relay's own URLs: …/providers/{provider}/{endpoint} for calls and WebSockets,
…/ws/{provider}[/{endpoint}] for WebSockets.

Owns what becomes of a request there: the Call, made from the raw path; the responses to preflights
and connection probes; the 404 of a wrong base URL. rest.py and websocket.py handle the call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

from aiohttp import web
from aiohttp.web_urldispatcher import PrefixResource, ResourceRoute, UrlMappingMatchInfo
from yarl import URL

from relay.calls.call import Call, resolve_target_header
from relay.core.base_urls import guess_provider
from relay.core.errors import UnknownRoute
from relay.core.paths import split_endpoint
from relay.core.subprotocols import split
from relay.gate.identify import Identified, KeyPlaces, Sent
from relay.gateway import GATEWAY
from relay.rest import relay_rest
from relay.sessions.explanation import explain_refusal
from relay.surfaces.cors import CORS, is_preflight
from relay.websocket import relay_websocket

CLAUDE_CODE_PROBE = "api/hello"


class CallPrefix(NamedTuple):
    """The path below which a surface takes REST calls."""

    path: str
    """It ends in a slash; the provider's name follows."""
    route: ResourceRoute


CALL_PREFIXES = web.AppKey("call_prefixes", list[CallPrefix])
"""Every surface adds its own, for code that sees a request before it is routed: load shedding, and
the fast path in server/connection.py."""


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the surface under `prefix`, which may be empty."""
    calls = _ProviderCalls(f"{prefix}/providers", app)
    app.router.register_resource(calls)
    app.router.register_resource(_ProviderSockets(f"{prefix}/ws", app))
    app[CALL_PREFIXES].append(CallPrefix(calls.get_info()["prefix"] + "/", calls.route))


async def _send_no_continue(request: web.Request) -> None:
    """Send no `100 Continue` before the call is admitted: calls/body.py sends it then."""


def unknown_route(request: web.Request) -> UnknownRoute:
    """The error for a request that no surface answers, with the base URL that its SDK needs."""
    gateway = request.app[GATEWAY]
    callers, resource = gateway.callers, request.app[CALL_PREFIXES][0].route.resource
    assert resource is not None
    path = request.raw_path.partition("?")[0].strip("/")
    guess = guess_provider(path, request.headers, gateway.registry.providers)
    own = callers.public_url(callers.locate(request), request.headers)
    root = f"{own}{resource.canonical}/"
    return UnknownRoute(request.method, root, guess.provider, guess.format)


def prefixes_of_calls(app: web.Application) -> tuple[str, ...]:
    """The paths below which surfaces take calls and WebSockets; each ends in a slash."""
    surfaces = (each for each in app.router.resources() if isinstance(each, Calls))
    return tuple(f"{surface.canonical}/" for surface in surfaces)


class Calls(PrefixResource):
    """Every path below a prefix, any method. The router takes nothing out of the path: it is read
    raw, from the end of the prefix on, wherever the application is mounted.
    """

    def __init__(self, prefix: str, app: web.Application) -> None:
        super().__init__(prefix)
        self._gateway, self._cors = app[GATEWAY], app[CORS]
        self._take_prefix()
        self.route = ResourceRoute("*", self.handle, self, expect_handler=_send_no_continue)

    @abstractmethod
    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""

    def _call(self, request: web.Request) -> Call:
        gateway = self._gateway
        provider, endpoint, query = split_endpoint(self._tail(request))
        places = gateway.registry.providers.get(provider)
        (caller, query, secrets), offered = self._identify(request, query, places)
        call = Call(
            request.method, provider, endpoint, query, request.headers, self._root, caller, offered,
            secrets,
        )  # fmt: skip
        return resolve_target_header(call, gateway.registry)

    def _tail(self, request: web.Request) -> str:
        """Return the raw path behind the prefix, with the query."""
        raw, path = request.raw_path, self._path
        if not raw.startswith(path):
            # The router matched an escaped spelling of the prefix, which no SDK sends.
            raise unknown_route(request)
        return raw[len(path) :]

    def _identify(
        self, request: web.Request, query: str, places: KeyPlaces | None
    ) -> tuple[Identified, tuple[str, ...]]:
        """Return the caller, and the subprotocols that it offers."""
        lines = request.headers.getall("Sec-WebSocket-Protocol", None)
        offered = split(lines) if lines else ()
        sent = Sent(request.headers, query, offered)
        return self._gateway.callers.identify(request, sent, places), offered

    def add_prefix(self, prefix: str) -> None:
        super().add_prefix(prefix)
        self._take_prefix()

    def _take_prefix(self) -> None:
        prefix = self.canonical
        self._path = f"{prefix}/"
        # For URLs of the relay that are written into responses.
        self._root = prefix.removesuffix("/ws").removesuffix("/providers") + "/providers/"

    async def resolve(self, request: web.Request) -> tuple[UrlMappingMatchInfo | None, set[str]]:
        """Match any path below the prefix, but not the prefix itself, which is management."""
        if len(request.rel_url.raw_path) <= len(self._path):
            return None, set()
        return UrlMappingMatchInfo({}, self.route), {"*"}

    def raw_match(self, path: str) -> bool:
        return path == self.canonical

    def url_for(self) -> URL:  # type: ignore[override]
        return URL(self.canonical)

    def get_info(self) -> dict[str, Any]:  # type: ignore[override]
        return {"prefix": self.canonical}

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[web.AbstractRoute]:
        return iter((self.route,))


class _ProviderCalls(Calls):
    """Any method, any path; a WebSocket where the client asks for an upgrade."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if is_preflight(request):
            return await self._cors.preflight(request)
        call = self._call(request)
        if wants_websocket(request):
            return await relay_websocket(request, self._gateway, call)
        if call.method == "HEAD" and self._is_probe(call):
            return web.Response()
        return await relay_rest(request, self._gateway, call)

    def _is_probe(self, call: Call) -> bool:
        """True if a client only probes its connection, and asks nothing of the provider: Claude
        Code sends HEAD to its base URL, and to `api/hello` below it, without a query. Raises what
        refuses a call.
        """
        if call.query or call.endpoint not in ("", CLAUDE_CODE_PROBE):
            return False
        self._gateway.callers.authorize(call.caller, call.headers, call.provider)
        provider = self._gateway.registry.provider(call.provider)
        return call.endpoint == "" or provider.format == "anthropic"


class _ProviderSockets(Calls):
    """A WebSocket; without an endpoint the provider's default realtime path."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if is_preflight(request):
            return await self._cors.preflight(request)
        call = self._call(request)
        if not wants_websocket(request):
            await explain_refusal(call, self._gateway)
        return await relay_websocket(request, self._gateway, call)


def wants_websocket(request: web.Request) -> bool:
    """True if a request asks to be upgraded to a WebSocket."""
    upgrade = request.headers.get("Upgrade")
    return upgrade is not None and upgrade.strip().lower() == "websocket"
