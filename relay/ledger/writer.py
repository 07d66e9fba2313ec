"""The ledger's writer: rows and sums into the database, in batches, whatever becomes of it.

Owns: what waits to be written, the one task that writes it, and the old rows' end. While the
database is away rows wait, up to a bound; what is dropped then is counted, bodies before rows, and
the sums lose nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from relay import log
from relay.core.record import Record
from relay.ledger.group_rollups import Grouping, GroupRollups, by_group
from relay.ledger.retention import Retention, retention
from relay.ledger.rollups import Key, Rollups, Sums
from relay.ledger.rows import Entry, inserts
from relay.storage.database import Database, DatabaseNewer, DatabaseUnavailable, RowsRefused

MAX_ROWS = 50_000
MAX_ROWS_BYTES = 64 * 1024 * 1024
MAX_BODIES_BYTES = 64 * 1024 * 1024
_AT_ONCE = 512
_RETRY_S = 1.0
_STOP_S = 5.0


@dataclass(slots=True)
class Lost:
    """What went wrong, counted since the start."""

    failures: int = 0
    """Times that the database could not be written."""
    rows: int = 0
    bodies: int = 0
    meters: int = 0
    """Meters that failed and were dropped."""
    usage_fields: int = 0
    """Fields of usage that were not read: of another type or size than is known, or within more
    than is read."""


class Writer:
    """One per process that has a database."""

    def __init__(self, database: Database, new_id: Callable[[], str], lost: Lost) -> None:
        self.database = database
        self._lost = lost
        self._by_key, self._by_group = Rollups(new_id), GroupRollups(database, new_id)
        self._sums = self._by_key, self._by_group
        self._grouping: Callable[[], Grouping] = Grouping
        self._entries: deque[Entry] = deque()
        self._writing = 0
        self._rows_bytes = self._bodies_bytes = 0
        self._at_once = _AT_ONCE
        self._come, self._stopping = asyncio.Event(), asyncio.Event()
        self.away = False
        """The database could not be written last time."""
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    @property
    def waiting(self) -> int:
        """Rows that are not written yet."""
        return len(self._entries) + self._writing

    def take(
        self, entries: Sequence[Entry], records: Sequence[Record], sums: Mapping[Key, Sums]
    ) -> None:
        """Write these soon: rows, and what they add up to."""
        now_s = time.time()
        self._by_key.take(sums, now_s)
        self._by_group.take(by_group(records, self._grouping().names), now_s)
        self._entries.extend(entries)
        self._rows_bytes += sum([entry.row_bytes for entry in entries])
        self._bodies_bytes += sum([entry.body_bytes for entry in entries])
        self._bound()
        self._come.set()

    async def start(self, keep: Callable[[], Retention], grouping: Callable[[], Grouping]) -> None:
        """Begin to write. Raises DatabaseNewer; a database that is away is waited for."""
        self._grouping = grouping
        try:
            await self.database.prepare()
        except DatabaseUnavailable as error:
            self._is_away(error)
        old = retention(self.database, keep)
        self._tasks = asyncio.create_task(self._run()), asyncio.create_task(old)

    async def stop(self) -> None:
        """Write what is left, within five seconds."""
        self._stopping.set()
        self._come.set()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=_STOP_S)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.waiting:
            log.warn("ledger.rows_dropped", rows=self.waiting)
        await self.database.close()

    async def _run(self) -> None:
        while self._entries or not self._stopping.is_set():
            await self._come.wait()
            self._come.clear()
            try:
                written = await self._write()
            except Exception as error:
                # Whatever it is must not end all that follows; it is logged each time.
                log.bug("ledger.failed", error)
                written = False
            if not written:
                if self._stopping.is_set():
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), _RETRY_S)
                self._come.set()

    async def _write(self) -> bool:
        """False if the database is away."""
        while self._entries:
            count = min(self._at_once, len(self._entries))
            entries = back = [self._entries.popleft() for _ in range(count)]
            self._writing = count
            try:
                await self._insert(entries)
                back = []
            except RowsRefused as error:
                if count > 1:
                    self._at_once = 1  # to find the one that no database takes
                elif not await self._sums_are_refused():
                    self._lost.rows += 1
                    log.warn("ledger.row_refused", cause=str(error), id=entries[0].row[0])
                    back = []
            except (DatabaseUnavailable, DatabaseNewer) as error:
                self._is_away(error)
                return False
            finally:
                self._entries.extendleft(reversed(back))
                self._writing = 0
            if not back:
                self._is_back()
                self._rows_bytes -= sum([entry.row_bytes for entry in entries])
                self._bodies_bytes -= sum([entry.body_bytes for entry in entries])
                if count > 1 or not self._entries:
                    self._at_once = _AT_ONCE
        return True

    async def _insert(self, entries: Sequence[Entry]) -> None:
        while self._by_group.undecided:
            await self._by_group.decide()
        # Both of the same calls: nothing is taken between these two.
        sums, group_sums = [kept.begin() for kept in self._sums]
        try:
            await self.database.write(inserts(entries, sums, group_sums))
        except BaseException:
            for kept in self._sums:
                kept.failed()
            raise
        for kept in self._sums:
            kept.written(time.time())

    async def _sums_are_refused(self) -> bool:
        """Whether it is the sums that the database does not take: then those are let go."""
        try:
            await self._insert([])
        except RowsRefused as error:
            log.warn("ledger.sums_refused", cause=str(error))
            for kept in self._sums:
                kept.drop(time.time())
            return True
        return False

    def _bound(self) -> None:
        """Let go of what is too much to hold: the oldest bodies first, then the oldest rows."""
        if self._bodies_bytes > MAX_BODIES_BYTES:
            for entry in self._entries:
                if entry.body is not None and self._bodies_bytes > MAX_BODIES_BYTES:
                    self._lost.bodies += 1
                    self._bodies_bytes -= entry.body_bytes
                    entry.body, entry.body_bytes = None, 0
        while self._entries and (
            len(self._entries) > MAX_ROWS or self._rows_bytes > MAX_ROWS_BYTES
        ):
            entry = self._entries.popleft()
            self._rows_bytes -= entry.row_bytes
            self._bodies_bytes -= entry.body_bytes
            self._lost.rows += 1

    def _is_away(self, error: Exception) -> None:
        self._lost.failures += 1
        if not self.away:
            self.away = True
            log.warn("database.unavailable", cause=str(error))

    def _is_back(self) -> None:
        if self.away:
            self.away = False
            log.event("database.recovered", waiting=self.waiting)
