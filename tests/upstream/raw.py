"""A provider written as bytes: each request plays the next script, byte for byte.

    raw = await RawUpstream.start()
    raw.plays(ok(b"hello"))                       # one response, then the connection stays open
    raw.plays(b"HTTP/1.1 200 OK\\r\\n…", RESET)     # bytes, then a TCP reset
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pause:
    """Send nothing for `s` seconds."""

    s: float


CLOSE, RESET, SILENCE = "close", "reset", "silence"
Step = bytes | Pause | str | asyncio.Event
"""Bytes are sent; an Event is waited for; "early" as the first step responds before the body is
read, "deaf" never reads it."""


def ok(body: bytes = b"ok", *headers: str, status: str = "200 OK") -> bytes:
    """Return a whole response with a Content-Length."""
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def head(*headers: str, status: str = "200 OK") -> bytes:
    """Return the head of a response."""
    return "\r\n".join([f"HTTP/1.1 {status}", *headers]).encode() + b"\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Return one HTTP chunk."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


SSE_HEAD = head("Content-Type: text/event-stream", "Transfer-Encoding: chunked")
LAST_CHUNK = b"0\r\n\r\n"


def gated_events(count: int) -> tuple[list[asyncio.Event], list[Step]]:
    """An SSE response whose n-th event, `data: n`, is sent once the n-th gate is set."""
    gates = [asyncio.Event() for _ in range(count)]
    steps: list[Step] = [SSE_HEAD]
    for number, gate in enumerate(gates):
        steps += [gate, chunk(b"data: %d\n\n" % number)]
    return gates, [*steps, LAST_CHUNK]


@dataclass
class Arrived:
    """One request as it arrived on the wire."""

    head: bytes
    body: bytes = b""

    @property
    def target(self) -> str:
        """The raw request target."""
        return self.head.split(b" ", 2)[1].decode("latin-1")

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Raw pairs in order."""
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return [(n, v.strip()) for line in lines if line for n, _, v in [line.partition(":")]]

    def header(self, name: str) -> list[str]:
        """All values of one header."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


@dataclass
class RawUpstream:
    """Plays one script for each request, in order, and repeats the last one."""

    port: int = 0
    arrived: list[Arrived] = field(default_factory=list)
    connections: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    scripts: list[tuple[Step, ...]] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @classmethod
    async def start(cls) -> RawUpstream:
        raw = cls()
        raw._server = await asyncio.start_server(raw._connected, "127.0.0.1", 0)
        raw.port = raw._server.sockets[0].getsockname()[1]
        return raw

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def plays(self, *steps: Step) -> None:
        """Queue a script for one request."""
        self.scripts.append(steps)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.closed.set()
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request = Arrived(await reader.readuntil(b"\r\n\r\n"))
        self.arrived.append(request)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        early = script[0] in ("early", "deaf")
        body = asyncio.create_task(asyncio.sleep(60) if script[0] == "deaf" else _read_body(reader, request))
        try:
            if not early:
                await body
            for step in script[1:] if early else script:
                if not await self._step(step, reader, writer):
                    return False
            return body.done()
        finally:
            body.cancel()
            with contextlib.suppress(asyncio.CancelledError, asyncio.IncompleteReadError, OSError):
                await body

    async def _step(self, step: Step, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if isinstance(step, bytes):
            writer.write(step)
            await writer.drain()
        elif isinstance(step, Pause):
            await asyncio.sleep(step.s)
        elif isinstance(step, asyncio.Event):
            await step.wait()
        elif step == SILENCE:
            await reader.read()
            return False
        else:
            if step == RESET:
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            return False
        return True


async def _read_body(reader: asyncio.StreamReader, request: Arrived) -> None:
    if length := request.header("Content-Length"):
        request.body = await reader.readexactly(int(length[0]))
    elif request.header("Transfer-Encoding"):
        while size := int(await reader.readuntil(b"\r\n"), 16):
            request.body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
