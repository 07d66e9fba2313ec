"""Count in windows of time in this process's memory, as a storage of the `limits` library.

Owns counting and expiry. Each new window drops a few that have ended, so that a hit costs the same
with many keys as with few (the library's own storage looks at all of them); the periodic sweep
drops the others. Windows are timed by the monotonic clock, so that a change of the wall clock
changes no limit. gate/windows.py decides what is counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import floor

from limits.storage.base import SlidingWindowCounterSupport, Storage

MAX_KEYS = 100_000
"""Past this each new window drops the window that ends first: memory stays bounded."""
_DROPPED_PER_NEW = 32
_DROPPED_PER_SWEEP = 5000
"""How many windows of each length `forget` drops, which takes a few milliseconds."""


class Window:
    """A window of time under one key. A window that has ended or was dropped is never used again,
    so that a release in it has no effect.
    """

    __slots__ = ("count", "ends_s")

    def __init__(self, ends_s: float) -> None:
        self.count, self.ends_s = 0, ends_s

    def release(self, amount: int) -> None:
        """Count `amount` less."""
        self.count = max(0, self.count - amount)


class MemoryWindows(Storage, SlidingWindowCounterSupport):
    """Windows in memory. No method awaits, so no other task runs between two calls."""

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        super().__init__()
        self._clock, self._wall = clock, wall
        self._windows: dict[str, Window] = {}
        self._ends: dict[int, deque[tuple[float, str]]] = {}
        """(end, key) of each window, by length: those of one length end in order of beginning."""

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def base_exceptions(self) -> type[Exception] | tuple[type[Exception], ...]:
        return ValueError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Add `amount` and return the count; the first hit begins a window of `expiry` seconds."""
        return self.add(key, expiry, amount).count

    def add(self, key: str, expiry: int, amount: int) -> Window:
        """Add `amount` to the current fixed window, and return the window."""
        now = self._clock()
        window = self._windows.get(key)
        if window is None or window.ends_s <= now:
            window = self._begin(key, expiry, now)
        window.count += amount
        return window

    def add_sliding(self, key: str, expiry: int, amount: int) -> Window:
        """Add `amount` to the current part of a sliding window, and return the part."""
        return self.add(f"{key}/{self._clock() // expiry:.0f}", 2 * expiry, amount)

    def get(self, key: str) -> int:
        """Return the count of the current window."""
        return self._count(key, self._clock())

    def window(self, key: str) -> tuple[int, float]:
        """Return count and seconds left of the current window."""
        window, now = self._windows.get(key), self._clock()
        if window is None or window.ends_s <= now:
            return 0, 0.0
        return window.count, window.ends_s - now

    def take(
        self, key: str, expiry: int, amount: int, limit: int
    ) -> tuple[Window | None, int, float]:
        """Do `get`, `incr` and `get_expiry` of a fixed window in one step. Return the window in
        which `amount` was counted (None if it has no room), its count, and its seconds left.
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
        """Return the Unix time at which the window ends."""
        window, now = self._windows.get(key), self._clock()
        return self._wall() + (max(0.0, window.ends_s - now) if window else 0.0)

    def check(self) -> bool:
        """Return True: memory is always available."""
        return True

    def reset(self) -> int:
        """Drop all windows, and return their number."""
        count = len(self._windows)
        self._windows.clear()
        self._ends.clear()
        return count

    def clear(self, key: str) -> None:
        """Drop one window."""
        self._windows.pop(key, None)

    def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> bool:
        """Add `amount` unless the sum of this window's count and the weighted count of the window
        before it would exceed `limit`.
        """
        before, before_ttl, count, _ = self.get_sliding_window(key, expiry)
        if floor(before * before_ttl / expiry) + count + amount > limit:
            return False
        self.add_sliding(key, expiry, amount)
        return True

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Return (count, seconds left) of the window before, then of this one."""
        now = self._clock()
        number, passed = divmod(now, expiry)
        left = expiry - passed
        before = self._count(f"{key}/{number - 1:.0f}", now)
        count = self._count(f"{key}/{number:.0f}", now)
        return before, left if before else 0.0, count, left + expiry

    def clear_sliding_window(self, key: str, expiry: int) -> None:
        """Drop the current window and the one before it."""
        number = self._clock() // expiry
        for each in (number - 1, number):
            self._windows.pop(f"{key}/{each:.0f}", None)

    def _count(self, key: str, now: float) -> int:
        window = self._windows.get(key)
        return window.count if window is not None and window.ends_s > now else 0

    def _begin(self, key: str, expiry: int, now: float) -> Window:
        window = self._windows[key] = Window(now + expiry)
        self._ends.setdefault(expiry, deque()).append((window.ends_s, key))
        self._drop_ended(now, _DROPPED_PER_NEW)
        while len(self._windows) > MAX_KEYS:
            self._drop(min(filter(None, self._ends.values()), key=lambda ends: ends[0][0]))
        return window

    def forget(self) -> None:
        """Drop windows that have ended. Without new windows nothing else drops them."""
        self._drop_ended(self._clock(), _DROPPED_PER_SWEEP)

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
