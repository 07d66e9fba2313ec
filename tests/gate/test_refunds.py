"""Refunds through a running relay: all if a call was refused, the unused part if it was sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conftest import StartRelay, Vendors
from tests.redis import RedisServer
from tests.relays import HANG_GUARD_S, Relay, provider
from tests.tools import need
from tests.upstream.raw import RawUpstream, gated_events, ok

WINDOW_S = 1_000_000
Begin = Callable[..., Awaitable[Relay]]


@pytest.fixture(params=["memory", "redis"])
async def begin(request: pytest.FixtureRequest, start: StartRelay, raw: RawUpstream, tmp_path: Path) -> AsyncIterator[Begin]:
    """`await begin(rule, rule)` start_relay a relay that counts in memory, or in Redis."""
    document: dict[str, Any] = {}
    server = RedisServer(tmp_path)
    if request.param == "redis":
        need("redis-server")
        await server.start()
        document["redis"] = {"url": server.url, "timeout_s": 5}

    async def start_relay(*limits: dict[str, Any], **providers: Any) -> Relay:
        rules = [{"window_s": WINDOW_S} | each if {"requests", "tokens", "handshakes"} & set(each) else each for each in limits]
        known = {"openai": provider(raw.url), "unset": provider(raw.url, "NOT_SET_KEY", websocket={"default_path": "x"})} | providers
        return await start(document | {"limits": rules}, **known)

    yield start_relay
    await server.stop()


async def _post(relay: Relay, headers: dict[str, str] | None = None, name: str = "openai", **body: Any) -> tuple[int, Any, bytes]:
    return await _post_text(relay, json.dumps({"model": "m"} | body).encode(), headers, name)


async def _post_text(relay: Relay, body: bytes, headers: dict[str, str] | None = None, name: str = "openai") -> tuple[int, Any, bytes]:
    """Make a call, and wait until what it did not use is given back."""
    headers = {"Content-Type": "application/json"} | (headers or {})
    answer = await relay.call("POST", relay.path(name, "chat/completions"), data=body, headers=headers)
    await relay.idle()
    await relay.gateway.background.done()
    return answer


def _remaining(headers: Any, name: str) -> int:
    return int(headers["ratelimit"].partition(f'"{name}";r=')[2].partition(";")[0])


async def _end_window(relay: Relay) -> None:
    """Let all windows end."""
    counters = relay.gateway.windows.local._counters
    clock = counters._clock
    counters._clock = lambda: clock() + 2 * WINDOW_S
    if relay.gateway.shared is not None:
        await relay.gateway.shared.client.flushall()


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a window of its model": ({"requests": 1, "per": "model", "name": "x"}, {"model": "m"}, "rate_limited"),
    "tokens": ({"tokens": 1000, "name": "x"}, {"max_tokens": 999}, "rate_limited"),
    "an unknown model": ({"requests": 9, "models": ["n"], "name": "x"}, {"model": None}, "model_unknown"),
    "a bad request": ({"requests": 9, "name": "x"}, {"headers": {"cf-aig-cache-ttl": "-1"}}, "bad_request"),
    "a bad number of attempts": ({"requests": 9, "name": "x"}, {"headers": {"cf-aig-max-attempts": "none"}}, "bad_request"),
    "a provider without a key": ({"requests": 9, "name": "x"}, {"name": "unset"}, "provider_not_configured"),
}


@pytest.mark.parametrize("why", REFUSALS)
async def test_a_refused_call_uses_nothing_whatever_refuses_it(why: str, begin: Begin, raw: RawUpstream) -> None:
    rule, refused, code = REFUSALS[why]
    raw.plays(ok(b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4}}'))
    relay = await begin({"requests": 100, "name": "all"}, rule)
    assert _remaining((await _post(relay))[1], "all") == 99
    for _ in range(3):
        if refused.get("model", "m") is None:
            answer = await _post_text(relay, b'{"model": "a", "model": "b"}')
        else:
            answer = await _post(relay, **refused)
        assert answer[1]["x-relay-error"] == code, answer
    assert len(raw.arrived) == 1
    _, headers, _ = await _post(relay, model="other", max_tokens=1)
    assert _remaining(headers, "all") == 98


@pytest.mark.parametrize("rule", [{"calls_at_once": 1, "per": "model"}, {"calls_at_once": 1, "per": "provider"}, {"calls_at_once": 1, "per": ["client", "model"]}])
async def test_a_call_refused_by_a_concurrency_limit_uses_nothing(rule: dict[str, Any], begin: Begin, raw: RawUpstream) -> None:
    gates, steps = gated_events(1)
    raw.plays(*steps)
    raw.plays(ok(b"{}"))
    relay = await begin({"requests": 100, "name": "all"}, {"tokens": 10_000, "name": "t"}, rule)
    async with relay.client.post(relay.path("openai", "chat/completions"), json={"model": "m"}) as running:
        for _ in range(3):
            status, headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m"})
            assert headers["x-relay-error"] in ("overloaded", "rate_limited") and status in (429, 503)
        gates[0].set()
        await running.read()
    _, headers, _ = await _post(relay)
    assert _remaining(headers, "all") == 98
    assert relay.gateway.limits._running == {}  # type: ignore[union-attr]


async def test_a_client_that_disconnects_before_its_call_is_sent_uses_nothing(begin: Begin, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await begin({"requests": 100, "name": "all"})
    _, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    path = relay.path("openai", "x").partition(str(relay.port))[2]
    writer.write(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{{".encode())
    async with asyncio.timeout(HANG_GUARD_S):
        while not any(exchange.waiting.for_ == "request_body" for exchange in relay.gateway.running):
            await asyncio.sleep(0.005)
    writer.transport.abort()
    await relay.idle()
    await relay.gateway.background.done()
    assert _remaining((await _post(relay))[1], "all") == 99


async def test_a_call_that_was_sent_counts_however_it_ends(begin: Begin, raw: RawUpstream) -> None:
    raw.plays("close")
    raw.plays(ok(b"{}", status="400 Bad Request"))
    raw.plays(ok(b"{}"))
    relay = await begin({"requests": 100, "name": "all"})
    assert [(await _post(relay))[0] for _ in range(2)] == [502, 400]
    assert _remaining((await _post(relay))[1], "all") == 97


async def test_a_response_from_the_cache_counts_as_a_request(begin: Begin, raw: RawUpstream) -> None:
    raw.plays(ok(b'{"choices": [{"finish_reason": "stop"}]}', "Content-Type: application/json"))
    relay = await begin({"requests": 100, "name": "all"})
    cached = {"cf-aig-cache-ttl": "600"}
    assert [_remaining((await _post(relay, cached))[1], "all") for _ in range(3)] == [99, 98, 97]
    assert len(raw.arrived) == 1


async def test_a_handshake_that_is_refused_before_it_is_sent_uses_nothing(begin: Begin, vendors: Vendors) -> None:
    relay = await begin({"handshakes": 1, "per": "client"}, {"sessions_at_once": 1, "per": "client"}, **vendors.entries())
    for _ in range(2):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await relay.client.ws_connect(relay.ws("unset"))
        assert refused.value.headers is not None and refused.value.headers["x-relay-error"] == "provider_not_configured"
        await relay.idle()
        await relay.gateway.background.done()
    async with relay.client.ws_connect(relay.ws("openai")):
        pass
    await relay.idle()
    assert relay.gateway.limits._running == {}  # type: ignore[union-attr]


@pytest.mark.parametrize("technique", ["fixed", "sliding"])
async def test_tokens_that_are_refunded_late_do_not_raise_the_limit(technique: str, begin: Begin, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(b'{"usage": {"prompt_tokens": 50, "completion_tokens": 50}}'))
    raw.plays(ok(b'{"usage": {"prompt_tokens": 100, "completion_tokens": 500}}'))
    relay = await begin({"tokens": 1000, "technique": technique, "name": "t"})
    early = asyncio.create_task(relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m", "max_tokens": 2000}))
    async with asyncio.timeout(HANG_GUARD_S):
        while not raw.arrived:
            await asyncio.sleep(0.005)
    await _end_window(relay)
    later = asyncio.create_task(relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m", "max_tokens": 2000}))
    assert (await later)[0] == 200
    gate.set()
    assert (await early)[0] == 200
    await relay.idle()
    await relay.gateway.background.done()
    status, headers, _ = await _post(relay, max_tokens=2000)
    assert (status, _remaining(headers, "t")) == (429, 400), "600 were used in this window"


async def test_tokens_used_beyond_the_reservation_count_when_they_are_known(begin: Begin, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(b'{"usage": {"prompt_tokens": 100, "completion_tokens": 500}}'))
    raw.plays(ok(b'{"usage": {"prompt_tokens": 1, "completion_tokens": 1}}'))
    relay = await begin({"tokens": 1000, "name": "t"})
    early = asyncio.create_task(relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m", "max_tokens": 90}))
    async with asyncio.timeout(HANG_GUARD_S):
        while not raw.arrived:
            await asyncio.sleep(0.005)
    await _end_window(relay)
    gate.set()
    assert (await early)[0] == 200
    await relay.idle()
    await relay.gateway.background.done()
    reserved = len(b'{"model": "m", "max_tokens": 90}') // 4 + 90
    status, headers, _ = await _post(relay, max_tokens=2000)
    assert (status, _remaining(headers, "t")) == (429, 1000 - (600 - reserved))


async def test_a_token_limit_holds_for_concurrent_calls(begin: Begin, raw: RawUpstream) -> None:
    raw.plays(ok(b'{"usage": {"prompt_tokens": 40, "completion_tokens": 60}}'))
    relay = await begin({"requests": 1000, "name": "all"}, {"tokens": 1000, "name": "t"})
    answers: list[Any] = []
    for _ in range(6):
        answers += await asyncio.gather(*(relay.call("POST", relay.path("openai", "x"), json={"max_tokens": 200}) for _ in range(8)))
        await relay.idle()
        await relay.gateway.background.done()
    sent = [status for status, _, _ in answers].count(200)
    assert len(raw.arrived) == sent and 8 <= sent <= 10
    status, headers, _ = await _post(relay, max_tokens=1)
    assert status == 429 or _remaining(headers, "all") == 1000 - sent - 1
