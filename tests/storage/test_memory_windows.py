"""Windows in memory, with clocks that a test sets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.core.limits import Charge, Rule
from relay.gate.windows import Taken, Windows
from relay.gateway import new_id
from relay.storage import memory_windows
from relay.storage.memory_windows import MemoryWindows


@dataclass
class Clock:
    now: float = 1000.0

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memory(clock: Clock) -> MemoryWindows:
    return MemoryWindows(lambda: clock.now)


def rule(amount: int, technique: str, name: str = "r") -> Rule:
    return Rule(name=name, counts="requests", amount=amount, window_s=10, sliding=technique == "sliding")


def take(memory: MemoryWindows, *charges: Charge) -> Taken:
    return Windows(memory, None, lambda _: None, new_id).local.take(charges)


def hit(memory: MemoryWindows, each: Rule, key: str = "a", amount: int = 1) -> bool:
    """Count a call if it has room; True if it has."""
    return take(memory, Charge(each, key, amount)).full is None


def test_a_fixed_window_begins_with_its_first_hit(memory: MemoryWindows, clock: Clock) -> None:
    each = rule(2, "fixed")
    clock.pass_s(7)
    assert [hit(memory, each) for _ in range(3)] == [True, True, False]
    (state,) = take(memory, Charge(each, "a", 1)).limit_states
    assert (state.reset_s, state.remaining) == (10, 0)
    clock.pass_s(9.9)
    assert not hit(memory, each, "a") and hit(memory, each, "b")
    clock.pass_s(0.2)
    assert hit(memory, each, "a")


@given(now_s=st.floats(0, 1e9), window_s=st.sampled_from([1, 60, 86_400]))
@example(now_s=15.807, window_s=1)  # 16.807 - 15.807 is more than 1
@example(now_s=2006.14, window_s=60)
def test_what_is_left_of_a_window_is_never_more_than_its_length(now_s: float, window_s: int) -> None:
    each = Rule(name="r", counts="requests", amount=2, window_s=window_s)
    (state,) = take(MemoryWindows(lambda: now_s), Charge(each, "a", 1)).limit_states
    assert window_s - 1 < state.reset_s <= window_s, "else the header says `t=61` for `w=60`"


def test_a_sliding_window_counts_the_previous_window_by_its_overlap(memory: MemoryWindows, clock: Clock) -> None:
    each = rule(10, "sliding")
    assert [hit(memory, each) for _ in range(11)] == [True] * 10 + [False]
    clock.pass_s(10)
    assert not hit(memory, each), "all ten hits still count"
    clock.pass_s(5)
    assert [hit(memory, each) for _ in range(6)] == [True] * 5 + [False]
    clock.pass_s(20)
    assert hit(memory, each, amount=10)


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_change_of_the_wall_clock_changes_no_limit(jump_s: float, memory: MemoryWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    wall = time.time()
    for technique in ("fixed", "sliding"):
        monkeypatch.setattr(time, "time", lambda: wall)
        assert hit(memory, rule(1, technique), technique)
        monkeypatch.setattr(time, "time", lambda: wall + jump_s)
        assert not hit(memory, rule(1, technique), technique)


def test_each_hit_deletes_a_few_ended_windows(memory: MemoryWindows, clock: Clock) -> None:
    for number in range(100):
        memory.add(f"old{number}", 10, 1)
    clock.pass_s(11)
    memory.add("new", 10, 1)
    assert len(memory._windows) == 101 - memory_windows._DROPPED_PER_NEW
    for number in range(3):
        memory.add(f"newer{number}", 10, 1)
    assert len(memory._windows) == 4


def test_ended_windows_are_deleted_without_a_hit(memory: MemoryWindows, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_windows, "_DROPPED_PER_SWEEP", 60)
    for number in range(100):
        memory.add(f"old{number}", 10, 1)
    memory.add("long", 600, 1)
    memory.forget()
    assert len(memory._windows) == 101
    clock.pass_s(11)
    memory.forget()
    assert len(memory._windows) == 41
    memory.forget()
    assert (len(memory._windows), memory.window("long")[0], sum(map(len, memory._ends.values()))) == (1, 1, 1)


def test_above_the_maximum_the_windows_that_end_first_are_deleted(memory: MemoryWindows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_windows, "MAX_KEYS", 3)
    memory.add("short", 5, 1)
    for number in range(4):
        memory.add(f"long{number}", 600, 1)
    assert [memory.window(key)[0] for key in ("short", "long0", "long1", "long3")] == [0, 0, 1, 1]


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
    memory.add("first", 60, 1)
    few = _window_ends_read(memory, lambda: memory.add("a", 60, 1))
    for number in range(10_000):
        memory.add(f"k{number}", 60, 1)
    assert _window_ends_read(memory, lambda: memory.add("b", 60, 1)) == few


@dataclass
class Model:
    """What a limit of 7 in 10 seconds decides, from a list of all hits. Times are exact: eighths of
    a second."""

    technique: str
    hits: list[tuple[Fraction, int]] = field(default_factory=list)

    def take(self, now: Fraction, amount: int) -> tuple[bool, int]:
        """Return whether the hit has room, and what remains."""
        counted = self._counted(now)
        if room := counted + amount <= 7:
            self.hits.append((now, amount))
            counted += amount
        return room, max(0, 7 - counted)

    def _counted(self, now: Fraction) -> int:
        if self.technique == "fixed":
            begin, count = Fraction(-10), 0
            for at, amount in self.hits:
                begin, count = (at, amount) if at >= begin + 10 else (begin, count + amount)
            return count if now < begin + 10 else 0
        part = now // 10
        before = sum(amount for at, amount in self.hits if at // 10 == part - 1)
        return before * (10 - now % 10) // 10 + sum(amount for at, amount in self.hits if at // 10 == part)


@pytest.mark.parametrize("technique", ["fixed", "sliding"])
@pytest.mark.parametrize("rules", [1, 2])
@given(hits=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 64)), max_size=20))
def test_each_decision_is_that_of_a_model_that_keeps_all_hits(rules: int, technique: str, hits: list[tuple[int, int]]) -> None:
    """A second rule, which has room, makes a call take the path of several charges."""
    clock, model = Clock(), Model(technique)
    memory = MemoryWindows(lambda: clock.now)
    for amount, pause_eighths in hits:
        clock.pass_s(pause_eighths / 8)
        charges = (Charge(rule(7, technique), "a", amount), Charge(rule(1000, technique, "wide"), "wide", amount))
        taken = take(memory, *charges[:rules])
        expected = model.take(Fraction(clock.now), amount)
        assert (taken.full is None, taken.limit_states[0].remaining) == expected
        assert 0 <= taken.limit_states[0].reset_s <= 10
