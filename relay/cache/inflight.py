"""Calls in flight that several clients share: one upstream call, every client the whole answer.

Owns: the list of its chunks, who watches it, and when it waits or ends. A watcher that comes late
gets what has passed at once and then lives along. While the answer is small all of it is held;
past `room_bytes` nobody new may join, what all have taken is let go, and the slowest watcher holds
the others up rather than lose anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from relay.core.errors import RelayError


@dataclass(frozen=True, slots=True)
class Head:
    """The head of an answer, as everybody gets it. `raw` are the provider's own headers."""

    status: int
    reason: str
    pairs: tuple[tuple[str, str], ...]
    raw: Mapping[str, str]


@dataclass(slots=True, eq=False)
class Watcher:
    """One client's place: the number of the chunk that it takes next."""

    next_chunk: int = 0


class Flight:
    """One upstream call. Its task calls `began`, `add` and `ended`; watchers the rest."""

    def __init__(self, room_bytes: int) -> None:
        self.head: Head | None = None
        self.over = asyncio.Event()
        """It ended, well or not."""
        self.task: asyncio.Task[None] | None = None
        self.error: RelayError | None = None
        self.cost_nano_usd: int | None = None
        """Of the call, once it is over and if it is known."""
        self._room_bytes = room_bytes
        self._chunks: list[bytes] = []
        self._first = 0
        """The number of the first chunk that is still held."""
        self._held_bytes = 0
        self._all_held = True
        self.left = False
        """Nobody watches any more: it is being cancelled."""
        self._watchers: set[Watcher] = set()
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def joinable(self) -> bool:
        """True while a newcomer would get all of it."""
        return self._all_held and not self.left and self.error is None

    def watch(self) -> Watcher:
        """A place at the beginning; give it back to `leave`."""
        watcher = Watcher()
        self._watchers.add(watcher)
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """A client is done, or gone. When nobody watches any more, the call is cancelled."""
        self._watchers.discard(watcher)
        if not self._watchers and not self.over.is_set() and self.task is not None:
            self.left = True
            self.task.cancel()
        self._forget_error()
        self._tell()

    async def until_begun(self) -> Head:
        """The head of the answer. Raises the RelayError that came instead."""
        while self.head is None:
            if self.error is not None:
                raise self.error
            await self._change()
        return self.head

    async def next(self, watcher: Watcher) -> bytes:
        """All that has come since this watcher's last time; empty at the end. Raises the RelayError
        that ended it, once all before it was taken.
        """
        while (at := watcher.next_chunk - self._first) >= len(self._chunks):
            if self.error is not None:
                raise self.error
            if self.over.is_set():
                return b""
            await self._change()
        taken = self._chunks[at:]
        watcher.next_chunk += len(taken)
        if not self._all_held:
            self._tell()
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def began(self, head: Head) -> None:
        """The provider answers."""
        self.head = head
        self._tell()

    async def add(self, chunk: bytes) -> None:
        """A chunk came. Waits while the slowest watcher is too far behind."""
        self._chunks.append(chunk)
        self._held_bytes += len(chunk)
        self._tell()
        while self._held_bytes > self._room_bytes and self._watchers:
            self._all_held = False
            self._let_go()
            if self._held_bytes > self._room_bytes:
                await self._change()

    def ended(self, error: RelayError | None = None) -> None:
        """It is over."""
        self.error = error
        self.over.set()
        self._forget_error()
        self._tell()

    def _forget_error(self) -> None:
        """When nobody asks for it any more: its traceback holds frames that hold this flight."""
        if not self._watchers and self.over.is_set():
            self.error = None

    def _let_go(self) -> None:
        """Drop the chunks that every watcher has taken."""
        taken = min(watcher.next_chunk for watcher in self._watchers) - self._first
        if taken > 0:
            self._held_bytes -= sum(map(len, self._chunks[:taken]))
            del self._chunks[:taken]
            self._first += taken

    def _tell(self) -> None:
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

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._flights)

    def enter(self, key: str, room_bytes: int) -> tuple[Flight, bool]:
        """The flight of this key, and whether the caller is to lead it."""
        flight = self._flights.get(key)
        if flight is not None and flight.joinable:
            return flight, False
        flight = self._flights[key] = Flight(room_bytes)
        return flight, True

    def launch(self, flight: Flight, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin its task."""
        flight.task = task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def stop(self) -> None:
        """End what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def land(self, key: str, flight: Flight) -> None:
        """It is over: the next caller begins a new one."""
        if self._flights.get(key) is flight:
            del self._flights[key]
