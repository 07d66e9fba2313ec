"""A provider's connection: how aiohttp's is changed, so that one request has one answer.

Owns: which heads of answers are accepted, and when a connection may be used again. Interim answers
are dropped and bounded in number, a final status that is none fails the call, what follows the head
of a 205 is cut off, and an answer that nobody asked for ends its connection: aiohttp would give it
to the next request. A connection that has been idle for as long as its provider keeps it
(`Keep-Alive: timeout=N`) is not used again; one whose other end is gone is found out by TCP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container
from math import inf
from typing import Any

from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from relay.core.errors import UpstreamProtocolError
from relay.core.headers import keep_alive_s
from relay.upstream.tcp import probe_when_idle

MAX_INTERIM_ANSWERS = 100
"""Enough for a provider that says `102 Processing` every few seconds; more is a flood."""
FINAL_STATUSES = range(200, 600)
KEEP_ALIVE_MARGIN_S = 1.0
"""Sent so much before the provider closes, a request still reaches it."""
PROBED_AFTER_S = 30
"""Networks forget idle connections after a few minutes, some cloud load balancers after 60 s."""


class ProviderConnection(ResponseHandler):
    """See the module. `statuses` are those that may end a call."""

    def __init__(self, statuses: Container[int], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._statuses, self._clock = statuses, loop.time
        self._interim_left = -1
        """Of the answer that is awaited; negative if none is."""
        self.idle_limit_s: float | None = None
        """How long it may wait in the pool, where its provider says so."""
        self.idle_since_s = inf
        """When such an answer had come whole; endless before."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        super().connection_made(transport)
        probe_when_idle(transport, PROBED_AFTER_S)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """aiohttp asks for it whenever a chunk was read; mostly nothing is paused."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def set_response_params(self, **params: Any) -> None:
        """A request is about to be sent."""
        self._interim_left = MAX_INTERIM_ANSWERS
        if self.idle_limit_s is not None:
            self.idle_limit_s, self.idle_since_s = None, inf
            self.__class__ = ProviderConnection
        super().set_response_params(**params)

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """Take the head of an answer, and its body."""
        message = data[0]
        status = message.code
        if self._interim_left < 0:
            self._end()
        elif 100 <= status < 200 and status != 101:
            self._interim_left -= 1
            if self._interim_left < 0:
                self._fail(f"it sent more than {MAX_INTERIM_ANSWERS} interim responses")
        elif status not in self._statuses:
            self._fail(f"it has the status {status}")
        else:
            self._interim_left = -1
            kept_s = keep_alive_s(message.headers.get("Keep-Alive"))
            if kept_s is not None:
                self.idle_limit_s = kept_s - KEEP_ALIVE_MARGIN_S
                self.__class__ = _LimitedConnection
                if self.idle_limit_s <= 0:
                    self.force_close()
            if status in (204, 205):
                data = (message, EMPTY_PAYLOAD)
                if _announces_body(message):
                    self.force_close()
            if kept_s is not None:
                data[1].on_eof(self._is_idle)
            super().feed_data(data, size)

    def _is_idle(self) -> None:
        self.idle_since_s = self._clock()

    def _fail(self, reason: str) -> None:
        self._interim_left = -1
        self.set_exception(UpstreamProtocolError(reason))
        self._end()

    def _end(self) -> None:
        if self.transport is not None:
            self.transport.close()


class _LimitedConnection(ProviderConnection):
    """One whose provider said how long it keeps it: the others are not asked for each call."""

    def is_connected(self) -> bool:
        """True if another request may be sent on it."""
        assert self.idle_limit_s is not None
        waited_s = self._clock() - self.idle_since_s
        return waited_s <= self.idle_limit_s and super().is_connected()


def _announces_body(message: RawResponseMessage) -> bool:
    """Of a 204 or 205: of the latter the end of the connection may be the end of a body too."""
    length = message.headers.get("Content-Length", "" if message.code == 205 else "0")
    return message.chunked or length != "0"
