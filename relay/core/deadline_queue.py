"""A queue of items in the order of their deadlines.

Owns that order. An item costs nothing before its deadline, however many items there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from math import inf
from typing import Generic, TypeVar

T = TypeVar("T")
_SPARE = 64


class DeadlineQueue(Generic[T]):
    """A collection of hashable items, each with its next deadline, in seconds of any one clock."""

    __slots__ = ("_heap", "_items", "_last", "_numbers")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        # The heap has numbers instead of items, so that a discarded item is not kept alive.
        self._items: dict[int, T] = {}
        self._numbers: dict[T, int] = {}
        self._last = 0

    def add(self, item: T, deadline_s: float) -> None:
        """Add `item`, or change its deadline."""
        self.discard(item)
        self._last = number = self._last + 1
        self._items[number], self._numbers[item] = item, number
        if len(self._heap) > 2 * len(self._items) + _SPARE:
            self._heap = [entry for entry in self._heap if entry[1] in self._items]
            heapify(self._heap)
        heappush(self._heap, (deadline_s, number))

    def discard(self, item: T) -> None:
        """Remove `item` if it is in the queue."""
        number = self._numbers.pop(item, None)
        if number is not None:
            del self._items[number]

    def take_due(self, now_s: float) -> list[T]:
        """Return the items whose deadline has passed, earliest first. Each stays in the collection,
        without a deadline until the next `add`.
        """
        due: list[T] = []
        while self._heap and self._heap[0][0] <= now_s:
            _, number = heappop(self._heap)
            if number in self._items:
                due.append(self._items[number])
        return due

    def make_all_due(self) -> None:
        """Make every item due now."""
        self._heap = [(-inf, number) for number in self._items]

    def __contains__(self, item: T) -> bool:
        return item in self._numbers

    def __iter__(self) -> Iterator[T]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)
