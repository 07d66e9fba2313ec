"""Query usage and cost: sums by time, client, provider, model, transport, surface and outcome, and
by user, team, agent session or a name of metadata.

Owns which rollup answers a query, and how rows are grouped, sorted and cut. The rows of an answer
add up to its total for every grouping. queries.py queries single calls.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from relay.core.histogram import percentiles
from relay.core.text import clean
from relay.core.usage import COUNTS
from relay.ledger.group_rollups import AGENT_SESSION, METADATA, NONE, TEAM, USER, Grouping
from relay.ledger.queries import BadQuery, iso, usd
from relay.storage.database import Database
from relay.storage.histograms import read_sum
from relay.storage.tables import KEYS, SUMS, group_rollups, rollups

SPANS = {"minute": 60, "hour": 3600, "day": 86400}
REST = "(rest)"
"""The key values of the row that sums the rows that `top` leaves out."""
MAX_TOP = 10_000
_REACH_S = {60: 2 * 86400, 3600: 60 * 86400}
"""How far back minutes and hours are kept."""
_BESIDE_NAMES = ("provider", "model")
"""The keys that can be combined with user or metadata."""
_MAX_GROUPS = 10_000
_PERCENTILES = (50, 95, 99)
_NAMES = {"duration": "latency_ms", "first_byte": "first_byte_ms", "overhead": "overhead_ms"}
_SORTS = {
    **{name: name for name in SUMS},
    "cost": "cost_nano_usd", "cost_usd": "cost_nano_usd", "saved": "saved_nano_usd",
    "saved_usd": "saved_nano_usd", "input": "input_tokens", "output": "output_tokens",
    "cached_tokens": "cache_read_tokens", "seconds": "audio_ms",
}  # fmt: skip
SORTS = ("name", "tokens", *(name for name in _SORTS if not name.endswith("nano_usd")))
"""The orders in which the rows of an answer can be sorted."""


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """A query for usage: the time in seconds since 1970, the grouping, and the filters."""

    since_s: float
    until_s: float
    now_s: float
    by: Sequence[str] = ()
    """Names of KEYS; or `user`, `team`, `agent_session` or one `metadata.NAME`, alone or with
    provider and model."""
    bucket: str | None = None
    """minute, hour or day: there is a row for each."""
    only: Mapping[str, str] = field(default_factory=dict)
    """The values that keys must have."""
    sort: str = "cost"
    """One of SORTS. The largest first, but names from A to Z."""
    top: int | None = None
    """The number of rows (of each bucket); one more row sums the rest."""


@dataclass(slots=True)
class _Group:
    sums: Sequence[int]
    histogram: int = 0

    def __add__(self, other: _Group) -> _Group:
        sums = list(map(operator.add, self.sums, other.sums))
        return _Group(sums, self.histogram + other.histogram)

    def __sub__(self, other: _Group) -> _Group:
        sums = list(map(operator.sub, self.sums, other.sums))
        return _Group(sums, self.histogram - other.histogram)


_Rows = list[tuple[tuple[Any, ...], _Group]]
_EMPTY = _Group([0] * len(SUMS))


def keys_of(text: str) -> list[str]:
    """Parse keys such as `provider,model`; duplicates are dropped. Raises BadQuery."""
    by = list(dict.fromkeys(name for name in text.split(",") if name))
    for name in by:
        if name not in KEYS and not _is_name(name):
            raise BadQuery(
                f"unknown key '{clean(name, 40)}' in by:"
                f" use {', '.join(KEYS)}, user, team, agent_session or metadata.NAME"
            )
    return by


def columns_of(query: UsageQuery) -> list[str]:
    """Return the keys of an answer's rows, in their order."""
    return (["at"] if query.bucket is not None else []) + list(query.by)


def sort_of(text: str) -> str:
    """Check the name of a sort order. Raises BadQuery."""
    if text not in SORTS:
        raise BadQuery(f"unknown sort '{clean(text, 40)}': use {', '.join(SORTS)}")
    return text


async def usage(database: Database, query: UsageQuery, grouping: Grouping) -> dict[str, Any]:
    """Return `{"since", "until", "rows": [{…keys, requests, errors, …}], "total": {…}}`. The start
    is rounded down to the rollup's span. Raises BadQuery, DatabaseUnavailable, QueryRefused.
    """
    name = _name_of(query, grouping)
    span_s = _span_s(query, name)
    since_s = int(query.since_s // span_s) * span_s
    summed = functools.partial(_summed, database, query=query, since=(since_s, span_s))
    statement: Any = summed(rollups)
    if name is not None:
        # One statement reads both tables at one moment: the difference is exact during writes.
        of_name = summed(group_rollups).where(group_rollups.c.name == name)
        statement = of_name.union_all(statement)
    rows = await database.rows(statement.limit(_MAX_GROUPS + 1))
    if len(rows) > _MAX_GROUPS:
        raise BadQuery(f"more than {_MAX_GROUPS} rows: query a shorter time, or fewer keys")
    return await asyncio.to_thread(_answer, query, since_s, rows)


_SHORT = {"team": TEAM}
"""Keys that are short for a name of metadata."""


def _is_name(key: str) -> bool:
    return key in (USER, AGENT_SESSION) or key in _SHORT or key.startswith(METADATA)


def _name_of(query: UsageQuery, grouping: Grouping) -> str | None:
    """Return the user or metadata name by which a query groups; None if it does not. Raises
    BadQuery.
    """
    names = [key for key in query.by if _is_name(key)]
    if not names:
        return None
    key = names[0]
    if len(names) > 1:
        raise BadQuery(f"by {clean(key, 60)} cannot be combined with {clean(names[1], 40)}")
    name = _SHORT.get(key, key)
    if name not in grouping.names:
        raise BadQuery(
            f"there are no sums by {clean(name, 60)}: list"
            f" {clean(name.removeprefix(METADATA), 40)} under ledger.group_by; calls are counted"
            " from then on"
        )
    if others := (set(query.by) | set(query.only)) - {key, *_BESIDE_NAMES}:
        raise BadQuery(
            f"by {clean(key, 60)} can be combined with provider and model only,"
            f" not with {min(others)}"
        )
    if query.now_s - query.since_s > grouping.retention_s + 60:
        raise BadQuery(f"sums by {name} are kept for {grouping.retention_s / 86400:g} days")
    return name


def _span_s(query: UsageQuery, name: str | None) -> int:
    """Choose the span of the rollup to read: that of the query's bucket, or the finest that is
    still kept and has not too many rows for the query's time. Raises BadQuery.
    """
    if query.bucket == "minute" and name is not None:
        raise BadQuery(f"sums by {name} have hours and days, no minutes")
    ago_s = query.now_s - query.since_s
    if query.bucket == "hour" and name is not None and ago_s > _REACH_S[3600] + 60:
        raise BadQuery(f"hourly sums by {name} are kept for {_REACH_S[3600] / 86400:g} days")
    if query.bucket is not None:
        return SPANS[query.bucket]
    for span_s, max_s in ((60, 6 * 3600), (3600, 3 * 86400)):
        if query.until_s - query.since_s <= max_s and ago_s <= _REACH_S[span_s]:
            return max(span_s, 3600) if name is not None else span_s
    return 86400


def _summed(
    database: Database, table: sa.Table, query: UsageQuery, since: tuple[int, int]
) -> sa.Select[Any]:
    """Build the query for keys, sums and histograms, a row for each group. In a table without
    values the user or metadata name is null. `since` is (time, span) in seconds.
    """
    since_s, span_s = since
    columns: list[sa.ColumnElement[Any]] = [_column(table, key) for key in query.by]
    if query.bucket is not None:
        columns.insert(0, table.c.at_s)
    within = (
        table.c.span_s == span_s,
        table.c.at_s >= since_s,
        table.c.at_s < query.until_s,
        *(table.c[key] == clean(value) for key, value in query.only.items()),
    )
    sums = [sa.func.sum(table.c[name]) for name in SUMS]
    histogram = database.histogram_sum(table.c.spread)
    keys = [column for column in columns if not isinstance(column, sa.Cast)]
    return sa.select(*columns, *sums, histogram).where(*within).group_by(*keys)


def _column(table: sa.Table, key: str) -> sa.ColumnElement[Any]:
    if not _is_name(key):
        return table.c[key]
    return table.c.value if "value" in table.c else sa.cast(sa.null(), sa.Text)


def _answer(query: UsageQuery, since_s: float, found: Sequence[sa.Row[Any]]) -> dict[str, Any]:
    """Build the answer. The caller runs this in a thread: ten thousand groups would block the loop
    for too long.
    """
    names = columns_of(query)
    keys = len(names)
    # Without keys there is one row, even if there were no calls.
    groups: _Rows = [
        (tuple(row[:keys]), _Group([int(n) for n in row[keys:-1]], read_sum(row[-1])))
        for row in found
        if row[keys]
    ]
    for at, name in enumerate(names):
        if _is_name(name):
            groups = _with_none(groups, at)
    total = sum((group for _, group in groups), _EMPTY)
    timed = query.bucket is not None
    groups.sort(key=lambda row: (row[0][0] if timed else 0, *_rank(query.sort, *row)))
    if query.top is not None:
        groups = _first(groups, query.top, 1 if timed else 0)
    rows = []
    for key, group in groups:
        named = dict(zip(names, key, strict=True))
        if timed:
            named["at"] = iso(named["at"])
        rows.append(named | _shown(group))
    return {
        "since": iso(since_s),
        "until": iso(query.until_s),
        "rows": rows,
        "total": _shown(total),
    }


def _with_none(found: _Rows, at: int) -> _Rows:
    """Return the groups by a name's values, and the groups of calls without a value: the sums of
    all calls, in which the value is null, less those by value.
    """
    rest = {key: group for key, group in found if key[at] is None}
    valued = [(key, group) for key, group in found if key[at] is not None]
    for key, group in valued:
        of_all = (*key[:at], None, *key[at + 1 :])
        if of_all in rest:
            rest[of_all] -= group
    return valued + [
        ((*key[:at], NONE, *key[at + 1 :]), group) for key, group in rest.items() if any(group.sums)
    ]


def _rank(sort: str, key: tuple[Any, ...], group: _Group) -> tuple[Any, ...]:
    """Return the sort key of a row."""
    sums = dict(zip(SUMS, group.sums, strict=True))
    if sort == "name":
        return key
    if sort == "tokens":
        return -sums["input_tokens"] - sums["output_tokens"], -sums["requests"], key
    return -sums[_SORTS[sort]], -sums["requests"], key


def _first(groups: _Rows, top: int, timed: int) -> _Rows:
    """Return the first `top` rows, and one that sums the rest; of each bucket if `timed` is 1 (the
    first key is its time).
    """
    first: _Rows = []
    for bucket, each in itertools.groupby(groups, lambda row: row[0][:timed]):
        rows = list(each)
        first += rows[:top]
        if len(rows) > top:
            rest = sum((group for _, group in rows[top:]), _EMPTY)
            first.append(((*bucket, *[REST] * (len(rows[0][0]) - timed)), rest))
    return first


def _shown(group: _Group) -> dict[str, Any]:
    sums = dict(zip(SUMS, group.sums, strict=True))
    return {
        "requests": sums["requests"],
        "errors": sums["errors"],
        "cache_hits": sums["cache_hits"],
        "cost_usd": usd(sums["cost_nano_usd"]),
        "saved_usd": usd(sums["saved_nano_usd"]),
        "unpriced": sums["unpriced"],
        "estimated": sums["estimated"],
        **{name: sums[name] for name in COUNTS},
        **{
            shown: percentiles(group.histogram, measure, _PERCENTILES)
            for measure, shown in _NAMES.items()
        },
    }
