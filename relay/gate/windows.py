"""How often: counting in windows of time, by the strategies of the `limits` library.

Owns: where windows are counted. With Redis it is there, for all workers and machines; while it is
away, in this process, as if it were alone: a limit that is too generous for a while rather than no
answer at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from limits import RateLimitItemPerSecond
from limits.aio.strategies import (
    FixedWindowRateLimiter,
    RateLimiter,
    SlidingWindowCounterRateLimiter,
)

from relay.core.limits import Rule, Standing
from relay.storage.counters import MemoryCounters
from relay.storage.shared import Shared

_NO_LIMIT = 1 << 53
"""Redis counts in doubles."""


class _Window(RateLimitItemPerSecond):
    """A rule's window, as the library wants it; the key is made by whoever asks."""

    __slots__ = ()

    def key_for(self, *identifiers: Any) -> str:
        return identifiers[0]  # type: ignore[no-any-return]


class _Strategies(NamedTuple):
    fixed: RateLimiter
    sliding: RateLimiter


def _on(storage: Any) -> _Strategies:
    return _Strategies(FixedWindowRateLimiter(storage), SlidingWindowCounterRateLimiter(storage))


class Windows:
    """One per process; it outlives a reload, and so do the counts."""

    def __init__(
        self, counters: MemoryCounters, shared: Shared | None, wall: Callable[[], float]
    ) -> None:
        self._own = _on(counters)
        self._shared, self._wall = shared, wall
        self._theirs = _on(shared.counters()) if shared else None

    async def test(self, rule: Rule, key: str, amount: int = 1) -> bool:
        """True if `amount` more would be allowed."""
        item = _Window(rule.amount, rule.window_s)
        return bool(await self._ask(rule, "test", item, key, cost=amount))

    async def hit(self, rule: Rule, key: str, amount: int = 1) -> bool:
        """Count `amount`; False if somebody else took the last in the meantime."""
        item = _Window(rule.amount, rule.window_s)
        return bool(await self._ask(rule, "hit", item, key, cost=amount))

    async def standing(self, rule: Rule, key: str) -> Standing:
        """What is left, and until when."""
        item = _Window(rule.amount, rule.window_s)
        reset, remaining = await self._ask(rule, "get_window_stats", item, key)
        return Standing(rule, remaining, max(0.0, reset - self._wall()))

    async def book(self, rule: Rule, key: str, difference: int) -> None:
        """Add what was used beyond what was counted, or take back what was not used."""
        shared = self._shared
        if self._theirs is not None and shared is not None and shared.usable():
            try:
                await _book(self._theirs, rule, key, difference)
                return
            except shared.errors as error:
                shared.lost(error)
        await _book(self._own, rule, key, difference)

    async def _ask(self, rule: Rule, name: str, *args: Any, **named: Any) -> Any:
        shared = self._shared
        if self._theirs is not None and shared is not None and shared.usable():
            strategy = self._theirs.sliding if rule.sliding else self._theirs.fixed
            try:
                answer = await getattr(strategy, name)(*args, **named)
            except shared.errors as error:
                shared.lost(error)
            else:
                shared.worked()
                return answer
        strategy = self._own.sliding if rule.sliding else self._own.fixed
        return await getattr(strategy, name)(*args, **named)


async def _book(strategies: _Strategies, rule: Rule, key: str, difference: int) -> None:
    storage: Any = strategies.fixed.storage
    if rule.sliding:
        await storage.acquire_sliding_window_entry(key, _NO_LIMIT, rule.window_s, difference)
        return
    if difference < 0:
        # The window in which it was counted may be over: nothing is owed to the next one.
        difference = -min(-difference, max(0, await storage.get(key)))
    if difference:
        await storage.incr(key, rule.window_s, difference)
