"""Change aiohttp's server connection for the relay.

Owns the fast path of a request to a call, the response to a request that is not valid HTTP, and the
guarantee that no connection outlives the server. Load shedding is in load_shedding.py, half-closed
connections are in half_close.py.
"""

from __future__ import annotations

import asyncio
import copy
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
from relay.surfaces.native import CALL_PREFIXES, prefixes_of_calls, unknown_route

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def fast_path(app: web.Application, otherwise: Handler) -> Handler:
    """A handler that passes calls to the handler of their surface, through the same middleware but
    without aiohttp's routing table, which took 5 % of a call. `otherwise` handles the rest.

    Every request comes here, so load shedding stops counting it as admitted here. A call is counted
    as running before the loop turns again.
    """
    gateway = app[GATEWAY]
    admitted = gateway.admitted
    prefixes = []
    for prefix, route in app[CALL_PREFIXES]:
        with_cors, without_cors = _matched(app, route), _matched(app, route)
        # Signals are sent to these applications; the only signal handler adds CORS headers.
        without_cors._apps = []
        prefixes.append((prefix, len(prefix), route.handler, with_cors, without_cors))

    def handle(request: Any) -> Awaitable[web.StreamResponse]:
        if admitted:
            admitted.discard(request.protocol)
        path = request.raw_path
        for prefix, start, handler, with_cors, without_cors in prefixes:
            if path.startswith(prefix) and path[start:].partition("?")[0] not in _NOT_CALLS:
                listed = gateway.lists_origins
                request._match_info = with_cors if listed else without_cors
                return middleware(request, handler)
        return otherwise(request)

    return handle


def management_alone(app: web.Application, otherwise: Handler) -> Handler:
    """A handler for the listener of management: `otherwise` handles requests, but calls and
    WebSockets to providers are refused. The rules of who may call hold for the other listeners.
    """
    admitted, prefixes = app[GATEWAY].admitted, prefixes_of_calls(app)
    resource = app[CALL_PREFIXES][0].route.resource
    assert resource is not None
    refused = _matched(app, ResourceRoute("*", _refuse_call, resource))

    def handle(request: Any) -> Awaitable[web.StreamResponse]:
        admitted.discard(request.protocol)
        path = request.raw_path.partition("?")[0]
        prefix = next(filter(path.startswith, prefixes), None)
        if prefix is not None and path[len(prefix) :] not in _NOT_CALLS:
            request._match_info = refused
            return middleware(request, _refuse_call)
        return otherwise(request)

    return handle


async def _refuse_call(request: web.Request) -> web.StreamResponse:
    raise unknown_route(request)


def _matched(app: web.Application, route: ResourceRoute) -> Any:
    matched = UrlMappingMatchInfo({}, route)
    matched.add_app(app)
    matched.freeze()
    return matched


_NOT_CALLS = {"", *BESIDE_CALLS}


class RelayRunner(web.AppRunner):
    """An AppRunner whose connections are _Connection. `management` makes those of the listener of
    management, which ends with the other ones.
    """

    __slots__ = ("_transports", "management")

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(app, **options)
        self._transports: set[asyncio.BaseTransport] = set()

    async def _make_server(self) -> Server:
        server = await super()._make_server()
        server.__class__ = _RelayServer
        server.transports = self._transports  # type: ignore[attr-defined]
        prefixes = [prefix.path for prefix in self.app[CALL_PREFIXES]]
        server.shedder = LoadShedder(self.app[GATEWAY], prefixes)  # type: ignore[attr-defined]
        # The copy shares the set of connections, so that both are shut down at once.
        self.management = management = copy.copy(server)
        management.request_handler = management_alone(self.app, server.request_handler)
        management.is_of_management = True  # type: ignore[attr-defined]
        server.request_handler = fast_path(self.app, server.request_handler)
        return server

    async def cleanup(self) -> None:
        """Clean up as aiohttp does, then abort the connections that are still closing: TLS waits
        half a minute for the client's close_notify, and the loop cannot be closed before.
        """
        await super().cleanup()
        for transport in list(self._transports):
            transport.abort()  # type: ignore[attr-defined]
        if self._transports:
            await asyncio.sleep(0)


class _RelayServer(Server):
    transports: set[asyncio.BaseTransport]
    shedder: LoadShedder
    is_of_management = False

    def __call__(self) -> RequestHandler:
        return _Connection(self, **self._kwargs)


class _Connection(HalfClosing):
    __slots__ = ("_open", "_received_head", "_server")

    def __init__(self, server: _RelayServer, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._server = server

    @property
    def is_of_management(self) -> bool:
        """True for a connection to the listener of management."""
        return self._server.is_of_management

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._open: asyncio.BaseTransport = transport
        self._received_head = False
        self._server.transports.add(transport)
        super().connection_made(transport)
        assert self._task_handler is not None
        self._task_handler.add_done_callback(_drop_traceback)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Skip aiohttp's call after every chunk while reading is not paused."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def data_received(self, data: bytes) -> None:
        if self._upgraded:
            super().data_received(data)
            return
        self._received_s = self._clock()
        if data.startswith(b"HEAD "):
            self._received_head = True
        shedder = self._server.shedder
        if not shedder.active:
            super().data_received(data)
            return
        parser, transport = self._parser, self.transport
        if parser is None or transport is None or self._waiter is None or self._messages:
            # A request is being handled: the next one waits for its turn.
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
        """The response to a malformed request, or to an unexpected exception before its handler.

        The log shows no request line: it may contain credentials.
        """
        if request.writer.output_size > 0:
            raise ConnectionError("a response has begun already")
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
        if self._received_head:
            # The parser does not tell the method of a malformed request: it may be a HEAD.
            response.body = None
        response.force_close()
        return response


def _drop_traceback(task: asyncio.Task[None]) -> None:
    """Break the cycle of a cancelled task, its exception, the traceback, and a frame of aiohttp's
    that refers to the task. Reading the exception removes it from the task.
    """
    if task.cancelled():
        try:
            task.exception()
        except asyncio.CancelledError as error:
            error.__traceback__ = None


_PARSE_REASONS = {
    "LineTooLong": "a line or header is too long",
    "BadHttpMethod": "the method is not valid",
    "InvalidURLError": "the target is not valid",
    "InvalidHeader": "a header is not valid",
    "ContentLengthError": "the content length is not valid",
    "TransferEncodingError": "the chunked body is not valid",
}
