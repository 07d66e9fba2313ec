"""Record each finished call: its log line, its row, its bodies, and its part of the sums.

Owns the queue of finished calls, and the one task that empties it, many calls at a time: no call
waits for that task. writer.py writes to the database; this task waits for the database only to ask
which objects other workers have counted, for a second at most.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

from relay import log
from relay.core.exchange import Exchange
from relay.core.meters.answer_meter import read_whole
from relay.core.meters.sent_call import SentCall
from relay.core.record import Record
from relay.core.redaction import Secrets
from relay.core.usage import Part
from relay.ledger.bodies import bodies_of
from relay.ledger.charges import note_object, unknown_cost
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
"""How long finished calls wait for others: short, since their data is still in the CPU's caches."""
ADD_S = 0.08
"""How long rows and sums wait for others. A kill -9 loses these and those being written."""
_TURN = 64
"""How many records are made in one turn of the loop."""


class Ledger:
    """The ledger of a process. `take` receives each finished call."""

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
        """The functions that get each batch of records too: those of metrics and traces."""
        self._writer = None if database is None else Writer(database, new_id, self.lost)
        self._clock = clock
        self._secrets = secrets
        self._ended: list[Exchange] = []
        self._recording = 0
        self._records: list[Record] = []
        self._entries: list[Entry] = []
        self._added, self._stopping = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def settle(self, exchange: Exchange) -> None:
        """Work out the usage and cost of a call, once: soon after it ended, or earlier for code
        that needs them at once.
        """
        if exchange.usage.settled:
            return
        exchange.usage.settled = True
        try:
            if exchange.usage.unread is not None:
                _meter_unread(exchange)
            self._count_usage(exchange)
            price_list.set_cost(exchange, time.time())
        except Exception as error:  # a meter that fails must not end a call; counted
            self.meter_failed(exchange, error)

    def _count_usage(self, exchange: Exchange) -> None:
        """Set the usage of a call, without usage that an earlier response about the same object has
        reported.
        """
        if exchange.usage.meter is None or exchange.routing.route is None:
            return
        provider, parts = exchange.routing.route.provider.name, exchange.usage.meter.parts
        self.lost.usage_fields += exchange.usage.meter.ignored
        request = exchange.request
        is_read = request.method == "GET" and request.transport == "rest"
        if is_read and exchange.outcome.error is not None:
            return  # a stored object that was read in part: it counts when it is read whole
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
        """Return the part of a growing count that this process has not counted before; None if
        there is none. Any other part is returned unchanged.
        """
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
        """Remove usage that another worker has counted, or this one before a restart."""
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
        except Exception as error:  # any exception: the calls are written as they are; counted
            self.lost.meters += 1
            log.bug("ledger.booking_failed", error)

    def meter_failed(self, exchange: Exchange, error: Exception) -> None:
        """Drop the meter of a call: its usage stays unknown."""
        exchange.usage.meter = exchange.usage.used = exchange.usage.cost_nano_usd = None
        exchange.usage.least_nano_usd = 0
        self.lost.meters += 1
        log.bug("meter.failed", error, id=exchange.id)

    def take(self, exchange: Exchange) -> None:
        """Queue a finished call."""
        # Drop the references that would keep its request alive.
        exchange.task = exchange.waiting.client_left = None
        if exchange.outcome.error is not None:
            log.exchange_failed(exchange)
        self._ended.append(exchange)
        if len(self._ended) == 1:
            self._added.set()

    @property
    def waiting(self) -> int:
        """Number of rows that are not written yet."""
        waiting = len(self._ended) + self._recording + len(self._records)
        return waiting if self._writer is None else waiting + self._writer.waiting

    @property
    def state(self) -> str:
        """The state of the database for /readyz: `ok` or `unavailable`."""
        return "unavailable" if self._writer is not None and self._writer.unavailable else "ok"

    async def start(
        self, periods: Callable[[], Retention], grouping: Callable[[], Grouping]
    ) -> None:
        """Start the tasks. Raises DatabaseNewer; an unavailable database is tried again later."""
        if self._writer is not None:
            await self._writer.start(periods, grouping)
        self._task = asyncio.create_task(self._run())

    async def stop(self, before_close: Callable[[], Awaitable[None]] | None = None) -> None:
        """Record the queued calls, and write the rows within five seconds. `before_close` is called
        when they are written, while the database is still open.
        """
        self._stopping.set()
        self._added.set()
        if self._task is not None:
            await self._task
        if self._writer is not None:
            await self._writer.stop(before_close)

    async def recorded(self) -> None:
        """Wait until the calls that have ended are recorded, so that their budgets are settled."""
        while self._ended or self._recording:  # noqa: ASYNC110 (a few milliseconds)
            await asyncio.sleep(SORT_S)

    async def flushed(self) -> None:
        """Wait until all queued calls are written, or the database is unavailable."""
        while self.waiting and self.state == "ok":  # noqa: ASYNC110 (for tests and the end)
            await asyncio.sleep(0.005)

    async def _run(self) -> None:
        added_s = 0.0
        while self._ended or not self._stopping.is_set():
            await self._added.wait()
            if not self._stopping.is_set():
                await asyncio.sleep(SORT_S)
            self._added.clear()
            await self._record_ended()
            if self._stopping.is_set() or self._clock() - added_s >= ADD_S:
                self._add_up()
                added_s = self._clock()
            elif self._records:
                self._added.set()

    async def _record_ended(self) -> None:
        """Make the record, log line and row of each finished call: many calls at a time, which
        costs a third of one call at a time.
        """
        ended, self._ended = self._ended, []
        self._recording = len(ended)
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
                use = exchange.budget
                if use is not None:
                    exchange.budget = None
                    cost_nano = exchange.usage.cost_nano_usd
                    if cost_nano is None:
                        use.note_known(exchange.usage.least_nano_usd)
                        cost_nano = unknown_cost(exchange)
                    use.settle(cost_nano)
                try:
                    entry = await self._record(exchange, at_zero)
                    if use is not None and entry is not None:
                        entry.budget = use
                        if use.unpriced_nano or exchange.request.method == "GET":
                            note_object(entry, use, exchange)
                except Exception as error:  # any exception: the others are written; counted
                    self.lost.rows += 1
                    log.bug("ledger.failed", error, id=exchange.id)
                    if self._writer is not None:
                        self._writer.charges.keep(use)
                exchange.let_go()
                self._recording -= 1
            await asyncio.sleep(0)

    async def _record(self, exchange: Exchange, at_zero: float) -> Entry | None:
        """Make the record of a call and its log line. Returns its row, if there is a database."""
        redactor = self._secrets.redactor
        record = record_of(exchange, redactor)
        line = log.exchange_ended(record, at_zero + exchange.outcome.ended_s)
        entry = None
        if self._writer is not None:
            bodies = await bodies_of(exchange, redactor) if exchange.capture is not None else None
            entry = entry_of(record, line, bodies)
            self._entries.append(entry)
        self._records.append(record)
        return entry

    def _add_up(self) -> None:
        records, self._records = self._records, []
        entries, self._entries = self._entries, []
        try:
            sums = by_key(records)
            for count in self.counted:
                count(records, sums)
            if self._writer is not None:
                self._writer.take(entries, records, sums)
        except Exception as error:
            # No exception may end the task; counted.
            self.lost.rows += len(entries)
            log.bug("ledger.failed", error)
            if self._writer is not None:
                for entry in entries:
                    self._writer.charges.keep(entry.budget)


def _meter_unread(exchange: Exchange) -> None:
    """Meter a response that was received whole. That is done here, for many responses together,
    since it costs three times as much within each call.
    """
    route, unread = exchange.routing.route, exchange.usage.unread
    assert route is not None and unread is not None
    sent = SentCall.of(exchange)
    exchange.usage.meter = read_whole(route.format, sent, unread.headers.get, unread.body)
    exchange.usage.unread = None
