"""A client's connection: how aiohttp's is changed for the relay.

Owns: the answer to what is not even HTTP, which no handler gives, and that no connection outlives
the server. Calls that are refused before they become a request are load_shedding.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server
from aiohttp.web_urldispatcher import ResourceRoute, UrlMappingMatchInfo

from relay import log
from relay.core.errors import BadFraming, InternalError
from relay.gateway import GATEWAY, new_id
from relay.server.half_close import HalfClosing
from relay.server.load_shedding import LoadShedder, SheddingParser
from relay.surfaces.admin import BESIDE_CALLS
from relay.surfaces.errors import plain
from relay.surfaces.middleware import middleware
from relay.surfaces.native import CALL_PREFIXES

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def fast_path(app: web.Application, otherwise: Handler) -> Handler:
    """A handler that takes the calls of all surfaces to their resource without a look at the
    routing table, through the same middleware; anything else goes the ordinary way. The table took
    a twentieth of a call.

    Every request comes here, whatever it is, so here its place among those that arrive is given
    back. A call takes its place among those that run before the loop turns again.
    """
    gateway = app[GATEWAY]
    admitted = gateway.admitted
    prefixes = []
    for prefix, route in app[CALL_PREFIXES]:
        with_cors, without_cors = _matched(app, route), _matched(app, route)
        without_cors._apps = []  # whose signals are sent: the only one there is adds CORS headers
        prefixes.append((prefix, len(prefix), route.handler, with_cors, without_cors))

    def handle(request: Any) -> Awaitable[web.StreamResponse]:
        if admitted:
            admitted.discard(request.protocol)
        path = request.raw_path
        for prefix, start, handler, with_cors, without_cors in prefixes:
            if path.startswith(prefix) and path[start:].partition("?")[0] not in _NO_CALLS:
                listed = gateway.access.origins.listed
                request._match_info = with_cors if listed else without_cors
                return middleware(request, handler)
        return otherwise(request)

    return handle


def _matched(app: web.Application, route: ResourceRoute) -> Any:
    matched = UrlMappingMatchInfo({}, route)
    matched.add_app(app)
    matched.freeze()
    return matched


_NO_CALLS = {"", *BESIDE_CALLS}


class RelayRunner(web.AppRunner):
    """An AppRunner whose connections answer parse errors in the relay's own words."""

    __slots__ = ("_transports",)

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(app, **options)
        self._transports: set[asyncio.BaseTransport] = set()

    async def _make_server(self) -> Server:
        server = await super()._make_server()
        server.__class__ = _RelayServer
        server.transports = self._transports  # type: ignore[attr-defined]
        prefixes = [prefix.path for prefix in self.app[CALL_PREFIXES]]
        server.shedder = LoadShedder(self.app[GATEWAY], prefixes)  # type: ignore[attr-defined]
        server.request_handler = fast_path(self.app, server.request_handler)
        return server

    async def cleanup(self) -> None:
        """As aiohttp does; then end what still says goodbye: TLS waits half a minute for a client
        that answers no close_notify, and the loop cannot be closed before.
        """
        await super().cleanup()
        for transport in list(self._transports):
            transport.abort()  # type: ignore[attr-defined]
        if self._transports:
            await asyncio.sleep(0)


class _RelayServer(Server):
    transports: set[asyncio.BaseTransport]
    shedder: LoadShedder

    def __call__(self) -> RequestHandler:
        return _Connection(self, **self._kwargs)


class _Connection(HalfClosing):
    __slots__ = ("_head_came", "_open", "_server")

    def __init__(self, server: _RelayServer, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._open: asyncio.BaseTransport = transport
        self._head_came = False
        self._server.transports.add(transport)
        super().connection_made(transport)
        assert self._task_handler is not None
        self._task_handler.add_done_callback(_drop_traceback)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """aiohttp asks for it whenever a chunk was read; mostly nothing is paused."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def data_received(self, data: bytes) -> None:
        if self._upgraded:
            super().data_received(data)
            return
        self._heard_s = self._clock()
        if data.startswith(b"HEAD "):
            self._head_came = True
        shedder = self._server.shedder
        if not shedder.active:
            super().data_received(data)
            return
        parser, transport = self._parser, self.transport
        if parser is None or transport is None or self._waiter is None or self._messages:
            # A request is being answered: what comes now waits for its turn.
            super().data_received(data)
            return
        self._parser = SheddingParser(parser, shedder, self, transport)  # type: ignore
        try:
            super().data_received(data)
        finally:
            if self._parser is not None:
                self._parser = parser

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.shedder.free(self)
        self._server.transports.discard(self._open)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Malformed, or our own bug: no handler saw it. Logged without the request line."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        if status >= 500 and exc is not None:
            log.bug("connection.failed", exc)
            error: BadFraming | InternalError = InternalError()
        else:
            log.event(
                "request.refused",
                error="bad_request",
                client=request.remote,
                cause=type(exc).__name__,
            )
            error = BadFraming(_PARSE_REASONS.get(type(exc).__name__, "it is not valid HTTP/1.1"))
        if exc is not None:
            exc.__traceback__ = None  # a frame in it holds this connection and the exception
        response = plain(error, "openai", new_id())
        if self._head_came:
            # The parser does not tell the method of what it could not read: this may be a HEAD.
            response.body = None
        response.force_close()
        return response


def _drop_traceback(task: asyncio.Task[None]) -> None:
    """A task that was cancelled keeps the cancellation, with its traceback, and a frame in that,
    one of aiohttp's, keeps the task. To ask for the exception takes it out of the task.
    """
    if task.cancelled():
        try:
            task.exception()
        except asyncio.CancelledError as error:
            error.__traceback__ = None


_PARSE_REASONS = {
    "LineTooLong": "a line or header of it is too long",
    "BadHttpMethod": "its method is not valid",
    "InvalidURLError": "its target is not valid",
    "InvalidHeader": "a header of it is not valid",
    "ContentLengthError": "its length is not valid",
    "TransferEncodingError": "its chunks are not valid",
}
