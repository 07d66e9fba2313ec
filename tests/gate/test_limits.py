"""Calls at once: who is refused, who is not, and that every place is given back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from relay.core.errors import Overloaded, RateLimited
from relay.gate.limits import AtOnce, Limits
from relay.listen import CannotListen, check_workers
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, configured, provider
from tests.upstream.raw import SILENCE, RawUpstream, gated_events, ok
from tests.upstream.vendors import vendor


def test_all_rules_are_tested_before_one_counts() -> None:
    limits = Limits([AtOnce(2, "all"), AtOnce(1, "provider"), AtOnce(1, "address", frozenset({"b"}))])
    first = limits.admit("a", "1.1.1.1")
    with pytest.raises(Overloaded):
        limits.admit("a", "2.2.2.2")
    second = limits.admit("b", "1.1.1.1")
    with pytest.raises(Overloaded):
        limits.admit("c", "3.3.3.3")
    limits.leave(first)
    limits.leave(second)
    assert limits._running == {}


def test_a_clients_own_limit_is_told_from_the_relays() -> None:
    limits = Limits([AtOnce(1, "address")])
    limits.admit("a", "1.1.1.1")
    limits.admit("a", "2.2.2.2")
    with pytest.raises(RateLimited):
        limits.admit("b", "1.1.1.1")


async def _held(relay: Relay, name: str, count: int) -> list[asyncio.Task[Any]]:
    """`count` calls that run until their provider answers."""
    calls = [asyncio.create_task(relay.call("POST", relay.path(name, "x"), data=b"{}")) for _ in range(count)]
    async with asyncio.timeout(HANG_GUARD_S):
        while len(relay.gateway.running) < count:
            await asyncio.sleep(0.01)
    return calls


async def test_a_provider_that_hangs_takes_no_room_from_the_others(start: StartRelay, raw: RawUpstream, aiohttp_server: Any) -> None:
    gate = asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        await gate.wait()
        return web.json_response({})

    server = await aiohttp_server(vendor(("POST", "/x", hang)))
    raw.plays(ok(b"fine"))
    relay = await start({"limits": [{"calls_at_once": 5, "per": "provider"}]}, slow=provider(str(server.make_url(""))), well=provider(raw.url))
    calls = await _held(relay, "slow", 5)
    status, headers, body = await relay.call("POST", relay.path("slow", "x"), data=b"{}")
    assert (status, headers["x-relay-error"], headers["retry-after"]) == (503, "overloaded", "1")
    assert json.loads(body)["error"]["code"] == "overloaded" and "x-should-retry" not in headers
    assert (await relay.call("POST", relay.path("well", "x"), data=b"{}"))[2] == b"fine"
    gate.set()
    assert {status for status, _, _ in await asyncio.gather(*calls)} == {200}
    assert (await relay.call("POST", relay.path("slow", "x"), data=b"{}"))[0] == 200


async def test_a_client_with_too_many_calls_is_told_429(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(1)
    raw.plays(*steps)
    relay = await start({"server": {"trusted_proxies": ["127.0.0.1"]}, "limits": [{"calls_at_once": 1, "per": "address"}]}, openai=provider(raw.url))
    async with relay.client.get(relay.path("openai", "x"), headers={"X-Forwarded-For": "198.51.100.7"}) as streaming:
        status, headers, _ = await relay.call("GET", relay.path("openai", "x"), headers={"X-Forwarded-For": "198.51.100.7"})
        assert (status, headers["x-relay-error"]) == (429, "rate_limited")
        other = asyncio.create_task(relay.call("GET", relay.path("openai", "x"), headers={"X-Forwarded-For": "198.51.100.8"}))
        gates[0].set()
        await streaming.read()
        assert (await other)[0] == 200


async def test_every_place_is_given_back_however_a_call_ends(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays("close")
    relay = await start({"limits": [{"calls_at_once": 3}]}, openai=provider(raw.url), unset=provider(raw.url, "NOT_SET_KEY"))
    for _ in range(5):
        assert (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[0] == 502
        assert (await relay.call("POST", relay.path("unset", "x"), data=b"{}"))[0] == 503
    raw.scripts.clear()
    raw.plays(SILENCE)
    leaving = await _held(relay, "openai", 3)
    for task in leaving:
        task.cancel()
    await relay.idle()
    assert relay.gateway.limits._running == {}


async def test_a_reload_leaves_what_runs_in_its_own_count(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(1)
    raw.plays(*steps)
    relay = await start({"limits": [{"calls_at_once": 1}]}, openai=provider(raw.url))
    before = relay.gateway.limits
    async with relay.client.get(relay.path("openai", "x")) as streaming:
        relay.gateway.replace(relay.gateway.config)
        gates[0].set()
        await streaming.read()
    await relay.idle()
    assert before._running == {} and relay.gateway.limits._running == {}


def test_several_workers_cannot_keep_a_limit_per_address(tmp_path: Any) -> None:
    config, _ = configured(tmp_path, {"server": {"workers": 2}, "limits": [{"calls_at_once": 1, "per": "address"}]})
    with pytest.raises(CannotListen, match="per address"):
        check_workers(config)
