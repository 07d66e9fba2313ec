"""Keep rollups: sums of calls by minute, hour and day, in memory, to be written as whole values.

Owns the sums of one writer. A writer's rows in the table have its own id (`writer`), so that to
write them again changes nothing and writers need no coordination; readers add up all writers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from relay.core.histogram import build_histogram, to_bytes
from relay.core.record import Record, is_failure
from relay.core.usage import COUNTS, counts_of

SPANS_S = (60, 3600, 86400)
_MAX_SUMS = 20_000
"""Past this the sums are dropped and a new writer id begins at zero: memory stays bounded."""
_ZEROS = (0,) * len(COUNTS)
_INDEX = {name: at for at, name in enumerate(COUNTS)}


class Key(NamedTuple):
    """The dimensions of usage."""

    client: str
    provider: str
    model: str
    transport: str
    surface: str
    outcome: str


class Sums:
    """Sums over some calls."""

    __slots__ = (
        "cache_hits", "cost", "counts", "errors", "estimated", "histogram", "requests", "saved",
        "unpriced",
    )  # fmt: skip

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self.requests = len(records)
        self.errors = self.cache_hits = self.unpriced = self.estimated = 0
        self.cost = self.saved = self.histogram = 0
        self.counts: tuple[int, ...] = _ZEROS
        if not records:
            return
        used = []
        for record in records:
            if is_failure(record.status, record.outcome):
                self.errors += 1
            if record.outcome == "cached":
                self.cache_hits += 1
                self.saved += record.saved_nano_usd or 0
            if record.cost_nano_usd:
                self.cost += record.cost_nano_usd
            if record.usage is not None:
                used.append(counts_of(record.usage))
                if record.usage.estimated:
                    self.estimated += 1
                if record.cost_nano_usd is None:
                    self.unpriced += 1
        self.histogram = build_histogram(
            # The duration of a session is not a latency.
            [record.duration_ms for record in records if record.transport == "rest"],
            [record.first_byte_ms for record in records if record.first_byte_ms is not None],
            [record.overhead_ms for record in records if record.overhead_ms],
        )
        if used:
            self.counts = tuple(map(sum, zip(*used, strict=True)))

    def add(self, other: Sums) -> None:
        """Add the sums of `other`."""
        self.requests += other.requests
        self.errors += other.errors
        self.cache_hits += other.cache_hits
        self.unpriced += other.unpriced
        self.estimated += other.estimated
        self.cost += other.cost
        self.saved += other.saved
        self.histogram += other.histogram
        self.counts = tuple(map(operator.add, self.counts, other.counts))

    def count(self, name: str) -> int:
        """Return the sum of one of the counts of a Usage."""
        return self.counts[_INDEX[name]]

    @property
    def row(self) -> tuple[Any, ...]:
        """The sums, then the histogram, in the order of the columns in storage/tables.py."""
        return (
            self.requests, self.errors, self.cache_hits, self.unpriced, self.estimated, self.cost,
            self.saved, *self.counts, to_bytes(self.histogram),
        )  # fmt: skip


def answered_by(record: Record) -> tuple[str, str]:
    """Return the provider and the model that a call counts for."""
    # An unknown provider's name is left out: clients could create any number of keys.
    provider = record.answered_by or (record.provider if record.via is not None else "")
    return provider, record.model_answered or record.model or ""


def by_key(records: Sequence[Record]) -> dict[Key, Sums]:
    """Sum calls by key."""
    groups: dict[tuple[str, str, str, str, str, str], list[Record]] = {}
    for record in records:
        rest = record.transport, record.surface, record.outcome
        key = (record.client, *answered_by(record), *rest)
        if (group := groups.get(key)) is None:
            group = groups[key] = []
        group.append(record)
    return {Key(*key): Sums(group) for key, group in groups.items()}


_RowKey = tuple[str, int, int, tuple[str, ...]]
"""(writer, span, time, key) of a row."""


class Rollups:
    """The rollups of one writer, for each of `spans_s`, by keys that are tuples of texts."""

    def __init__(self, new_id: Callable[[], str], spans_s: Sequence[int] = SPANS_S) -> None:
        self._new_id, self._spans_s = new_id, spans_s
        self.writer = new_id()
        self._current: dict[tuple[int, int, tuple[str, ...]], Sums] = {}
        self._latest_s = 0
        self._touched: dict[_RowKey, Sums] = {}
        self._writing: dict[_RowKey, Sums] = {}

    def take(self, batch: Mapping[Any, Sums], unix_s: float) -> None:
        """Add the sums of some calls at the time `unix_s`."""
        begun_s = int(unix_s // self._spans_s[0]) * self._spans_s[0]
        # The clock was set back: the sums of that time may be dropped already. New sums under the
        # same writer id would replace the written ones.
        if len(self._current) > _MAX_SUMS or begun_s < self._latest_s:
            self._current.clear()
            self.writer = self._new_id()
        self._latest_s = begun_s
        for span_s in self._spans_s:
            at_s = int(unix_s // span_s) * span_s
            for key, sums in batch.items():
                whole = self._current.get((span_s, at_s, key))
                if whole is None:
                    whole = self._current[span_s, at_s, key] = Sums()
                whole.add(sums)
                self._touched[self.writer, span_s, at_s, key] = whole

    def begin(self) -> list[tuple[Any, ...]]:
        """Return the sums that are not written yet, as rows. The caller then calls `written` or
        `failed`; sums that change in between are written the next time.
        """
        self._writing, self._touched = self._touched, {}
        return [
            (span_s, at_s, *key, writer, *sums.row)
            for (writer, span_s, at_s, key), sums in self._writing.items()
        ]

    def failed(self) -> None:
        """Note that the rows were not written: the next `begin` returns their sums of that time."""
        self._writing, self._touched = {}, self._writing | self._touched

    def drop(self, unix_s: float) -> None:
        """Drop the sums that are not written: the database refuses them."""
        self.begin()
        self.written(unix_s)

    def written(self, unix_s: float) -> None:
        """Note that the rows are written, and drop the sums of past spans."""
        self._writing = {}
        now = {span_s: int(unix_s // span_s) * span_s for span_s in self._spans_s}
        if any(at_s < now[span_s] for span_s, at_s, _ in self._current):
            self._current = {k: sums for k, sums in self._current.items() if k[1] >= now[k[0]]}
