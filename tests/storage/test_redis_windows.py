"""Windows in the process and in Redis: a refund goes to the window that was charged, or is lost."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from relay.core.limits import Charge, Reservation, Rule
from relay.gate.windows import Windows
from relay.gateway import new_id
from relay.storage import memory_windows
from relay.storage.memory_windows import MemoryWindows, Window
from relay.storage.redis import RETRY_AFTER_S, RedisConnection
from relay.storage.redis_windows import WindowId
from tests.redis import RedisServer
from tests.relays import HANG_GUARD_S

WINDOW_S = 1_000_000
"""Long enough that no window ends during a test."""
TECHNIQUES = pytest.mark.parametrize("technique", ["fixed", "sliding"])


def rule(amount: int, technique: str = "fixed", window_s: int = WINDOW_S, name: str = "r") -> Rule:
    return Rule(name=name, counts="tokens", amount=amount, window_s=window_s, sliding=technique == "sliding")


@dataclass
class Process:
    """The windows of one process, with clocks and a queue that a test controls."""

    shared: RedisConnection | None = None
    now: float = 2.0 * WINDOW_S
    work: list[Coroutine[Any, Any, None]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counters = MemoryWindows(lambda: self.now)
        self.windows = Windows(self.counters, self.shared, self.work.append, new_id)

    async def take(self, *charges: Charge) -> tuple[Reservation, ...] | None:
        taken = await self.windows.take(charges)
        return None if taken.full else taken.reservations

    async def settle(self) -> None:
        """Run the queued work."""
        async with asyncio.timeout(HANG_GUARD_S):
            while self.work:
                await self.work.pop(0)


@pytest.fixture
async def redis_processes(redis_server: RedisServer) -> AsyncIterator[Any]:
    """`redis_processes()` adds a process that counts in the same Redis."""
    opened: list[Process] = []

    def begin() -> Process:
        process = Process()
        shared = RedisConnection(redis_server.url, 5.0, lambda: process.now, lambda event, _: process.events.append(event))
        process.shared = shared
        process.__post_init__()
        opened.append(process)
        return process

    yield begin
    for process in opened:
        assert process.shared is not None
        await process.settle()
        await process.shared.close()


async def _hash(process: Process, each: Rule) -> dict[str, str]:
    """The hash in Redis of a rule with one counter for all clients."""
    assert process.shared is not None
    technique = "sliding" if each.sliding else "fixed"
    found = await process.shared.client.hgetall(f"relay:windows:{technique}:{each.window_s}:{each.name}")  # type: ignore[misc]
    return {name.decode(): value.decode() for name, value in found.items()}


async def _end_window(process: Process, charge: Reservation) -> Reservation:
    """Expire a window: delete a fixed one, move a sliding one two windows back."""
    assert process.shared is not None
    each = charge.rule
    if not each.sliding:
        await process.shared.client.delete(f"relay:windows:fixed:{each.window_s}:{each.name}")
        return charge
    await process.shared.client.hincrby(f"relay:windows:sliding:{each.window_s}:{each.name}", "number", -2)  # type: ignore[misc]
    return _earlier(charge, 2)


def _earlier(charge: Reservation, windows: int) -> Reservation:
    assert isinstance(charge.window, WindowId)
    return replace(charge, window=charge.window._replace(number=charge.window.number - windows))


# Windows in the process.


@TECHNIQUES
async def test_a_late_refund_does_not_change_the_next_window(technique: str) -> None:
    process, each = Process(), rule(1000, technique)
    early = await process.take(Charge(each, "k", 1000))
    process.now += 2 * WINDOW_S
    assert early is not None and await process.take(Charge(each, "k", 600)) is not None
    process.windows.release([replace(early[0], amount=900)])
    assert await process.take(Charge(each, "k", 401)) is None
    assert await process.take(Charge(each, "k", 400)) is not None


async def test_a_refund_lowers_a_sliding_window_that_still_overlaps() -> None:
    process, each = Process(), rule(1000, "sliding")
    early = await process.take(Charge(each, "k", 1000))
    process.now += WINDOW_S
    assert early is not None and await process.take(Charge(each, "k", 100)) is None
    process.windows.release([replace(early[0], amount=900)])
    assert await process.take(Charge(each, "k", 901)) is None
    assert await process.take(Charge(each, "k", 900)) is not None


@TECHNIQUES
@pytest.mark.parametrize("jump_s", [86400.0, -86400.0])
async def test_a_change_of_the_wall_clock_does_not_change_a_refund(technique: str, jump_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    process, each, wall = Process(), rule(10, technique), time.time()
    taken = await process.take(Charge(each, "k", 10))
    monkeypatch.setattr(time, "time", lambda: wall + jump_s)
    assert taken is not None
    process.windows.release(taken)
    assert await process.take(Charge(each, "k", 10)) is not None


async def test_usage_above_the_reservation_is_counted_in_the_current_window() -> None:
    process, each = Process(), rule(1000)
    assert await process.take(Charge(each, "k", 10)) is not None
    process.now += WINDOW_S + 1
    process.windows.add(Charge(each, "k", 990))
    assert await process.take(Charge(each, "k", 11)) is None
    assert await process.take(Charge(each, "k", 10)) is not None


async def test_a_deleted_window_gets_no_refund(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_windows, "MAX_KEYS", 1)
    process, each = Process(), rule(10)
    taken = await process.take(Charge(each, "k", 10))
    assert await process.take(Charge(each, "other", 1)) is not None, "the window of k is dropped"
    assert taken is not None and await process.take(Charge(each, "k", 10)) is not None
    process.windows.release(taken)
    assert await process.take(Charge(each, "k", 1)) is None


_STEPS = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 12), st.integers(0, 1)),
    st.tuples(st.just("end"), st.integers(0, 30), st.integers(0, 12)),
    st.tuples(st.just("pass"), st.integers(0, 25), st.just(0)),
)


@given(st.lists(_STEPS, max_size=60), st.sampled_from(["fixed", "sliding"]))
def test_no_window_ever_admits_more_than_its_limit(steps: list[tuple[str, int, int]], technique: str) -> None:
    """Calls reserve, use less and refund at any time; a window counts what is used or reserved."""
    process, each = Process(), rule(20, technique, window_s=10)
    running: list[Reservation] = []
    passed: dict[int, int] = {}
    windows: dict[int, Window] = {}
    for what, number, more in steps:
        if what == "take":
            for charge in process.windows.local.take([Charge(each, f"k{more}", number)]).reservations:
                assert isinstance(charge.window, Window)
                running.append(charge)
                windows[id(charge.window)] = charge.window
                passed[id(charge.window)] = passed.get(id(charge.window), 0) + number
        elif what == "end" and running:
            charge = running.pop(number % len(running))
            unused = charge.amount - min(more, charge.amount)
            process.windows.release([replace(charge, amount=unused)])
            passed[id(charge.window)] -= unused
        elif what == "pass":
            process.now += number / 2
        assert all(windows[at].count == count for at, count in passed.items())
        assert all(0 <= count <= 20 for count in passed.values())


# Windows in Redis.


@TECHNIQUES
async def test_in_redis_a_late_refund_does_not_change_the_next_window(technique: str, redis_processes: Any) -> None:
    process, each = redis_processes(), rule(1000, technique)
    early = await process.take(Charge(each, "r", 1000))
    late = await _end_window(process, early[0])
    assert await process.take(Charge(each, "r", 600)) is not None
    process.windows.release([replace(late, amount=900)])
    await process.settle()
    assert await process.take(Charge(each, "r", 401)) is None
    assert await process.take(Charge(each, "r", 400)) is not None


@TECHNIQUES
async def test_in_redis_a_refund_can_be_used_again(technique: str, redis_processes: Any) -> None:
    process, each = redis_processes(), rule(1000, technique)
    taken = await process.take(Charge(each, "r", 1000))
    assert await process.take(Charge(each, "r", 1)) is None
    process.windows.release([replace(taken[0], amount=900)])
    await process.settle()
    assert await process.take(Charge(each, "r", 901)) is None
    assert await process.take(Charge(each, "r", 900)) is not None


async def test_in_redis_a_sliding_window_counts_and_refunds_the_previous_window_by_its_overlap(redis_processes: Any) -> None:
    process, each = redis_processes(), rule(1_000_000, "sliding")
    taken = await process.take(Charge(each, "r", 1_000_000))
    await process.shared.client.hincrby(f"relay:windows:sliding:{each.window_s}:r", "number", -1)
    full = await process.windows.take([Charge(each, "r", 1_000_000)])
    reaching = 1_000_000 - full.limit_states[0].remaining
    assert full.full is each and reaching > 0
    older = [replace(_earlier(taken[0], 1), amount=999_999)]
    assert await process.take(Charge(each, "r", 0)) is not None, "the window advances"
    process.windows.release(older)
    await process.settle()
    held = await _hash(process, each)
    assert (held["before"], held["count"]) == ("1", "0")
    assert await process.take(Charge(each, "r", 999_999)) is not None


@TECHNIQUES
async def test_a_redis_that_lost_its_data_gets_no_refund_of_earlier_charges(technique: str, redis_processes: Any) -> None:
    process, each = redis_processes(), rule(10, technique)
    before = await process.take(Charge(each, "r", 10))
    await process.shared.client.flushall()
    assert await process.take(Charge(each, "r", 10)) is not None
    process.windows.release(before)
    await process.settle()
    assert await process.take(Charge(each, "r", 1)) is None


async def test_in_redis_a_clock_that_is_set_back_reopens_no_window(redis_processes: Any) -> None:
    process, each = redis_processes(), rule(10, "sliding")
    assert await process.take(Charge(each, "r", 10)) is not None
    await process.shared.client.hincrby(f"relay:windows:sliding:{each.window_s}:r", "number", 5)
    assert await process.take(Charge(each, "r", 1)) is None


async def test_in_redis_a_window_expires_after_the_time_of_its_rule(redis_processes: Any) -> None:
    process = redis_processes()
    for technique, longest_s in (("fixed", WINDOW_S), ("sliding", 2 * WINDOW_S)):
        each = rule(1000, technique)
        for _ in range(3):
            taken = await process.windows.take([Charge(each, "r", 1)])
            left_ms = await process.shared.client.pttl(f"relay:windows:{technique}:{WINDOW_S}:r")
            assert 0 < left_ms <= longest_s * 1000 and 0 < taken.limit_states[0].reset_s <= WINDOW_S
        assert taken.limit_states[0].remaining == 997


async def test_in_redis_an_expired_window_starts_again(redis_processes: Any) -> None:
    process, each = redis_processes(), rule(10)
    assert await process.take(Charge(each, "r", 10)) is not None
    await process.shared.client.pexpire(f"relay:windows:fixed:{WINDOW_S}:r", 1)
    async with asyncio.timeout(HANG_GUARD_S):
        while await process.shared.client.exists(f"relay:windows:fixed:{WINDOW_S}:r"):
            await asyncio.sleep(0.002)
    assert await process.take(Charge(each, "r", 10)) is not None
    assert await process.shared.client.pttl(f"relay:windows:fixed:{WINDOW_S}:r") > 999_000_000


async def test_in_redis_a_charge_counts_for_all_rules_or_for_none(redis_processes: Any) -> None:
    one, other = redis_processes(), redis_processes()
    wide, narrow, sliding = rule(1000, name="wide"), rule(10, name="narrow"), rule(500, "sliding", name="s")
    steps = [Charge(wide, "wide", 1), Charge(narrow, "narrow", 1), Charge(sliding, "s", 1)]
    taken = await asyncio.gather(*(process.take(*steps) for _ in range(30) for process in (one, other)))
    assert sum(each is not None for each in taken) == 10
    assert [(await _hash(one, each))["count"] for each in (wide, narrow, sliding)] == ["10"] * 3


@TECHNIQUES
async def test_in_redis_processes_that_race_never_use_more_than_the_limit(technique: str, redis_processes: Any) -> None:
    processes, each, chance = [redis_processes() for _ in range(3)], rule(500, technique), random.Random(7)
    used = 0

    async def calls(process: Process) -> None:
        nonlocal used
        for _ in range(40):
            amount = chance.randint(1, 60)
            charges = await process.take(Charge(each, "r", amount))
            if charges is None:
                continue
            uses = chance.randint(0, amount)
            used += uses
            assert used <= 500
            process.windows.release([replace(charges[0], amount=amount - uses)])
            await process.settle()

    await asyncio.gather(*(calls(process) for process in processes for _ in range(3)))
    assert int((await _hash(processes[0], each))["count"]) == used > 400


async def test_a_charge_in_redis_is_never_refunded_in_the_process(redis_processes: Any, redis_server: RedisServer) -> None:
    process, each = redis_processes(), rule(10)
    in_redis = await process.take(Charge(each, "r", 10))
    await redis_server.stop()
    local = await process.take(Charge(each, "r", 8))
    assert local is not None and isinstance(local[0].window, Window) and process.events == ["redis.unavailable"]
    process.windows.release(in_redis)
    await process.settle()
    assert process.counters.window("r")[0] == 8
    await redis_server.start()
    process.now += RETRY_AFTER_S
    fresh = await process.take(Charge(each, "r", 10))
    assert fresh is not None and not isinstance(fresh[0].window, Window)
    process.windows.release(local)
    await process.settle()
    assert process.counters.window("r")[0] == 0 and (await _hash(process, each))["count"] == "10"


async def test_a_refund_while_redis_is_unavailable_reaches_it_later_and_once(redis_processes: Any) -> None:
    process, each = redis_processes(), rule(10)
    taken = await process.take(Charge(each, "r", 10))

    async def fail() -> None:
        raise OSError("for a moment")

    assert await process.shared.ask(fail) is None and process.shared.failures == 1
    process.windows.release(taken)
    await process.settle()
    assert (await _hash(process, each))["count"] == "10"
    process.now += RETRY_AFTER_S
    assert await process.take(Charge(each, "r", 1)) is None, "the refund follows after this call"
    await process.settle()
    assert await process.take(Charge(each, "r", 10)) is not None
    process.windows.release([])
    await process.settle()
    assert (await _hash(process, each))["count"] == "10"


class _DelayingProxy:
    """A proxy to Redis that delays responses while `open` is not set, and never requests."""

    def __init__(self, server: RedisServer) -> None:
        self._server, self.open, self.waiting = server, asyncio.Event(), asyncio.Event()
        self.open.set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, asks = await asyncio.open_connection("127.0.0.1", self._server.port)

        async def ask() -> None:
            while data := await reader.read(65536):
                asks.write(data)
            asks.close()

        asking = asyncio.create_task(ask())
        while data := await answers.read(65536):
            if not self.open.is_set():
                self.waiting.set()
                await self.open.wait()
            writer.write(data)
        writer.close()
        await asking


async def test_a_call_that_is_cancelled_while_redis_responds_is_refunded(redis_processes: Any, redis_server: RedisServer) -> None:
    proxy, each = _DelayingProxy(redis_server), rule(10)
    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    shared = RedisConnection(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", 60.0, lambda: 0.0, lambda *_: None)
    process = Process(shared)
    assert await process.take(Charge(each, "r", 1)) is not None, "Redis has the script from now on"
    proxy.open.clear()
    asking = asyncio.create_task(process.windows.take([Charge(each, "r", 9)]))
    async with asyncio.timeout(HANG_GUARD_S):
        await proxy.waiting.wait()
    assert (await _hash(redis_processes(), each))["count"] == "10", "Redis has counted the call"
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    proxy.open.set()
    await process.settle()
    counted = (await _hash(redis_processes(), each))["count"]
    await shared.close()
    server.close()
    assert counted == "1"


async def test_usage_above_the_limit_is_counted_in_redis(redis_processes: Any) -> None:
    process, each = redis_processes(), rule(10)
    assert await process.take(Charge(each, "r", 10)) is not None
    process.windows.add(Charge(each, "r", 25))
    await process.settle()
    assert (await _hash(process, each))["count"] == "35"
    assert (await process.windows.take([Charge(each, "r", 1)])).limit_states[0].remaining == 0


# Values that another program has written into Redis.

FOREIGN = {
    "a text": [("SET", "KEY", "x")],
    "a list": [("DEL", "KEY"), ("RPUSH", "KEY", "x")],
    "a text for a count": [("HSET", "KEY", "count", "many")],
    "a text for a number": [("HSET", "KEY", "number", "x")],
    "nothing for a count": [("HDEL", "KEY", "count", "before")],
    "a count below nothing": [("HSET", "KEY", "count", "-5")],
    "a fraction": [("HSET", "KEY", "count", "1.5")],
    "a huge count": [("HSET", "KEY", "count", "99999999999999999999")],
    "a count beyond all": [("HSET", "KEY", "count", "inf")],
    "no number": [("HSET", "KEY", "count", "nan")],
    "a huge number": [("HSET", "KEY", "number", "99999999999999999999")],
    "a huge count before": [("HSET", "KEY", "before", "1e300")],
    "bytes for a name": [("HSET", "KEY", "born", b"\xff\xfe")],
    "a long name": [("HSET", "KEY", "born", "a" * 1000)],
    "no end": [("PERSIST", "KEY")],
    "an end that is far": [("PEXPIRE", "KEY", 10**15)],
}


@TECHNIQUES
@pytest.mark.parametrize("name", FOREIGN)
async def test_in_redis_a_foreign_value_lets_calls_pass_and_is_logged_once(name: str, technique: str, redis_processes: Any) -> None:
    process, each = redis_processes(), rule(10, technique)
    key = f"relay:windows:{technique}:{WINDOW_S}:r"
    early = await process.take(Charge(each, "r", 9))
    for command in FOREIGN[name]:
        await process.shared.client.execute_command(*[key if part == "KEY" else part for part in command])
    assert await process.take(Charge(each, "r", 9)) is not None, "the call passes"
    assert (process.shared.foreign_values, process.shared.failures, process.shared.state) == (1, 0, "ok")
    assert process.events == ["redis.foreign_value"]
    assert await process.take(Charge(each, "r", 9)) is None, "the limit holds again"
    process.windows.release(early)
    await process.settle()
    assert process.shared.foreign_values == 1 and await process.take(Charge(each, "r", 2)) is None


async def test_in_redis_a_refund_to_a_key_of_another_type_is_dropped(redis_processes: Any) -> None:
    process, each = redis_processes(), rule(10)
    taken = await process.take(Charge(each, "r", 9))
    key = f"relay:windows:fixed:{WINDOW_S}:r"
    for command in (("DEL", key), ("SET", key, "x")):
        await process.shared.client.execute_command(*command)
    process.windows.release(taken)
    await process.settle()
    assert process.shared.failures == 0 and process.shared.state == "ok"


async def test_many_foreign_values_are_counted_and_logged_once_a_second(redis_processes: Any) -> None:
    process = redis_processes()
    for at in range(5):
        await process.shared.client.set(f"relay:windows:fixed:{WINDOW_S}:k{at}", "x")
        assert await process.take(Charge(rule(10, name=f"k{at}"), f"k{at}", 1)) is not None
    assert process.shared.foreign_values == 5 and len(process.events) == 1
    process.now += RETRY_AFTER_S
    process.shared.found_foreign("x" * 10_000)
    assert len(process.events) == 2
