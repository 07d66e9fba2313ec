"""`calls_at_once`: whatever a request was and however it ended, its slot is free again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from relay.registry.changes import Reloaded
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, provider
from tests.upstream.raw import LAST_CHUNK, SILENCE, SSE_HEAD, RawUpstream, chunk, ok

CALLS = "/api/v1/ai-gateway/providers"
Connect = Callable[[], Awaitable["Connection"]]


class Connection:
    """A keep-alive connection that sends raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    def send(self, *requests: bytes) -> None:
        self.writer.write(b"".join(requests))

    async def status(self, method: str = "POST") -> int:
        """Read the next response and return its status."""
        async with asyncio.timeout(HANG_GUARD_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
            lengths = [line.partition(":")[2] for line in head.split("\r\n") if line.startswith("content-length:")]
            if lengths and method != "HEAD":
                await self._reader.readexactly(int(lengths[0]))
        return int(head.split()[1])


def request(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


CALL = request("POST", f"{CALLS}/openai/chat/completions", body=b'{"model": "m"}')


@pytest.fixture
async def one_slot(start: StartRelay, raw: RawUpstream) -> AsyncIterator[tuple[Relay, Connect]]:
    """(relay, connect): a relay that runs one call at a time."""
    raw.plays(ok(b"fine"))
    relay = await start({"limits": [{"calls_at_once": 1}]}, openai=provider(raw.url))
    connections: list[Connection] = []

    async def connect() -> Connection:
        connections.append(Connection(*await asyncio.open_connection("127.0.0.1", relay.port)))
        return connections[-1]

    yield relay, connect
    for connection in connections:
        connection.writer.close()


async def _check_free(relay: Relay, connect: Connect) -> None:
    """Check that another connection gets the only slot."""
    await relay.idle()
    other = await connect()
    other.send(CALL)
    assert await other.status() == 200
    await relay.idle()
    assert not relay.gateway.admitted and not relay.gateway.limits._running  # type: ignore[union-attr]


PREFLIGHT_METHOD = "Access-Control-Request-Method: POST"
REQUESTS = {
    "a preflight without an Origin": request("OPTIONS", f"{CALLS}/openai/x", PREFLIGHT_METHOD),
    "a preflight of management": request("OPTIONS", f"{CALLS}/reload", PREFLIGHT_METHOD),
    "an OPTIONS that is a call": request("OPTIONS", f"{CALLS}/openai/x"),
    "a reload": request("POST", f"{CALLS}/reload"),
    "a reload from another machine": request("POST", f"{CALLS}/reload", "X-Forwarded-For: 198.51.100.1"),
    "a reload by another method": request("PUT", f"{CALLS}/reload", body=b"{}"),
    "a reload with an unknown expectation": request("POST", f"{CALLS}/reload", "Expect: a-miracle", body=b"{}"),
    "a call with an unknown expectation": request("POST", f"{CALLS}/openai/x", "Expect: a-miracle", body=b"{}"),
    "below reload": request("GET", f"{CALLS}/reload/more"),
    "no provider": request("GET", f"{CALLS}/"),
    "no such provider": request("GET", f"{CALLS}/nobody/x"),
    "a bad path": request("GET", f"{CALLS}/openai/%2e%2e/x"),
    "a foreign host": request("GET", f"{CALLS}/openai/x").replace(b"127.0.0.1", b"evil.example"),
    "TRACE": request("TRACE", f"{CALLS}/openai/x"),
    "an upgrade without a connection header": request("GET", f"{CALLS}/openai/x", "Upgrade: websocket"),
    "an upgrade that is not WebSocket": request("GET", f"{CALLS}/openai/x", "Upgrade: h2c", "Connection: Upgrade"),
    "a bad chunked body": request("POST", f"{CALLS}/reload", "Transfer-Encoding: chunked") + b"zz\r\n",
    "a wrong coding": request("POST", f"{CALLS}/openai/x", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
}


@pytest.mark.parametrize("what", REQUESTS)
async def test_a_request_holds_no_slot_after_its_response(what: str, one_slot: tuple[Relay, Connect]) -> None:
    relay, connect = one_slot
    connection = await connect()
    connection.send(REQUESTS[what])
    await connection.status()
    await _check_free(relay, connect)


async def test_a_head_request_holds_no_slot(one_slot: tuple[Relay, Connect], raw: RawUpstream) -> None:
    relay, connect = one_slot
    connection = await connect()
    for path in (f"{CALLS}/reload", f"{CALLS}/nobody/x"):
        connection.send(request("HEAD", path))
        assert await connection.status("HEAD") >= 400
    await _check_free(relay, connect)


async def test_a_management_request_that_fails_holds_no_slot(one_slot: tuple[Relay, Connect]) -> None:
    relay, connect = one_slot

    async def fail() -> None:
        raise RuntimeError("injected failure")

    relay.gateway.reload = fail
    connection = await connect()
    connection.send(request("POST", f"{CALLS}/reload"))
    assert await connection.status() == 500
    await _check_free(relay, connect)


async def test_a_running_management_request_takes_no_slot(one_slot: tuple[Relay, Connect]) -> None:
    relay, connect = one_slot
    running, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> Reloaded:
        running.set()
        await go_on.wait()
        return Reloaded([], [])

    relay.gateway.reload = wait
    connection = await connect()
    connection.send(request("POST", f"{CALLS}/reload"))
    async with asyncio.timeout(HANG_GUARD_S):
        await running.wait()
    await _check_free(relay, connect)
    go_on.set()
    assert await connection.status() == 200


@pytest.mark.parametrize("first", ["a preflight without an Origin", "a reload", "no such provider"])
async def test_pipelined_requests_hold_no_slot(first: str, one_slot: tuple[Relay, Connect]) -> None:
    relay, connect = one_slot
    connection = await connect()
    connection.send(REQUESTS[first], REQUESTS[first], CALL, REQUESTS[first])
    statuses = [await connection.status() for _ in range(4)]
    assert statuses[2] == 200
    await _check_free(relay, connect)


async def test_garbage_after_a_request_holds_no_slot(one_slot: tuple[Relay, Connect]) -> None:
    relay, connect = one_slot
    connection = await connect()
    connection.send(CALL, b"garbage\r\n\r\n")
    assert await connection.status() in (200, 400)
    await _check_free(relay, connect)


async def test_a_client_that_disconnects_before_its_request_is_handled_holds_no_slot(one_slot: tuple[Relay, Connect]) -> None:
    relay, connect = one_slot
    for _ in range(20):
        gone = await connect()
        gone.send(CALL)
        gone.writer.transport.abort()
    async with asyncio.timeout(HANG_GUARD_S):
        while relay.gateway.admitted or relay.gateway.running:
            await asyncio.sleep(0.01)
    await _check_free(relay, connect)


async def test_a_call_that_is_aborted_while_it_runs_holds_no_slot(one_slot: tuple[Relay, Connect], raw: RawUpstream) -> None:
    relay, connect = one_slot
    raw.scripts[:] = [(SILENCE,), (ok(b"fine"),)]
    gone = await connect()
    gone.send(CALL)
    async with asyncio.timeout(HANG_GUARD_S):
        while not raw.arrived:
            await asyncio.sleep(0.01)
    gone.writer.transport.abort()
    await _check_free(relay, connect)


async def test_all_slots_are_usable_after_many_other_requests(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"fine"))
    relay = await start({"limits": [{"calls_at_once": 3}]}, openai=provider(raw.url))
    opened = [Connection(*await asyncio.open_connection("127.0.0.1", relay.port)) for _ in range(9)]
    for at, connection in enumerate(opened):
        connection.send(list(REQUESTS.values())[at])
        await connection.status()
    gate = asyncio.Event()
    raw.scripts[:] = [(gate, ok(b"fine"))]
    calls: list[asyncio.Task[Any]] = [asyncio.create_task(relay.call("POST", relay.path("openai", "x"), data=b"{}")) for _ in range(3)]
    async with asyncio.timeout(HANG_GUARD_S):
        while len(raw.arrived) < 4:  # one of the other requests, an OPTIONS, was a call
            await asyncio.sleep(0.01)
    gate.set()
    assert [(await call)[0] for call in calls] == [200, 200, 200]
    for connection in opened:
        connection.writer.close()


async def test_the_bytes_of_a_body_are_released_once_if_the_provider_responds_early(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a streamed body are released piece by piece, even after the response head."""
    gate = asyncio.Event()
    raw.plays("early", SSE_HEAD, chunk(b"data: 0\n\n"), gate, LAST_CHUNK)
    relay = await start({"server": {"buffer_bytes": 4 << 20, "body_idle_timeout_s": HANG_GUARD_S}}, openai=provider(raw.url))
    gateway, lowest = relay.gateway, [0]
    let_go = gateway.let_go

    def watched(exchange: Any, count: int) -> None:
        let_go(exchange, count)
        lowest.append(min(gateway.held_bytes, exchange.request.held_bytes))

    monkeypatch.setattr(gateway, "let_go", watched)

    async def upload() -> AsyncIterator[bytes]:
        for _ in range(128):  # without a length, so it is buffered up to the limit
            yield bytes(1 << 16)

    async with relay.client.post(relay.path("openai", "files"), data=upload()) as answer:
        assert await answer.content.readany() == b"data: 0\n\n"
        async with asyncio.timeout(HANG_GUARD_S):
            while gateway.held_bytes > 0:
                await asyncio.sleep(0.01)
        gate.set()
        await answer.read()
    await relay.idle()
    assert len(lowest) > 2 and min(lowest) == 0 and gateway.held_bytes == 0


@pytest.mark.parametrize("first", [True, False])
async def test_a_callback_that_raises_at_the_end_of_a_call_stops_neither_limits_nor_cache_nor_ledger(
    start: StartRelay, raw: RawUpstream, first: bool
) -> None:
    raw.plays(ok(b'{"data": []}', "Content-Type: application/json"))
    relay = await start({"limits": [{"calls_at_once": 1}], "cache": {"ttl_s": 60}}, openai=provider(raw.url))
    begin = relay.gateway.begin

    def fails() -> None:
        raise RuntimeError("injected failure")

    def beginning(*args: Any) -> Any:
        exchange = begin(*args)
        if first:
            exchange.at_end += (fails,)
        return exchange

    release = relay.gateway.release

    def releasing(exchange: Any) -> None:
        if not first:
            exchange.at_end += (fails,)
        release(exchange)

    relay.gateway.begin, relay.gateway.release = beginning, releasing  # type: ignore[method-assign]
    for cache_status in ("MISS", "HIT"):
        status, headers, _ = await relay.call("GET", relay.path("openai", "models"))
        assert (status, headers["cf-aig-cache-status"]) == (200, cache_status)
        await relay.idle()
        assert relay.gateway.limits._running == {}  # type: ignore[union-attr]
    assert [line["outcome"] for line in await relay.events(count=2)] == ["relayed", "cached"]
    assert len(await relay.events("exchange.close_failed", 2)) == 2


async def test_a_response_whose_caching_fails_with_an_internal_error_is_recorded(
    start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.plays(ok(b'{"data": []}', "Content-Type: application/json"))
    relay = await start({"limits": [{"calls_at_once": 1}], "cache": {"ttl_s": 60}}, openai=provider(raw.url))

    def fails(*_: Any) -> None:
        raise RuntimeError("injected failure")

    monkeypatch.setattr(relay.gateway.cache, "put", fails)
    assert (await relay.call("GET", relay.path("openai", "models")))[0] == 200
    await relay.idle()
    assert relay.gateway.limits._running == {}  # type: ignore[union-attr]
    assert [line["outcome"] for line in await relay.events()] == ["relayed"]


async def test_a_key_is_not_busy_after_an_attempt_with_an_internal_error(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(ok(b"fine"))
    keys = {"header": "Authorization", "value": ["Bearer ${OPENAI_API_KEY}", "Bearer ${GROQ_API_KEY}"], "pool": "least_busy"}
    relay = await start(openai={"base_url": raw.url, "auth": keys})

    def fail(*_: Any) -> None:
        raise RuntimeError("injected failure")

    with monkeypatch.context() as patch:
        patch.setattr("relay.calls.attempt.send", fail)
        for _ in range(3):
            assert (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[0] == 500
    assert (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[0] == 200
    await relay.idle()
    assert {state.running for state in relay.gateway.attempts.health._keys.values()} == {0}
