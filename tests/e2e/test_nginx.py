"""The real nginx in front: what it lets through is as safe, and as prompt, as without it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import WSMsgType

from tests.conftest import StartRelay, need
from tests.processes import serve
from tests.relays import HANG_GUARD_S, provider
from tests.test_security import SMUGGLING, send_raw
from tests.test_supervisor import _workers
from tests.upstream.raw import SSE_HEAD, RawUpstream, chunk, gated_events, ok
from tests.upstream.vendors import echo, vendor

CONF = """
worker_processes 1; daemon off; pid nginx.pid; error_log stderr crit;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  upstream relay {{ server 127.0.0.1:{relay} max_fails=0; keepalive 16; keepalive_timeout 55s; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://relay; proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade;
      proxy_set_header Host $host; proxy_buffering off; proxy_request_buffering off; proxy_next_upstream off;
    }}
  }}
}}
"""


class Nginx:
    """A running nginx with a port of its own."""

    def __init__(self, folder: Path) -> None:
        need("nginx")
        self.folder = folder / "nginx"
        self.folder.mkdir()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port: int = sock.getsockname()[1]
        self.process: asyncio.subprocess.Process | None = None

    async def before(self, relay_port: int) -> str:
        """Start it in front of a relay; its URL."""
        (self.folder / "nginx.conf").write_text(CONF.format(relay=relay_port, port=self.port))
        nginx = shutil.which("nginx")
        assert nginx
        self.process = await asyncio.create_subprocess_exec(nginx, "-p", str(self.folder), "-c", "nginx.conf", stderr=asyncio.subprocess.DEVNULL)
        async with asyncio.timeout(HANG_GUARD_S):
            while True:
                with socket.socket() as sock:
                    if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                        return f"http://127.0.0.1:{self.port}"
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            await self.process.wait()


@pytest.fixture
async def nginx(tmp_path: Path) -> AsyncIterator[Nginx]:
    made = Nginx(tmp_path)
    yield made
    await made.stop()


async def test_no_payload_becomes_two_requests(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    direct_port = relay.port
    await nginx.before(direct_port)
    relay.url = f"http://127.0.0.1:{nginx.port}"
    for name, payload in SMUGGLING.items():
        raw.arrived.clear()
        answer = await send_raw(relay, payload)
        status = int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/") else 400
        assert len(raw.arrived) <= 1, name
        # 403: nginx makes the absolute form a plain one whose Host is then not ours.
        assert status in (400, 403, 405, 414, 431, 501, 505) or (status == 200 and len(raw.arrived) == 1), (name, status)


async def test_each_event_passes_at_once(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    gates, steps = gated_events(10)
    raw.plays(*steps)
    relay = await start(openai=provider(raw.url))
    url = await nginx.before(relay.port)
    async with asyncio.timeout(HANG_GUARD_S), relay.client.get(f"{url}/api/v1/ai-gateway/providers/openai/sse") as answer:
        for number, gate in enumerate(gates):
            gate.set()
            assert await answer.content.readany() == b"data: %d\n\n" % number


async def test_a_cut_stream_is_cut_behind_nginx_too(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    raw.plays(SSE_HEAD, chunk(b"data: 1\n\n"), "close")
    relay = await start(openai=provider(raw.url))
    url = await nginx.before(relay.port)
    with pytest.raises(aiohttp.ClientPayloadError):
        await relay.call("GET", f"{url}/api/v1/ai-gateway/providers/openai/sse")


async def test_sockets_pass_with_their_close_codes(start: StartRelay, aiohttp_server, nginx: Nginx) -> None:  # type: ignore[no-untyped-def]
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start(openai=provider(str(server.make_url("")), websocket={"default_path": "echo"}))
    url = await nginx.before(relay.port)
    async with relay.client.ws_connect(f"{url}/api/v1/ai-gateway/ws/openai", autoclose=False) as ws:
        await ws.send_bytes(b"x" * 200_000)
        assert len((await ws.receive(HANG_GUARD_S)).data) == 200_000
        relay.gateway.draining = False
        for session in relay.gateway.sessions:
            from relay.websocket import draining

            session.end(draining())
        message = await ws.receive(HANG_GUARD_S)
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)


@pytest.mark.timeout(300)
async def test_a_rolling_restart_of_two_workers_fails_no_call(tmp_path: Path, raw: RawUpstream, nginx: Nginx) -> None:
    raw.plays(ok(b"fine"))
    relay = await serve(tmp_path, {"providers": {"up": provider(raw.url)}}, "--workers", "2")
    pids = await _workers(relay, 2)
    url = await nginx.before(int(relay.url.rpartition(":")[2]))
    statuses: dict[int, int] = {}
    stop = asyncio.Event()

    async def load(session: aiohttp.ClientSession) -> None:
        while not stop.is_set():
            async with session.post(f"{url}/api/v1/ai-gateway/providers/up/x", data=b"{}") as answer:
                await answer.read()
                statuses[answer.status] = statuses.get(answer.status, 0) + 1

    async with aiohttp.ClientSession() as session:
        loads = [asyncio.create_task(load(session)) for _ in range(8)]
        for round_ in range(2):
            for number in (0, 1):
                await asyncio.sleep(0.5)
                os.kill((await _workers(relay, 2))[number], signal.SIGTERM)
                await _workers(relay, 2 + round_ * 2 + number + 1)
        await asyncio.sleep(0.5)
        stop.set()
        await asyncio.gather(*loads)
    await relay.stop()
    assert set(statuses) == {200} and statuses[200] > 500
    assert pids
