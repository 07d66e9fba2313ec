"""The ledger: every call that ended gets its line, its row and its share of all sums, soon after.

Owns: the queue between calls and those, and the one task that empties it, many calls at a time: a
call never waits for it. It waits for nothing itself: what the database takes its time for is
writer.py's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from relay import log
from relay.core.exchange import Exchange
from relay.core.meters.answer_meter import read_whole
from relay.core.meters.sent_call import SentCall
from relay.core.record import Record
from relay.core.redaction import Secrets
from relay.core.usage import Part
from relay.ledger.bodies import bodies_of
from relay.ledger.counted_objects import CountedObjects
from relay.ledger.group_rollups import Grouping
from relay.ledger.records import record_of
from relay.ledger.retention import Retention
from relay.ledger.rollups import Key, Sums, by_key
from relay.ledger.rows import Entry, entry_of
from relay.ledger.writer import Lost, Writer
from relay.prices import price_list
from relay.storage.database import Database

SORT_S = 0.005
"""How long calls that ended wait for others: what they hold is better read while it is warm."""
ADD_S = 0.08
"""How long rows and sums do: what a kill -9 may lose, with the writing itself."""
_TURN = 64
"""So many records are made in one turn of the loop."""


class Ledger:
    """One per process. `take` is all that calls know of it."""

    def __init__(
        self,
        database: Database | None,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        secrets: Secrets,
    ) -> None:
        self.lost = Lost()
        self.database = database
        self._counted_objects = CountedObjects(database)
        self.counted: list[Callable[[Sequence[Record], Mapping[Key, Sums]], None]] = []
        """Who else is told of each batch: metrics and traces."""
        self._writer = None if database is None else Writer(database, new_id, self.lost)
        self._clock = clock
        self._secrets = secrets
        self._ended: list[Exchange] = []
        self._sorting = 0
        self._records: list[Record] = []
        self._entries: list[Entry] = []
        self._come, self._stopping = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def settle(self, exchange: Exchange) -> None:
        """Find out what it used, and what that cost, once: soon after it ended, or before, for whom
        it matters at once.
        """
        if exchange.usage.settled:
            return
        exchange.usage.settled = True
        try:
            if exchange.usage.unread is not None:
                _read(exchange)
            self._count_usage(exchange)
            price_list.set_cost(exchange, time.time())
        except Exception as error:  # a meter that fails must not end a call; counted
            self.meter_failed(exchange, error)

    def _count_usage(self, exchange: Exchange) -> None:
        """Take what it used, without what an answer before it told of the same object."""
        if exchange.usage.meter is None or exchange.routing.route is None:
            return
        provider, parts = exchange.routing.route.provider.name, exchange.usage.meter.parts
        self.lost.usage_fields += exchange.usage.meter.ignored
        request = exchange.request
        is_read = request.method == "GET" and request.transport == "rest"
        if is_read and exchange.outcome.error is not None:
            return  # a stored object of which a part was read: it counts when it is read whole
        named = [part for part in parts if part.object_id]
        if not named:
            exchange.usage.parts = parts
            return
        ids = {part.object_id for part in named if part.booking != "so_far"}
        known = {each for each in ids if not self._counted_objects.claim((provider, each))}
        exchange.usage.parts = tuple(
            rest
            for part in parts
            if part.object_id not in known or part.booking == "made"
            if (rest := self._uncounted_rest(provider, part)) is not None
        )

    def _uncounted_rest(self, provider: str, part: Part) -> Part | None:
        """What this process has not counted before of a count that grows; any other part whole."""
        if part.booking != "so_far" or not part.object_id:
            return part
        audio_ms = part.usage.audio_ms
        before_ms = self._counted_objects.claim_up_to((provider, part.object_id), audio_ms)
        if before_ms == 0:
            return part
        if before_ms >= audio_ms:
            return None
        usage = msgspec.structs.replace(part.usage, audio_ms=audio_ms - before_ms)
        return part._replace(usage=usage, object_id="")

    async def _drop_counted_elsewhere(self, exchanges: Sequence[Exchange]) -> None:
        """Take back what another worker has counted, or this one before it was restarted."""
        claimed = {
            (exchange.routing.route.provider.name, part.object_id): exchange
            for exchange in exchanges
            if exchange.routing.route is not None
            for part in exchange.usage.parts
            if part.object_id
        }
        if not claimed:
            return
        try:
            for named in await self._counted_objects.counted_elsewhere(list(claimed)):
                exchange, object_id = claimed[named], named[1]
                exchange.usage.parts = tuple(
                    part
                    for part in exchange.usage.parts
                    if part.object_id != object_id or part.booking == "made"
                )
                price_list.set_cost(exchange, time.time())
        except Exception as error:  # whatever it is, the calls are written as they stand; counted
            self.lost.meters += 1
            log.bug("ledger.booking_failed", error)

    def meter_failed(self, exchange: Exchange, error: Exception) -> None:
        """What it used stays unknown."""
        exchange.usage.meter = exchange.usage.used = exchange.usage.cost_nano_usd = None
        self.lost.meters += 1
        log.bug("meter.failed", error, id=exchange.id)

    def take(self, exchange: Exchange) -> None:
        """Write it down soon."""
        # Nothing that would keep its request alive.
        exchange.task = exchange.waiting.client_left = None
        if exchange.outcome.error is not None:
            log.exchange_failed(exchange)
        self._ended.append(exchange)
        if len(self._ended) == 1:
            self._come.set()

    @property
    def waiting(self) -> int:
        """Rows that are not written yet."""
        waiting = len(self._ended) + self._sorting + len(self._records)
        return waiting if self._writer is None else waiting + self._writer.waiting

    @property
    def state(self) -> str:
        """For /readyz."""
        return "unavailable" if self._writer is not None and self._writer.away else "ok"

    async def start(self, keep: Callable[[], Retention], grouping: Callable[[], Grouping]) -> None:
        """Begin to write. Raises DatabaseNewer; a database that is away is waited for."""
        if self._writer is not None:
            await self._writer.start(keep, grouping)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write what is left, within five seconds."""
        self._stopping.set()
        self._come.set()
        if self._task is not None:
            await self._task
        if self._writer is not None:
            await self._writer.stop()

    async def flushed(self) -> None:
        """Wait until all that was taken is written, or the database is away."""
        while self.waiting and self.state == "ok":  # noqa: ASYNC110 (for tests and the end)
            await asyncio.sleep(0.005)

    async def _run(self) -> None:
        added_s = 0.0
        while self._ended or not self._stopping.is_set():
            await self._come.wait()
            if not self._stopping.is_set():
                await asyncio.sleep(SORT_S)
            self._come.clear()
            await self._sort()
            if self._stopping.is_set() or self._clock() - added_s >= ADD_S:
                self._add_up()
                added_s = self._clock()
            elif self._records:
                self._come.set()

    async def _sort(self) -> None:
        """Make records of what ended, and lines and rows of those: many at a time, for that costs a
        third of what it does one by one.
        """
        ended, self._ended = self._ended, []
        self._sorting = len(ended)
        at_zero = time.time() - self._clock()
        for at in range(0, len(ended), _TURN):
            turn = ended[at : at + _TURN]
            for exchange in turn:
                self.settle(exchange)
                try:
                    exchange.fail_if_answer_is_error()
                except Exception as error:  # a meter that fails must not end a call; counted
                    self.meter_failed(exchange, error)
            if self._counted_objects.is_shared and self.state == "ok":
                await self._drop_counted_elsewhere(turn)
            for exchange in turn:
                try:
                    await self._record(exchange, at_zero)
                except Exception as error:  # whatever it is, the others are written; counted
                    self.lost.rows += 1
                    log.bug("ledger.failed", error, id=exchange.id)
                exchange.let_go()
                self._sorting -= 1
            await asyncio.sleep(0)

    async def _record(self, exchange: Exchange, at_zero: float) -> None:
        redactor = self._secrets.redactor
        record = record_of(exchange, redactor)
        line = log.exchange_ended(record, at_zero + exchange.outcome.ended_s)
        if self._writer is not None:
            bodies = await bodies_of(exchange, redactor) if exchange.capture is not None else None
            self._entries.append(entry_of(record, line, bodies))
        self._records.append(record)

    def _add_up(self) -> None:
        records, self._records = self._records, []
        entries, self._entries = self._entries, []
        try:
            sums = by_key(records)
            for tell in self.counted:
                tell(records, sums)
            if self._writer is not None:
                self._writer.take(entries, records, sums)
        except Exception as error:
            # Whatever it is must not end all that follows; counted.
            self.lost.rows += len(entries)
            log.bug("ledger.failed", error)


def _read(exchange: Exchange) -> None:
    """Make the meter of a whole answer: many read together cost a third of what they do one by one,
    each within its own call.
    """
    route, unread = exchange.routing.route, exchange.usage.unread
    assert route is not None and unread is not None
    sent = SentCall.of(exchange)
    exchange.usage.meter = read_whole(route.format, sent, unread.headers.get, unread.body)
    exchange.usage.unread = None
