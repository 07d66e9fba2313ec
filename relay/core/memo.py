"""Memoize a function of one argument, with a bounded number of results.

Owns BoundedMemo. `functools.lru_cache` is for pure functions of a module; BoundedMemo is for
results that belong to an object, or are looked up many times a call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedMemo(dict[K, V]):
    """`memo[key]` is `compute(key)`, computed once. Keys come from outside: at `max_entries`, all
    entries are dropped, so that a lookup costs no more than that of a dictionary.
    """

    __slots__ = ("_compute", "_max_entries")

    def __init__(self, compute: Callable[[K], V], max_entries: int) -> None:
        super().__init__()
        self._compute, self._max_entries = compute, max_entries

    def __missing__(self, key: K) -> V:
        value = self._compute(key)
        if len(self) >= self._max_entries:
            self.clear()
        self[key] = value
        return value
