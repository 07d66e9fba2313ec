"""Counters of time windows in this process's memory, behind the interface of the `limits` library.

Owns: counting and expiry. Each new window forgets a few that have ended, so that none costs more
with many keys than with few (the library's own backend walks all of them); the sweep has the rest
forgotten, when no new ones come. Both clocks are given:
the monotonic one rules, so that a clock that is set changes no limit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import floor

from limits.storage.base import SlidingWindowCounterSupport, Storage

MAX_KEYS = 100_000
"""Past this the window that ends first is forgotten for each new one: memory stays bounded."""
_FORGOTTEN_A_HIT = 32
_FORGOTTEN_AT_ONCE = 5000
"""By `forget`: it takes a few milliseconds."""


class Window:
    """A window of time under one key. One that ended or was forgotten is never used again, so what
    is given back to it goes nowhere.
    """

    __slots__ = ("count", "ends_s")

    def __init__(self, ends_s: float) -> None:
        self.count, self.ends_s = 0, ends_s

    def release(self, amount: int) -> None:
        """Count `amount` less."""
        self.count = max(0, self.count - amount)


class MemoryWindows(Storage, SlidingWindowCounterSupport):
    """Never waits: between two of its calls nothing else runs."""

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        super().__init__()
        self._clock, self._wall = clock, wall
        self._windows: dict[str, Window] = {}
        self._ends: dict[int, deque[tuple[float, str]]] = {}
        """By length: windows of one length end in the order in which they began."""

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def base_exceptions(self) -> type[Exception] | tuple[type[Exception], ...]:
        return ValueError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """The count after `amount` more; a window of `expiry` seconds begins with the first."""
        return self.add(key, expiry, amount).count

    def add(self, key: str, expiry: int, amount: int) -> Window:
        """The fixed window that runs, with `amount` more in it."""
        now = self._clock()
        window = self._windows.get(key)
        if window is None or window.ends_s <= now:
            window = self._begin(key, expiry, now)
        window.count += amount
        return window

    def add_sliding(self, key: str, expiry: int, amount: int) -> Window:
        """The part of a sliding window that runs, with `amount` more in it."""
        return self.add(f"{key}/{self._clock() // expiry:.0f}", 2 * expiry, amount)

    def get(self, key: str) -> int:
        """The count of the window that runs."""
        return self._count(key, self._clock())

    def window(self, key: str) -> tuple[int, float]:
        """Count and seconds left of the window that runs."""
        window, now = self._windows.get(key), self._clock()
        if window is None or window.ends_s <= now:
            return 0, 0.0
        return window.count, window.ends_s - now

    def take(
        self, key: str, expiry: int, amount: int, limit: int
    ) -> tuple[Window | None, int, float]:
        """What `get`, `incr` and `get_expiry` of a fixed window come to, in one step: the window in
        which `amount` was counted, None if it has no room, then count and seconds left.
        """
        now = self._clock()
        window = self._windows.get(key)
        if window is None or window.ends_s <= now:
            window = self._begin(key, expiry, now)
        if window.count + amount > limit:
            return None, window.count, window.ends_s - now
        window.count += amount
        return window, window.count, window.ends_s - now

    def get_expiry(self, key: str) -> float:
        """When the window ends, as Unix time."""
        window, now = self._windows.get(key), self._clock()
        return self._wall() + (max(0.0, window.ends_s - now) if window else 0.0)

    def check(self) -> bool:
        """It is always there."""
        return True

    def reset(self) -> int:
        """Forget everything."""
        count = len(self._windows)
        self._windows.clear()
        self._ends.clear()
        return count

    def clear(self, key: str) -> None:
        """Forget one."""
        self._windows.pop(key, None)

    def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> bool:
        """Add `amount` unless this window's count, and the last one's by how much of it still
        reaches back, would pass `limit`.
        """
        before, before_ttl, count, _ = self.get_sliding_window(key, expiry)
        if floor(before * before_ttl / expiry) + count + amount > limit:
            return False
        self.add_sliding(key, expiry, amount)
        return True

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """(count, seconds left) of the last window and of this one."""
        now = self._clock()
        number, passed = divmod(now, expiry)
        left = expiry - passed
        before = self._count(f"{key}/{number - 1:.0f}", now)
        count = self._count(f"{key}/{number:.0f}", now)
        return before, left if before else 0.0, count, left + expiry

    def clear_sliding_window(self, key: str, expiry: int) -> None:
        """Forget both."""
        number = self._clock() // expiry
        for each in (number - 1, number):
            self._windows.pop(f"{key}/{each:.0f}", None)

    def _count(self, key: str, now: float) -> int:
        window = self._windows.get(key)
        return window.count if window is not None and window.ends_s > now else 0

    def _begin(self, key: str, expiry: int, now: float) -> Window:
        window = self._windows[key] = Window(now + expiry)
        self._ends.setdefault(expiry, deque()).append((window.ends_s, key))
        self._drop_ended(now, _FORGOTTEN_A_HIT)
        while len(self._windows) > MAX_KEYS:
            self._drop(min(filter(None, self._ends.values()), key=lambda ends: ends[0][0]))
        return window

    def forget(self) -> None:
        """Drop windows that have ended: those too whose rules nobody falls under any more."""
        self._drop_ended(self._clock(), _FORGOTTEN_AT_ONCE)

    def _drop_ended(self, now: float, limit: int) -> None:
        for ends in self._ends.values():
            for _ in range(limit):
                if not ends or ends[0][0] > now:
                    break
                self._drop(ends)

    def _drop(self, ends: deque[tuple[float, str]]) -> None:
        ends_s, key = ends.popleft()
        window = self._windows.get(key)
        if window is not None and window.ends_s == ends_s:
            del self._windows[key]
