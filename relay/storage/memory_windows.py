"""Count in windows of time in this process's memory.

Owns counting and expiry. Each new window drops a few that have ended, so that a hit costs the same
with many keys as with few; the periodic sweep drops the others. Windows are timed by the monotonic
clock, so that a change of the wall clock changes no limit. gate/windows.py decides what is counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import nextafter

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


class MemoryWindows:
    """Windows in memory. No method awaits, so no other task runs between two calls."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._windows: dict[str, Window] = {}
        self._ends: dict[int, deque[tuple[float, str]]] = {}
        """(end, key) of each window, by length: those of one length end in order of beginning."""

    def add(self, key: str, window_s: int, amount: int) -> Window:
        """Add `amount` to the current fixed window, which its first hit begins, and return it."""
        now = self._clock()
        window = self._current(key, now) or self._begin(key, window_s, now)
        window.count += amount
        return window

    def add_sliding(self, key: str, window_s: int, amount: int) -> Window:
        """Add `amount` to the current part of a sliding window, and return the part."""
        return self.add(f"{key}/{self._clock() // window_s:.0f}", 2 * window_s, amount)

    def take(
        self, key: str, window_s: int, amount: int, limit: int
    ) -> tuple[Window | None, int, float]:
        """Check and count in a fixed window in one step. Return the window in which `amount` was
        counted (None if it has no room), its count, and its seconds left.
        """
        now = self._clock()
        window = self._current(key, now) or self._begin(key, window_s, now)
        if window.count + amount > limit:
            return None, window.count, window.ends_s - now
        window.count += amount
        return window, window.count, window.ends_s - now

    def window(self, key: str) -> tuple[int, float]:
        """Return count and seconds left of the current fixed window."""
        now = self._clock()
        window = self._current(key, now)
        return (window.count, window.ends_s - now) if window else (0, 0.0)

    def sliding_window(self, key: str, window_s: int) -> tuple[int, int, float]:
        """Return the counts of the part before and of the current part, and the seconds left of
        the current part.
        """
        now = self._clock()
        number, passed_s = divmod(now, window_s)
        before = self._current(f"{key}/{number - 1:.0f}", now)
        part = self._current(f"{key}/{number:.0f}", now)
        return before.count if before else 0, part.count if part else 0, window_s - passed_s

    def _current(self, key: str, now: float) -> Window | None:
        window = self._windows.get(key)
        return window if window is not None and window.ends_s > now else None

    def _begin(self, key: str, window_s: int, now: float) -> Window:
        ends_s = now + window_s
        if ends_s - now > window_s:  # by a rounding error
            ends_s = nextafter(ends_s, now)
        window = self._windows[key] = Window(ends_s)
        self._ends.setdefault(window_s, deque()).append((window.ends_s, key))
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
