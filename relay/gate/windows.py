"""How often: counting in windows of time.

Owns: where windows are counted. With Redis it is there, for all workers and machines; while it is
away, in this process, as if it were alone: a limit that is too generous for a while rather than no
answer at all. What is given back goes to the window in which it was counted, here or there, or
nowhere.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import lru_cache
from math import floor
from typing import Any, NamedTuple

from limits import RateLimitItemPerSecond, strategies

from relay.core.limits import Charge, Counted, Rule, Standing
from relay.storage.counters import MemoryCounters, Window
from relay.storage.redis import Shared
from relay.storage.windows import RedisWindows, Spot, State, Wanted

InBackground = Callable[[Coroutine[Any, Any, None]], None]
_NO_LIMIT = 1 << 53
"""Redis counts in doubles."""
_MOST_OWED = 10_000
_PAID_AT_ONCE = 100


class _Item(RateLimitItemPerSecond):
    """A rule's window, as the library wants it; the key is made by whoever asks."""

    __slots__ = ()

    def key_for(self, *identifiers: Any) -> str:
        return identifiers[0]  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def _item(rule: Rule) -> _Item:
    return _Item(rule.amount, rule.window_s)


class Taken(NamedTuple):
    """What came of it: the caller's standings, what was counted, and the rule that has no room."""

    standings: tuple[Standing, ...]
    charges: tuple[Charge, ...] = ()
    full: Rule | None = None


class Windows:
    """One per process; it outlives a reload, and so do the counts."""

    def __init__(
        self,
        here: MemoryCounters,
        shared: Shared | None,
        in_background: InBackground,
        new_id: Callable[[], str],
    ) -> None:
        self.here = _Here(here)
        self._there = None
        self.shared = shared is not None
        """True if it is not in this process alone that is counted."""
        if shared is not None:
            self._there = _There(RedisWindows(shared.client, new_id, shared.found_foreign))
        self._shared, self._in_background = shared, in_background
        self._owed: deque[Charge] = deque(maxlen=_MOST_OWED)
        """What is to be given back in Redis. Past the most the oldest is dropped: its window only
        lets less through until it ends."""

    async def take(self, places: Sequence[Counted]) -> Taken:
        """Count under each, if each has room; else under none: then the one standing is that under
        the rule that is full. A caller that is cancelled meanwhile has counted nothing.
        """
        if self._owed:
            self._in_background(self._pay())
        work = asyncio.create_task(self._take(places))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # Redis counts what it was asked to, whoever has left.
            self._in_background(self._undo(work))
            raise

    def forget(self) -> None:
        """Let go of what ended in this process: callers make up names, and each had a window."""
        self.here.forget()

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Take back what was counted, in the windows in which it was; nothing where they are over.
        In Redis it is done soon, and not at all if Redis fails meanwhile.
        """
        there = False
        for charge in charges:
            if isinstance(charge.window, Window):
                charge.window.give_back(charge.amount)
            else:
                self._owed.append(charge)
                there = True
        if there:
            self._in_background(self._pay())

    def add(self, place: Counted) -> None:
        """Count what was used already, in the window that runs now, room or not."""
        if self._there is None:
            self.here.add(place)
        else:
            self._in_background(self._add(place))

    async def _take(self, places: Sequence[Counted]) -> Taken:
        there, taken = self._there, None
        if there is not None and self._shared is not None:
            taken = await self._shared.ask(lambda: there.take(places))
        return self.here.take(places) if taken is None else taken

    async def _undo(self, work: asyncio.Task[Taken]) -> None:
        self.give_back((await work).charges)

    async def _add(self, place: Counted) -> None:
        there, added = self._there, None
        if there is not None and self._shared is not None:
            added = await self._shared.ask(lambda: there.add(place))
        if added is None:
            self.here.add(place)

    async def _pay(self) -> None:
        """Give back in Redis what is owed there. What may have been given back is not given back
        again: too low a count would let too much through, one that stays ends with its window.
        """
        assert self._shared is not None
        paid: bool | None = True
        while paid:
            paid = await self._shared.ask(self._pay_some)

    async def _pay_some(self) -> bool:
        """True if more may be owed."""
        assert self._there is not None
        some = [self._owed.popleft() for _ in range(min(len(self._owed), _PAID_AT_ONCE))]
        if some:
            await self._there.give_back(some)
        return bool(some)


class _Here:
    """In this process. Nothing waits, so nothing comes between a test and its hit."""

    def __init__(self, counters: MemoryCounters) -> None:
        self._counters = counters
        self._fixed = strategies.FixedWindowRateLimiter(counters)
        self._sliding = strategies.SlidingWindowCounterRateLimiter(counters)

    def take(self, places: Sequence[Counted]) -> Taken:
        """See Windows.take."""
        if len(places) == 1 and not places[0].rule.sliding:
            return self._take_one(places[0])
        for rule, key, amount in places:
            strategy = self._sliding if rule.sliding else self._fixed
            if not strategy.test(_item(rule), key, cost=amount):
                return Taken((self._standing(rule, key),), full=rule)
        charges = tuple([self.add(place) for place in places])
        return Taken(tuple([self._standing(rule, key) for rule, key, _ in places]), charges)

    def _take_one(self, place: Counted) -> Taken:
        """Without others there is nothing to test beforehand; a fixed window, what most rules have,
        takes one step.
        """
        rule, key, amount = place
        window, count, left_s = self._counters.take(key, rule.window_s, amount, rule.amount)
        standings = (Standing(rule, max(0, rule.amount - count), left_s),)
        if window is None:
            return Taken(standings, full=rule)
        return Taken(standings, (Charge(rule, key, amount, window),))

    def add(self, place: Counted) -> Charge:
        """Count, room or not."""
        rule, key, amount = place
        add = self._counters.add_sliding if rule.sliding else self._counters.add
        return Charge(rule, key, amount, add(key, rule.window_s, amount))

    def forget(self) -> None:
        """See Windows.forget."""
        self._counters.forget()

    def _standing(self, rule: Rule, key: str) -> Standing:
        if not rule.sliding:
            return _standing(rule, 0, *self._counters.window(key))
        before, _, count, left_s = self._counters.get_sliding_window(key, rule.window_s)
        return _standing(rule, before, count, left_s - rule.window_s)


class _There:
    """In Redis. One question asks for all places of a step."""

    def __init__(self, windows: RedisWindows) -> None:
        self._windows = windows

    async def take(self, places: Sequence[Counted]) -> Taken:
        """See Windows.take."""
        full, states = await self._windows.take([_wanted(place) for place in places])
        if full is not None:
            rule = places[full].rule
            return Taken((_stands(rule, states[0]),), full=rule)
        counted = tuple(zip(places, states, strict=True))
        charges = tuple([Charge(*place, state.spot) for place, state in counted])
        return Taken(tuple([_stands(place.rule, state) for place, state in counted]), charges)

    async def add(self, place: Counted) -> bool:
        """See Windows.add."""
        await self._windows.take([_wanted(place)._replace(limit=_NO_LIMIT)])
        return True

    async def give_back(self, charges: Sequence[Charge]) -> None:
        """See Windows.give_back."""
        await self._windows.give_back(
            [
                (_wanted(Counted(*charge[:3])), charge.window)
                for charge in charges
                if isinstance(charge.window, Spot)
            ]
        )


def _wanted(place: Counted) -> Wanted:
    rule, key, amount = place
    return Wanted(key, rule.sliding, rule.window_s, rule.amount, amount)


def _stands(rule: Rule, state: State) -> Standing:
    return _standing(rule, state.before, state.counted, state.left_s)


def _standing(rule: Rule, before: int, count: int, left_s: float) -> Standing:
    """Under a window that ends in `left_s`. A sliding one has room again as soon as what reaches
    back of the window before is one less.
    """
    reach = floor(before * left_s / rule.window_s) + count
    reset_s = left_s if before or count else 0.0
    if before:
        reset_s = min(left_s % (rule.window_s / before), left_s if count else rule.window_s)
    return Standing(rule, max(0, rule.amount - reach), reset_s)
