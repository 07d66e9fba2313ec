"""Change aiohttp's connection to a provider so that each request gets exactly its own response.

Owns which heads of responses are accepted, and when a connection may be used again. Interim
responses are dropped and limited in number; an invalid final status fails the call; a body of a 204
or 205 is ignored; a response without a request closes the connection, since aiohttp would give it
to the next request. A connection is not used again after the provider's `Keep-Alive: timeout=N`, or
if the provider has closed it or sent something since its last response; TCP keep-alive (tcp.py)
finds connections whose peer is gone.
"""

from __future__ import annotations

import asyncio
import select
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
"""A request that is sent so long before the provider closes the connection still reaches it."""
PROBED_AFTER_S = 30
"""Networks drop idle connections after a few minutes, some cloud load balancers after 60 s."""


class ProviderConnection(ResponseHandler):
    """See the module's docstring. `statuses` are the final statuses that are accepted."""

    def __init__(self, statuses: Container[int], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._statuses, self._clock = statuses, loop.time
        self._interim_left = -1
        """Interim responses that may still come; negative while no response is expected."""
        self.idle_limit_s: float | None = None
        """How long the connection may be idle in the pool, if its provider said so."""
        self.idle_since_s = inf
        """When the last response with such a limit ended; infinite before that."""
        self._arrivals = select.poll()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Turn on TCP keep-alive, and watch what arrives."""
        super().connection_made(transport)
        probe_when_idle(transport, PROBED_AFTER_S)
        if (sock := transport.get_extra_info("socket")) is not None:
            self._arrivals.register(sock, select.POLLIN)

    def is_connected(self) -> bool:
        """True if another request may be sent on it. What has arrived since the last response, the
        end of the connection included, may still wait to be read.
        """
        return super().is_connected() and not self._arrivals.poll(0)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Do nothing if reading is not paused: aiohttp calls this after each chunk."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def set_response_params(self, **params: Any) -> None:
        """Expect a response: aiohttp calls this before it sends a request."""
        self._interim_left = MAX_INTERIM_ANSWERS
        if self.idle_limit_s is not None:
            self.idle_limit_s, self.idle_since_s = None, inf
            self.__class__ = ProviderConnection
        super().set_response_params(**params)

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """Accept the head of a response and its body, or fail the call."""
        message = data[0]
        status = message.code
        if self._interim_left < 0:
            self._close()
        elif 100 <= status < 200 and status != 101:
            self._interim_left -= 1
            if self._interim_left < 0:
                self._fail(f"it sent more than {MAX_INTERIM_ANSWERS} interim responses")
        elif status not in self._statuses:
            self._fail(f"its status is {status}")
        else:
            self._interim_left = -1
            idle_s = keep_alive_s(message.headers.get("Keep-Alive"))
            if idle_s is not None:
                self.idle_limit_s = idle_s - KEEP_ALIVE_MARGIN_S
                self.__class__ = _LimitedConnection
                if self.idle_limit_s <= 0:
                    self.force_close()
            if status in (204, 205):
                data = (message, EMPTY_PAYLOAD)
                if _announces_body(message):
                    self.force_close()
            if idle_s is not None:
                data[1].on_eof(self._begin_idle)
            super().feed_data(data, size)

    def _begin_idle(self) -> None:
        self.idle_since_s = self._clock()

    def _fail(self, reason: str) -> None:
        self._interim_left = -1
        self.set_exception(UpstreamProtocolError(reason))
        self._close()

    def _close(self) -> None:
        if self.transport is not None:
            self.transport.close()


class _LimitedConnection(ProviderConnection):
    """A connection with an idle limit. A class of its own, so that the others skip the check."""

    def is_connected(self) -> bool:
        """True if another request may be sent on it, and its time is not over."""
        assert self.idle_limit_s is not None
        waited_s = self._clock() - self.idle_since_s
        return waited_s <= self.idle_limit_s and super().is_connected()


def _announces_body(message: RawResponseMessage) -> bool:
    """True if a 204 or 205 announces a body, which ends a 205 possibly with the connection."""
    length = message.headers.get("Content-Length", "" if message.code == 205 else "0")
    return message.chunked or length != "0"
