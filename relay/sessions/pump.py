"""Copy messages one way between the two legs of a session, in order, with backpressure.

Owns the loop, and what each kind of frame means for the session. A message waits only for the other
side's socket: there is no queue, task or parser between a read and its write.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import WebSocketError, WSMsgType

from relay.core.errors import InternalError
from relay.sessions.observers import Observer
from relay.sessions.session import (
    GONE,
    NAMES,
    Admit,
    Clock,
    Ending,
    Leg,
    Pay,
    Rename,
    Session,
    code_allowed,
)

Read = Callable[[], Awaitable[Any]]
_TEXT, _BINARY, _PING, _PONG = WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.PING, WSMsgType.PONG


async def pump(
    source: Leg, sink: Leg, session: Session, clock: Clock, observe: Observer | None
) -> None:
    """Relay from `source` to `sink` until either ends, and end the session with that ending.
    `observe` is called with every message that was relayed. Any other exception is raised and ends
    the session too: see `broken`.
    """
    read = source.read if source.rename is None else _renamed(source.read, source.rename)
    if source.admit is not None:
        read = _admitted(read, source, source.admit, clock)
    if source.pay is not None:
        read = _paid(read, source.pay)
    try:
        ending = await _copy(read, source, sink, clock, observe)
    except _NotAdmitted as refusal:
        ending = refusal.ending
    except WebSocketError as error:
        ending = _failed(source, error.code, _protocol_reason(error.code, source))
    except GONE as error:
        if isinstance(error, RuntimeError) and not _closing(source, sink):
            raise  # a bug, not uvloop's error for a closed connection
        ending = lost(sink if sink.sending_since_s else source)
    session.end(ending)


class _NotAdmitted(Exception):
    def __init__(self, ending: Ending) -> None:
        self.ending = ending


def _renamed(read: Read, rename: Rename) -> Read:
    """Return a read that returns text messages with their models renamed."""

    async def read_renamed() -> Any:
        message = await read()
        if message.type is not _TEXT:
            return message
        renamed = rename(message.data)
        if isinstance(renamed, Ending):
            raise _NotAdmitted(renamed)
        return message if renamed is message.data else message._replace(data=renamed)

    return read_renamed


def _admitted(read: Read, source: Leg, admit: Admit, clock: Clock) -> Read:
    """Return a read of `source` that returns only messages that `admit` accepts. A refused message
    counts as received; its sender gets an error event, or the session ends.
    """
    admit_binary = source.admit_binary or admit

    async def read_admitted() -> Any:
        while True:
            message = await read()
            if message.type is _TEXT:
                if not message.data.isascii() and not _is_utf8(message.data):
                    return message  # `_copy` ends the session
                refusal = admit(message.data)
            elif message.type is _BINARY:
                refusal = admit_binary(message.data)
            else:
                return message
            if refusal is None:
                return message
            source.heard_s = source.message_s = clock()
            source.messages += 1
            source.bytes += len(message.data)
            if isinstance(refusal, Ending):
                raise _NotAdmitted(refusal)
            await source.socket.send_frame(refusal, _TEXT)

    return read_admitted


def _paid(read: Read, pay: Pay) -> Read:
    """Return a read that returns a message when the money that it may cost is reserved."""

    async def read_paid() -> Any:
        message = await read()
        if message.type is _TEXT or message.type is _BINARY:
            reserving = pay(message.data)
            if reserving is not None and (ending := await reserving) is not None:
                raise _NotAdmitted(ending)
        return message

    return read_paid


async def _copy(
    read: Read, source: Leg, sink: Leg, clock: Clock, observe: Observer | None
) -> Ending:
    send = sink.socket.send_frame
    while True:
        message = await read()
        kind = message.type
        if kind is _TEXT or kind is _BINARY:
            data: bytes = message.data
            source.heard_s = source.message_s = sink.sending_since_s = clock()
            if kind is _TEXT and not data.isascii() and not _is_utf8(data):
                sink.sending_since_s = 0.0
                return _failed(source, 1007, f"invalid UTF-8 from the {NAMES[source.side]}")
            source.messages += 1
            source.bytes += len(data)
            await send(data, kind)
            sink.sending_since_s = 0.0
            if observe is not None:
                observe(data)
        elif kind is _PING:
            source.heard_s = clock()
            await source.socket.pong(message.data)
        elif kind is _PONG:
            source.heard_s = clock()
        else:
            return _close(message, source)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _close(message: Any, source: Leg) -> Ending:
    """Return the ending for a close frame from `source`."""
    source.close_received = True
    code, reason = message.data, message.extra or ""
    if not code:
        return Ending(None, "", source.side)
    if not code_allowed(code):
        return _failed(source, 1002, f"close code {code} is not allowed")
    return Ending(code, reason, source.side)


def _failed(source: Leg, code: int, reason: str) -> Ending:
    """Return the ending for a leg that violated the protocol."""
    return Ending(code, reason, source.side, failed=source.side)


def _protocol_reason(code: int, source: Leg) -> str:
    who = NAMES[source.side]
    reasons = {1009: f"message too big from the {who}", 1007: f"invalid UTF-8 from the {who}"}
    return reasons.get(code, f"protocol error by the {who}")


def lost(leg: Leg) -> Ending:
    """Return the ending for a leg whose connection was lost without a close frame."""
    code = 1014 if leg.side == "upstream" else 1011
    return Ending(code, f"the {NAMES[leg.side]} connection was lost", leg.side, lost=leg.side)


def broken(error: BaseException) -> Ending:
    """Return the ending for a bug in the relay, which is logged when the session ends."""
    return Ending(InternalError.close_code, "the relay failed", "relay", error)


def _closing(*legs: Leg) -> bool:
    return any(leg.transport.is_closing() for leg in legs)
