"""Shared calls: usage and cost are in the leader's row, whoever disconnects or whatever fails."""

from __future__ import annotations

import asyncio
import collections
import gc
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from relay.app import API, create
from relay.cache.inflight import Inflight
from relay.core.exchange import Caller, Exchange, Request
from relay.core.record import Record
from relay.gateway import GATEWAY
from relay.periodic import sweep
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, provider, write_config
from tests.upstream.raw import CLOSE, LAST_CHUNK, SILENCE, SSE_HEAD, RawUpstream, chunk, ok

USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}\n\n'
FIRST, SECOND = b"data: 1\n\n", b"data: 2\n\n"
COST = 10 * 1000 + 5 * 2000
"""The cost of a call whose usage arrived, in billionths of a dollar."""
SHARED: dict[str, Any] = {"cache": {"coalesce": True}}
PRICES = {"pricing": [{"input_per_mtok": 1, "output_per_mtok": 2}]}


async def begin(start: StartRelay, raw: RawUpstream, document: dict[str, Any] | None = None, **entry: Any) -> tuple[Relay, list[Record]]:
    """Start a relay that shares calls; return it with the list of finished records."""
    relay = await start(SHARED | (document or {}), openai=provider(raw.url, **(PRICES | entry)))
    records: list[Record] = []
    relay.gateway.ledger.counted.append(lambda finished, _sums: records.extend(finished))
    return relay, records


Call = asyncio.Task[tuple[int, bytes]]


async def post(relay: Relay, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    url = relay.path("openai", "chat/completions")
    async with relay.client.post(url, json={"model": "m", "stream": True}, headers=headers) as answer:
        return answer.status, await answer.read()


async def start_together(relay: Relay, count: int) -> list[Call]:
    """Start `count` clients of one shared call; the first one leads."""
    calls: list[Call] = []
    async with asyncio.timeout(HANG_GUARD_S):
        for more in (1, count - 1):
            calls += [asyncio.create_task(post(relay)) for _ in range(more)]
            while len(relay.gateway.running) < len(calls) + 1:  # and the shared call itself
                await asyncio.sleep(0.005)
    return calls


async def wait_until(condition: Any) -> None:
    async with asyncio.timeout(HANG_GUARD_S):
        while not condition():
            await asyncio.sleep(0.005)


async def disconnect(relay: Relay, *calls: Call) -> None:
    """Disconnect these clients and wait until the relay has noticed."""
    running = len(relay.gateway.running)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await wait_until(lambda: len(relay.gateway.running) <= running - len(calls))


def outcomes(records: list[Record]) -> list[tuple[str, int | None]]:
    """Return (outcome, cost) of each record, the leader's first."""
    leading = sorted(records, key=lambda record: (record.cache != "MISS", record.id))
    return [(record.outcome, record.cost_nano_usd) for record in leading]


def cost(records: list[Record]) -> int:
    return sum(record.cost_nano_usd or 0 for record in records)


async def test_a_leader_that_disconnects_before_the_head_is_client_gone_and_has_the_cost(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, SSE_HEAD, chunk(FIRST), chunk(USAGE), LAST_CHUNK)
    relay, records = await begin(start, raw)
    leader, *others = await start_together(relay, 3)
    await wait_until(lambda: raw.arrived)
    await disconnect(relay, leader)
    gate.set()
    assert [await each for each in others] == [(200, FIRST + USAGE)] * 2 and len(raw.arrived) == 1
    await relay.idle()
    assert outcomes(records) == [("client_gone", COST), ("cached", 0), ("cached", 0)]
    row = next(record for record in records if record.cache == "MISS")
    assert (row.error, row.first_byte_ms, row.bytes_down) == ("client_gone", None, 0)
    assert row.usage is not None and row.usage.tokens == 15
    assert {record.saved_nano_usd for record in records if record.cache == "HIT"} == {COST}


async def test_a_leader_that_disconnects_during_the_stream_is_client_gone_and_has_the_cost(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(FIRST), gate, chunk(SECOND), chunk(USAGE), LAST_CHUNK)
    relay, records = await begin(start, raw)
    url = relay.path("openai", "chat/completions")
    leading = await relay.client.post(url, json={"model": "m", "stream": True})
    assert await leading.content.readexactly(len(FIRST)) == FIRST
    other = asyncio.create_task(post(relay))
    await wait_until(lambda: len(relay.gateway.running) == 3)
    leading.close()
    await wait_until(lambda: len(relay.gateway.running) == 2)
    gate.set()
    assert await other == (200, FIRST + SECOND + USAGE)
    await relay.idle()
    assert outcomes(records) == [("client_gone", COST), ("cached", 0)]
    row = next(record for record in records if record.cache == "MISS")
    assert row.bytes_down == len(FIRST) and row.first_byte_ms is not None


async def test_the_periodic_sweep_does_not_expire_a_leader_that_has_disconnected(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(FIRST), gate, chunk(USAGE), LAST_CHUNK)
    relay, records = await begin(start, raw)
    leading = await relay.client.post(relay.path("openai", "chat/completions"), json={"model": "m", "stream": True})
    await leading.content.readexactly(len(FIRST))
    other = asyncio.create_task(post(relay))
    await wait_until(lambda: len(relay.gateway.running) == 3)
    leading.close()
    await wait_until(lambda: not any(exchange.cache is not None and exchange.cache.leads and exchange.state != "ended" for exchange in relay.gateway.running))
    clock, relay.gateway.clock = relay.gateway.clock, lambda: clock() + 100_000
    for exchange in relay.gateway.running:  # the clients that stayed were active just now
        exchange.waiting.since_s += 100_000
    await sweep(relay.gateway)
    gate.set()
    assert await other == (200, FIRST + USAGE)
    await relay.idle()
    assert outcomes(records) == [("client_gone", COST), ("cached", 0)]


async def test_a_leader_releases_its_slot_when_it_disconnects(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, SSE_HEAD, chunk(USAGE), LAST_CHUNK)
    relay, _ = await begin(start, raw, {"limits": [{"calls_at_once": 2}]})
    leader, other = await start_together(relay, 2)
    await wait_until(lambda: raw.arrived)
    await disconnect(relay, leader)
    assert relay.gateway.limits is not None and relay.gateway.limits.running == 1
    again = asyncio.create_task(post(relay))
    await wait_until(lambda: relay.gateway.limits.running == 2)  # type: ignore[union-attr]
    gate.set()
    assert await other == await again == (200, USAGE)
    await relay.idle()
    assert relay.gateway.limits._running == {}


async def test_the_usage_until_all_clients_disconnect_is_in_the_leaders_row(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(FIRST), chunk(USAGE), SILENCE)
    relay, records = await begin(start, raw)
    streams = [await relay.client.post(relay.path("openai", "chat/completions"), json={"model": "m", "stream": True}) for _ in range(3)]
    for each in streams:
        await each.content.readexactly(len(FIRST + USAGE))
    for each in streams:
        each.close()
    async with asyncio.timeout(HANG_GUARD_S):
        await raw.closed.wait()
    await relay.idle()
    assert outcomes(records) == [("client_gone", COST), ("client_gone", 0), ("client_gone", 0)]
    assert len(relay.gateway.inflight) == 0


async def test_a_failure_of_the_provider_is_in_every_row_and_the_cost_in_one(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, SSE_HEAD, chunk(FIRST), chunk(USAGE), CLOSE)
    relay, records = await begin(start, raw)
    calls = await start_together(relay, 3)
    gate.set()
    assert all(isinstance(each, Exception) for each in await asyncio.gather(*calls, return_exceptions=True))
    await relay.idle()
    assert {(record.outcome, record.error) for record in records} == {("failed", "upstream_disconnected")}
    assert len(records) == 3 and cost(records) == COST


async def test_a_leader_that_disconnected_before_the_provider_fails_stays_client_gone(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, SSE_HEAD, chunk(USAGE), CLOSE)
    relay, records = await begin(start, raw)
    leader, other = await start_together(relay, 2)
    await wait_until(lambda: raw.arrived)
    await disconnect(relay, leader)
    gate.set()
    with pytest.raises(aiohttp.ClientError):
        await other
    await relay.idle()
    assert sorted((record.outcome, record.cost_nano_usd) for record in records) == [("client_gone", COST), ("failed", 0)]


@pytest.mark.parametrize("disconnects", [False, True])
@pytest.mark.parametrize("method", ["settle", "take"])
async def test_a_failure_while_the_call_is_closed_leaves_no_client_waiting(
    method: str, disconnects: bool, start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    raw.plays(gate, SSE_HEAD, chunk(FIRST), chunk(USAGE), LAST_CHUNK)
    relay, records = await begin(start, raw)
    leader, *others = await start_together(relay, 3)
    await wait_until(lambda: raw.arrived)
    if disconnects:
        await disconnect(relay, leader)
    original, failed = getattr(relay.gateway.ledger, method), []

    def fail_once(*args: Any) -> Any:
        if not failed:
            failed.append(args)
            raise RuntimeError("injected failure")
        return original(*args)

    monkeypatch.setattr(relay.gateway.ledger, method, fail_once)
    gate.set()
    stayed = others if disconnects else [leader, *others]
    answers = await asyncio.wait_for(asyncio.gather(*stayed, return_exceptions=True), HANG_GUARD_S)
    assert answers.count((200, FIRST + USAGE)) >= len(others)
    await relay.idle()
    assert failed and len(relay.gateway.inflight) == 0
    if method == "settle":
        assert len(records) == 3 and cost(records) == COST


async def test_a_failure_while_tokens_are_released_leaves_no_client_waiting(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = asyncio.Event()
    raw.plays(gate, SSE_HEAD, chunk(USAGE), LAST_CHUNK)
    relay, records = await begin(start, raw, {"limits": [{"tokens": 10**9}]})
    calls = await start_together(relay, 3)

    def fail(*_: Any) -> None:
        raise RuntimeError("injected failure")

    monkeypatch.setattr(relay.gateway.windows, "release", fail)
    gate.set()
    answers = await asyncio.wait_for(asyncio.gather(*calls), HANG_GUARD_S)
    assert {body for _, body in answers} == {USAGE}
    await relay.idle()
    assert cost(records) == COST and len(records) == 3


async def test_an_unexpected_failure_of_the_call_is_reported_to_its_leader_and_logged(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(SILENCE)
    relay, _ = await begin(start, raw)

    async def fail(*_: Any) -> None:
        raise RuntimeError("injected failure")

    monkeypatch.setattr(relay.gateway.attempts, "open", fail)
    assert (await asyncio.wait_for(post(relay), HANG_GUARD_S))[0] == 500
    (bug,) = await relay.events("exchange.failed")
    assert "injected failure" in bug["traceback"]
    (line,) = await relay.events()
    assert (line["error"], line["cause"]) == ("internal_error", "RuntimeError")


async def test_a_leader_that_is_refused_costs_nothing(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b'{"usage": {"prompt_tokens": 10, "completion_tokens": 5}}', "Content-Type: application/json"))
    relay, records = await begin(start, raw, {"limits": [{"tokens": 100, "name": "t"}]})
    assert (await post(relay, {"x-other": "1"}))[0] == 200
    assert (await post(relay))[0] == 429
    await relay.idle()
    assert [(record.outcome, record.cost_nano_usd) for record in records] == [("relayed", COST), ("refused", None)]
    assert len(raw.arrived) == 1


async def test_the_row_of_a_leader_that_disconnected_is_written_when_the_relay_stops(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(FIRST), chunk(USAGE), SILENCE)
    relay, records = await begin(start, raw)
    leading = await relay.client.post(relay.path("openai", "chat/completions"), json={"model": "m", "stream": True})
    await leading.content.readexactly(len(FIRST + USAGE))
    other = asyncio.create_task(post(relay))
    await wait_until(lambda: len(relay.gateway.running) == 3)
    leading.close()
    await wait_until(lambda: len(relay.gateway.running) == 2)
    await relay.runner.cleanup()
    await asyncio.gather(other, return_exceptions=True)
    assert len(records) == 2 and cost(records) == COST and not relay.gateway.running
    assert outcomes(records)[0] == ("client_gone", COST)


async def test_a_call_that_is_cancelled_before_its_first_step_ends_for_all_clients(start: StartRelay, raw: RawUpstream) -> None:
    """A stop cancels a task before its first step: none of its code runs, not even `finally`."""
    raw.plays(SILENCE)
    relay, records = await begin(start, raw)
    inflight, start_task = relay.gateway.inflight, relay.gateway.inflight.start

    def start_and_cancel(flight: Any, work: Any) -> Any:
        task = start_task(flight, work)
        task.cancel()
        return task

    inflight.start = start_and_cancel  # type: ignore[method-assign]
    assert (await asyncio.wait_for(post(relay), HANG_GUARD_S))[0] == 503
    await relay.idle()
    assert [record.error for record in records] == ["draining"] and not raw.arrived


async def test_a_mounted_leader_that_disconnects_does_not_end_the_other_calls(aiohttp_client: Any, tmp_path: Path, raw: RawUpstream) -> None:
    """In a mounted relay the sweep finds clients that are gone; the shared call has others."""
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(FIRST), gate, chunk(USAGE), LAST_CHUNK)
    entry = provider(raw.url, **PRICES)
    write_config(tmp_path, SHARED | {"providers": {"openai": entry}})
    host, inner = web.Application(), create(tmp_path / "gateway.yaml")
    host.add_subapp(API, inner)
    client = await aiohttp_client(host, server_kwargs={"skip_url_asserts": True})
    gateway = inner[GATEWAY]
    url = f"{API}/providers/openai/chat/completions"
    leading, other = [await client.post(url, json={"model": "m", "stream": True}) for _ in range(2)]
    for each in (leading, other):
        await each.content.readexactly(len(FIRST))
    leading.close()
    await wait_until(lambda: len(gateway.running) == 2)
    gate.set()
    assert await other.content.read() == USAGE


def test_no_client_joins_a_call_that_all_others_have_left() -> None:
    async def run() -> None:
        inflight = Inflight(lambda: 0.0)
        flight, _ = inflight.enter("k", 100)
        subscriber = flight.subscribe(Exchange("i", Request("rest", "POST", Caller("c"), 0.0)))
        task = inflight.start(flight, asyncio.sleep(60))  # type: ignore[arg-type]
        flight.unsubscribe(subscriber)
        again, leads = inflight.enter("k", 100)
        assert leads and again is not flight
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


async def test_the_body_of_a_shared_call_counts_as_buffered_until_it_is_sent(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(b"{}", "Content-Type: application/json"))
    relay, _ = await begin(start, raw)
    body = b'{"model": "m", "input": "%s"}' % (b"x" * 300_000)
    url = relay.path("openai", "chat/completions")

    async def call() -> int:
        async with relay.client.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
            return answer.status

    leader = asyncio.create_task(call())
    await wait_until(lambda: raw.arrived)
    other = asyncio.create_task(call())
    await wait_until(lambda: len(relay.gateway.running) == 3 and relay.gateway.held_bytes >= 2 * len(body))
    leader.cancel()
    await wait_until(lambda: len(relay.gateway.running) == 2)
    assert relay.gateway.held_bytes >= 2 * len(body), "the body of the follower, and that of the shared call"
    gate.set()
    assert await other == 200
    await relay.idle()
    assert relay.gateway.held_bytes == 0


async def _uncollected(relay: Relay, rounds: Any) -> dict[str, int]:
    """Count the objects that `rounds` leaves for the garbage collector, by type."""
    await rounds()
    gc.collect()
    gc.disable()
    try:
        await rounds()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return collections.Counter(type(each).__name__ for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def test_a_leader_that_disconnects_leaves_no_reference_cycles(start: StartRelay, raw: RawUpstream) -> None:
    relay, _ = await begin(start, raw)
    count = 20

    async def rounds() -> None:
        for _ in range(count):
            gate = asyncio.Event()
            raw.scripts[:] = [(gate, SSE_HEAD, chunk(USAGE), LAST_CHUNK)]
            arrived = len(raw.arrived)
            leader, other = await start_together(relay, 2)
            await wait_until(lambda: len(raw.arrived) > arrived)  # noqa: B023
            await disconnect(relay, leader)
            gate.set()
            assert await other == (200, USAGE)
        await relay.idle()

    abandoned = await _uncollected(relay, rounds)
    assert {name for name in ("Flight", "Exchange", "Subscriber", "RestAttempt") if abandoned.get(name, 0) >= count} == set(), abandoned


# Clients that stall, and abandoned calls that are drained.


async def test_a_shared_call_that_all_have_left_is_drained_to_learn_its_usage(start: StartRelay, raw: RawUpstream) -> None:
    end = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(FIRST), end, chunk(USAGE), LAST_CHUNK)
    relay, records = await begin(start, raw, on_disconnect="drain")
    streams = [await relay.client.post(relay.path("openai", "chat/completions"), json={"model": "m", "stream": True}) for _ in range(3)]
    for each in streams:
        await each.content.readexactly(len(FIRST))
        each.close()
    await wait_until(lambda: len(relay.gateway.running) == 1)  # the shared call itself
    end.set()
    await relay.idle()
    assert outcomes(records) == [("client_gone", COST), ("client_gone", 0), ("client_gone", 0)]


async def test_a_shared_call_is_drained_for_a_limited_time(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(FIRST), SILENCE)
    relay, records = await begin(start, raw, on_disconnect="drain", drain_s=0.05)
    async with relay.client.post(relay.path("openai", "chat/completions"), json={"model": "m", "stream": True}) as abandoned:
        await abandoned.content.readexactly(len(FIRST))
    async with asyncio.timeout(HANG_GUARD_S):
        await raw.closed.wait()
    await relay.idle()
    assert [record.outcome for record in records] == ["client_gone"]


async def test_a_client_that_disconnects_from_a_shared_call_releases_its_slot_at_once(start: StartRelay, raw: RawUpstream) -> None:
    end = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(FIRST), end, chunk(USAGE), LAST_CHUNK)
    relay, records = await begin(start, raw, {"limits": [{"calls_at_once": 9}]}, on_disconnect="drain")
    leaving, staying = [await relay.client.post(relay.path("openai", "chat/completions"), json={"model": "m", "stream": True}) for _ in range(2)]
    await leaving.content.readexactly(len(FIRST))
    leaving.close()
    await wait_until(lambda: relay.gateway.limits.running == 1)  # type: ignore[union-attr]
    end.set()
    assert await staying.read() == FIRST + USAGE
    await relay.idle()
    assert outcomes(records) == [("client_gone", COST), ("cached", 0)]


LARGE = bytes(range(256)) * 4096 * 16
STALLS = {"cache": {"coalesce": True, "max_answer_bytes": 100_000, "stall_timeout_s": 0.05}}


@pytest.mark.parametrize("stalled_at", [0, 2])
async def test_a_client_that_stalls_is_disconnected_and_the_others_get_the_whole_response(stalled_at: int, start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(LARGE, "Content-Type: audio/mpeg"))
    relay, records = await begin(start, raw, STALLS)
    url, body = relay.path("openai", "chat/completions"), {"model": "m", "stream": True}
    others: list[Call] = []
    for at in range(3):
        if at == stalled_at:
            stalled = asyncio.create_task(relay.client.post(url, json=body))
        else:
            others.append(asyncio.create_task(post(relay)))
        await wait_until(lambda: len(relay.gateway.running) == at + 2)  # noqa: B023
    gate.set()
    assert {response for _, response in await asyncio.gather(*others)} == {LARGE}, "while the stalled client reads nothing"
    with pytest.raises(aiohttp.ClientError):
        await (await stalled).read()
    await relay.idle()
    assert sorted(record.error or "" for record in records) == ["", "", "client_stalled"] and len(raw.arrived) == 1


async def test_waiting_for_a_slower_client_is_not_a_timeout_of_the_provider(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(LARGE, "Content-Type: audio/mpeg"))
    document: dict[str, Any] = {"cache": STALLS["cache"] | {"stall_timeout_s": 1000}}
    relay, _ = await begin(start, raw, document, idle_timeout_s=10)
    gateway, url, body = relay.gateway, relay.path("openai", "chat/completions"), {"model": "m", "stream": True}
    slow, fast = asyncio.create_task(relay.client.post(url, json=body)), asyncio.create_task(post(relay))
    await wait_until(lambda: len(gateway.running) == 3)
    gate.set()
    await wait_until(lambda: any(flight._held_up_since_s is not None for flight in gateway.inflight._tasks.values()))
    clock, gateway.clock = gateway.clock, lambda: clock() + 100
    await sweep(gateway)
    gateway.clock = clock
    assert all(exchange.waiting.expired is None for exchange in gateway.running) and len(gateway.running) == 3
    assert await (await slow).read() == LARGE and (await fast)[1] == LARGE


class FlightWithClock:
    """A shared call with a clock that only the test advances."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.flight, _ = Inflight(lambda: self.now_s).enter("k", 100)
        self.adding: asyncio.Task[None] | None = None

    def subscribe(self) -> Any:
        return self.flight.subscribe(Exchange("i", Request("rest", "POST", Caller("c"), 0.0)))

    async def add(self, *sizes: int) -> None:
        """Add chunks of these sizes, as far as the buffer has room for them."""

        async def work() -> None:
            for size in sizes:
                await self.flight.add(bytes(size))

        self.adding = asyncio.create_task(work())
        await asyncio.sleep(0)

    async def take(self, subscriber: Any) -> None:
        assert await self.flight.next(subscriber)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_a_client_far_behind_stalls_only_while_others_wait_for_it() -> None:
    shared = FlightWithClock()
    slow, fast = shared.subscribe(), shared.subscribe()
    await shared.add(60, 60)
    shared.now_s += 100
    assert shared.flight.stalled(5) == [], "no client waits yet"
    await shared.take(fast)
    assert shared.flight.stalled(5) == []
    shared.now_s += 5
    assert shared.flight.stalled(5) == []
    shared.now_s += 1
    assert shared.flight.stalled(5) == [slow]
    shared.flight.unsubscribe(slow)
    await asyncio.sleep(0)
    assert shared.adding is not None and shared.adding.done() and shared.flight.stalled(5) == []


async def test_a_client_that_reads_too_slowly_stalls() -> None:
    shared = FlightWithClock()
    slow, fast = shared.subscribe(), shared.subscribe()
    await shared.add(*[60] * 20)
    for _ in range(3):
        await shared.take(fast)
        shared.now_s += 2
        assert shared.flight.stalled(5) == ([] if shared.now_s < 5 else [slow])
        slow.next_chunk += 1  # it reads one of the chunks that wait for it
        shared.flight._wake_waiting()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await shared.take(fast)
    shared.now_s += 0.1
    assert shared.flight.stalled(5) == [slow]


async def test_a_client_that_catches_up_gets_the_stall_timeout_anew() -> None:
    shared = FlightWithClock()
    slow, fast = shared.subscribe(), shared.subscribe()
    for _ in range(5):
        await shared.add(60, 60)
        await shared.take(fast)
        shared.now_s += 4
        assert shared.flight.stalled(5) == []
        await shared.take(slow)
        await shared.take(fast) if fast.next_chunk < slow.next_chunk else None
    assert not shared.flight.joinable


async def test_clients_that_are_equally_far_behind_do_not_stall() -> None:
    shared = FlightWithClock()
    shared.subscribe(), shared.subscribe()
    await shared.add(60, 60)
    shared.now_s += 100
    assert shared.flight.stalled(5) == []
