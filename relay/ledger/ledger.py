"""The ledger: every call that ended gets its row, soon after.

Owns: the queue between calls and the database, the one task that empties it in batches, and the
old rows' end. A call never waits for it. While the database is away rows wait, up to a bound; what
is dropped then is counted, bodies before rows, and the sums lose nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from relay.core.exchange import Exchange
from relay.core.meters.answers import Sent, read_whole
from relay.core.record import Record
from relay.ledger import log
from relay.ledger.pricing import Prices
from relay.ledger.records import bodies_of, record_of
from relay.ledger.retention import Retention, retention
from relay.ledger.rows import BODY, ROW, SUM, TAG, TAG_SUM, Entry, entry_of
from relay.ledger.tallies import Key, Tallies, Tally, by_key, by_tag
from relay.storage.database import Database, DatabaseAway, DatabaseNewer, RowsRefused

SORT_S = 0.02
"""How long calls that ended wait for others, until their log lines are written."""
FLUSH_S = 0.1
"""How long rows do: what a kill -9 may lose, with the writing itself."""
MOST_ROWS = 50_000
MOST_BODIES_BYTES = 64 * 1024 * 1024
_AT_ONCE = 512
_TURN = 64
"""So many rows are made in one turn of the loop."""
_RETRY_S = 1.0
_STOP_S = 5.0


class Ledger:
    """One per process. `take` is all that calls know of it."""

    def __init__(
        self,
        database: Database | None,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self.database = database
        self.prices = Prices()
        self._clock = clock
        self.rows_dropped = self.bodies_dropped = 0
        self.failures = self.meter_failures = 0
        self.counted: list[Callable[[Sequence[Record], Mapping[Key, Tally]], None]] = []
        """Who else is told of each batch: metrics and traces."""
        self._tallies, self._by_tag = Tallies(new_id), Tallies(new_id, (3600,))
        self._ended: list[Exchange] = []
        self._sorting = 0
        self._entries: deque[Entry] = deque()
        self._bodies_bytes = 0
        self._at_once = _AT_ONCE
        self._come, self._stopping = asyncio.Event(), asyncio.Event()
        self._away = False
        self._task: asyncio.Task[None] | None = None
        self._old: asyncio.Task[None] | None = None

    def settle(self, exchange: Exchange) -> None:
        """Find out what it used, and what that cost, once: soon after it ended, or before, for whom
        it matters at once.
        """
        if exchange.settled:
            return
        exchange.settled = True
        try:
            if exchange.answer:
                _read(exchange)
            self.prices.settle(exchange, time.time())
        except Exception as error:  # a meter that fails must not end a call; counted
            self.meter_failed(exchange, error)

    def meter_failed(self, exchange: Exchange, error: Exception) -> None:
        """What it used stays unknown."""
        exchange.meter = exchange.used = exchange.cost_nano_usd = None
        self.meter_failures += 1
        log.bug("meter.failed", error, id=exchange.id)

    def take(self, exchange: Exchange, ended_s: float) -> None:
        """Write it down soon."""
        exchange.ended_s = ended_s
        exchange.task = exchange.client_left = None  # nothing that would keep its request alive
        if exchange.error is not None:
            log.exchange_failed(exchange)
        self._ended.append(exchange)
        if len(self._ended) == 1:
            self._come.set()

    @property
    def waiting(self) -> int:
        """Rows that are not written yet."""
        return len(self._ended) + self._sorting + len(self._entries)

    @property
    def state(self) -> str:
        """For /readyz."""
        return "away" if self._away else "ok"

    async def start(self, keep: Callable[[], Retention]) -> None:
        """Begin to write. Raises DatabaseNewer; a database that is away is waited for."""
        if self.database is not None:
            try:
                await self.database.prepare()
            except DatabaseAway as error:
                self._lost(error)
            self._old = asyncio.create_task(retention(self.database, keep))
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write what is left, within five seconds."""
        self._stopping.set()
        self._come.set()
        if self._task is not None:
            _, running = await asyncio.wait({self._task}, timeout=_STOP_S)
            for task in running:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._old is not None:
            self._old.cancel()
            await asyncio.gather(self._old, return_exceptions=True)
        if self.waiting:
            log.warn("ledger.unwritten", rows=self.waiting)
        if self.database is not None:
            await self.database.close()

    async def flushed(self) -> None:
        """Wait until all that was taken is written, or the database is away."""
        while self.waiting and not self._away:  # noqa: ASYNC110 (for tests and the end)
            await asyncio.sleep(0.005)

    async def _run(self) -> None:
        written_s = 0.0
        while not (self._stopping.is_set() and not self.waiting):
            await self._come.wait()
            if not self._stopping.is_set():
                await asyncio.sleep(SORT_S)
            self._come.clear()
            try:
                await self._sort()
                wait_s = _RETRY_S if self._away else FLUSH_S
                if self._stopping.is_set() or self._clock() - written_s >= wait_s:
                    await self._write()
                    written_s = self._clock()
            except Exception as error:
                # Whatever it is must not end all that follows; it is logged each time.
                log.bug("ledger.failed", error)
            if self.waiting:
                self._come.set()
                if self._away and self._stopping.is_set():
                    return

    async def _sort(self) -> None:
        """Make records of what ended, lines and rows of those, and add them up: many at a time, for
        that costs a third of what it does one by one.
        """
        ended, self._ended = self._ended, []
        if not ended:
            return
        self._sorting = len(ended)
        try:
            await self._add_up(ended)
        finally:
            self._sorting = 0

    async def _add_up(self, ended: list[Exchange]) -> None:
        records: list[Record] = []
        at_zero = time.time() - self._clock()
        for at in range(0, len(ended), _TURN):
            for exchange in ended[at : at + _TURN]:
                try:
                    records.append(self._record(exchange, at_zero))
                except Exception as error:  # whatever it is, the others are written; counted
                    self.rows_dropped += 1
                    log.bug("ledger.failed", error, id=exchange.id)
            await asyncio.sleep(0)
        batch = by_key(records)
        for tell in self.counted:
            tell(records, batch)
        if self.database is not None:
            now_s = time.time()
            self._tallies.take(batch, now_s)
            self._by_tag.take(by_tag(records), now_s)
            self._bound()

    def _record(self, exchange: Exchange, at_zero: float) -> Record:
        self.settle(exchange)
        record = record_of(exchange)
        line = log.exchange_ended(record, at_zero + exchange.ended_s)
        if self.database is not None:
            entry = entry_of(record, line, bodies_of(exchange))
            self._bodies_bytes += entry.body_bytes
            self._entries.append(entry)
        return record

    def _bound(self) -> None:
        """Let go of what is too much to hold: the oldest bodies first, then the oldest rows."""
        if self._bodies_bytes > MOST_BODIES_BYTES:
            for entry in self._entries:
                if entry.body is not None and self._bodies_bytes > MOST_BODIES_BYTES:
                    self.bodies_dropped += 1
                    self._bodies_bytes -= entry.body_bytes
                    entry.body, entry.body_bytes = None, 0
        while len(self._entries) > MOST_ROWS:
            self._bodies_bytes -= self._entries.popleft().body_bytes
            self.rows_dropped += 1

    async def _write(self) -> None:
        while self._entries:
            count = min(self._at_once, len(self._entries))
            entries = list(itertools.islice(self._entries, count))
            try:
                await self._insert(entries)
            except RowsRefused as error:
                if count > 1:
                    self._at_once = 1  # to find the one that no database takes
                    continue
                if await self._sums_are_refused():
                    continue
                self.rows_dropped += 1
                log.warn("ledger.row_refused", cause=str(error), id=entries[0].row[0])
            except (DatabaseAway, DatabaseNewer) as error:
                self._lost(error)
                return
            self._back()
            if count > 1 or len(self._entries) == 1:
                self._at_once = _AT_ONCE
            for _ in range(count):
                self._bodies_bytes -= self._entries.popleft().body_bytes

    async def _sums_are_refused(self) -> bool:
        """Whether it is the sums that the database does not take: then those are let go."""
        try:
            await self._insert([])
        except RowsRefused as error:
            log.warn("ledger.sums_refused", cause=str(error))
            self._forget_written()
            return True
        return False

    def _forget_written(self) -> None:
        for sums in (self._tallies, self._by_tag):
            sums.written(time.time())

    async def _insert(self, entries: list[Entry]) -> None:
        assert self.database is not None
        await self.database.write(
            (
                (ROW, [entry.row for entry in entries]),
                (TAG, [tag for entry in entries for tag in entry.tags]),
                (BODY, [entry.body for entry in entries if entry.body]),
                (SUM, list(self._tallies.rows())),
                (TAG_SUM, [row[1:] for row in self._by_tag.rows()]),
            )
        )
        self._forget_written()

    def _lost(self, error: Exception) -> None:
        self.failures += 1
        if not self._away:
            self._away = True
            log.warn("ledger.lost", cause=str(error))

    def _back(self) -> None:
        if self._away:
            self._away = False
            log.event("ledger.back", waiting=self.waiting)


def _read(exchange: Exchange) -> None:
    """Make the meter of a whole answer: many read together cost a third of what they do one by one,
    each within its own call.
    """
    assert exchange.route is not None and exchange.answer_headers is not None
    sent = Sent(exchange.kind, exchange.spoken, exchange.request_bytes)
    name, header = exchange.route.provider.meter, exchange.answer_headers.get
    exchange.meter = read_whole(name, sent, header, exchange.answer)
    exchange.answer = b""
