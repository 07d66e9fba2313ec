"""Windows, here and in Redis: what is given back goes where it was counted, or nowhere."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.limits import Charge, Reservation, Rule
from relay.gate.windows import Windows
from relay.gateway import new_id
from relay.storage.memory_windows import MemoryWindows, Window
from relay.storage.redis import RETRY_AFTER_S, RedisConnection
from relay.storage.redis_windows import WindowId
from tests.redis import RedisServer
from tests.relays import HANG_GUARD_S

WINDOW_S = 1_000_000
"""Long enough that no test sees one end by itself."""
TECHNIQUES = pytest.mark.parametrize("technique", ["fixed", "sliding"])


def rule(amount: int, technique: str = "fixed", window_s: int = WINDOW_S, name: str = "r") -> Rule:
    return Rule(name=name, counts="tokens", amount=amount, window_s=window_s, sliding=technique == "sliding")


@dataclass
class Place:
    """Windows of one process, with clocks and a queue that a test moves by hand."""

    shared: RedisConnection | None = None
    now: float = 2.0 * WINDOW_S
    wall: float = 5_000_000.0
    work: list[Coroutine[Any, Any, None]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counters = MemoryWindows(lambda: self.now, lambda: self.wall)
        self.windows = Windows(self.counters, self.shared, self.work.append, new_id)

    async def take(self, *places: Charge) -> tuple[Reservation, ...] | None:
        taken = await self.windows.take(places)
        return None if taken.full else taken.reservations

    async def settle(self) -> None:
        """Do what is left to do."""
        async with asyncio.timeout(HANG_GUARD_S):
            while self.work:
                await self.work.pop(0)


@pytest.fixture
async def redis_places(redis_server: RedisServer) -> AsyncIterator[Any]:
    """`redis_places()`: one more process that counts in the same Redis."""
    opened: list[Place] = []

    def begin() -> Place:
        place = Place()
        shared = RedisConnection(redis_server.url, 5.0, lambda: place.now, lambda event, _: place.events.append(event))
        place.shared = shared
        place.__post_init__()
        opened.append(place)
        return place

    yield begin
    for place in opened:
        assert place.shared is not None
        await place.settle()
        await place.shared.close()


async def _hash(place: Place, each: Rule) -> dict[str, str]:
    """What stands in Redis for a rule that counts all together."""
    assert place.shared is not None
    technique = "sliding" if each.sliding else "fixed"
    found = await place.shared.client.hgetall(f"relay:windows:{technique}:{each.window_s}:{each.name}")  # type: ignore[misc]
    return {name.decode(): value.decode() for name, value in found.items()}


async def _end_window(place: Place, charge: Reservation) -> Reservation:
    """As if its time had passed: a fixed window is forgotten, a sliding one is two windows ago."""
    assert place.shared is not None
    each = charge.rule
    if not each.sliding:
        await place.shared.client.delete(f"relay:windows:fixed:{each.window_s}:{each.name}")
        return charge
    await place.shared.client.hincrby(f"relay:windows:sliding:{each.window_s}:{each.name}", "number", -2)  # type: ignore[misc]
    return _earlier(charge, 2)


def _earlier(charge: Reservation, windows: int) -> Reservation:
    assert isinstance(charge.window, WindowId)
    return charge._replace(window=charge.window._replace(number=charge.window.number - windows))


# In this process.


@TECHNIQUES
async def test_what_is_given_back_late_leaves_the_next_window_as_it_is(technique: str) -> None:
    place, each = Place(), rule(1000, technique)
    early = await place.take(Charge(each, "k", 1000))
    place.now += 2 * WINDOW_S
    assert early is not None and await place.take(Charge(each, "k", 600)) is not None
    place.windows.release([early[0]._replace(amount=900)])
    assert await place.take(Charge(each, "k", 401)) is None
    assert await place.take(Charge(each, "k", 400)) is not None


async def test_what_is_given_back_lowers_a_sliding_window_that_still_reaches_back() -> None:
    place, each = Place(), rule(1000, "sliding")
    early = await place.take(Charge(each, "k", 1000))
    place.now += WINDOW_S
    assert early is not None and await place.take(Charge(each, "k", 100)) is None
    place.windows.release([early[0]._replace(amount=900)])
    assert await place.take(Charge(each, "k", 901)) is None
    assert await place.take(Charge(each, "k", 900)) is not None


@TECHNIQUES
@pytest.mark.parametrize("jump_s", [86400.0, -86400.0])
async def test_a_wall_clock_that_is_set_changes_nothing_of_what_is_given_back(technique: str, jump_s: float) -> None:
    place, each = Place(), rule(10, technique)
    taken = await place.take(Charge(each, "k", 10))
    place.wall += jump_s
    assert taken is not None
    place.windows.release(taken)
    assert await place.take(Charge(each, "k", 10)) is not None


async def test_what_was_used_beyond_is_counted_in_the_window_that_runs() -> None:
    place, each = Place(), rule(1000)
    assert await place.take(Charge(each, "k", 10)) is not None
    place.now += WINDOW_S + 1
    place.windows.add(Charge(each, "k", 990))
    assert await place.take(Charge(each, "k", 11)) is None
    assert await place.take(Charge(each, "k", 10)) is not None


async def test_a_window_that_was_forgotten_takes_nothing_back() -> None:
    place, each = Place(), rule(10)
    taken = await place.take(Charge(each, "k", 10))
    place.counters.clear("k")
    assert taken is not None and await place.take(Charge(each, "k", 10)) is not None
    place.windows.release(taken)
    assert await place.take(Charge(each, "k", 1)) is None


_STEPS = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 12), st.integers(0, 1)),
    st.tuples(st.just("end"), st.integers(0, 30), st.integers(0, 12)),
    st.tuples(st.just("pass"), st.integers(0, 25), st.just(0)),
    st.tuples(st.just("set"), st.integers(-5000, 5000), st.just(0)),
)


@given(st.lists(_STEPS, max_size=60), st.sampled_from(["fixed", "sliding"]))
def test_no_window_ever_lets_more_through_than_its_limit(steps: list[tuple[str, int, int]], technique: str) -> None:
    """Calls set aside, use less, and give back at any time: what passed in a window is what its calls used or may use."""
    place, each = Place(), rule(20, technique, window_s=10)
    running: list[Reservation] = []
    passed: dict[int, int] = {}
    windows: dict[int, Window] = {}
    for what, number, more in steps:
        if what == "take":
            for charge in place.windows.local.take([Charge(each, f"k{more}", number)]).reservations:
                assert isinstance(charge.window, Window)
                running.append(charge)
                windows[id(charge.window)] = charge.window
                passed[id(charge.window)] = passed.get(id(charge.window), 0) + number
        elif what == "end" and running:
            charge = running.pop(number % len(running))
            unused = charge.amount - min(more, charge.amount)
            place.windows.release([charge._replace(amount=unused)])
            passed[id(charge.window)] -= unused
        elif what == "pass":
            place.now += number / 2
            place.wall += number / 2
        elif what == "set":
            place.wall += number
        assert all(windows[at].count == count for at, count in passed.items())
        assert all(0 <= count <= 20 for count in passed.values())


# In Redis.


@TECHNIQUES
async def test_in_redis_what_is_given_back_late_leaves_the_next_window_as_it_is(technique: str, redis_places: Any) -> None:
    place, each = redis_places(), rule(1000, technique)
    early = await place.take(Charge(each, "r", 1000))
    late = await _end_window(place, early[0])
    assert await place.take(Charge(each, "r", 600)) is not None
    place.windows.release([late._replace(amount=900)])
    await place.settle()
    assert await place.take(Charge(each, "r", 401)) is None
    assert await place.take(Charge(each, "r", 400)) is not None


@TECHNIQUES
async def test_in_redis_what_is_given_back_in_time_can_be_used_again(technique: str, redis_places: Any) -> None:
    place, each = redis_places(), rule(1000, technique)
    taken = await place.take(Charge(each, "r", 1000))
    assert await place.take(Charge(each, "r", 1)) is None
    place.windows.release([taken[0]._replace(amount=900)])
    await place.settle()
    assert await place.take(Charge(each, "r", 901)) is None
    assert await place.take(Charge(each, "r", 900)) is not None


async def test_in_redis_a_sliding_window_counts_the_last_one_and_takes_back_what_reaches_back(redis_places: Any) -> None:
    place, each = redis_places(), rule(1_000_000, "sliding")
    taken = await place.take(Charge(each, "r", 1_000_000))
    await place.shared.client.hincrby(f"relay:windows:sliding:{each.window_s}:r", "number", -1)
    full = await place.windows.take([Charge(each, "r", 1_000_000)])
    reaching = 1_000_000 - full.limit_states[0].remaining
    assert full.full is each and reaching > 0
    older = [_earlier(taken[0], 1)._replace(amount=999_999)]
    assert await place.take(Charge(each, "r", 0)) is not None, "the window moves on"
    place.windows.release(older)
    await place.settle()
    held = await _hash(place, each)
    assert (held["before"], held["count"]) == ("1", "0")
    assert await place.take(Charge(each, "r", 999_999)) is not None


@TECHNIQUES
async def test_a_redis_that_lost_its_memory_takes_back_nothing_of_before(technique: str, redis_places: Any) -> None:
    place, each = redis_places(), rule(10, technique)
    before = await place.take(Charge(each, "r", 10))
    await place.shared.client.flushall()
    assert await place.take(Charge(each, "r", 10)) is not None
    place.windows.release(before)
    await place.settle()
    assert await place.take(Charge(each, "r", 1)) is None


async def test_in_redis_a_clock_that_is_set_back_opens_no_window_again(redis_places: Any) -> None:
    place, each = redis_places(), rule(10, "sliding")
    assert await place.take(Charge(each, "r", 10)) is not None
    await place.shared.client.hincrby(f"relay:windows:sliding:{each.window_s}:r", "number", 5)
    assert await place.take(Charge(each, "r", 1)) is None


async def test_in_redis_a_window_lasts_as_long_as_its_rule_says(redis_places: Any) -> None:
    place = redis_places()
    for technique, longest_s in (("fixed", WINDOW_S), ("sliding", 2 * WINDOW_S)):
        each = rule(1000, technique)
        for _ in range(3):
            taken = await place.windows.take([Charge(each, "r", 1)])
            left_ms = await place.shared.client.pttl(f"relay:windows:{technique}:{WINDOW_S}:r")
            assert 0 < left_ms <= longest_s * 1000 and 0 < taken.limit_states[0].reset_s <= WINDOW_S
        assert taken.limit_states[0].remaining == 997


async def test_in_redis_a_window_that_expired_begins_anew(redis_places: Any) -> None:
    place, each = redis_places(), rule(10)
    assert await place.take(Charge(each, "r", 10)) is not None
    await place.shared.client.pexpire(f"relay:windows:fixed:{WINDOW_S}:r", 1)
    async with asyncio.timeout(HANG_GUARD_S):
        while await place.shared.client.exists(f"relay:windows:fixed:{WINDOW_S}:r"):
            await asyncio.sleep(0.002)
    assert await place.take(Charge(each, "r", 10)) is not None
    assert await place.shared.client.pttl(f"relay:windows:fixed:{WINDOW_S}:r") > 999_000_000


async def test_in_redis_a_step_counts_under_all_rules_or_under_none(redis_places: Any) -> None:
    one, other = redis_places(), redis_places()
    wide, narrow, sliding = rule(1000, name="wide"), rule(10, name="narrow"), rule(500, "sliding", name="s")
    steps = [Charge(wide, "wide", 1), Charge(narrow, "narrow", 1), Charge(sliding, "s", 1)]
    taken = await asyncio.gather(*(place.take(*steps) for _ in range(30) for place in (one, other)))
    assert sum(each is not None for each in taken) == 10
    assert [(await _hash(one, each))["count"] for each in (wide, narrow, sliding)] == ["10"] * 3


@TECHNIQUES
async def test_in_redis_processes_that_race_never_use_more_than_the_limit(technique: str, redis_places: Any) -> None:
    places, each, chance = [redis_places() for _ in range(3)], rule(500, technique), random.Random(7)
    used = 0

    async def calls(place: Place) -> None:
        nonlocal used
        for _ in range(40):
            amount = chance.randint(1, 60)
            charges = await place.take(Charge(each, "r", amount))
            if charges is None:
                continue
            uses = chance.randint(0, amount)
            used += uses
            assert used <= 500
            place.windows.release([charges[0]._replace(amount=amount - uses)])
            await place.settle()

    await asyncio.gather(*(calls(place) for place in places for _ in range(3)))
    assert int((await _hash(places[0], each))["count"]) == used > 400


async def test_what_was_counted_in_redis_is_never_given_back_here(redis_places: Any, redis_server: RedisServer) -> None:
    place, each = redis_places(), rule(10)
    there = await place.take(Charge(each, "r", 10))
    await redis_server.stop()
    here = await place.take(Charge(each, "r", 8))
    assert here is not None and isinstance(here[0].window, Window) and place.events == ["redis.unavailable"]
    place.windows.release(there)
    await place.settle()
    assert place.counters.get("r") == 8
    await redis_server.start()
    place.now += RETRY_AFTER_S
    fresh = await place.take(Charge(each, "r", 10))
    assert fresh is not None and not isinstance(fresh[0].window, Window)
    place.windows.release(here)
    await place.settle()
    assert place.counters.get("r") == 0 and (await _hash(place, each))["count"] == "10"


async def test_what_is_given_back_while_redis_is_left_alone_reaches_it_later_and_once(redis_places: Any) -> None:
    place, each = redis_places(), rule(10)
    there = await place.take(Charge(each, "r", 10))

    async def fail() -> None:
        raise OSError("for a moment")

    assert await place.shared.ask(fail) is None and place.shared.failures == 1
    place.windows.release(there)
    await place.settle()
    assert (await _hash(place, each))["count"] == "10"
    place.now += RETRY_AFTER_S
    assert await place.take(Charge(each, "r", 1)) is None, "it is given back behind this"
    await place.settle()
    assert await place.take(Charge(each, "r", 10)) is not None
    place.windows.release([])
    await place.settle()
    assert (await _hash(place, each))["count"] == "10"


class _Held:
    """A way to Redis on which answers wait while `open` is not set; what is asked never does."""

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


async def test_a_caller_that_leaves_while_redis_answers_has_counted_nothing(redis_places: Any, redis_server: RedisServer) -> None:
    held, each = _Held(redis_server), rule(10)
    server = await asyncio.start_server(held, "127.0.0.1", 0)
    shared = RedisConnection(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", 60.0, lambda: 0.0, lambda *_: None)
    place = Place(shared)
    assert await place.take(Charge(each, "r", 1)) is not None, "the script is known from here on"
    held.open.clear()
    asking = asyncio.create_task(place.windows.take([Charge(each, "r", 9)]))
    async with asyncio.timeout(HANG_GUARD_S):
        await held.waiting.wait()
    assert (await _hash(redis_places(), each))["count"] == "10", "Redis has counted"
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    held.open.set()
    await place.settle()
    counted = (await _hash(redis_places(), each))["count"]
    await shared.close()
    server.close()
    assert counted == "1"


async def test_what_was_used_beyond_is_counted_in_redis_room_or_not(redis_places: Any) -> None:
    place, each = redis_places(), rule(10)
    assert await place.take(Charge(each, "r", 10)) is not None
    place.windows.add(Charge(each, "r", 25))
    await place.settle()
    assert (await _hash(place, each))["count"] == "35"
    assert (await place.windows.take([Charge(each, "r", 1)])).limit_states[0].remaining == 0


# What somebody else has written into Redis.

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
async def test_in_redis_a_key_that_holds_no_window_lets_calls_pass_and_is_told_once(name: str, technique: str, redis_places: Any) -> None:
    place, each = redis_places(), rule(10, technique)
    key = f"relay:windows:{technique}:{WINDOW_S}:r"
    early = await place.take(Charge(each, "r", 9))
    for command in FOREIGN[name]:
        await place.shared.client.execute_command(*[key if part == "KEY" else part for part in command])
    assert await place.take(Charge(each, "r", 9)) is not None, "the call passes"
    assert (place.shared.foreign_values, place.shared.failures, place.shared.state) == (1, 0, "ok")
    assert place.events == ["redis.foreign_value"]
    assert await place.take(Charge(each, "r", 9)) is None, "and its limit holds again"
    place.windows.release(early)
    await place.settle()
    assert place.shared.foreign_values == 1 and await place.take(Charge(each, "r", 2)) is None


async def test_in_redis_what_is_given_back_to_a_key_of_another_type_goes_nowhere(redis_places: Any) -> None:
    place, each = redis_places(), rule(10)
    taken = await place.take(Charge(each, "r", 9))
    key = f"relay:windows:fixed:{WINDOW_S}:r"
    for command in (("DEL", key), ("SET", key, "x")):
        await place.shared.client.execute_command(*command)
    place.windows.release(taken)
    await place.settle()
    assert place.shared.failures == 0 and place.shared.state == "ok"


async def test_many_foreign_values_are_counted_and_logged_once_a_second(redis_places: Any) -> None:
    place = redis_places()
    for at in range(5):
        await place.shared.client.set(f"relay:windows:fixed:{WINDOW_S}:k{at}", "x")
        assert await place.take(Charge(rule(10, name=f"k{at}"), f"k{at}", 1)) is not None
    assert place.shared.foreign_values == 5 and len(place.events) == 1
    place.now += RETRY_AFTER_S
    place.shared.found_foreign("x" * 10_000)
    assert len(place.events) == 2
