"""Write the ledger's rows and sums to the database, in batches.

Owns the rows that wait, the task that writes them, and the task of the retention. While the
database is unavailable rows wait, up to a limit; past it the oldest bodies are dropped, then the
oldest rows, and both are counted. The sums lose nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from relay import log
from relay.core.record import Record
from relay.ledger.charges import Charges
from relay.ledger.group_rollups import Grouping, GroupRollups, by_group
from relay.ledger.retention import Retention, retention
from relay.ledger.rollups import Key, Rollups, Sums
from relay.ledger.rows import Entry, inserts
from relay.storage.budgets import charge_batch
from relay.storage.database import Database, DatabaseNewer, DatabaseUnavailable, RowsRefused
from relay.storage.provisional_charges import INSERT, ChargedObject, give_back

MAX_ROWS = 50_000
MAX_ROWS_BYTES = 64 * 1024 * 1024
MAX_BODIES_BYTES = 64 * 1024 * 1024
_MAX_OBJECTS = 10_000
_AT_ONCE = 512
_RETRY_S = 1.0
_STOP_S = 5.0


@dataclass(slots=True)
class Lost:
    """Failures and losses of the ledger, counted since the start."""

    failures: int = 0
    """Failed writes to the database."""
    rows: int = 0
    bodies: int = 0
    meters: int = 0
    """Meters that failed and were dropped."""
    usage_fields: int = 0
    """Usage fields that were ignored: of an unexpected type or size, or beyond the part of a
    response that is read."""


class Writer:
    """The writer of a process that has a database."""

    def __init__(self, database: Database, new_id: Callable[[], str], lost: Lost) -> None:
        self.database = database
        self._lost = lost
        self._by_key, self._by_group = Rollups(new_id), GroupRollups(database, new_id)
        self._sums = self._by_key, self._by_group
        self.charges = Charges()
        self._grouping: Callable[[], Grouping] = Grouping
        self._entries: deque[Entry] = deque()
        self._charged_objects: deque[ChargedObject] = deque(maxlen=_MAX_OBJECTS)
        """The objects whose usage is charged and whose provisional charges are not given back."""
        self._writing = 0
        self._rows_bytes = self._bodies_bytes = 0
        self._at_once = _AT_ONCE
        self._added, self._stopping = asyncio.Event(), asyncio.Event()
        self.unavailable = False
        """True if the last write to the database failed."""
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    @property
    def waiting(self) -> int:
        """Number of rows that are not written yet."""
        return len(self._entries) + self._writing

    def take(
        self, entries: Sequence[Entry], records: Sequence[Record], sums: Mapping[Key, Sums]
    ) -> None:
        """Queue the rows of some calls, and add up their sums."""
        now_s = time.time()
        self._by_key.take(sums, now_s)
        self._by_group.take(by_group(records, self._grouping().names), now_s)
        self._entries.extend(entries)
        self._rows_bytes += sum([entry.row_bytes for entry in entries])
        self._bodies_bytes += sum([entry.body_bytes for entry in entries])
        self._drop_excess()
        self._added.set()

    async def start(
        self, periods: Callable[[], Retention], grouping: Callable[[], Grouping]
    ) -> None:
        """Start the tasks. Raises DatabaseNewer; an unavailable database is tried again later."""
        self._grouping = grouping
        try:
            await self.database.prepare()
        except DatabaseUnavailable as error:
            self._report_unavailable(error)
        deletion = retention(self.database, periods)
        self._tasks = asyncio.create_task(self._run()), asyncio.create_task(deletion)

    async def stop(self, before_close: Callable[[], Awaitable[None]] | None = None) -> None:
        """Write the waiting rows, within five seconds; drop the rest. Then call `before_close`, and
        close the database.
        """
        self._stopping.set()
        self._added.set()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=_STOP_S)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.waiting:
            log.warn("ledger.rows_dropped", rows=self.waiting)
        if before_close is not None:
            await before_close()
        await self.database.close()

    async def _run(self) -> None:
        while self._entries or self.charges.waiting or not self._stopping.is_set():
            await self._added.wait()
            self._added.clear()
            try:
                written = await self._write()
            except Exception as error:
                # No exception may end the task; each is logged.
                log.bug("ledger.failed", error)
                written = False
            if not written:
                if self._stopping.is_set():
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), _RETRY_S)
                self._added.set()

    async def _write(self) -> bool:
        """Write all waiting rows; False if the database is unavailable."""
        while self._entries or self.charges.waiting:
            count = min(self._at_once, len(self._entries))
            entries = unwritten = [self._entries.popleft() for _ in range(count)]
            self._writing = count
            try:
                await self._insert(entries)
                unwritten = []
            except RowsRefused as error:
                if count > 1:
                    self._at_once = 1  # to find the row that the database refuses
                elif not await self._set_refused_aside() and entries:
                    (entry,) = entries
                    if entry.budget is None:
                        self._lost.rows += 1
                        log.warn("ledger.row_refused", cause=str(error), id=entry.row[0])
                        unwritten = []
                    # Else the row is written again without its charge.
                    self.charges.keep(entry.budget)
                    entry.budget = None
            except (DatabaseUnavailable, DatabaseNewer) as error:
                self._report_unavailable(error)
                return False
            finally:
                self._entries.extendleft(reversed(unwritten))
                self._writing = 0
            if not unwritten:
                self._report_recovered()
                self._rows_bytes -= sum([entry.row_bytes for entry in entries])
                self._bodies_bytes -= sum([entry.body_bytes for entry in entries])
                if count > 1 or not self._entries:
                    self._at_once = _AT_ONCE
        return True

    async def _give_back(self) -> None:
        """Give the provisional charges back. Where that fails, they stay charged until the next
        write.
        """
        charged = list(self._charged_objects)
        try:
            await self.database.change(partial(give_back, charged=charged))
        except (DatabaseUnavailable, DatabaseNewer, RowsRefused) as error:
            log.warn("budgets.not_given_back", objects=len(charged), cause=str(error))
        else:
            self._charged_objects.clear()

    async def _insert(self, entries: Sequence[Entry]) -> None:
        while self._by_group.undecided:
            await self._by_group.decide()
        # Without an await between the two, so that both sum the same calls.
        sums, group_sums = [rollups.begin() for rollups in self._sums]
        charged = self.charges.begin(entries)
        batch = inserts(entries, sums, group_sums)
        if charged:
            provisional = [row for entry in entries for row in entry.provisional]
            batch = (*batch, *charge_batch(charged), (INSERT, provisional))
        try:
            await self.database.write(batch)
        except BaseException:
            for rollups in self._sums:
                rollups.failed()
            self.charges.failed()
            raise
        self.charges.written(charged)
        for entry in entries:
            if entry.charged_object is not None:
                self._charged_objects.append(entry.charged_object)
        for rollups in self._sums:
            rollups.written(time.time())
        if self._charged_objects:
            await self._give_back()

    async def _set_refused_aside(self) -> bool:
        """Find out by themselves which sums and which charges the database refuses, so that they
        hold up no row: drop the sums, and keep the charges in memory. False if it refuses none.
        """
        found = False
        sums, group_sums = [rollups.begin() for rollups in self._sums]
        try:
            await self.database.write(inserts([], sums, group_sums))
        except RowsRefused as error:
            log.warn("ledger.sums_refused", cause=str(error))
            for rollups in self._sums:
                rollups.drop(time.time())
            found = True
        except BaseException:
            for rollups in self._sums:
                rollups.failed()
            raise
        else:
            for rollups in self._sums:
                rollups.written(time.time())
        for account in self.charges.leases:
            charged = self.charges.begin_alone(account)
            try:
                await self.database.write(charge_batch(charged))
            except RowsRefused as error:
                log.warn("ledger.charges_refused", cause=str(error), budget=account.rule.name)
                self.charges.set_aside()
                found = True
            except BaseException:
                self.charges.failed()
                raise
            else:
                self.charges.written(charged)
        return found

    def _drop_excess(self) -> None:
        """Drop the oldest bodies, then the oldest rows, until the limits of memory are met."""
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
            self.charges.keep(entry.budget)

    def _report_unavailable(self, error: Exception) -> None:
        self._lost.failures += 1
        if not self.unavailable:
            self.unavailable = True
            log.warn("database.unavailable", cause=str(error))

    def _report_recovered(self) -> None:
        if self.unavailable:
            self.unavailable = False
            log.event("database.recovered", waiting=self.waiting)
