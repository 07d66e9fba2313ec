"""A client's connection: how aiohttp's is changed for the relay.

Owns: the answers that no handler gives, to what is not even HTTP and to what comes while the relay
is full; and that no connection outlives the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server
from aiohttp.web_urldispatcher import ResourceRoute, UrlMappingMatchInfo

from relay.core import shapes
from relay.core.errors import BadFraming, InternalError, Overloaded
from relay.gateway import GATEWAY, Gateway, new_id
from relay.half_close import HalfClosing
from relay.ledger import log
from relay.surfaces.admin import BESIDE_CALLS
from relay.surfaces.errors import plain
from relay.surfaces.middleware import middleware
from relay.surfaces.native import STRAIGHT


class Door:
    """Refuses REST calls while as many run, of all together, as may (`calls_at_once` of all).

    A refusal by the line costs two thirds of a call: at twice the capacity there would be nothing
    left to answer with. Here a request that the parser has found whole gets a few ready-made bytes,
    before anything is made of it. What is not plainly such a request goes on to the line.
    """

    __slots__ = ("_answers", "_gateway", "_prefix")

    def __init__(self, gateway: Gateway, prefix: str) -> None:
        self._gateway, self._prefix = gateway, prefix
        self._answers: dict[str, tuple[bytes, bytes]] = {}

    @property
    def kept(self) -> bool:
        """True if there is such a limit."""
        limits = self._gateway.limits
        return limits is not None and limits.most is not None

    def refusal(self, message: Any, payload: Any, connection: RequestHandler) -> bytes | None:
        """The answer to a request that is refused at once; None if it is let in.

        What was let in and is not handled yet counts as running: of a thousand that come in one
        turn of the loop no more than there is room for may become calls.
        """
        gateway, path = self._gateway, message.path
        limits, arriving = gateway.limits, gateway.arriving
        if limits is None or limits.most is None or not path.startswith(self._prefix):
            return None
        headers = message.headers
        if message.upgrade or "Origin" in headers:
            return None
        if limits.running + len(arriving) < limits.most:
            arriving.add(connection)
            return None
        if message.should_close or "Expect" in headers or not payload.is_eof():
            return None
        name = path[len(self._prefix) :].partition("/")[0]
        provider = gateway.registry.providers.get(name)
        if provider is None:
            return None
        gateway.refused_at_the_door += 1
        answer = self._answers.get(provider.format)
        if answer is None:
            answer = self._answers[provider.format] = _ready(provider.format)
        head, body = answer
        return head if message.method == "HEAD" else head + body

    def free(self, connection: RequestHandler) -> None:
        """Give back the place of what arrived on this connection, if it has one."""
        self._gateway.arriving.discard(connection)


def _ready(meter: str) -> tuple[bytes, bytes]:
    """Head and body of an answer. It has no id: nothing is recorded of such a call but that there
    was one.
    """
    error = Overloaded("calls at once, of all together,")
    body = shapes.body(error, meter, "")
    head = [
        "HTTP/1.1 503 Service Unavailable",
        *(f"{name}: {value}" for name, value in shapes.headers(error).items()),
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n", body


class _AtTheDoor:
    """aiohttp's parser where a door is kept: it keeps to itself what was refused."""

    __slots__ = ("_connection", "_door", "_parser", "_transport")

    def __init__(
        self, parser: Any, door: Door, connection: RequestHandler, transport: asyncio.Transport
    ) -> None:
        self._parser, self._door = parser, door
        self._connection, self._transport = connection, transport

    def feed_data(self, data: bytes) -> tuple[Any, bool, bytes]:
        """As the parser's. Of several requests at once none is refused here."""
        messages, upgraded, tail = self._parser.feed_data(data)
        if len(messages) != 1:
            return messages, upgraded, tail
        message, payload = messages[0]
        answer = self._door.refusal(message, payload, self._connection)
        if answer is None:
            return messages, upgraded, tail
        self._transport.write(answer)
        self._parser.message_consumed()
        return (), upgraded, tail


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def straight(app: web.Application, otherwise: Handler) -> Handler:
    """A handler that takes calls to their resource without a look at the routing table, through the
    same middleware; anything else goes the ordinary way. The table took a twentieth of a call.

    Every request comes here, whatever it is, so here its place among those that arrive is given
    back. A call takes its place among those that run before the loop turns again.
    """
    prefix, route = app[STRAIGHT]
    gateway, start = app[GATEWAY], len(prefix)
    arriving = gateway.arriving
    with_cors, without_cors = _matched(app, route), _matched(app, route)
    without_cors._apps = []  # whose signals are sent: the only one there is adds CORS headers

    def handle(request: Any) -> Awaitable[web.StreamResponse]:
        if arriving:
            arriving.discard(request.protocol)
        path = request.raw_path
        if not path.startswith(prefix) or path[start:].partition("?")[0] in _NO_CALLS:
            return otherwise(request)
        listed = gateway.access.origins.listed
        request._match_info = with_cors if listed else without_cors
        return middleware(request, route.handler)

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
        prefix, _ = self.app[STRAIGHT]
        server.door = Door(self.app[GATEWAY], prefix)  # type: ignore[attr-defined]
        server.request_handler = straight(self.app, server.request_handler)
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
    door: Door

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(HalfClosing):
    __slots__ = ("_head_came", "_open")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._open: asyncio.BaseTransport = transport
        self._head_came = False
        self._manager.transports.add(transport)  # type: ignore[union-attr]
        super().connection_made(transport)
        assert self._task_handler is not None
        self._task_handler.add_done_callback(_drop_traceback)

    def data_received(self, data: bytes) -> None:
        self._heard_s = self._loop.time()
        if data.startswith(b"HEAD "):
            self._head_came = True
        manager = self._manager
        if manager is None or not manager.door.kept:  # type: ignore[attr-defined]
            super().data_received(data)
            return
        parser, transport = self._parser, self.transport
        if parser is None or transport is None or self._waiter is None or self._messages:
            # A request is being answered: what comes now waits for its turn.
            super().data_received(data)
            return
        self._parser = _AtTheDoor(parser, manager.door, self, transport)  # type: ignore
        try:
            super().data_received(data)
        finally:
            if self._parser is not None:
                self._parser = parser

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._manager is not None:
            self._manager.door.free(self)  # type: ignore[attr-defined]
            self._manager.transports.discard(self._open)  # type: ignore[attr-defined]
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
