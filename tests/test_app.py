"""The relay mounted in another aiohttp application, on a server with the defaults of aiohttp."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path
from typing import Any

from aiohttp import web

import relay.app
from relay.gateway import GATEWAY
from tests.relays import CLIENT_KEY, HANG_GUARD_S, provider, write_config
from tests.upstream.raw import SILENCE, RawUpstream, ok


async def _own_page(_request: web.Request) -> web.Response:
    return web.Response(text="own")


async def _start_host(aiohttp_client: Any, folder: Path, document: dict[str, Any]) -> tuple[Any, web.Application]:
    write_config(folder, document)
    host = web.Application()
    inner = relay.app.create(folder / "gateway.yaml")
    host.add_subapp("/api/v1/ai-gateway", inner)
    host.router.add_get("/own", _own_page)
    client = await aiohttp_client(host, server_kwargs={"skip_url_asserts": True}, auto_decompress=False)
    return client, inner


async def test_relayed_calls_and_pages_of_the_host_application_work_side_by_side(aiohttp_client: Any, tmp_path: Path, raw: RawUpstream) -> None:
    raw.plays(ok(b"relayed"))
    client, _ = await _start_host(aiohttp_client, tmp_path, {"providers": {"openai": provider(f"{raw.url}/v1")}})
    assert await (await client.get("/own")).text() == "own"
    answer = await client.post("/api/v1/ai-gateway/providers/openai/v1/chat%2Fcompletions?x=1", data=b"{}")
    assert (answer.status, await answer.read()) == (200, b"relayed")
    assert raw.arrived[-1].target == "/v1/chat%2Fcompletions?x=1"
    assert (await client.get("/api/v1/ai-gateway/healthz")).status == 200
    refused = await client.get("/api/v1/ai-gateway/providers/opnai/x")
    assert (refused.status, refused.headers["x-relay-error"]) == (404, "unknown_provider")
    assert (await client.get("/api/v1/ai-gateway/nothing")).headers["x-relay-error"] == "unknown_route"
    assert (await client.get("/nothing")).status == 404


async def test_the_demo_works_in_a_host_application(aiohttp_client: Any, tmp_path: Path) -> None:
    client, _ = await _start_host(aiohttp_client, tmp_path, {"demo": {"enabled": True}})
    answer = await client.post("/api/v1/ai-gateway/providers/demo/embeddings", json={"model": "m", "input": "x"})
    assert (await answer.json())["object"] == "list"
    async with client.ws_connect("/api/v1/ai-gateway/ws/demo") as socket:
        assert (await socket.receive_json(timeout=HANG_GUARD_S))["type"] == "session.created"


async def test_a_body_that_the_host_decompressed_has_no_content_encoding(aiohttp_client: Any, tmp_path: Path, raw: RawUpstream) -> None:
    raw.plays(ok())
    client, _ = await _start_host(aiohttp_client, tmp_path, {"providers": {"openai": provider(raw.url)}})
    await client.post("/api/v1/ai-gateway/providers/openai/x", data=gzip.compress(b"plain"), headers={"Content-Encoding": "gzip"})
    assert raw.arrived[-1].body == b"plain"
    assert raw.arrived[-1].header("Content-Encoding") == []


async def test_a_client_that_disconnects_cancels_its_call(tmp_path: Path, raw: RawUpstream) -> None:
    """The server of the host does not cancel handlers, so the sweep detects the disconnect."""
    raw.plays(SILENCE)
    write_config(tmp_path, {"providers": {"openai": provider(raw.url)}})
    host = web.Application()
    inner = relay.app.create(tmp_path / "gateway.yaml")
    host.add_subapp("/ai", inner)
    runner = web.AppRunner(host)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    _, writer = await asyncio.open_connection("127.0.0.1", runner.addresses[0][1])
    writer.write(b"GET /ai/providers/openai/x HTTP/1.1\r\nHost: localhost\r\n\r\n")
    async with asyncio.timeout(HANG_GUARD_S):
        while not raw.arrived:
            await asyncio.sleep(0.01)
        writer.transport.abort()
        await raw.closed.wait()
        while inner[GATEWAY].running:
            await asyncio.sleep(0.01)
    await runner.cleanup()


async def test_a_mounted_relay_gives_tickets_for_its_own_path(aiohttp_client: Any, tmp_path: Path, sqlite_setting: str, raw: RawUpstream) -> None:
    document = {"clients": {"web": {"key": CLIENT_KEY}}, "database": sqlite_setting, "providers": {"openai": provider(raw.url, websocket={"default_path": "x"})}}
    client, _ = await _start_host(aiohttp_client, tmp_path, document)
    answer = await client.post("/api/v1/ai-gateway/tickets", json={"provider": "openai"}, headers={"x-relay-key": CLIENT_KEY})
    assert (await answer.json())["websocket_url"] == f"ws://127.0.0.1:{client.port}/api/v1/ai-gateway/ws/openai"


async def test_a_bad_configuration_is_refused_when_the_application_is_created(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("sever: {}")
    try:
        relay.app.create(tmp_path / "gateway.yaml")
    except relay.app.ConfigError as error:
        assert "did you mean 'server'?" in str(error)
    else:
        raise AssertionError("not refused")

