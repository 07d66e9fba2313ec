"""A client that closes its sending half: whether it left, or has only nothing more to send.

Owns: that decision. Both are the same FIN on the wire. One that comes right behind a whole request
is taken for the end of what the client sends (`nc -N`, socat, scripts): it gets its answer, and is
found to be gone by a reset, which the next write, or a probe of TCP's, brings about. One that comes
later, when the client has been waiting, or within an upload, is a client that left.
"""

from __future__ import annotations

import asyncio
import select
from typing import Any

from aiohttp.web_protocol import RequestHandler

from relay.upstream.tcp import probe_when_idle

BEHIND_REQUEST_S = 1.0
"""Long enough for a FIN that was lost once; few clients leave so soon."""
_CHECK_EACH_S = 1.0
_PROBED_AFTER_S = 10


class HalfClosing(RequestHandler):
    """A client's connection that answers a request behind which the client has closed its half.
    What is derived from it stamps `_heard_s` whenever bytes come.
    """

    __slots__ = ("_clock", "_heard_s", "_next_check")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._clock = asyncio.get_running_loop().time
        self._heard_s = 0.0
        self._next_check: asyncio.TimerHandle | None = None
        super().connection_made(transport)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client sends nothing more. True keeps the connection for its answer."""
        if self._next_check is not None:
            return True
        if not self._has_whole_request():
            return None
        assert self.transport is not None and self._parser is not None
        probe_when_idle(self.transport, _PROBED_AFTER_S)
        self._next_check = asyncio.get_running_loop().call_later(_CHECK_EACH_S, self._check_reset)
        if self._messages:
            self._parser = _LastRequests(self, self._parser)  # type: ignore[assignment]
        else:
            self.close()  # once what runs is answered
        return True

    def _has_whole_request(self) -> bool:
        """True if one is being answered, or waits for it, and ended just now."""
        transport, request, waiting = self.transport, self._current_request, self._messages
        if transport is None or transport.get_extra_info("sslcontext") is not None:
            return False  # TLS has no half-closed connections in asyncio
        is_busy = self._request_count and (waiting or self._waiter is None)
        if not is_busy or self._upgraded:
            return False
        payload = waiting[-1][1] if waiting else request.content if request else None
        if payload is not None and not payload.is_eof():
            return False
        return self._clock() - self._heard_s <= BEHIND_REQUEST_S

    def _check_reset(self) -> None:
        """Close the connection if the client reset it: nothing reads any more that would notice."""
        transport, request = self.transport, self._current_request
        if transport is None:
            return
        if _is_reset(transport) or (request is not None and not request.content.is_eof()):
            transport.abort()
            return
        self._next_check = asyncio.get_running_loop().call_later(_CHECK_EACH_S, self._check_reset)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._next_check is not None:
            self._next_check.cancel()
        super().connection_lost(exc)


class _LastRequests:
    """The parser of a connection on which nothing more comes: it closes the connection behind the
    last of the requests that wait.
    """

    __slots__ = ("_connection", "_parser")

    def __init__(self, connection: RequestHandler, parser: Any) -> None:
        self._connection, self._parser = connection, parser

    def feed_data(self, data: bytes) -> Any:
        """As the parser's."""
        return self._parser.feed_data(data)

    def message_consumed(self) -> None:
        """A request is answered now."""
        self._parser.message_consumed()
        if not self._connection._messages:
            self._connection.close()


def _is_reset(transport: asyncio.Transport) -> bool:
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), 0)  # no event but those that cannot be masked: error and hang-up
    return bool(poll.poll(0))
