"""Management on a listener of its own: what each listener answers, and which sockets it takes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from relay.registry.load import Config
from relay.server.listen import CannotListen, bind, listen, require_loopback
from relay.server.listen import _in_order as in_order
from relay.server.worker import _ManagementSite
from tests.conftest import StartRelay
from tests.gate.test_management import ADMIN, ROUTES, bearer
from tests.relays import Relay, canary, configured, provider
from tests.server.conftest import Serve
from tests.server.test_tls import _files, _trusting
from tests.upstream.raw import RawUpstream, ok

API = "/api/v1/ai-gateway"
KEY = canary("admin-port-web")
MANAGEMENT = [*ROUTES, ("GET", "/"), ("GET", "/metrics")]
CALLS = [f"{API}/providers/openai/x", f"{API}/providers/openai/x?y=1", f"{API}/providers/openai/reload", f"{API}/ws/openai", f"{API}/ws/openai/x", f"{API}/providers/reload/x"]


@pytest.fixture
async def pair(start: StartRelay, raw: RawUpstream) -> AsyncIterator[tuple[Relay, str]]:
    """A relay whose management has a listener of its own, and the URL of that listener."""
    raw.plays(ok())
    relay = await start({"access": {"admin_token": ADMIN, "mode": "required"}, "clients": {"web": {"key": KEY}}}, openai=provider(raw.url, websocket={"default_path": "x"}))
    sock = bind("127.0.0.1", 0)
    site = _ManagementSite(relay.runner, sock, None)  # type: ignore[arg-type]
    await site.start()
    relay.gateway.has_admin_listener = True
    yield relay, f"http://127.0.0.1:{sock.getsockname()[1]}"
    await site.stop()


async def test_the_other_listeners_answer_404_for_management_even_with_a_token(pair: tuple[Relay, str]) -> None:
    for method, path in MANAGEMENT:
        relay, admin = pair
        for headers in (bearer(ADMIN), {}, bearer(KEY)):
            status, answered, _ = await relay.call(method, relay.url + path, headers=headers)
            assert (status, answered["x-relay-error"]) == (404, "unknown_route")
        status, answered, _ = await relay.call(method, admin + path, headers=bearer(ADMIN))
        assert answered.get("x-relay-error") != "unknown_route"
        if path != "/":
            assert (await relay.call(method, admin + path, headers={"X-Forwarded-For": "192.0.2.1"}))[0] == 401


async def test_the_listener_of_management_takes_no_calls(pair: tuple[Relay, str], raw: RawUpstream) -> None:
    for path in CALLS:
        relay, admin = pair
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
        for headers in (bearer(KEY), bearer(ADMIN), {"x-relay-key": KEY} | upgrade):
            for method in ("GET", "POST", "OPTIONS"):
                status, answered, _ = await relay.call(method, admin + path, headers=headers)
                assert (status, answered["x-relay-error"]) == (404, "unknown_route")
        for spelling in (path.replace("providers", "%70roviders").replace("/ws/", "/%77s/"), "/" + path):
            assert (await relay.call("GET", admin + spelling, headers=bearer(KEY)))[0] in (400, 404)
        assert raw.connections == 0


async def test_calls_and_health_are_where_they_were(pair: tuple[Relay, str]) -> None:
    relay, admin = pair
    assert (await relay.call("GET", f"{relay.url}{CALLS[0]}", headers=bearer(KEY)))[0] == 200
    for url in (relay.url, admin):
        for path in ("/healthz", "/version", "/readyz"):
            assert (await relay.call("GET", url + path))[0] == 200
        assert (await relay.call("HEAD", f"{url}/"))[0] == 200
    assert "in_flight" not in json.loads((await relay.call("GET", f"{relay.url}/readyz", headers=bearer(ADMIN)))[2])
    assert "in_flight" in json.loads((await relay.call("GET", f"{admin}/readyz", headers=bearer(ADMIN)))[2])


async def test_the_status_page_is_on_the_listener_of_management_for_everybody_there(pair: tuple[Relay, str]) -> None:
    relay, admin = pair
    for headers in ({}, {"Host": "admin.example.com"}, {"X-Forwarded-For": "192.0.2.1"}):
        status, _, body = await relay.call("GET", f"{admin}/", headers=headers)
        assert status == 200 and b'id="token"' in body


async def test_connections_to_management_end_with_the_relay(pair: tuple[Relay, str]) -> None:
    relay, admin = pair
    reader, writer = await asyncio.open_connection("127.0.0.1", int(admin.rpartition(":")[2]))
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"}")
    await relay.runner.cleanup()
    assert await reader.read() == b""
    writer.close()


# --- sockets


def config_of(folder: Path, **sections: Any) -> Config:
    config, _ = configured(folder, sections)
    return config


def test_beyond_loopback_management_needs_a_token(tmp_path: Path) -> None:
    server = {"port": 0, "admin_port": 0, "admin_host": "0.0.0.0"}
    with pytest.raises(CannotListen, match="RELAY_ADMIN_TOKEN"):
        listen(config_of(tmp_path, server=server), require_loopback)
    listeners = listen(config_of(tmp_path, server=server, access={"read_token": ADMIN}), require_loopback)
    assert listeners.admin is not None and len(listeners.descriptors()) == 2
    listeners.close()


def test_without_an_admin_port_there_is_no_third_socket(tmp_path: Path) -> None:
    listeners = listen(config_of(tmp_path, server={"port": 0}), require_loopback)
    assert listeners.admin is None and len(listeners.descriptors()) == 1
    listeners.close()


@pytest.mark.parametrize("tls", [False, True])
def test_sockets_of_systemd_are_for_calls_tls_and_management_in_this_order(tmp_path: Path, tls: bool) -> None:
    sections: dict[str, Any] = {"server": {"admin_port": 1}}
    if tls:
        sections["tls"] = _files(tmp_path, trustme.CA())
    config = config_of(tmp_path, **sections)
    with contextlib.ExitStack() as opened:
        socks = [opened.enter_context(bind("127.0.0.1", 0)) for _ in range(3)]
        found = in_order(config, socks, require_loopback)
        assert (found.plain, found.tls, found.admin) == ((socks[0], socks[1], socks[2]) if tls else (socks[0], None, socks[1]))
        with pytest.raises(CannotListen, match="management"):
            in_order(config, socks[: 2 if tls else 1], require_loopback)
        open_to_all = opened.enter_context(socket.create_server(("0.0.0.0", 0)))
        with pytest.raises(CannotListen, match="RELAY_ADMIN_TOKEN"):
            in_order(config, [*socks[: 2 if tls else 1], open_to_all], require_loopback)


@pytest.mark.programs
async def test_two_workers_serve_management_with_tls_beyond_loopback_and_drain(served: Serve, tmp_path: Path) -> None:
    authority = trustme.CA()
    server = {"admin_host": "0.0.0.0", "admin_port": 0}
    relay = await served({"server": server, "tls": _files(tmp_path, authority), "access": {"admin_token": ADMIN}, "providers": {"up": provider("https://up.example.com")}}, "--workers", "2")
    admin = (await relay.until(r'"admin_url":"(https://[^"]+)"')).group(1)
    connector = aiohttp.TCPConnector(ssl=_trusting(authority), force_close=True)
    async with aiohttp.ClientSession(connector=connector, headers=bearer(ADMIN)) as session:
        for _ in range(6):
            async with session.get(f"{admin}{API}/providers") as answer:
                assert answer.status == 200
            async with session.get(f"{relay.url}{API}/providers") as answer:
                assert answer.status == 404
        async with session.post(f"{admin}{API}/providers/reload") as answer:
            assert answer.status == 200 and (await answer.json())["reloaded"]
    relay.send(signal.SIGTERM)
    assert await relay.ended() == 0
