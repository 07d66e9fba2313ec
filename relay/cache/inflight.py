"""Share one upstream call in flight among several clients, each of which gets the whole response.

Owns the chunks, the subscribers, and when the call waits or is cancelled. A late subscriber gets
everything buffered so far, then follows the stream. Up to `room_bytes` the whole response is
buffered. Past that no client may join, chunks that all subscribers have read are dropped, and the
slowest subscriber delays the others rather than lose a chunk. `stalled` returns the subscribers
that delay others for too long; periodic.py ends them. calls/caching.py makes the call itself.
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
    """The head of a response, as every client gets it. `raw` are the provider's own headers."""

    status: int
    reason: str
    pairs: tuple[tuple[str, str], ...]
    raw: Mapping[str, str]


@dataclass(slots=True, eq=False)
class Subscriber:
    """One client, and the number of the chunk that it reads next."""

    exchange: Exchange
    next_chunk: int = 0


class Flight:
    """One upstream call. Its task calls `set_head`, `add`, `ended`; subscribers call the rest."""

    def __init__(self, room_bytes: int, clock: Callable[[], float]) -> None:
        self.head: Head | None = None
        self.over = asyncio.Event()
        """Set when the call has ended, well or not."""
        self.task: asyncio.Task[None] | None = None
        self.error: RelayError | None = None
        self.cost_nano_usd: int | None = None
        """The cost of the call, once it has ended; None if it is unknown."""
        self._room_bytes, self._clock = room_bytes, clock
        self._chunks: list[bytes] = []
        self._first = 0
        """The number of the first chunk that is still buffered."""
        self._held_bytes = 0
        self._all_held = True
        self.left = False
        """True if all subscribers have left: the call is being cancelled."""
        self._held_up_s = 0.0
        """How long subscribers that had read everything waited for those far behind."""
        self._held_up_since_s: float | None = None
        """Since when they wait now; None while they do not."""
        self._subscribers: set[Subscriber] = set()
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def joinable(self) -> bool:
        """True while a new subscriber would get the whole response."""
        return self._all_held and not self.left and self.error is None

    def subscribe(self, exchange: Exchange) -> Subscriber:
        """Add a subscriber, at the beginning of the response; `unsubscribe` removes it."""
        subscriber = Subscriber(exchange)
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Remove a subscriber. When the last one is removed, a running call is cancelled."""
        self._subscribers.discard(subscriber)
        if not self._subscribers and not self.over.is_set() and self.task is not None:
            self.left = True
            self.task.cancel()
        self._forget_error()
        self._wake_waiting()

    async def wait_for_head(self) -> Head:
        """Wait for the head of the response. Raises the RelayError of a call that failed before."""
        while self.head is None:
            if self.error is not None:
                raise self.error
            await self._change()
        return self.head

    async def next(self, subscriber: Subscriber) -> bytes:
        """Return all that was added since this subscriber's last call; empty at the end. Raises the
        RelayError that ended the call, after the subscriber has read everything before it.
        """
        while (at := subscriber.next_chunk - self._first) >= len(self._chunks):
            if self.error is not None:
                raise self.error
            if self.over.is_set():
                return b""
            await self._change()
        unread = self._chunks[at:]
        subscriber.next_chunk += len(unread)
        if not self._all_held:
            self._wake_waiting()
        return unread[0] if len(unread) == 1 else b"".join(unread)

    def set_head(self, head: Head) -> None:
        """Set the head of the response."""
        self.head = head
        self._wake_waiting()

    async def add(self, chunk: bytes) -> None:
        """Add a chunk, and wait while the slowest subscriber is too far behind."""
        self._chunks.append(chunk)
        self._held_bytes += len(chunk)
        self._wake_waiting()
        while self._held_bytes > self._room_bytes and self._subscribers:
            self._all_held = False
            self._drop_read()
            if self._held_bytes > self._room_bytes:
                await self._wait_for_room()
        if self._held_bytes <= self._room_bytes // 2:
            self._held_up_s = 0.0  # the slowest has caught up

    async def _wait_for_room(self) -> None:
        """Wait for a change, and measure the time if a subscriber has read everything, for that one
        waits too.
        """
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
        """Return the subscribers for which others wait, and have waited for longer than `limit_s`
        since the slowest last caught up.
        """
        if self._held_up_since_s is None:
            return []
        held_up_s = self._held_up_s + self._clock() - self._held_up_since_s
        if held_up_s <= limit_s:
            return []
        return [each for each in self._subscribers if self._behind(each) > self._room_bytes // 2]

    def _behind(self, subscriber: Subscriber) -> int:
        """Return how many buffered bytes a subscriber has not read yet."""
        return sum(map(len, self._chunks[subscriber.next_chunk - self._first :]))

    def ended(self, error: RelayError | None = None) -> None:
        """Note that the call has ended, with `error` if it failed."""
        self.error = error
        self.over.set()
        self._forget_error()
        self._wake_waiting()

    def _forget_error(self) -> None:
        """Drop the error after the last subscriber has left: the frames of its traceback refer to
        this flight, a cycle.
        """
        if not self._subscribers and self.over.is_set():
            self.error = None

    def _drop_read(self) -> None:
        """Drop the chunks that every subscriber has read."""
        count = min(subscriber.next_chunk for subscriber in self._subscribers) - self._first
        if count > 0:
            self._held_bytes -= sum(map(len, self._chunks[:count]))
            del self._chunks[:count]
            self._first += count

    def _wake_waiting(self) -> None:
        """Wake all tasks that wait for a change."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter


class Inflight:
    """The flights of a process, by cache key."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._flights: dict[str, Flight] = {}
        self._tasks: dict[asyncio.Task[None], Flight] = {}
        """The tasks of all running flights, including those that no client may join any more."""

    def __len__(self) -> int:
        return len(self._flights)

    def enter(self, key: str, room_bytes: int) -> tuple[Flight, bool]:
        """Return the flight of this key, and True if the caller must lead it: it is new."""
        flight = self._flights.get(key)
        if flight is not None and flight.joinable:
            return flight, False
        flight = self._flights[key] = Flight(room_bytes, self._clock)
        return flight, True

    def stalled(self, limit_s: float) -> list[Subscriber]:
        """Return the clients for which others of their flight have waited longer than `limit_s`."""
        return [each for flight in self._tasks.values() for each in flight.stalled(limit_s)]

    def start(self, flight: Flight, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start the task of a flight."""
        flight.task = task = asyncio.create_task(work)
        self._tasks[task] = flight
        task.add_done_callback(self._tasks.pop)
        return task

    async def stop(self) -> None:
        """Cancel all running flights, and wait for their end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def remove(self, key: str, flight: Flight) -> None:
        """Remove a flight: the next caller of its key begins a new one."""
        if self._flights.get(key) is flight:
            del self._flights[key]
