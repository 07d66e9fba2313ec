"""Counters in memory: the interface of the `limits` library, with clocks that a test sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import RateLimitItemPerSecond
from limits.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter

from relay.storage import memory_windows
from relay.storage.memory_windows import MemoryWindows


@dataclass
class Clocks:
    now: float = 1000.0
    wall: float = 5_000_000.0

    def pass_s(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def memory(clocks: Clocks) -> MemoryWindows:
    return MemoryWindows(lambda: clocks.now, lambda: clocks.wall)


def test_a_fixed_window_begins_with_its_first_hit(memory: MemoryWindows, clocks: Clocks) -> None:
    limit, item = FixedWindowRateLimiter(memory), RateLimitItemPerSecond(2, 10)
    clocks.pass_s(7)
    assert [limit.hit(item, "a") for _ in range(3)] == [True, True, False]
    reset, remaining = limit.get_window_stats(item, "a")
    assert (reset - clocks.wall, remaining) == (10, 0)
    clocks.pass_s(9.9)
    assert not limit.test(item, "a") and limit.test(item, "b")
    clocks.pass_s(0.2)
    assert limit.hit(item, "a")


def test_a_sliding_window_counts_the_previous_window_by_its_overlap(memory: MemoryWindows, clocks: Clocks) -> None:
    limit, item = SlidingWindowCounterRateLimiter(memory), RateLimitItemPerSecond(10, 10)
    assert [limit.hit(item, "a") for _ in range(11)] == [True] * 10 + [False]
    clocks.pass_s(10)
    assert not limit.hit(item, "a"), "all ten hits still count"
    clocks.pass_s(5)
    assert [limit.hit(item, "a") for _ in range(6)] == [True] * 5 + [False]
    clocks.pass_s(20)
    assert limit.hit(item, "a", cost=10)


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_change_of_the_wall_clock_changes_no_limit(jump_s: float, memory: MemoryWindows, clocks: Clocks) -> None:
    for limit in (FixedWindowRateLimiter(memory), SlidingWindowCounterRateLimiter(memory)):
        item = RateLimitItemPerSecond(1, 60)
        assert limit.hit(item, "a")
        clocks.wall += jump_s
        assert not limit.test(item, "a")
        memory.reset()


def test_each_hit_deletes_a_few_ended_windows(memory: MemoryWindows, clocks: Clocks) -> None:
    for number in range(100):
        memory.incr(f"old{number}", 10)
    clocks.pass_s(11)
    memory.incr("new", 10)
    assert len(memory) == 101 - memory_windows._DROPPED_PER_NEW
    for number in range(3):
        memory.incr(f"newer{number}", 10)
    assert len(memory) == 4


def test_ended_windows_are_deleted_without_a_hit(memory: MemoryWindows, clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_windows, "_DROPPED_PER_SWEEP", 60)
    for number in range(100):
        memory.incr(f"old{number}", 10)
    memory.incr("long", 600)
    memory.forget()
    assert len(memory) == 101
    clocks.pass_s(11)
    memory.forget()
    assert len(memory) == 41
    memory.forget()
    assert (len(memory), memory.get("long"), sum(map(len, memory._ends.values()))) == (1, 1, 1)


def test_above_the_maximum_the_windows_that_end_first_are_deleted(memory: MemoryWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_windows, "MAX_KEYS", 3)
    memory.incr("short", 5)
    for number in range(4):
        memory.incr(f"long{number}", 600)
    assert [memory.get(key) for key in ("short", "long0", "long1", "long3")] == [0, 0, 1, 1]


def _window_ends_read(memory: MemoryWindows, call: Callable[[], object]) -> int:
    """Count the window ends that a call reads."""
    reads = 0

    class Counted(type(memory._ends[60])):  # type: ignore[misc]
        def __getitem__(self, at: int) -> object:
            nonlocal reads
            reads += 1
            return super().__getitem__(at)

    memory._ends[60] = Counted(memory._ends[60])
    call()
    return reads


def test_a_hit_reads_as_many_windows_with_ten_keys_as_with_ten_thousand(memory: MemoryWindows) -> None:
    memory.incr("first", 60)
    few = _window_ends_read(memory, lambda: memory.incr("a", 60))
    for number in range(10_000):
        memory.incr(f"k{number}", 60)
    assert _window_ends_read(memory, lambda: memory.incr("b", 60)) == few


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 8)), max_size=20))
def test_one_step_has_the_result_of_the_librarys_strategy(hits: list[tuple[int, float]]) -> None:
    clocks = Clocks()
    ours, theirs = (MemoryWindows(lambda: clocks.now, lambda: clocks.wall) for _ in range(2))
    limit, item = FixedWindowRateLimiter(theirs), RateLimitItemPerSecond(7, 10)
    for amount, pause_s in hits:
        clocks.pass_s(pause_s)
        allowed = limit.test(item, "a", cost=amount) and limit.hit(item, "a", cost=amount)
        taken, count, left_s = ours.take("a/7/10/second", 10, amount, 7)
        reset, remaining = limit.get_window_stats(item, "a")
        assert (taken is not None, 7 - count) == (allowed, remaining)
        # After a refused call, the window begins with that call here, with the next one there.
        assert not count or left_s == pytest.approx(reset - clocks.wall)
