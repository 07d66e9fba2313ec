"""Load shedding: which calls above the limit are refused before aiohttp builds a Request."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from relay.surfaces import native
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, provider
from tests.upstream.raw import RawUpstream, gated_events, ok

pytestmark = pytest.mark.serial

PATH = "/api/v1/ai-gateway/providers/openai/chat/completions"
BODY = b'{"model": "m"}'


def request(path: str = PATH, *headers: str, body: bytes = BODY) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Connection:
    """A connection of a client that sends raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(HANG_GUARD_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
            headers = {n.lower(): v.strip() for line in head.split("\r\n")[1:] if line for n, _, v in [line.partition(":")]}
            body = await self._reader.readexactly(int(headers["content-length"]))
        return int(head.split()[1]), headers, body


@pytest.fixture
async def full(start: StartRelay, raw: RawUpstream):  # type: ignore[no-untyped-def]
    """(relay, connect, free): a relay at its concurrency limit. `free()` ends the running call."""
    gates, steps = gated_events(1)
    raw.plays(*steps)
    raw.plays(ok(b"fine"))
    relay = await start({"limits": [{"calls_at_once": 1}]}, openai=provider(raw.url), anthropic=provider(raw.url, format="anthropic"))
    running = asyncio.create_task(relay.call("GET", relay.path("openai", "x")))
    writers = []

    async def connect() -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writers.append(writer)
        return Connection(reader, writer)

    async def free() -> None:
        gates[0].set()
        await running
        await relay.idle()

    async with asyncio.timeout(HANG_GUARD_S):
        while not raw.arrived:
            await asyncio.sleep(0.01)
    yield relay, connect, free
    gates[0].set()
    await asyncio.gather(running, return_exceptions=True)
    for writer in writers:
        writer.close()


async def test_a_complete_request_is_shed_before_an_exchange_exists(full: Any) -> None:
    relay, connect, free = full
    connection = await connect()
    connection.send(request())
    status, headers, body = await connection.answer()
    assert (status, headers["x-relay-error"], headers["x-relay-error-source"], headers["retry-after"]) == (503, "overloaded", "relay", "1")
    assert json.loads(body)["error"]["code"] == "overloaded" and "x-should-retry" not in headers
    assert relay.gateway.requests_shed == 1
    await free()
    connection.send(request())
    assert (await connection.answer())[::2] == (200, b"fine"), "the connection is used again"
    assert [line["status"] for line in await relay.events(count=2)] == [200, 200], "the refused call has no exchange"


async def test_a_shed_call_gets_an_error_in_the_vendors_format_and_is_counted(full: Any) -> None:
    relay, connect, _ = full
    connection = await connect()
    for number in range(3):
        connection.send(request("/api/v1/ai-gateway/providers/anthropic/v1/messages"))
        _, _, body = await connection.answer()
        assert json.loads(body)["error"]["type"] == "api_error", number
    logged = 0
    async with asyncio.timeout(HANG_GUARD_S):
        while logged < 3:
            logged = sum(line["requests"] for line in await relay.events("requests.shed"))
    _, _, ready = await relay.call("GET", f"{relay.url}/readyz")
    assert json.loads(ready)["requests_shed"] == logged == 3


@pytest.mark.parametrize(
    "sent",
    [
        [request()[: -len(BODY)], BODY],
        [request(PATH, "Origin: http://127.0.0.1")],
        [request(PATH, "Connection: close")],
        [request(PATH, "Expect: 100-continue")],
        [request("/api/v1/ai-gateway/providers/%6Fpenai/x")],
    ],
    ids=["body in another piece", "of a browser", "last of its connection", "expects 100", "escaped path"],
)
async def test_requests_that_need_more_parsing_are_refused_by_the_concurrency_limit(sent: list[bytes], full: Any) -> None:
    relay, connect, _ = full
    connection = await connect()
    for piece in sent:
        connection.send(piece)
        await asyncio.sleep(0.05)
    status, headers, _ = await connection.answer()
    assert status in (503, 404) and "cf-aig-log-id" in headers
    assert relay.gateway.requests_shed == 0


async def test_a_request_in_two_pieces_is_shed_once_it_is_complete(full: Any) -> None:
    relay, connect, _ = full
    connection = await connect()
    for piece in (request()[:40], request()[40:]):
        connection.send(piece)
        await asyncio.sleep(0.05)
    assert (await connection.answer())[0] == 503 and relay.gateway.requests_shed == 1


async def test_health_and_management_respond_at_the_concurrency_limit(full: Any) -> None:
    relay, _, _ = full
    for path in ("/healthz", "/readyz", "/api/v1/ai-gateway/providers"):
        assert (await relay.call("GET", f"{relay.url}{path}"))[0] == 200, path


async def test_pipelined_requests_get_their_answers_in_order(full: Any) -> None:
    _, connect, free = full
    connection = await connect()
    connection.send(request("/healthz", body=b"") + request())
    statuses = [(await connection.answer())[0] for _ in range(2)]
    assert statuses == [404, 503], "POST /healthz does not exist"
    connection.send(request())
    connection.send(request())
    assert [(await connection.answer())[0] for _ in range(2)] == [503, 503]
    await free()
    connection.send(request() + request())
    assert [(await connection.answer())[0] for _ in range(2)] == [200, 200]


async def test_a_request_that_arrives_while_another_is_answered_waits_for_its_turn(full: Any, raw: RawUpstream) -> None:
    relay, connect, free = full
    await free()
    gate = asyncio.Event()
    raw.scripts.clear()
    raw.plays(gate, ok(b"first"))
    raw.plays(ok(b"second"))
    connection = await connect()
    connection.send(request())
    async with asyncio.timeout(HANG_GUARD_S):
        while relay.gateway.limits.running < 1:
            await asyncio.sleep(0.01)
    connection.send(request())
    await asyncio.sleep(0.05)
    gate.set()
    assert [(await connection.answer())[2] for _ in range(2)] == [b"first", b"second"]


async def test_of_many_concurrent_requests_only_those_within_the_limit_become_calls(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(b"fine"))
    relay = await start({"limits": [{"calls_at_once": 3}]}, openai=provider(raw.url))
    connections = [Connection(*await asyncio.open_connection("127.0.0.1", relay.port)) for _ in range(50)]
    for connection in connections:
        connection.send(request())
    async with asyncio.timeout(HANG_GUARD_S):
        while relay.gateway.requests_shed < 47:
            await asyncio.sleep(0.01)
    gate.set()
    statuses = [(await connection.answer())[0] for connection in connections]
    assert (statuses.count(200), statuses.count(503)) == (3, 47)
    assert not relay.gateway.admitted
    for connection in connections:
        connection._writer.close()


async def test_an_invalid_request_does_not_count_towards_the_limit(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"fine"))
    relay = await start({"limits": [{"calls_at_once": 1}]}, openai=provider(raw.url))
    for path in (f"{PATH}/../x", f"{PATH}/%2e%2e/x", "/api/v1/ai-gateway/providers/nobody/x"):
        connection = Connection(*await asyncio.open_connection("127.0.0.1", relay.port))
        connection.send(request(path))
        assert (await connection.answer())[0] in (400, 404)
        assert not relay.gateway.admitted
        connection.send(request())
        assert (await connection.answer())[0] == 200
        connection._writer.close()


async def test_a_body_that_looks_like_a_request_is_not_answered_as_one(full: Any, raw: RawUpstream) -> None:
    """Bytes of a body that look like a request are not one: the parser finds where one begins."""
    _, connect, free = full
    connection = await connect()
    inner = request()
    connection.send(b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(inner))
    await asyncio.sleep(0.05)
    connection.send(inner)
    status, headers, _ = await connection.answer()
    assert (status, "cf-aig-log-id" in headers) == (503, True)
    await free()
    connection.send(request())
    assert (await connection.answer())[::2] == (200, b"fine")
    assert len(raw.arrived) == 2



async def test_the_calls_of_every_surface_are_shed_and_take_the_fast_path(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    add_routes = native.add_routes

    def add_twice(app: web.Application, prefix: str) -> None:
        add_routes(app, prefix)
        add_routes(app, "/elsewhere")

    async def resolve(*_: object) -> None:
        raise AssertionError("the routing table was used")

    monkeypatch.setattr(native, "add_routes", add_twice)
    gates, steps = gated_events(1)
    raw.plays(*steps)
    relay = await start({"limits": [{"calls_at_once": 1}]}, openai=provider(raw.url))
    monkeypatch.setattr(relay.app.router, "resolve", resolve)
    elsewhere = f"{relay.url}/elsewhere/providers/openai/x"
    running = asyncio.create_task(relay.call("GET", elsewhere))
    async with asyncio.timeout(HANG_GUARD_S):
        while not raw.arrived:
            await asyncio.sleep(0.01)
    for url in (elsewhere, relay.path("openai", "x")):
        status, headers, _ = await relay.call("GET", url)
        assert (status, headers["x-relay-error"]) == (503, "overloaded")
    gates[0].set()
    assert (await running)[0] == 200
    assert relay.gateway.requests_shed == 2
