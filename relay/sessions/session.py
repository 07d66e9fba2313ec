"""A running WebSocket session: its two legs, how it ends, and the closing handshake of each side.

Owns: the legs' stamps that periodic.py judges by, the one Ending, the closing handshakes.
aiohttp's own `close()` reads and drops whatever the peer floods for as long as it waits; a closing
handshake here is bounded in time and bytes, and then the connection is cut.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from aiohttp import ClientWebSocketResponse, WebSocketError, WSMsgType, web
from aiohttp.streams import EofStream

from relay import log
from relay.core.exchange import Exchange
from relay.core.meters.turns import Turns
from relay.core.provider import WebSocketRules

Side = Literal["downstream", "upstream"]
NAMES = {"downstream": "client", "upstream": "provider", "relay": "relay"}
"""What people call who is on which side."""
Socket = web.WebSocketResponse[bool] | ClientWebSocketResponse[bool]

MAX_REASON_BYTES = 123
_MAX_CLOSING_BYTES = 256 * 1024
_POLL_S = 0.02
GONE = (OSError, EofStream, aiohttp.ClientError, RuntimeError)
"""What reading from or sending to a leg raises when its connection is gone."""
_NEVER_ON_THE_WIRE = frozenset({1004, 1005, 1006, 1015})


@dataclass(frozen=True, slots=True)
class Ending:
    """Why and how a session ends. `code` None is a close frame without a code."""

    code: int | None
    reason: str
    by: Side | Literal["relay"]
    error: BaseException | None = None
    """What went wrong, if anything did: a RelayError, or the bug of ours that ended it."""
    lost: Side | None = None
    """The leg that has no connection any more: it gets no close frame."""
    failed: Side | None = None
    """The leg that broke the protocol: its connection is failed (RFC 6455 7.1.7), not closed."""


Admit = Callable[[bytes], bytes | Ending | None]
"""Judges a message before it is sent on: None lets it pass, bytes are the error event that answers
it in its place, an Ending ends the session."""


@dataclass(slots=True, eq=False)
class Leg:
    """One side. Stamps are of the gateway's clock; `sending_since_s` is 0 while nothing is sent."""

    side: Side
    socket: Socket
    transport: asyncio.Transport
    heard_s: float
    sending_since_s: float = 0.0
    pinged_s: float = 0.0
    messages: int = 0
    bytes: int = 0
    message_s: float = 0.0
    close_received: bool = False
    judged_s: float = 0.0
    judged_messages: int = 0
    judged_bytes: int = 0
    """When its rate was last judged, and what it had sent by then."""
    admit: Admit | None = None
    """Sees each message of this side before the other side gets it; None: all pass, unseen."""

    async def close(self, ending: Ending, timeout_s: float) -> None:
        """Send a close frame, give its answer `timeout_s`, then let go of the connection.

        A side that broke the protocol gets the FIN at once behind the frame: it may wait for it.
        What it still sends is read all the same, since a reset could overtake the frame.
        """
        try:
            async with asyncio.timeout(timeout_s):
                frame = close_payload(ending.code, ending.reason)
                await self.socket.send_frame(frame, WSMsgType.CLOSE)
                if ending.failed == self.side:
                    self._finish_sending()
                if not self.close_received:
                    await self._until_close()
                while self.transport.get_write_buffer_size():  # noqa: ASYNC110 (no event for it)
                    await asyncio.sleep(_POLL_S)
        except (TimeoutError, *GONE):
            pass
        finally:
            await self.cut()

    def _finish_sending(self) -> None:
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()  # TLS: it says so once what was written has left

    async def read(self) -> Any:
        """The next frame, as aiohttp's parser hands it over.

        Not `receive()`: that answers protocol errors, ends and closes by itself, reading and
        dropping whatever a peer floods for as long as it waits. What it raises instead:
        WebSocketError, EofStream, OSError, aiohttp.ClientError.
        """
        return await self.socket._reader.read()  # type: ignore[union-attr]

    async def _until_close(self) -> None:
        """Read on until the peer's close frame, but only a little of what it still sends."""
        taken = 0
        try:
            while taken < _MAX_CLOSING_BYTES:
                message = await self.read()
                if message.type is WSMsgType.CLOSE:
                    return
                taken += len(message.data) + 2
        except WebSocketError:
            pass  # what it sends cannot be parsed any more: its end is all there is to wait for
        # It floods or babbles: not one byte more is read until it goes or the time is up.
        while not self.transport.is_closing():  # noqa: ASYNC110 (a transport has no event for it)
            await asyncio.sleep(_POLL_S)

    async def cut(self) -> None:
        """Close the connection; what is still unsent is dropped."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()
        # With its transport closing this only tidies up what aiohttp keeps of the socket.
        await self.socket.close()
        for holder in (self.socket, self.socket._reader):
            # The frames of such a traceback hold this leg, and so the holder: a cycle.
            if holder is not None and (error := holder.exception()) is not None:
                error.__traceback__ = None


@dataclass(slots=True, eq=False)
class Session:
    """One client, one provider, and the future that ends them."""

    exchange: Exchange
    rules: WebSocketRules
    downstream: Leg
    upstream: Leg
    refuse_key: Callable[[str], None]
    """Tells the pool by which code the provider refused the key."""
    key_is_refused: bool = False
    turns: Turns | None = None
    last_event: bytes = b""
    """The last small message of the provider's that nothing has read."""
    ended: asyncio.Future[Ending] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def legs(self) -> tuple[tuple[Leg, Leg], tuple[Leg, Leg]]:
        """Each side, with the other one."""
        return (self.downstream, self.upstream), (self.upstream, self.downstream)

    def end(self, ending: Ending) -> None:
        """End the session. Its first ending counts."""
        if not self.ended.done():
            self.ended.set_result(ending)

    def refused(self, code: str) -> None:
        """Count the key as refused, once a session; an empty `code` says that it is not."""
        if code and not self.key_is_refused:
            self.key_is_refused = True
            self.refuse_key(code)

    async def close(self, ending: Ending, timeout_s: float) -> None:
        """Close both sides, at once. One that fails is logged, and its connection is gone too."""
        legs = (self.downstream, self.upstream)
        closed = (
            leg.cut() if leg.side == ending.lost else leg.close(ending, timeout_s) for leg in legs
        )
        results = await asyncio.gather(*closed, return_exceptions=True)
        for leg, error in zip(legs, results, strict=True):
            if error is not None:
                log.bug("session.close_failed", error, id=self.exchange.id)
                leg.transport.abort()
                await leg.socket.close()


def close_payload(code: int | None, reason: str) -> bytes:
    """The payload of a close frame (RFC 6455 5.5.1): reserved codes never go on the wire."""
    if code is None:
        return b""
    # A character that the cut went through is dropped.
    text = reason.encode()[:MAX_REASON_BYTES].decode("utf-8", "ignore").encode()
    return struct.pack("!H", code) + text


def code_allowed(code: int) -> bool:
    """True for codes that a peer may send: 1000-1003, 1007-1014, 3000-4999."""
    return (1000 <= code <= 1014 and code not in _NEVER_ON_THE_WIRE) or 3000 <= code <= 4999


Clock = Callable[[], float]
