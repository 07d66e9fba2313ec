"""The relay's own URLs: …/providers/{provider}/{endpoint} for calls and sockets, …/ws/{provider}
for sockets.
"""

from __future__ import annotations

from aiohttp import web

from relay.call import read_call
from relay.core.errors import UpgradeRequired
from relay.gateway import GATEWAY
from relay.rest import relay_rest
from relay.surfaces.cors import CORS, is_preflight
from relay.websocket import relay_websocket


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the surface under `prefix`, which may be empty."""
    for path in ("/providers/{provider}", "/providers/{provider}/{endpoint:.*}"):
        app.router.add_resource(prefix + path).add_route(
            "*", provider_call, expect_handler=_not_yet
        )
    for path in ("/ws/{provider}", "/ws/{provider}/{endpoint:.*}"):
        app.router.add_resource(prefix + path).add_route(
            "*", provider_socket, expect_handler=_not_yet
        )


async def _not_yet(request: web.Request) -> None:
    """No `100 Continue` before the call is admitted: the line sends it when it reads the body."""


async def provider_call(request: web.Request) -> web.StreamResponse:
    """Any method, any path; a WebSocket where the client asks to upgrade."""
    if is_preflight(request):
        return await request.app[CORS].preflight(request)
    if _wants_websocket(request):
        return await relay_websocket(request, request.app[GATEWAY], read_call(request))
    return await relay_rest(request, request.app[GATEWAY], read_call(request))


async def provider_socket(request: web.Request) -> web.StreamResponse:
    """A WebSocket; without an endpoint the provider's default realtime path."""
    if not _wants_websocket(request):
        raise UpgradeRequired
    return await relay_websocket(request, request.app[GATEWAY], read_call(request))


def _wants_websocket(request: web.Request) -> bool:
    return request.headers.get("Upgrade", "").strip().lower() == "websocket"
