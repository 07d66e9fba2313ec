"""Count in windows of time, in this process or in Redis.

Owns where windows are counted. With Redis all workers and machines share the counts. While Redis is
unavailable each process counts alone: to admit too many calls for a while is better than to refuse
all. A reservation is released only in the window in which it was counted, and only while that
window has not ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from math import floor
from typing import Any

import msgspec

from relay.core.limits import Charge, LimitState, Reservation, Rule
from relay.storage.memory_windows import MemoryWindows, Window
from relay.storage.redis import RedisConnection
from relay.storage.redis_windows import RedisCharge, RedisWindows, WindowId, WindowState

InBackground = Callable[[Coroutine[Any, Any, None]], object]
_NO_LIMIT = 1 << 53
"""Lua numbers in Redis are doubles: larger integers are not exact."""
_MAX_UNRELEASED = 10_000
_RELEASED_AT_ONCE = 100


class Taken(msgspec.Struct, frozen=True, gc=False):
    """The result of `take`: the caller's limit states, what was counted, and the rule that has no
    room, if there is one.
    """

    limit_states: tuple[LimitState, ...]
    reservations: tuple[Reservation, ...] = ()
    full: Rule | None = None


class Windows:
    """One per process; it outlives a reload, and so do the counts."""

    def __init__(
        self,
        memory: MemoryWindows,
        shared: RedisConnection | None,
        in_background: InBackground,
        new_id: Callable[[], str],
    ) -> None:
        self.local = _LocalWindows(memory)
        self._redis = None
        self.in_redis = shared is not None
        """True if windows are counted in Redis."""
        if shared is not None:
            self._redis = RedisWindows(shared.client, new_id, shared.found_foreign)
        self._shared, self._in_background = shared, in_background
        self._unreleased: deque[Reservation] = deque(maxlen=_MAX_UNRELEASED)
        """Reservations to release in Redis. If there are too many the oldest is dropped: its window
        admits less until it ends."""

    async def take(self, charges: Sequence[Charge]) -> Taken:
        """Count all charges if each has room; else count none, and return the state of the rule
        that is full. If the caller is cancelled, nothing stays counted.
        """
        if self._redis is None:
            return self.local.take(charges)
        if self._unreleased:
            self._in_background(self._release_in_redis())
        work = asyncio.create_task(self._take(charges))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # Redis counts the charges although the caller has left: release them afterwards.
            self._in_background(self._undo(work))
            raise

    def forget(self) -> None:
        """Drop the ended windows of this process: there may be many, since clients choose names."""
        self.local.forget()

    def release(self, reservations: Sequence[Reservation]) -> None:
        """Count less in the windows in which these were counted, unless they have ended. In Redis
        that happens in the background, and not at all if Redis fails meanwhile.
        """
        in_redis = False
        for reservation in reservations:
            if isinstance(reservation.window, Window):
                reservation.window.release(reservation.amount)
            else:
                self._unreleased.append(reservation)
                in_redis = True
        if in_redis:
            self._in_background(self._release_in_redis())

    def add(self, charge: Charge) -> None:
        """Count what was used already in the current window, even if it has no room."""
        if self._redis is None:
            self.local.add(charge)
        else:
            self._in_background(self._add(charge))

    async def _take(self, charges: Sequence[Charge]) -> Taken:
        redis, taken = self._redis, None
        if redis is not None and self._shared is not None:
            taken = await self._shared.ask(lambda: _take_in_redis(redis, charges))
        return self.local.take(charges) if taken is None else taken

    async def _undo(self, work: asyncio.Task[Taken]) -> None:
        self.release((await work).reservations)

    async def _add(self, charge: Charge) -> None:
        redis, added = self._redis, None
        if redis is not None and self._shared is not None:
            unlimited = _redis_charge(charge)._replace(limit=_NO_LIMIT)
            added = await self._shared.ask(lambda: redis.take([unlimited]))
        if added is None:
            self.local.add(charge)

    async def _release_in_redis(self) -> None:
        """Release all reservations in `_unreleased`. Nothing is released twice: a count that is too
        low admits too much, one that is too high ends with its window.
        """
        assert self._shared is not None
        more: bool | None = True
        while more:
            more = await self._shared.ask(self._release_some)

    async def _release_some(self) -> bool:
        """Release a batch; True if there may be more."""
        assert self._redis is not None
        some = [
            self._unreleased.popleft() for _ in range(min(len(self._unreleased), _RELEASED_AT_ONCE))
        ]
        if some:
            await self._redis.release(
                [
                    (_redis_charge(each), each.window)
                    for each in some
                    if isinstance(each.window, WindowId)
                ]
            )
        return bool(some)


class _LocalWindows:
    """Windows in this process. Nothing is awaited: no task runs between a check and its count."""

    def __init__(self, counters: MemoryWindows) -> None:
        self._counters = counters

    def take(self, charges: Sequence[Charge]) -> Taken:
        """See Windows.take."""
        if len(charges) == 1 and not charges[0].rule.sliding:
            return self._take_one(charges[0])
        for charge in charges:
            rule, state = charge.rule, self._state(charge)
            if _weighted_count(rule, *state) + charge.amount > rule.amount:
                return Taken((_limit_state(rule, *state),), full=rule)
        reservations = tuple([self.add(charge) for charge in charges])
        states = tuple([_limit_state(each.rule, *self._state(each)) for each in charges])
        return Taken(states, reservations)

    def _take_one(self, charge: Charge) -> Taken:
        """Check and count one charge of a fixed window, the common case, in one step."""
        rule, key, amount = charge.rule, charge.key, charge.amount
        window, count, left_s = self._counters.take(key, rule.window_s, amount, rule.amount)
        limit_states = (LimitState(rule, max(0, rule.amount - count), left_s),)
        if window is None:
            return Taken(limit_states, full=rule)
        return Taken(limit_states, (Reservation(rule, key, amount, window),))

    def add(self, charge: Charge) -> Reservation:
        """Count, even if the window has no room."""
        rule, key, amount = charge.rule, charge.key, charge.amount
        add = self._counters.add_sliding if rule.sliding else self._counters.add
        return Reservation(rule, key, amount, add(key, rule.window_s, amount))

    def forget(self) -> None:
        """See Windows.forget."""
        self._counters.forget()

    def _state(self, charge: Charge) -> tuple[int, int, float]:
        """Return the count of the window before, of this window, and the seconds left of it."""
        if charge.rule.sliding:
            return self._counters.sliding_window(charge.key, charge.rule.window_s)
        return 0, *self._counters.window(charge.key)


async def _take_in_redis(windows: RedisWindows, charges: Sequence[Charge]) -> Taken:
    """See Windows.take. One Redis command counts all charges of a step."""
    full, states = await windows.take([_redis_charge(charge) for charge in charges])
    if full is not None:
        rule = charges[full].rule
        return Taken((_state_of(rule, states[0]),), full=rule)
    counted = tuple(zip(charges, states, strict=True))
    return Taken(
        tuple([_state_of(each.rule, state) for each, state in counted]),
        tuple([Reservation(c.rule, c.key, c.amount, state.window_id) for c, state in counted]),
    )


def _redis_charge(charge: Charge | Reservation) -> RedisCharge:
    rule = charge.rule
    return RedisCharge(charge.key, rule.sliding, rule.window_s, rule.amount, charge.amount)


def _state_of(rule: Rule, state: WindowState) -> LimitState:
    return _limit_state(rule, state.before, state.counted, state.left_s)


def _limit_state(rule: Rule, before: int, count: int, left_s: float) -> LimitState:
    """Compute the state of a window that ends in `left_s`. A sliding window has room again as soon
    as the weighted count of the window before it has dropped by one.
    """
    reset_s = left_s if before or count else 0.0
    if before:
        reset_s = min(left_s % (rule.window_s / before), left_s if count else rule.window_s)
    remaining = max(0, rule.amount - _weighted_count(rule, before, count, left_s))
    return LimitState(rule, remaining, reset_s)


def _weighted_count(rule: Rule, before: int, count: int, left_s: float) -> int:
    """Count the window before by the share of it that a sliding window still covers. The script in
    storage/redis_windows.py computes the same.
    """
    return floor(before * left_s / rule.window_s) + count
