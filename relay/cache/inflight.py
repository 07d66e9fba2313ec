"""Calls in flight that several clients share: one upstream call, every client the whole answer.

Owns: the chunks, the subscribers, and when the call waits or ends. A late subscriber gets
everything buffered so far, then follows the stream. While the answer is small all of it is
buffered; past `room_bytes` nobody new may join, chunks that all have taken are dropped, and the
slowest subscriber delays the others rather than lose anything, but only for a while: then it is one
of `stalled`, and the caller of that ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from relay.core.errors import RelayError
from relay.core.exchange import Exchange


@dataclass(frozen=True, slots=True)
class Head:
    """The head of an answer, as everybody gets it. `raw` are the provider's own headers."""

    status: int
    reason: str
    pairs: tuple[tuple[str, str], ...]
    raw: Mapping[str, str]


@dataclass(slots=True, eq=False)
class Subscriber:
    """One client, and the number of the chunk that it takes next."""

    exchange: Exchange
    next_chunk: int = 0


class Flight:
    """One upstream call. Its task calls `set_head`, `add` and `ended`; subscribers the rest."""

    def __init__(self, room_bytes: int, clock: Callable[[], float]) -> None:
        self.head: Head | None = None
        self.over = asyncio.Event()
        """It ended, well or not."""
        self.task: asyncio.Task[None] | None = None
        self.error: RelayError | None = None
        self.cost_nano_usd: int | None = None
        """Of the call, once it is over and if it is known."""
        self._room_bytes, self._clock = room_bytes, clock
        self._chunks: list[bytes] = []
        self._first = 0
        """The number of the first chunk that is still held."""
        self._held_bytes = 0
        self._all_held = True
        self.left = False
        """No subscriber is left: it is being cancelled."""
        self._held_up_s = 0.0
        """How long subscribers that had taken everything waited for those far behind."""
        self._held_up_since_s: float | None = None
        """They wait now."""
        self._subscribers: set[Subscriber] = set()
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def joinable(self) -> bool:
        """True while a newcomer would get all of it."""
        return self._all_held and not self.left and self.error is None

    def subscribe(self, exchange: Exchange) -> Subscriber:
        """A new subscriber, at the beginning; end it by `unsubscribe`."""
        subscriber = Subscriber(exchange)
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """A client is done, or gone. With the last subscriber the call is cancelled."""
        self._subscribers.discard(subscriber)
        if not self._subscribers and not self.over.is_set() and self.task is not None:
            self.left = True
            self.task.cancel()
        self._forget_error()
        self._wake_waiting()

    async def wait_for_head(self) -> Head:
        """The head of the answer. Raises the RelayError that came instead."""
        while self.head is None:
            if self.error is not None:
                raise self.error
            await self._change()
        return self.head

    async def next(self, subscriber: Subscriber) -> bytes:
        """All that has come since this subscriber's last time; empty at the end. Raises the
        RelayError that ended it, once all before it was taken.
        """
        while (at := subscriber.next_chunk - self._first) >= len(self._chunks):
            if self.error is not None:
                raise self.error
            if self.over.is_set():
                return b""
            await self._change()
        taken = self._chunks[at:]
        subscriber.next_chunk += len(taken)
        if not self._all_held:
            self._wake_waiting()
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def set_head(self, head: Head) -> None:
        """The provider answers."""
        self.head = head
        self._wake_waiting()

    async def add(self, chunk: bytes) -> None:
        """A chunk came. Waits while the slowest subscriber is too far behind."""
        self._chunks.append(chunk)
        self._held_bytes += len(chunk)
        self._wake_waiting()
        while self._held_bytes > self._room_bytes and self._subscribers:
            self._all_held = False
            self._drop_taken()
            if self._held_bytes > self._room_bytes:
                await self._wait_for_room()
        if self._held_bytes <= self._room_bytes // 2:
            self._held_up_s = 0.0  # the slowest has caught up

    async def _wait_for_room(self) -> None:
        """Wait for a change, and take the time if a subscriber waits too, that has taken all."""
        end = self._first + len(self._chunks)
        if any(subscriber.next_chunk == end for subscriber in self._subscribers):
            self._held_up_since_s = self._clock()
        try:
            await self._change()
        finally:
            if self._held_up_since_s is not None:
                self._held_up_s += self._clock() - self._held_up_since_s
                self._held_up_since_s = None

    def stalled(self, limit_s: float) -> list[Subscriber]:
        """Those for which others wait, and have waited for longer than this without a pause in
        which they caught up.
        """
        if self._held_up_since_s is None:
            return []
        held_up_s = self._held_up_s + self._clock() - self._held_up_since_s
        if held_up_s <= limit_s:
            return []
        return [each for each in self._subscribers if self._behind(each) > self._room_bytes // 2]

    def _behind(self, subscriber: Subscriber) -> int:
        """How many bytes a subscriber has still to take."""
        return sum(map(len, self._chunks[subscriber.next_chunk - self._first :]))

    def ended(self, error: RelayError | None = None) -> None:
        """It is over."""
        self.error = error
        self.over.set()
        self._forget_error()
        self._wake_waiting()

    def _forget_error(self) -> None:
        """When nobody asks for it any more: its traceback holds frames that hold this flight."""
        if not self._subscribers and self.over.is_set():
            self.error = None

    def _drop_taken(self) -> None:
        """Drop the chunks that every subscriber has taken."""
        taken = min(subscriber.next_chunk for subscriber in self._subscribers) - self._first
        if taken > 0:
            self._held_bytes -= sum(map(len, self._chunks[:taken]))
            del self._chunks[:taken]
            self._first += taken

    def _wake_waiting(self) -> None:
        """Wake all who wait for a change."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter


class Inflight:
    """The flights of a process, by the key of their call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._flights: dict[str, Flight] = {}
        self._tasks: dict[asyncio.Task[None], Flight] = {}
        """All that run, those too that nobody new may join."""

    def __len__(self) -> int:
        return len(self._flights)

    def enter(self, key: str, room_bytes: int) -> tuple[Flight, bool]:
        """The flight of this key, and whether the caller is to lead it."""
        flight = self._flights.get(key)
        if flight is not None and flight.joinable:
            return flight, False
        flight = self._flights[key] = Flight(room_bytes, self._clock)
        return flight, True

    def stalled(self, limit_s: float) -> list[Subscriber]:
        """Clients for which the others of their call have waited for longer than this."""
        return [each for flight in self._tasks.values() for each in flight.stalled(limit_s)]

    def start(self, flight: Flight, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin its task."""
        flight.task = task = asyncio.create_task(work)
        self._tasks[task] = flight
        task.add_done_callback(self._tasks.pop)
        return task

    async def stop(self) -> None:
        """End what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def remove(self, key: str, flight: Flight) -> None:
        """It is over: the next caller begins a new one."""
        if self._flights.get(key) is flight:
            del self._flights[key]
