"""The real nginx in front of the relay: calls are as safe and as prompt as without it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import socket
import sqlite3
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from relay.cli.keys import carry_out
from relay.cli.main import build_parser
from relay.registry.load import Sources, load
from relay.server.supervisor import _worker_command
from tests.conftest import StartRelay, Vendors
from tests.nginx import Nginx
from tests.processes import STARTED, Served, run, serve
from tests.relays import CLIENT_KEY, HANG_GUARD_S, provider, stop_relay, write_config
from tests.server.test_supervisor import _workers
from tests.template import passing_socket
from tests.test_security import SMUGGLING, send_raw, send_raw_to
from tests.upstream.raw import SSE_HEAD, RawUpstream, chunk, gated_events, ok
from tests.upstream.vendors import echo, vendor

pytestmark = pytest.mark.programs


async def test_no_smuggling_payload_becomes_two_requests(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    direct_port = relay.port
    await nginx.start(direct_port)
    relay.url = f"http://127.0.0.1:{nginx.port}"
    for name, payload in SMUGGLING.items():
        raw.arrived.clear()
        answer = await send_raw(relay, payload)
        status = int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/") else 400
        assert len(raw.arrived) <= 1, name
        # 403: nginx rewrites the absolute form to a request whose Host the relay does not know.
        assert status in (400, 403, 405, 414, 431, 501, 505) or (status == 200 and len(raw.arrived) == 1), (name, status)


async def test_each_event_passes_nginx_at_once(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    gates, steps = gated_events(10)
    raw.plays(*steps)
    relay = await start(openai=provider(raw.url))
    url = await nginx.start(relay.port)
    async with asyncio.timeout(HANG_GUARD_S), relay.client.get(f"{url}/api/v1/ai-gateway/providers/openai/sse") as answer:
        for number, gate in enumerate(gates):
            gate.set()
            assert await answer.content.readany() == b"data: %d\n\n" % number


async def test_calls_without_a_provider_in_their_path_pass_nginx_too(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    gates, steps = gated_events(3)
    raw.plays(*steps)
    relay = await start(openai=provider(raw.url))
    url = await nginx.start(relay.port)
    call = {"model": "openai/gpt-5", "messages": [], "stream": True}
    async with asyncio.timeout(HANG_GUARD_S), relay.client.post(f"{url}/v1/chat/completions", json=call) as answer:
        assert (answer.status, "cf-aig-log-id" in answer.headers) == (200, True)
        for number, gate in enumerate(gates):
            gate.set()
            assert await answer.content.readany() == b"data: %d\n\n" % number
    async with relay.client.get(f"{url}/v1/models") as listed:
        assert (await listed.json())["object"] == "list"


async def test_a_truncated_stream_is_truncated_behind_nginx_too(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    raw.plays(SSE_HEAD, chunk(b"data: 1\n\n"), "close")
    relay = await start(openai=provider(raw.url))
    url = await nginx.start(relay.port)
    with pytest.raises(aiohttp.ClientPayloadError):
        await relay.call("GET", f"{url}/api/v1/ai-gateway/providers/openai/sse")


async def test_websocket_messages_and_close_codes_pass_nginx(start: StartRelay, aiohttp_server, nginx: Nginx) -> None:  # type: ignore[no-untyped-def]
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start(openai=provider(str(server.make_url("")), websocket={"default_path": "echo"}))
    url = await nginx.start(relay.port)
    async with relay.client.ws_connect(f"{url}/api/v1/ai-gateway/ws/openai", autoclose=False) as ws:
        await ws.send_bytes(b"x" * 200_000)
        assert len((await ws.receive(HANG_GUARD_S)).data) == 200_000
        relay.gateway.draining = False
        for session in relay.gateway.sessions:
            from relay.websocket import draining

            session.end(draining())
        message = await ws.receive(HANG_GUARD_S)
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)


@asynccontextmanager
async def _under_load(url: str) -> AsyncIterator[dict[int, int]]:
    """Run four clients that POST up to 100 times a second each. Yields the count of each status.

    Without a pause they would take the CPU from the relays that start meanwhile.
    """
    statuses: dict[int, int] = {}
    stop = asyncio.Event()

    async def load(session: aiohttp.ClientSession) -> None:
        while not stop.is_set():
            async with session.post(f"{url}/api/v1/ai-gateway/providers/up/x", data=b"{}") as answer:
                await answer.read()
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
            await asyncio.sleep(0.01)

    async with aiohttp.ClientSession() as session:
        loads = [asyncio.create_task(load(session)) for _ in range(4)]
        yield statuses
        await asyncio.sleep(0.5)
        stop.set()
        await asyncio.gather(*loads)


@pytest.mark.timeout(300)
async def test_a_rolling_restart_of_two_workers_fails_no_call(tmp_path: Path, raw: RawUpstream, nginx: Nginx) -> None:
    raw.plays(ok(b"fine"))
    relay = await serve(tmp_path, {"providers": {"up": provider(raw.url)}}, "--workers", "2")
    await _workers(relay, 2)
    url = await nginx.start(int(relay.url.rpartition(":")[2]))
    async with _under_load(url) as statuses:
        for number in (0, 1):
            await asyncio.sleep(0.5)
            os.kill((await _workers(relay, 2))[number], signal.SIGTERM)
            await _workers(relay, 2 + number + 1)
    await relay.stop()
    assert set(statuses) == {200}


async def test_two_relays_with_passed_sockets_restart_in_turn_and_no_call_fails(tmp_path: Path, raw: RawUpstream, nginx: Nginx) -> None:
    """As with a .socket unit of systemd: connections wait in the queue while a relay restarts."""
    raw.plays(ok(b"fine"))
    sockets = [socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in range(2)]
    folders = [tmp_path / f"relay{number}" for number in range(2)]
    for folder in folders:
        folder.mkdir()
        write_config(folder, {"providers": {"up": provider(raw.url)}})

    async def begin(number: int) -> Served:
        relay = await run(folders[number], "serve", start=passing_socket(sockets[number]))
        await relay.until(STARTED)
        return relay

    relays = [await begin(0), await begin(1)]
    url = await nginx.start(*(sock.getsockname()[1] for sock in sockets))
    async with _under_load(url) as statuses:
        for number in (0, 1, 0, 1):
            await asyncio.sleep(0.5)
            await relays[number].stop()
            relays[number] = await begin(number)
    for relay, sock in zip(relays, sockets, strict=True):
        await relay.stop()
        sock.close()
    assert set(statuses) == {200}


async def test_a_page_and_the_relay_share_an_origin(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    raw.plays(ok(b"fine"))
    relay = await start(openai=provider(raw.url))
    (nginx.root / "index.html").write_text("<title>app</title>")
    url = await nginx.start(relay.port)
    assert (await relay.call("GET", f"{url}/some/page"))[2] == b"<title>app</title>"
    origin = {"Origin": url}
    status, _, body = await relay.call("POST", f"{url}/api/v1/ai-gateway/providers/openai/chat/completions", json={}, headers=origin)
    assert (status, body) == (200, b"fine")


@pytest.mark.parametrize(
    "path",
    ["providers", "providers/", "providers/reload", "providers//reload", "keys", "logs?x=1", "usage", "sessions", "tickets", "ws/", "providers/openai/%2e%2e/reload", "providers/x/../reload", "%70roviders"],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_nginx_closes_the_management_api(start: StartRelay, raw: RawUpstream, nginx: Nginx, path: str, method: str) -> None:
    raw.plays(ok(b"fine"))
    relay = await start(openai=provider(raw.url))
    await nginx.start(relay.port)
    answer = await send_raw_to(nginx.port, f"{method} /api/v1/ai-gateway/{path} HTTP/1.1\r\nHost: 127.0.0.1:{nginx.port}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
    assert int(answer.split(b" ")[1]) in (400, 403, 404)
    assert b'"providers"' not in answer and b"reloaded" not in answer and not raw.arrived


async def test_healthz_is_served_by_the_relay_and_fails_while_the_relay_is_down(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    relay = await start(openai=provider(raw.url))
    (nginx.root / "index.html").write_text("<title>app</title>")
    url = await nginx.start(relay.port)
    status, _, body = await relay.call("GET", f"{url}/healthz")
    assert (status, body) == (200, b'{"status": "ok"}')
    await stop_relay(relay)
    async with aiohttp.ClientSession() as session, session.get(f"{url}/healthz") as answer:
        assert answer.status == 502


@pytest.mark.parametrize("path", ["readyz", "version", "metrics"])
async def test_nginx_closes_readiness_version_and_metrics(start: StartRelay, raw: RawUpstream, nginx: Nginx, path: str) -> None:
    relay = await start(openai=provider(raw.url))
    (nginx.root / "index.html").write_text("<title>app</title>")
    url = await nginx.start(relay.port)
    assert (await relay.call("GET", f"{url}/{path}"))[0] == 404


async def test_no_query_string_is_logged(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    raw.plays("close")
    relay = await start(openai=provider(raw.url))
    url = await nginx.start(relay.port)
    await relay.call("GET", f"{url}/api/v1/ai-gateway/providers/openai/x?key=hidden-in-query")
    await stop_relay(relay)
    async with aiohttp.ClientSession() as session, session.get(f"{url}/api/v1/ai-gateway/providers/openai/x?key=hidden-in-query") as answer:
        assert answer.status == 502, "nginx reports that the relay does not run"
    assert "GET /api/v1/ai-gateway/providers/openai/x" in nginx.logged
    assert "hidden-in-query" not in nginx.logged


@pytest.mark.timeout(300)
async def test_an_upload_of_200_mb_streams_through(start: StartRelay, aiohttp_server, nginx: Nginx) -> None:  # type: ignore[no-untyped-def]
    received = 0

    async def count(request: web.Request) -> web.StreamResponse:
        nonlocal received
        async for data in request.content.iter_any():
            received += len(data)
        return web.json_response({"bytes": received})

    server = await aiohttp_server(vendor(("POST", "/files", count)))
    relay = await start(openai=provider(str(server.make_url(""))))
    url = await nginx.start(relay.port)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield bytes(1024 * 1024)

    status, _, answer = await relay.call("POST", f"{url}/api/v1/ai-gateway/providers/openai/files", data=body())
    assert (status, answer) == (200, b'{"bytes": 209715200}')
    assert relay.gateway.held_bytes == 0


async def test_pings_keep_an_idle_websocket_open_through_nginx(start: StartRelay, aiohttp_server, nginx: Nginx) -> None:  # type: ignore[no-untyped-def]
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start({"websocket": {"ping_after_s": 0.5}}, openai=provider(str(server.make_url("")), websocket={"default_path": "echo"}))
    url = await nginx.start(relay.port)
    async with relay.client.ws_connect(f"{url}/api/v1/ai-gateway/ws/openai", autoping=False) as ws:
        for _ in range(3):
            assert (await ws.receive(HANG_GUARD_S)).type is WSMsgType.PING
            await ws.pong()
        await ws.send_str("still here")
        assert (await ws.receive(HANG_GUARD_S)).data == "still here"


async def test_a_page_over_tls_gets_tls_urls(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    raw.plays(ok(b"{}", f"x-goog-upload-url: {raw.url}/upload?upload_id=1"))
    entry = provider(raw.url, "GOOGLE_AI_API_KEY", rewrite={"headers": ["x-goog-upload-url"]})
    relay = await start({"server": {"trusted_proxies": ["127.0.0.1"]}, "providers": {"google": entry}})
    await nginx.start(relay.port)
    trusted = ssl.create_default_context()
    nginx.authority.configure_trust(trusted)
    _, headers, _ = await relay.call("POST", f"{nginx.tls_url}/api/v1/ai-gateway/providers/google/upload", ssl=trusted)
    assert headers["x-goog-upload-url"] == f"{nginx.tls_url}/api/v1/ai-gateway/providers/google/upload?upload_id=1"


async def test_client_keys_appear_in_no_log_row_metric_error_or_argument(start: StartRelay, vendors: Vendors, raw: RawUpstream, nginx: Nginx, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys of gateway.yaml, keys that were made, and revoked ones, wherever a client puts them."""
    raw.plays(ok(b'{"quoted": "%s"}' % CLIENT_KEY.encode(), "Content-Type: application/json"))
    file = tmp_path / "relay.db"
    document = {
        "access": {"mode": "required"}, "clients": {"web": {"key": CLIENT_KEY, "origins": "https://a.example"}}, "database": str(file),
        "ledger": {"bodies": "on"}, "providers": vendors.entries() | {"mine": provider(raw.url, query_credentials=["key"])},
    }  # fmt: skip
    relay = await start(document)
    sources = Sources(relay.folder / "gateway.yaml", relay.folder / ".env")
    made: list[str] = []
    for arguments in (["create", "app"], ["rotate", "app", "--grace", "0"], ["create", "web"]):
        await carry_out(load(sources), build_parser(["keys"]).parse_args(["keys", *arguments]), made.append)
    await relay.gateway.refresh_access()
    url = await nginx.start(relay.port)
    errors = ""
    for key in (CLIENT_KEY, *made, made[-1] + "x"):
        basic = base64.b64encode(f"user:{key}".encode()).decode()
        for headers, query in (({"x-relay-key": key}, ""), ({"Authorization": f"Bearer {key}"}, ""), ({"Authorization": f"Basic {basic}"}, ""), ({}, f"?key={key}"), ({}, f"?x={quote(key)}")):
            for name, more in (("mine", {}), ("nobody", {}), ("mine", {"Origin": "https://evil.example"})):
                path = f"/api/v1/ai-gateway/providers/{name}/chat/completions{query}"
                status, answer, body = await relay.call("POST", url + path, json={"model": "m"}, headers=headers | more)
                errors += "" if status == 200 and "x-relay-error" not in answer else f"{dict(answer)}{body.decode()}"
        with contextlib.suppress(aiohttp.WSServerHandshakeError):
            async with relay.client.ws_connect(f"{url}/api/v1/ai-gateway/ws/openai", protocols=("realtime", f"openai-insecure-api-key.{key}")) as session:
                await session.receive()
    await relay.idle()
    _, _, metrics = await relay.call("GET", f"{relay.url}/metrics")
    shown = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/logs?limit=100")
    with contextlib.closing(sqlite3.connect(file)) as connection:
        rows = "\n".join(connection.iterdump())
    listeners = SimpleNamespace(plain=SimpleNamespace(fileno=lambda: 3), tls=None, admin=None)
    arguments_of_worker = str(_worker_command(sources, listeners, SimpleNamespace(fileno=lambda: 4)))  # type: ignore[arg-type]
    places = {"relay": "".join(relay.logged.lines), "nginx": nginx.logged, "rows": rows, "metrics": metrics.decode(), "logs": str(shown), "errors": errors, "worker": arguments_of_worker, "stderr": capsys.readouterr().err}
    leaks = [(place, key) for place, text in places.items() for key in (CLIENT_KEY, *made) if key in text or key[3:-4] in text]
    assert leaks == [] and all(places.values())
    assert sha256(made[0].encode()).hexdigest() in rows.lower()
    assert not any(key.encode() in arrived.head for arrived in raw.arrived for key in (CLIENT_KEY, *made))
