"""Write keepalives into a silent stream, so that no proxy in front closes the connection as idle.

Owns when a keepalive may be written, and its bytes. The periodic sweep calls `send_if_due`: a timer
for each chunk would cost more. A keepalive is written past the copy of the response, so meters,
recordings and byte counts do not contain it, and it does not restart the provider's idle timeout.
"""

from __future__ import annotations

import contextlib

from relay.calls.recording import Observer
from relay.calls.response import RelayedResponse
from relay.core.exchange import Exchange, WaitingFor
from relay.core.sse import KEEPALIVE, KEEPALIVE_OF_FORMAT, KEEPALIVE_WITH_ID, at_boundary, has_id


class Keepalive:
    """The keepalives of one response, whose head has been sent or is sent before the source is
    waited for.
    """

    __slots__ = (
        "_after_s",
        "_exchange",
        "_first",
        "_last",
        "_response",
        "_sent_s",
        "_text",
        "_waits_for",
    )

    def __init__(
        self, response: RelayedResponse, exchange: Exchange, waits_for: WaitingFor, after_s: float
    ) -> None:
        self._response, self._exchange = response, exchange
        self._waits_for, self._after_s = waits_for, after_s
        self._text = KEEPALIVE_OF_FORMAT.get(exchange.error_format, KEEPALIVE)
        self._sent_s = 0.0
        self._first = self._last = b""
        """The first chunk, and the end of all that was sent: the last chunk, at least 4 bytes."""

    def following(self, observe: Observer | None) -> Observer:
        """Return an observer that notes each chunk that was sent, then calls `observe`."""
        if observe is None:
            return self._note

        def note_and_observe(chunk: bytes) -> None:
            self._note(chunk)
            observe(chunk)

        return note_and_observe

    def _note(self, chunk: bytes) -> None:
        if not self._last:
            self._first = chunk
        self._last = chunk if len(chunk) >= 4 else self._last[-4:] + chunk

    def send_if_due(self, now_s: float) -> None:
        """Write a keepalive if the response has been silent for long enough, and is between two
        events. Does not wait: none is written while the client has not taken what was sent before.
        """
        exchange, waiting = self._exchange, self._exchange.waiting
        if now_s - max(waiting.since_s, self._sent_s) < self._after_s:
            return
        has_ended = exchange.outcome.name is not None or waiting.expired is not None
        if has_ended or waiting.for_ != self._waits_for or not at_boundary(self._last):
            return
        self._sent_s = now_s
        # Events have ids from the first one on, if at all: to search each chunk would cost more.
        if self._text is KEEPALIVE and (has_id(self._first) or has_id(self._last)):
            self._text = KEEPALIVE_WITH_ID
        with contextlib.suppress(ConnectionError):  # the client has left, which ends the call
            self._response.write_if_empty(self._text)
