"""The relay's own URLs: …/providers/{provider}/{endpoint} for calls and sockets, …/ws/{provider}
for sockets.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from aiohttp import web
from aiohttp.web_urldispatcher import PrefixResource, ResourceRoute, UrlMappingMatchInfo
from yarl import URL

from relay.call import read_call
from relay.core.errors import UpgradeRequired
from relay.gateway import GATEWAY
from relay.rest import relay_rest
from relay.surfaces.cors import CORS, is_preflight
from relay.websocket import relay_websocket

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the surface under `prefix`, which may be empty."""
    app.router.register_resource(_Calls(f"{prefix}/providers", provider_call))
    app.router.register_resource(_Calls(f"{prefix}/ws", provider_socket))


class _Calls(PrefixResource):
    """All that lies under a prefix, any method. Nothing is taken out of the path here: the lines
    read it raw.
    """

    def __init__(self, prefix: str, handler: Handler) -> None:
        super().__init__(prefix)
        self._route = ResourceRoute("*", handler, self, expect_handler=_not_yet)

    async def resolve(self, request: web.Request) -> tuple[UrlMappingMatchInfo | None, set[str]]:
        """Match anything below the prefix; the prefix alone is somebody else's."""
        if len(request.rel_url.raw_path) <= len(self._prefix) + 1:
            return None, set()
        return UrlMappingMatchInfo({}, self._route), {"*"}

    def raw_match(self, path: str) -> bool:
        return path == self._prefix

    def url_for(self) -> URL:  # type: ignore[override]
        return URL(self._prefix)

    def get_info(self) -> dict[str, Any]:  # type: ignore[override]
        return {"prefix": self._prefix}

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[web.AbstractRoute]:
        return iter((self._route,))


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
    asked = request.headers.get("Upgrade")
    return asked is not None and asked.strip().lower() == "websocket"
