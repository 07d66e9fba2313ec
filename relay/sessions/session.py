"""Hold a running WebSocket session: its two legs, its one Ending, and the closing handshakes.

Owns the time stamps of the legs, which timeouts.py reads, and the closing handshake of each side,
which is bounded in time and bytes before the connection is cut: aiohttp's own `close()` reads and
drops an unbounded number of bytes while it waits. pump.py copies the messages.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
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
"""The names of the sides in close reasons and in the ledger."""
Socket = web.WebSocketResponse[bool] | ClientWebSocketResponse[bool]

MAX_REASON_BYTES = 123
_MAX_CLOSING_BYTES = 256 * 1024
_POLL_S = 0.02
GONE = (OSError, EofStream, aiohttp.ClientError, RuntimeError)
"""What a read from a leg or a write to it raises when the connection is lost."""
_NEVER_ON_THE_WIRE = frozenset({1004, 1005, 1006, 1015})


@dataclass(frozen=True, slots=True)
class Ending:
    """Why and how a session ends. `code` None stands for a close frame without a code."""

    code: int | None
    reason: str
    by: Side | Literal["relay"]
    error: BaseException | None = None
    """The RelayError that ended the session, or the exception of a bug; None if there was none."""
    lost: Side | None = None
    """The leg whose connection was lost: it gets no close frame."""
    failed: Side | None = None
    """The leg that violated the protocol: its connection is failed (RFC 6455 7.1.7), not closed."""
    event: bytes = b""
    """The error event of the vendor, which the client gets before the close frame."""


Pay = Callable[[bytes], "Awaitable[Ending | None] | None"]
"""Called before a message is relayed that `admit` has accepted. Returns None if nothing has to be
reserved for the message; else what reserves it, and returns the Ending if there is no money."""
Rename = Callable[[bytes], "bytes | Ending"]
"""Returns a text message as it is relayed, or the Ending of the session."""
Admit = Callable[[bytes], bytes | Ending | None]
"""Judges a message before it is relayed. None: relay it. Bytes: drop it and send its sender this
error event. An Ending: end the session."""


@dataclass(slots=True, eq=False)
class Leg:
    """One side. Times are those of the gateway's clock; `sending_since_s` is 0 while no message is
    being sent.
    """

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
    """When its rate was last checked, and how much it had sent by then."""
    admit: Admit | None = None
    """Judges each message of this side before it is relayed; None: all are relayed."""
    admit_binary: Admit | None = None
    """Judges the binary messages instead of `admit`, if there is one."""
    rename: Rename | None = None
    """Replaces names of models in the text messages of this side; None: nothing is replaced."""
    pay: Pay | None = None
    """Reserves money for the messages of this side; None: no budget applies."""

    async def close(self, ending: Ending, timeout_s: float) -> None:
        """Send a close frame, wait up to `timeout_s` for the peer's, and close the connection.

        A side that violated the protocol gets a FIN right after the frame, since it may wait for
        the FIN. Its data is read further all the same: unread data would make the system send a
        reset, which could overtake the frame.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if ending.event and self.side == "downstream":
                    await self.socket.send_frame(ending.event, WSMsgType.TEXT)
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
            self.transport.close()  # TLS: close_notify follows the bytes that were written

    async def read(self) -> Any:
        """Return the next frame, as aiohttp's parser made it.

        `receive()` is not used: it answers protocol errors, ends and closes by itself, and reads
        and drops an unbounded number of bytes while it waits. Raises WebSocketError, EofStream,
        OSError, aiohttp.ClientError.
        """
        return await self.socket._reader.read()  # type: ignore[union-attr]

    async def _until_close(self) -> None:
        """Read until the peer's close frame, up to _MAX_CLOSING_BYTES, then wait for the peer to
        close the connection.
        """
        read_bytes = 0
        try:
            while read_bytes < _MAX_CLOSING_BYTES:
                message = await self.read()
                if message.type is WSMsgType.CLOSE:
                    return
                read_bytes += len(message.data) + 2
        except WebSocketError:
            pass  # the rest cannot be parsed
        # Read nothing more; the caller's timeout ends this wait.
        while not self.transport.is_closing():  # noqa: ASYNC110 (a transport has no event for it)
            await asyncio.sleep(_POLL_S)

    async def cut(self) -> None:
        """Close the connection; unsent bytes are dropped."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()
        # The transport is closing already: this only releases aiohttp's state of the socket.
        await self.socket.close()
        for holder in (self.socket, self.socket._reader):
            # The frames of the traceback refer to this leg, and so to the holder: a cycle.
            if holder is not None and (error := holder.exception()) is not None:
                error.__traceback__ = None


@dataclass(slots=True, eq=False)
class Session:
    """The two legs of a session, and the future of its ending."""

    exchange: Exchange
    rules: WebSocketRules
    downstream: Leg
    upstream: Leg
    refuse_key: Callable[[str], None]
    """Reports to the key pool that the provider refused the key, by the code of the refusal."""
    key_is_refused: bool = False
    turns: Turns | None = None
    check_spending: Callable[[], None] | None = None
    """Called when the provider has reported usage; None: no budget applies."""
    made: Callable[[str], None] | None = None
    """Called with the id of each response that the session makes; None: nothing remembers it."""
    last_event: bytes = b""
    """The provider's last small message that no meter has read."""
    ended: asyncio.Future[Ending] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def legs(self) -> tuple[tuple[Leg, Leg], tuple[Leg, Leg]]:
        """Each leg, paired with the other one."""
        return (self.downstream, self.upstream), (self.upstream, self.downstream)

    def end(self, ending: Ending) -> None:
        """Set the session's ending; only the first one counts."""
        if not self.ended.done():
            self.ended.set_result(ending)

    def refused(self, code: str) -> None:
        """Report the key as refused, once a session; an empty `code` reports nothing."""
        if code and not self.key_is_refused:
            self.key_is_refused = True
            self.refuse_key(code)

    async def close(self, ending: Ending, timeout_s: float) -> None:
        """Close both sides at the same time. A failure is logged, and that side is aborted."""
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
    """Build the payload of a close frame (RFC 6455 5.5.1). The reason is truncated to the 123 bytes
    that the frame has room for.
    """
    if code is None:
        return b""
    # "ignore" drops a character of which only a part is left.
    text = reason.encode()[:MAX_REASON_BYTES].decode("utf-8", "ignore").encode()
    return struct.pack("!H", code) + text


def code_allowed(code: int) -> bool:
    """True for the codes that a peer may send: 1000-1003, 1007-1014, 3000-4999."""
    return (1000 <= code <= 1014 and code not in _NEVER_ON_THE_WIRE) or 3000 <= code <= 4999


Clock = Callable[[], float]
