"""A forward proxy on loopback: CONNECT tunnels and absolute URLs, to ports that a test sets.

    proxy = await ForwardProxy.start()
    proxy.routes["api.example.test", 443] = port    # no other name resolves
    proxy.answers(b"HTTP/1.1 407 No\\r\\n\\r\\n")      # instead of a tunnel, from now on
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.upstream.raw import Arrived


@dataclass
class ForwardProxy:
    """`arrived` holds the requests as the proxy received them."""

    port: int = 0
    routes: dict[tuple[str, int], int] = field(default_factory=dict)
    arrived: list[Arrived] = field(default_factory=list)
    _instead: bytes | None = None
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @classmethod
    async def start(cls, context: ssl.SSLContext | None = None) -> ForwardProxy:
        proxy = cls()
        proxy._server = await asyncio.start_server(proxy._connected, "127.0.0.1", 0, ssl=context)
        proxy.port = proxy._server.sockets[0].getsockname()[1]
        return proxy

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def targets(self) -> list[tuple[str, str]]:
        """(method, target) of each request."""
        return [(each.head.split(b" ")[0].decode(), each.target) for each in self.arrived]

    def answers(self, instead: bytes) -> None:
        """Respond to every request with these bytes, then close the connection."""
        self._instead = instead

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = Arrived(await reader.readuntil(b"\r\n\r\n"))
        self.arrived.append(request)
        if self._instead is not None:
            writer.write(self._instead)
            await writer.drain()
            return
        method, target = self.targets[-1]
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            upstream = await asyncio.open_connection("127.0.0.1", self.routes[host, int(port)])
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            url = urlsplit(target)
            upstream = await asyncio.open_connection("127.0.0.1", self.routes[url.hostname or "", url.port or 80])
            path = f"{url.path}?{url.query}" if url.query else url.path
            upstream[1].write(request.head.replace(target.encode(), path.encode(), 1))
        copies = (_copy(reader, upstream[1]), _copy(upstream[0], writer))
        try:
            await asyncio.gather(*copies)
        finally:
            upstream[1].close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
