"""Connections: when one to a provider is used again, and when one of a client ends."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import socket
import struct
from typing import Any

import pytest

from relay.core.headers import keep_alive_s
from relay.periodic import DescriptorCheck
from relay.server.connection import _Connection
from relay.upstream.protocol import ProviderConnection
from tests.conftest import StartRelay
from tests.relays import Relay, provider
from tests.upstream.raw import LAST_CHUNK, SILENCE, SSE_HEAD, RawUpstream, chunk, gated_events, ok
from tests.upstream.vendors import echo, vendor


def pooled(relay: Relay) -> list[ProviderConnection]:
    """The idle connections to providers."""
    return [connection for pool in relay.gateway.upstream.rest.connector._conns.values() for connection, _ in pool]  # type: ignore[union-attr]


KEEP_ALIVES: dict[str | None, int | None] = {
    None: None, "": None, "timeout=5": 5, "timeout=5, max=1000": 5, "max=3, Timeout = 60": 60, 'timeout="7"': 7, "timeout=0": 0,
    "timeout=-1": None, "timeout=x": None, "nottimeout=5": None, "timeout=" + "9" * 30: None, "x" * 5000 + ",timeout=5": None,
}  # fmt: skip


@pytest.mark.parametrize("value", KEEP_ALIVES)
def test_the_timeout_in_a_keep_alive_header_is_parsed_with_bounds(value: str | None) -> None:
    assert keep_alive_s(value) == KEEP_ALIVES[value]


async def test_a_connection_is_not_reused_after_the_providers_keep_alive_timeout(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"ok", "Keep-Alive: timeout=5"))
    relay = await start(openai=provider(raw.url))
    for idle_s, connections in ((0.0, 1), (3.9, 1), (4.1, 2)):  # one second less than the provider keeps it
        for connection in pooled(relay):
            connection.idle_since_s -= idle_s
        await relay.call("POST", relay.path("openai", "x"), data=b"{}")
        assert raw.connections == connections


async def test_a_connection_with_a_short_keep_alive_timeout_is_not_reused(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"ok", "Keep-Alive: timeout=1"))
    relay = await start(openai=provider(raw.url))
    for connections in (1, 2):
        assert (await relay.call("GET", relay.path("openai", "x")))[0] == 200
        assert raw.connections == connections and not pooled(relay)


async def test_the_last_response_sets_the_keep_alive_timeout_of_a_connection(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"ok", "Keep-Alive: timeout=5"))
    raw.plays(ok(b"ok"))
    relay = await start(openai=provider(raw.url))
    for _ in range(3):
        await relay.call("GET", relay.path("openai", "x"))
        [connection] = pooled(relay)
    assert raw.connections == 1 and connection.idle_limit_s is None


async def test_reading_a_chunk_does_not_call_the_parser(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def received(received: Any) -> Any:
        def data_received(connection: Any, data: bytes) -> None:
            sizes.append(len(data))
            received(connection, data)

        return data_received

    for kind in (ProviderConnection, _Connection):
        monkeypatch.setattr(kind, "data_received", received(kind.data_received))
    raw.plays(SSE_HEAD, *(chunk(b"data: {}\n\n") for _ in range(5)), LAST_CHUNK)
    relay = await start(openai=provider(raw.url))
    status, _, body = await relay.call("POST", relay.path("openai", "x"), data=b"{}")
    assert status == 200 and body == b"data: {}\n\n" * 5
    assert len(sizes) >= 2 and all(sizes)


def _keepalive_options(sock: Any) -> tuple[bool, int]:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)), sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)


async def test_connections_to_providers_are_probed_by_tcp(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    await relay.call("GET", relay.path("openai", "x"))
    [connection] = pooled(relay)
    assert connection.transport is not None
    assert _keepalive_options(connection.transport.get_extra_info("socket")) == (True, 30)


async def test_websockets_to_providers_are_probed_by_tcp(start: StartRelay, aiohttp_server: Any) -> None:
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start(openai=provider(str(server.make_url("")), websocket={"default_path": "echo"}))
    async with relay.client.ws_connect(relay.ws("openai")) as client:
        await client.send_str("x")
        await client.receive(20)
        [session] = relay.gateway.sessions
        assert _keepalive_options(session.upstream.transport.get_extra_info("socket")) == (True, 30)


PATH = "/api/v1/ai-gateway/providers/openai/chat/completions"
REQUEST = f'POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{{"model":"m"}}'.encode()


async def _half_closed(relay: Relay, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send `data` and close the sending half of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(data)
    writer.write_eof()
    return reader, writer


async def _until(done: Any) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.005)


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.fixture
def fin_behind_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat each FIN as right behind its request, however slow the machine is."""
    monkeypatch.setattr("relay.server.half_close.BEHIND_REQUEST_S", 3600.0)
    monkeypatch.setattr("relay.server.half_close._CHECK_INTERVAL_S", 0.01)


@pytest.mark.usefixtures("fin_behind_request")
async def test_a_client_that_closes_its_sending_half_gets_its_whole_answer(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(b"the answer"))
    relay = await start(openai=provider(raw.url))
    reader, writer = await _half_closed(relay, REQUEST)
    await _until(lambda: raw.arrived)
    gate.set()
    answer = await asyncio.wait_for(reader.read(), 20)  # to the end: the relay closes after it
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"the answer")
    assert [row["outcome"] for row in await relay.events()] == ["relayed"]


@pytest.mark.usefixtures("fin_behind_request")
async def test_a_client_that_closes_its_sending_half_gets_its_whole_stream(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(3)
    raw.plays(*steps)
    relay = await start(openai=provider(raw.url))
    reader, writer = await _half_closed(relay, REQUEST)
    for number, gate in enumerate(gates):
        gate.set()
        await asyncio.wait_for(reader.readuntil(b"data: %d\n\n" % number), 20)
    rest = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    assert rest.endswith(b"0\r\n\r\n")


@pytest.mark.usefixtures("fin_behind_request")
async def test_all_pipelined_requests_before_a_half_close_are_answered(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(b"1"))
    raw.plays(ok(b"2"))
    raw.plays(ok(b"3"))
    relay = await start(openai=provider(raw.url))
    reader, writer = await _half_closed(relay, REQUEST * 3)
    await _until(lambda: raw.arrived)
    gate.set()
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    assert answer.count(b"HTTP/1.1 200") == 3 and answer.endswith(b"3")


@pytest.mark.usefixtures("fin_behind_request")
async def test_a_client_that_closed_at_once_is_detected_during_its_stream(start: StartRelay, raw: RawUpstream) -> None:
    """The client closed the whole connection, so a write to it is answered with a reset."""
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, gate, *[chunk(b"data: x\n\n")] * 2, SILENCE)
    relay = await start(openai=provider(raw.url))
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(REQUEST)
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    writer.close()
    gate.set()
    await asyncio.wait_for(raw.closed.wait(), 20)
    [row] = await relay.events()
    assert (row["outcome"], row["error"]) == ("client_gone", "client_gone")


@pytest.mark.usefixtures("fin_behind_request")
@pytest.mark.parametrize("sent", [(), (SSE_HEAD,)], ids=["before the answer", "in a silent stream"])
async def test_a_reset_after_a_half_close_is_detected_without_a_write(start: StartRelay, raw: RawUpstream, sent: tuple[Any, ...]) -> None:
    raw.plays(*sent, SILENCE)
    relay = await start(openai=provider(raw.url))
    _, writer = await _half_closed(relay, REQUEST)
    await _until(lambda: raw.arrived)
    _reset(writer)
    await asyncio.wait_for(raw.closed.wait(), 20)
    [row] = await relay.events()
    assert (row["outcome"], row["error"]) == ("client_gone", "client_gone")


@pytest.mark.usefixtures("fin_behind_request")
async def test_a_half_closed_connection_is_probed_sooner(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok())
    relay = await start(openai=provider(raw.url))
    reader, writer = await _half_closed(relay, REQUEST)
    [transport] = relay.runner._transports  # type: ignore[attr-defined]
    await _until(lambda: _keepalive_options(transport.get_extra_info("socket")) == (True, 10))
    gate.set()
    await asyncio.wait_for(reader.read(), 20)
    writer.close()


@pytest.mark.parametrize("data", [b"", b"GET / HTT", REQUEST[:-5]], ids=["nothing", "half a head", "half a body"])
@pytest.mark.usefixtures("fin_behind_request")
async def test_a_half_close_without_a_whole_request_ends_the_connection(start: StartRelay, raw: RawUpstream, data: bytes) -> None:
    relay = await start({"server": {"body_idle_timeout_s": 3600}}, openai=provider(raw.url))
    reader, writer = await _half_closed(relay, data)
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()
    await relay.idle()


@pytest.mark.usefixtures("fin_behind_request")
async def test_a_half_close_of_an_idle_connection_ends_it(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"first"))
    relay = await start(openai=provider(raw.url))
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(REQUEST)
    await asyncio.wait_for(reader.readuntil(b"first"), 20)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()


BAD_FRAMING = {
    "another coding": b"POST %b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "another coding, without an end": b"POST %b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "chunks of HTTP/1.0": b"POST %b HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk without a size": b"POST %b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nxyz\r\n",
    "two lengths": b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "another expectation": b"POST %b HTTP/1.1\r\nHost: localhost\r\nExpect: x\r\nContent-Length: 2\r\n\r\n",
}


@pytest.mark.parametrize("framing", BAD_FRAMING)
async def test_the_connection_ends_after_a_400_for_bad_framing(start: StartRelay, raw: RawUpstream, framing: str) -> None:
    """The end of such a request is unknown, so the bytes after it are not another request."""
    relay = await start(openai=provider(raw.url))
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(BAD_FRAMING[framing] % PATH.encode() + REQUEST)
    answer = await asyncio.wait_for(reader.read(), 9)  # aiohttp by itself reads for 10 s before it closes
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head[8:].startswith(b" 400") and len(re.findall(rb"HTTP/1\.[01] \d", answer)) == 1 and b'"bad_request"' in body
    assert b"connection: close" in head.lower() or head.startswith(b"HTTP/1.0")
    assert raw.connections == 0


async def test_the_connection_ends_after_a_408(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"server": {"body_idle_timeout_s": 0.05}}, openai=provider(raw.url))
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(REQUEST[:-5])
    answer = await asyncio.wait_for(reader.read(), 9)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()


async def test_running_out_of_file_descriptors_is_logged_once(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    files, limits = DescriptorCheck(), resource.getrlimit(resource.RLIMIT_NOFILE)
    files.check()
    with open(os.devnull) as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1, limits[1]))
        try:
            duplicates = []
            while True:
                try:
                    duplicates.append(os.dup(0))
                except OSError:
                    break
            for _ in range(5):
                files.check()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in duplicates:
                os.close(descriptor)
    for _ in range(3):
        files.check()
    [line] = await relay.events("file_descriptors.exhausted")
    assert (line["level"], line["cause"]) == ("warning", "Too many open files")
    assert len(await relay.events("file_descriptors.available")) == 1
    events = [line for line in relay.logged.lines if "file_descriptors." in line]
    assert len(events) == 2


async def test_a_call_without_a_free_descriptor_gets_an_error_that_names_the_cause(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    duplicates: list[int] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, limits[1]))
    try:
        while True:
            try:
                duplicates.append(os.dup(0))
            except OSError:
                break
        writer.write(REQUEST)
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), 20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in (last, *duplicates):
            os.close(descriptor)
    writer.close()
    assert b"502" in answer and b"no file descriptor left" in answer
