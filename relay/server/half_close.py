"""Tell a client that disconnected from one that only closed its sending half.

Owns that decision: both are the same FIN on the wire. A FIN right behind a complete request means
that the client sends nothing more (`nc -N`, socat, scripts): the request is answered, and a client
that has gone is found by a reset, which the next write or a TCP keepalive probe causes. A FIN that
arrives later, or within an upload, means that the client disconnected.
"""

from __future__ import annotations

import asyncio
import select
from typing import Any

from aiohttp.web_protocol import RequestHandler

from relay.upstream.tcp import probe_when_idle

BEHIND_REQUEST_S = 1.0
"""How long after a request a FIN counts as right behind it: long enough for one retransmission,
while few clients disconnect so soon."""
_CHECK_INTERVAL_S = 1.0
_PROBE_AFTER_S = 10


class HalfClosing(RequestHandler):
    """A client's connection that answers a request after the client has closed its sending half.
    A subclass sets `_received_s` to the loop's time whenever bytes arrive.
    """

    __slots__ = ("_clock", "_next_check", "_received_s")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._clock = asyncio.get_running_loop().time
        self._received_s = 0.0
        self._next_check: asyncio.TimerHandle | None = None
        super().connection_made(transport)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Return True to keep the connection open for the response."""
        if self._next_check is not None:
            return True
        if not self._has_whole_request():
            return None
        assert self.transport is not None and self._parser is not None
        probe_when_idle(self.transport, _PROBE_AFTER_S)
        self._schedule_check()
        if self._messages:
            self._parser = _LastRequests(self, self._parser)  # type: ignore[assignment]
        else:
            self.close()  # when the current request is answered
        return True

    def _has_whole_request(self) -> bool:
        """True if the last request is complete since BEHIND_REQUEST_S at most, and unanswered."""
        transport, request, waiting = self.transport, self._current_request, self._messages
        if transport is None or transport.get_extra_info("sslcontext") is not None:
            return False  # asyncio has no half-closed TLS connections
        is_busy = self._request_count and (waiting or self._waiter is None)
        if not is_busy or self._upgraded:
            return False
        payload = waiting[-1][1] if waiting else request.content if request else None
        if payload is not None and not payload.is_eof():
            return False
        return self._clock() - self._received_s <= BEHIND_REQUEST_S

    def _schedule_check(self) -> None:
        loop = asyncio.get_running_loop()
        self._next_check = loop.call_later(_CHECK_INTERVAL_S, self._check_reset)

    def _check_reset(self) -> None:
        """Abort the connection if the client reset it: no read would notice that any more."""
        transport, request = self.transport, self._current_request
        if transport is None:
            return
        if _is_reset(transport) or (request is not None and not request.content.is_eof()):
            transport.abort()
            return
        self._schedule_check()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._next_check is not None:
            self._next_check.cancel()
        super().connection_lost(exc)


class _LastRequests:
    """The parser of a half-closed connection with pipelined requests: it closes the connection
    after the last of them.
    """

    __slots__ = ("_connection", "_parser")

    def __init__(self, connection: RequestHandler, parser: Any) -> None:
        self._connection, self._parser = connection, parser

    def feed_data(self, data: bytes) -> Any:
        """The parser's result."""
        return self._parser.feed_data(data)

    def message_consumed(self) -> None:
        """Called by aiohttp when a request is answered."""
        self._parser.message_consumed()
        if not self._connection._messages:
            self._connection.close()


def _is_reset(transport: asyncio.Transport) -> bool:
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), 0)  # only the events that cannot be masked: error and hang-up
    return bool(poll.poll(0))
