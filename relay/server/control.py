"""The channel between a supervisor and each of its workers: one JSON message a line, over a socket
pair that the worker inherits.

Owns: the messages and their bounds, and the worker's end. What one worker is asked is done by all
of them: the worker asks the supervisor, which orders it of every worker and collects the answers.
No message, whatever is in it or becomes of it, ends the channel; its end is the end of the other
process.
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
"""How long a worker may take to carry out an order."""
_ASK_TIMEOUT_S = 3 * ANSWER_TIMEOUT_S
_LINE_BYTES = 256 * 1024
_CONFIG_LINE_BYTES = 16 * 1024 * 1024
"""From the supervisor, which sends the files of the configuration; twice in a Begin."""
_UNREAD_BYTES = 32 * 1024 * 1024
_MAX_PROBLEMS, _PROBLEM_CHARS = 100, 500


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of an order."""

    problems: list[str] = []
    """Why it was refused: nothing changed."""
    missing: list[str] = []
    """Workers that did not carry it out, and why."""
    count: int = 0
    changed: list[str] = []
    """Settings and providers that a reload changed."""
    restart: list[str] = []
    """Changed settings that need a restart."""


class Begin(msgspec.Struct, tag_field="say", tag="begin"):
    """The first message to a worker: the files that it makes its configuration of. They are not
    read again by each worker: since a refused reload they may be bad.
    """

    files: Snapshot
    """Of the supervisor's own start."""
    reloaded: Snapshot | None = None
    """Of the last reload."""


class Ready(msgspec.Struct, tag_field="say", tag="ready"):
    """A worker takes calls."""


class Leaving(msgspec.Struct, tag_field="say", tag="leaving"):
    """A worker drains: another is to take its place."""


class Command(msgspec.Struct, tag_field="say", tag="command"):
    """An order to a worker; or, from a worker, one for all workers."""

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
    """One end."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line_bytes: int
    ) -> None:
        self._reader, self._writer, self._line_bytes = reader, writer, line_bytes
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Answer]] = {}

    @classmethod
    async def open(cls, sock: socket.socket, line_bytes: int = _LINE_BYTES) -> Channel:
        """Take over one socket of the pair. Raises OSError."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=line_bytes)
        return cls(reader, writer, line_bytes)

    async def first(self) -> Message | None:
        """The next message; None if the other process has ended."""
        async for message in self.messages():
            return message
        return None

    def post(self, message: Message) -> None:
        """Send one message without waiting. Raises ConnectionError if the other process is gone, or
        has stopped reading.
        """
        transport = self._writer.transport
        if transport.is_closing() or transport.get_write_buffer_size() > _UNREAD_BYTES:
            raise ConnectionError("the other process does not read")
        self._writer.write(_encode(message) + b"\n")

    @contextlib.contextmanager
    def pending(self) -> Iterator[tuple[int, asyncio.Future[Answer]]]:
        """The id for a Command, and the answer of its Reply, while this context lasts."""
        command_id = next(self._ids)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[command_id] = answer
        try:
            yield command_id, answer
        finally:
            del self._pending[command_id]

    def resolve(self, reply: Reply) -> None:
        """Hand an answer to whoever waits for it."""
        answer = self._pending.get(reply.id)
        if answer is not None and not answer.done():
            answer.set_result(reply.answer)

    async def messages(self) -> AsyncIterator[Message]:
        """What the other process sends, until that process has ended or closed its end. A line that
        is no message is logged and skipped.
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
        """Let go of this end."""
        self._writer.close()


def bounded(lines: list[str]) -> list[str]:
    """Such lines in a size that fits into a message."""
    first = [line[:_PROBLEM_CHARS] for line in lines[:_MAX_PROBLEMS]]
    more = len(lines) - len(first)
    return [*first, f"and {more} more"] if more else first


class Control:
    """A worker's end."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, fd: int) -> Control:
        """Take over the inherited descriptor."""
        return cls(await Channel.open(socket.socket(fileno=fd), _CONFIG_LINE_BYTES))

    async def begin(self) -> Begin | None:
        """What the supervisor sends first; None if it has ended."""
        message = await self._channel.first()
        return message if isinstance(message, Begin) else None

    def report(self, message: Ready | Leaving) -> None:
        """Send it to the supervisor, if there is one."""
        with contextlib.suppress(ConnectionError):
            self._channel.post(message)

    async def ask(self, order: str, arguments: dict[str, Any]) -> Answer:
        """Have all workers do it."""
        with self._channel.pending() as (command_id, answer):
            try:
                self._channel.post(Command(command_id, order, arguments))
                async with asyncio.timeout(_ASK_TIMEOUT_S):
                    return await answer
            except (TimeoutError, ConnectionError):
                return Answer(missing=["the supervisor did not answer"])

    async def listen(self, orders: Mapping[str, Order]) -> None:
        """Carry out what the supervisor orders, each order by itself, until the supervisor is
        gone.
        """
        try:
            async for message in self._channel.messages():
                if isinstance(message, Reply):
                    self._channel.resolve(message)
                elif isinstance(message, Command):
                    task = asyncio.create_task(self._obey(message, orders))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                else:
                    log.warn("control.unexpected_message", say=type(message).__name__.lower())
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _obey(self, message: Command, orders: Mapping[str, Order]) -> None:
        answer = await _answer(message, orders)
        with contextlib.suppress(ConnectionError):
            self._channel.post(Reply(message.id, answer))


async def _answer(message: Command, orders: Mapping[str, Order]) -> Answer:
    name = message.order[:40]
    if (order := orders.get(message.order)) is None:
        log.warn("control.unknown_order", order=name)
        return Answer([f"it does not know the order '{name}'"])
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            answer = await order(message.arguments)
    except TimeoutError:
        log.warn("control.order_timed_out", order=name)
        return Answer([f"its {name} took longer than {ANSWER_TIMEOUT_S:g} s and was given up"])
    except Exception as error:
        # Whatever it is must end neither the channel nor the orders that follow; it is logged.
        log.bug("control.order_failed", error, order=name)
        return Answer([f"its {name} failed ({type(error).__name__}); its log has the cause"])
    return msgspec.structs.replace(answer, problems=bounded(answer.problems))
