"""Connections: to providers, when one is used again; of clients, when one ends."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from relay.core.headers import keep_alive_s
from relay.upstream.protocol import ProviderConnection
from tests.conftest import StartRelay
from tests.relays import Relay, provider
from tests.upstream.raw import RawUpstream, ok
from tests.upstream.vendors import echo, vendor


def pooled(relay: Relay) -> list[ProviderConnection]:
    """The connections to providers that wait for the next call."""
    return [connection for kept in relay.gateway.upstream.rest.connector._conns.values() for connection, _ in kept]  # type: ignore[union-attr]


KEEP_ALIVES: dict[str | None, int | None] = {
    None: None, "": None, "timeout=5": 5, "timeout=5, max=1000": 5, "max=3, Timeout = 60": 60, 'timeout="7"': 7, "timeout=0": 0,
    "timeout=-1": None, "timeout=x": None, "nottimeout=5": None, "timeout=" + "9" * 30: None, "x" * 5000 + ",timeout=5": None,
}  # fmt: skip


@pytest.mark.parametrize("value", KEEP_ALIVES)
def test_the_time_in_a_keep_alive_header_is_read_within_bounds(value: str | None) -> None:
    assert keep_alive_s(value) == KEEP_ALIVES[value]


async def test_a_connection_is_not_used_for_longer_than_its_provider_keeps_it(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"ok", "Keep-Alive: timeout=5"))
    relay = await start(openai=provider(raw.url))
    for idle_s, connections in ((0.0, 1), (3.9, 1), (4.1, 2)):  # a second less than the provider says
        for connection in pooled(relay):
            assert connection._released_s is not None
            connection._released_s -= idle_s
        await relay.call("POST", relay.path("openai", "x"), data=b"{}")
        assert raw.connections == connections


async def test_a_connection_that_its_provider_hardly_keeps_is_not_used_again(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"ok", "Keep-Alive: timeout=1"))
    relay = await start(openai=provider(raw.url))
    for connections in (1, 2):
        assert (await relay.call("GET", relay.path("openai", "x")))[0] == 200
        assert raw.connections == connections and not pooled(relay)


async def test_the_last_answer_says_how_long_a_connection_is_kept(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"ok", "Keep-Alive: timeout=5"))
    raw.plays(ok(b"ok"))
    relay = await start(openai=provider(raw.url))
    for _ in range(3):
        await relay.call("GET", relay.path("openai", "x"))
        [connection] = pooled(relay)
    assert raw.connections == 1 and connection._idle_limit_s is None


def _probed(sock: Any) -> tuple[bool, int]:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)), sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)


async def test_connections_to_providers_are_probed_by_tcp(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    await relay.call("GET", relay.path("openai", "x"))
    [connection] = pooled(relay)
    assert connection.transport is not None
    assert _probed(connection.transport.get_extra_info("socket")) == (True, 30)


async def test_sockets_to_providers_are_probed_by_tcp(start: StartRelay, aiohttp_server: Any) -> None:
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start(openai=provider(str(server.make_url("")), websocket={"default_path": "echo"}))
    async with relay.client.ws_connect(relay.ws("openai")) as client:
        await client.send_str("x")
        await client.receive(20)
        [session] = relay.gateway.sessions
        assert _probed(session.upstream.transport.get_extra_info("socket")) == (True, 30)
