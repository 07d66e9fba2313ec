"""How often: counting in windows of time, by the strategies of the `limits` library.

Owns: where windows are counted. With Redis it is there, for all workers and machines; while it is
away, in this process, as if it were alone: a limit that is too generous for a while rather than no
answer at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from limits import RateLimitItemPerSecond, aio, strategies

from relay.core.limits import Counted, Rule, Standing
from relay.storage.counters import MemoryCounters
from relay.storage.shared import Shared

_NO_LIMIT = 1 << 53
"""Redis counts in doubles."""


class _Window(RateLimitItemPerSecond):
    """A rule's window, as the library wants it; the key is made by whoever asks."""

    __slots__ = ()

    def key_for(self, *identifiers: Any) -> str:
        return identifiers[0]  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def _window(rule: Rule) -> _Window:
    return _Window(rule.amount, rule.window_s)


class Taken(NamedTuple):
    """What came of it: the caller's standings, and the rule that has no room."""

    standings: tuple[Standing, ...]
    full: Rule | None = None


class Windows:
    """One per process; it outlives a reload, and so do the counts."""

    def __init__(
        self, counters: MemoryCounters, shared: Shared | None, wall: Callable[[], float]
    ) -> None:
        self.here = _Here(counters, wall)
        self._there = _There(shared.counters(), wall) if shared else None
        self._shared = shared

    @property
    def shared(self) -> bool:
        """True if it is not in this process alone that is counted."""
        return self._there is not None

    async def take(self, places: Sequence[Counted]) -> Taken:
        """Count under each, if each has room; else under none: then the one standing is that under
        the rule that is full.
        """
        there, taken = self._there, None
        if there is not None and self._shared is not None:
            taken = await self._shared.ask(lambda: there.take(places))
        return self.here.take(places) if taken is None else taken

    async def book(self, place: Counted, difference: int) -> None:
        """Add what was used beyond what was counted, or take back what was not used."""
        there, booked = self._there, None
        if there is not None and self._shared is not None:
            booked = await self._shared.ask(lambda: there.book(place, difference))
        if booked is None:
            self.here.book(place, difference)


class _Here:
    """In this process. Nothing waits, so nothing comes between a test and its hit."""

    def __init__(self, counters: MemoryCounters, wall: Callable[[], float]) -> None:
        self._counters, self._wall = counters, wall
        self._fixed = strategies.FixedWindowRateLimiter(counters)
        self._sliding = strategies.SlidingWindowCounterRateLimiter(counters)

    def take(self, places: Sequence[Counted]) -> Taken:
        """See Windows.take."""
        if len(places) == 1:
            return self._take_one(places[0])
        for rule, key, amount in places:
            strategy = self._sliding if rule.sliding else self._fixed
            if not strategy.test(_window(rule), key, cost=amount):
                return Taken((self._standing(rule, key),), rule)
        for rule, key, amount in places:
            strategy = self._sliding if rule.sliding else self._fixed
            strategy.hit(_window(rule), key, cost=amount)
        return Taken(tuple([self._standing(rule, key) for rule, key, _ in places]))

    def _take_one(self, place: Counted) -> Taken:
        """Without others there is nothing to test beforehand; a fixed window, what most rules have,
        takes one step.
        """
        rule, key, amount = place
        if rule.sliding:
            taken = self._sliding.hit(_window(rule), key, cost=amount)
            return Taken((self._standing(rule, key),), None if taken else rule)
        taken, count, left_s = self._counters.take(key, rule.window_s, amount, rule.amount)
        standing = Standing(rule, max(0, rule.amount - count), left_s)
        return Taken((standing,), None if taken else rule)

    def book(self, place: Counted, difference: int) -> None:
        """See Windows.book."""
        rule, key, _ = place
        if rule.sliding:
            self._counters.acquire_sliding_window_entry(key, _NO_LIMIT, rule.window_s, difference)
        else:
            difference = max(difference, -self._counters.get(key))
            self._counters.incr(key, rule.window_s, difference)

    def _standing(self, rule: Rule, key: str) -> Standing:
        if not rule.sliding:
            count, left_s = self._counters.window(key)
            return Standing(rule, max(0, rule.amount - count), left_s)
        reset, remaining = self._sliding.get_window_stats(_window(rule), key)
        return Standing(rule, int(remaining), max(0.0, reset - self._wall()))


class _There:
    """In Redis: between a test and its hit others come, so a hit may fail, and is undone."""

    def __init__(self, counters: Any, wall: Callable[[], float]) -> None:
        self._counters, self._wall = counters, wall
        self._fixed = aio.strategies.FixedWindowRateLimiter(counters)
        self._sliding = aio.strategies.SlidingWindowCounterRateLimiter(counters)

    async def take(self, places: Sequence[Counted]) -> Taken:
        for rule, key, amount in places:
            if not await self._of(rule).test(_window(rule), key, cost=amount):
                return Taken((await self._standing(rule, key),), rule)
        for at, (rule, key, amount) in enumerate(places):
            if not await self._of(rule).hit(_window(rule), key, cost=amount):
                # A fixed window counted it all the same; a sliding one did not.
                for place in places[: at + (not rule.sliding)]:
                    await self.book(place, -place.amount)
                return Taken((await self._standing(rule, key),), rule)
        return Taken(tuple([await self._standing(rule, key) for rule, key, _ in places]))

    async def book(self, place: Counted, difference: int) -> bool:
        rule, key, _ = place
        if rule.sliding:
            await self._counters.acquire_sliding_window_entry(
                key, _NO_LIMIT, rule.window_s, difference
            )
            return True
        # The window in which it was counted may be over: nothing is owed to the next one.
        if difference := max(difference, -await self._counters.get(key)):
            await self._counters.incr(key, rule.window_s, difference)
        return True

    def _of(self, rule: Rule) -> aio.strategies.RateLimiter:
        return self._sliding if rule.sliding else self._fixed

    async def _standing(self, rule: Rule, key: str) -> Standing:
        reset, remaining = await self._of(rule).get_window_stats(_window(rule), key)
        return Standing(rule, int(remaining), max(0.0, reset - self._wall()))
