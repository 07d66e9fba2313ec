"""The memory of a relay process: it does not grow with the size of bodies and messages."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.processes import Served, serve
from tests.relays import HANG_GUARD_S, provider
from tests.template import executed

pytestmark = pytest.mark.programs

MIB = 2**20


@dataclass
class Sent:
    """What the senders of a test have sent so far."""

    count: int = 0

    async def stalls(self) -> None:
        """Wait until nothing more is sent for a second."""
        async with asyncio.timeout(HANG_GUARD_S):
            before = -1
            while before != self.count:
                before = self.count
                await asyncio.sleep(1)


def rss_bytes(relay: Served) -> int:
    """The resident memory of the relay process."""
    status = Path(f"/proc/{relay.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
async def sink(aiohttp_server: Any, tmp_path: Path, sent: Sent) -> AsyncIterator[Served]:
    """A relay in front of a provider that hashes uploads and sends endless responses and messages.

    Its WebSocket path `deaf` reads nothing.
    """
    finished = asyncio.Event()

    async def upload(request: web.Request) -> web.Response:
        digest, size = hashlib.sha256(), 0
        async for piece in request.content.iter_any():
            digest.update(piece)
            size += len(piece)
        return web.json_response({"sha256": digest.hexdigest(), "bytes": size})

    async def flood(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        while True:
            await answer.write(bytes(65536))
            sent.count += 1

    async def deaf(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        await finished.wait()
        return socket

    async def flood_socket(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        while True:
            await socket.send_bytes(bytes(65536))
            sent.count += 1

    app = web.Application()
    app.add_routes([web.post("/upload", upload), web.get("/flood", flood), web.get("/deaf", deaf), web.get("/flood_socket", flood_socket)])
    server = await aiohttp_server(app)
    relay = await serve(tmp_path, {"providers": {"up": provider(str(server.make_url("")), websocket={"default_path": "deaf"})}}, start=executed)
    yield relay
    finished.set()
    await relay.stop()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mib", [256, pytest.param(1024, marks=pytest.mark.soak)])
async def test_a_large_upload_takes_less_than_16_mib_of_memory(sink: Served, mib: int) -> None:
    piece = bytes(range(256)) * 4096
    digest = hashlib.sha256()

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(mib):
            digest.update(piece)
            yield piece

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        async with session.post(sink.path("up", "upload"), data=piece[:1000]) as answer:
            await answer.read()
        before, peak = rss_bytes(sink), 0
        call = asyncio.create_task(session.post(sink.path("up", "upload"), data=pieces()))  # type: ignore[arg-type]
        while not call.done():
            peak = max(peak, rss_bytes(sink))
            await asyncio.sleep(0.1)
        async with await call as answer:
            assert await answer.json() == {"sha256": digest.hexdigest(), "bytes": mib * MIB}
    assert peak - before < 16 * MIB


async def test_a_slow_reader_of_a_response_takes_less_than_2_mib(sink: Served, sent: Sent) -> None:
    """32 clients do not read an endless response."""
    async with aiohttp.ClientSession() as session:
        await (await session.get(sink.path("up", "flood"))).content.readexactly(MIB)
        before = rss_bytes(sink)
        held = []
        for _ in range(32):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(sink.url.rpartition(":")[2]), limit=1024)
            writer.write(b"GET /api/v1/ai-gateway/providers/up/flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
            held.append((reader, writer))
        await sent.stalls()
        grown = rss_bytes(sink) - before
        for _, writer in held:
            writer.transport.abort()
    assert grown < 32 * 2 * MIB


async def test_a_slow_websocket_takes_less_than_2_mib_in_each_direction(sink: Served, sent: Sent) -> None:
    """Messages of 64 KiB to a peer that reads nothing: the sender stalls."""
    async with aiohttp.ClientSession() as session:
        first = await session.ws_connect(sink.path("up", "flood_socket"), max_msg_size=0)
        await first.receive()
        before = rss_bytes(sink)
        sockets = [await session.ws_connect(sink.path("up", path), max_msg_size=0) for path in ("deaf", "flood_socket") * 8]

        async def push(socket: aiohttp.ClientWebSocketResponse[bool]) -> None:
            while True:
                await socket.send_bytes(bytes(65536))
                sent.count += 1

        pushing = [asyncio.create_task(push(socket)) for socket in sockets[::2]]
        await sent.stalls()
        grown = rss_bytes(sink) - before
        assert not any(task.done() for task in pushing), "the senders stall and are not disconnected"
        for task in pushing:
            task.cancel()
        await asyncio.gather(*pushing, return_exceptions=True)
        for socket in (first, *sockets):
            socket._response.connection.transport.abort()  # type: ignore[union-attr]
    assert grown < len(sockets) * 2 * MIB
