"""Keep what the responses of a session may cost that were ordered and have not ended.

Owns the amounts, and how long the provider may take to begin an ordered response. The meter counts
responses and does not say which order began which: each end frees the smallest amount, so what is
kept is never less than what the remaining orders may cost.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

from relay.core.meters.socket_meter import ResponseCounts

ORDER_S = 60.0
"""How long a provider may be idle before an ordered response begins; then it has refused it."""
_MAX_AMOUNTS = 1000
_MAX_TIMES = 100


class Orders:
    """The responses that were ordered, or that the provider began by itself, until they end. Money
    is in billionths of a US dollar, times are seconds of the gateway's clock.
    """

    __slots__ = (
        "_amounts",
        "_busy_s",
        "_counts",
        "_dearest_nano",
        "_more",
        "_ordered_s",
        "_waiting",
        "_waits",
    )

    def __init__(self) -> None:
        self._amounts: list[int] = []
        """What each response may cost, from the lowest; the highest ones, if there are many."""
        self._more = 0
        """The number of further responses, each of which costs at most the lowest amount."""
        self._waits: deque[list[float]] = deque()
        """When responses were ordered that have not begun, and how many."""
        self._waiting = 0
        self._counts = ResponseCounts(0, 0)
        self._dearest_nano = 0
        """The most of an order of late. A response that began without an order may be one that was
        mistaken for another."""
        self._busy_s = self._ordered_s = float("-inf")
        """When a response ran, and when one was ordered."""

    @property
    def nano(self) -> int:
        """What all of them may cost."""
        further_nano = self._more * self._amounts[0] if self._more else 0
        return sum(self._amounts) + further_nano

    def add(self, nano: int, now_s: float) -> None:
        """Note an ordered response."""
        self._keep(nano)
        self._waiting += 1
        if self._waits and (now_s - self._waits[-1][0] < 1 or len(self._waits) >= _MAX_TIMES):
            self._waits[-1][1] += 1
        else:
            self._waits.append([now_s, 1])
        self._dearest_nano, self._ordered_s = max(self._dearest_nano, nano), now_s

    def update(self, counts: ResponseCounts, next_nano: int, now_s: float) -> None:
        """Note how many responses have begun, run and were refused. `next_nano` is what one may
        cost that was not ordered.
        """
        before, self._counts = self._counts, counts
        gone = counts.begun - before.begun + counts.refused - before.refused
        for _ in range(min(gone, self._waiting)):
            self._forget_first()
        if counts.running or before.running:
            self._busy_s = now_s
        # Providers answer one order after another, so the last one may wait for long.
        while self._waits and now_s - max(self._busy_s, self._waits[0][0]) > ORDER_S:
            self._forget_first()
        kept, left = len(self._amounts) + self._more, self._waiting + counts.running
        for _ in range(left - kept):
            self._keep(max(next_nano, self._dearest_nano))
        for _ in range(kept - left):
            self._release_one()
        if not left and now_s - max(self._busy_s, self._ordered_s) > ORDER_S:
            self._dearest_nano = 0

    def _forget_first(self) -> None:
        """Forget that the first order waits."""
        self._waiting -= 1
        self._waits[0][1] -= 1
        if not self._waits[0][1]:
            self._waits.popleft()

    def _keep(self, nano: int) -> None:
        insort(self._amounts, nano)
        if len(self._amounts) > _MAX_AMOUNTS:
            self._amounts.pop(0)
            self._more += 1

    def _release_one(self) -> None:
        if self._more:
            self._more -= 1
        else:
            self._amounts.pop(0)
