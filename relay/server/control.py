"""Carry orders between a supervisor and each of its workers, over a socket pair that the worker
inherits: one JSON message a line.

Owns the messages, their bounds, and the worker's end of the channel. All workers carry out what a
client requests of one of them (a reload, a purge, the list and the end of sessions): that worker
passes it to the supervisor, which orders it of every worker and collects the answers. No message
ends the channel, whatever its content or result; the channel ends when the other process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import msgspec

from relay import log
from relay.registry.files import Snapshot

ANSWER_TIMEOUT_S = 10.0
"""The longest that a worker may take for an order."""
_ORDER_ALL_TIMEOUT_S = 3 * ANSWER_TIMEOUT_S
_LINE_BYTES = 256 * 1024
_CONFIG_LINE_BYTES = 16 * 1024 * 1024
"""For messages of the supervisor, which contain the configuration files; twice in a Begin."""
_UNREAD_BYTES = 32 * 1024 * 1024
MAX_ITEMS = 100
"""How many items an answer has at most: 1.5 KiB each fit into a line."""
_MAX_PROBLEMS, _PROBLEM_CHARS = 100, 500


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of an order."""

    problems: list[str] = []
    """Why the order was refused; then nothing changed."""
    missing: list[str] = []
    """The workers that did not carry out the order, and why."""
    count: int = 0
    """The cached responses that a purge removed."""
    changed: list[str] = []
    """Settings and providers that a reload changed."""
    restart: list[str] = []
    """Changed settings that need a restart."""
    items: list[dict[str, Any]] = []
    """What was to be listed, each with its `id`, in the order of the ids: at most MAX_ITEMS."""


class Begin(msgspec.Struct, tag_field="say", tag="begin"):
    """The first message to a worker: its configuration files. Workers do not read them from disk,
    where they may be invalid since a refused reload.
    """

    files: Snapshot
    """The files of the supervisor's start."""
    reloaded: Snapshot | None = None
    """The files of the last reload."""


class Ready(msgspec.Struct, tag_field="say", tag="ready"):
    """The worker accepts calls."""


class Leaving(msgspec.Struct, tag_field="say", tag="leaving"):
    """The worker drains: the supervisor starts another one."""


class Command(msgspec.Struct, tag_field="say", tag="command"):
    """An order to a worker; from a worker, an order for all workers."""

    id: int
    order: str
    arguments: dict[str, Any] = {}


class Reply(msgspec.Struct, tag_field="say", tag="reply"):
    """The answer to a Command."""

    id: int
    answer: Answer


Message = Begin | Ready | Leaving | Command | Reply
_decode = msgspec.json.Decoder(Message).decode
_encode = msgspec.json.Encoder().encode

Order = Callable[[dict[str, Any]], Awaitable[Answer]]
"""Carries out an order with its arguments."""


class Channel:
    """One end of the channel."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line_bytes: int
    ) -> None:
        self._reader, self._writer, self._line_bytes = reader, writer, line_bytes
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Answer]] = {}

    @classmethod
    async def open(cls, sock: socket.socket, line_bytes: int = _LINE_BYTES) -> Channel:
        """The channel over one socket of the pair. Raises OSError."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=line_bytes)
        return cls(reader, writer, line_bytes)

    async def first(self) -> Message | None:
        """The next message; None if the other process has ended."""
        async for message in self.messages():
            return message
        return None

    def post(self, message: Message) -> None:
        """Send one message without waiting. Raises ConnectionError if the other process has ended
        or stopped reading.
        """
        transport = self._writer.transport
        if transport.is_closing() or transport.get_write_buffer_size() > _UNREAD_BYTES:
            raise ConnectionError("the other process does not read")
        self._writer.write(_encode(message) + b"\n")

    @contextlib.contextmanager
    def pending(self) -> Iterator[tuple[int, asyncio.Future[Answer]]]:
        """An id for a Command, and a future for the answer in its Reply; valid in the context."""
        command_id = next(self._ids)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[command_id] = answer
        try:
            yield command_id, answer
        finally:
            del self._pending[command_id]

    def resolve(self, reply: Reply) -> None:
        """Set the future that `pending` returned for this reply."""
        answer = self._pending.get(reply.id)
        if answer is not None and not answer.done():
            answer.set_result(reply.answer)

    async def messages(self) -> AsyncIterator[Message]:
        """The messages of the other process, until it closes its end. A malformed line is logged
        and skipped.
        """
        while True:
            try:
                line = await self._reader.readline()
            except ValueError:
                cause = f"a line of more than {self._line_bytes} bytes"
                log.warn("control.malformed_message", cause=cause)
                continue
            except OSError:
                return
            if not line:
                return
            try:
                message = _decode(line)
            except msgspec.MsgspecError as error:
                log.warn("control.malformed_message", cause=str(error)[:200])
                continue
            yield message

    def close(self) -> None:
        """Close this end."""
        self._writer.close()


def bounded(lines: list[str]) -> list[str]:
    """`lines`, truncated so that they fit into a message."""
    first = [line[:_PROBLEM_CHARS] for line in lines[:_MAX_PROBLEMS]]
    more = len(lines) - len(first)
    return [*first, f"and {more} more"] if more else first


class Control:
    """A worker's end of the channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, fd: int) -> Control:
        """The channel over the inherited descriptor."""
        return cls(await Channel.open(socket.socket(fileno=fd), _CONFIG_LINE_BYTES))

    async def begin(self) -> Begin | None:
        """The supervisor's first message; None if the supervisor has ended."""
        message = await self._channel.first()
        return message if isinstance(message, Begin) else None

    def report(self, message: Ready | Leaving) -> None:
        """Send a message to the supervisor, if it still runs."""
        with contextlib.suppress(ConnectionError):
            self._channel.post(message)

    async def order_all(self, order: str, arguments: dict[str, Any]) -> Answer:
        """Have the supervisor order it of all workers, and return the joint answer."""
        with self._channel.pending() as (command_id, answer):
            try:
                self._channel.post(Command(command_id, order, arguments))
                async with asyncio.timeout(_ORDER_ALL_TIMEOUT_S):
                    return await answer
            except (TimeoutError, ConnectionError):
                return Answer(missing=["the supervisor did not answer"])

    async def listen(self, orders: Mapping[str, Order]) -> None:
        """Carry out the supervisor's orders, each in a task of its own, until the supervisor
        ends.
        """
        try:
            async for message in self._channel.messages():
                if isinstance(message, Reply):
                    self._channel.resolve(message)
                elif isinstance(message, Command):
                    task = asyncio.create_task(self._carry_out(message, orders))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                else:
                    log.warn("control.unexpected_message", say=type(message).__name__.lower())
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry_out(self, message: Command, orders: Mapping[str, Order]) -> None:
        answer = await _answer(message, orders)
        with contextlib.suppress(ConnectionError):
            self._channel.post(Reply(message.id, answer))


async def _answer(message: Command, orders: Mapping[str, Order]) -> Answer:
    name = message.order[:40]
    if (order := orders.get(message.order)) is None:
        log.warn("control.unknown_order", order=name)
        return Answer([f"unknown order '{name}'"])
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            answer = await order(message.arguments)
    except TimeoutError:
        log.warn("control.order_timed_out", order=name)
        return Answer([f"{name} took longer than {ANSWER_TIMEOUT_S:g} s and was cancelled"])
    except Exception as error:
        # No exception may end the channel or the orders that follow; it is logged.
        log.bug("control.order_failed", error, order=name)
        return Answer([f"{name} failed ({type(error).__name__}); the log has the cause"])
    return msgspec.structs.replace(answer, problems=bounded(answer.problems))
