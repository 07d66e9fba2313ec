"""What was used and what it cost: sums by time, client, provider, model, surface, outcome, or an
entry of the calls' metadata.

Owns: which rollup answers a question, and the putting together of sums and percentiles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from relay.core.spread import percentiles
from relay.core.text import clean
from relay.core.usage import COUNTS
from relay.ledger.queries import BadQuestion, iso, usd
from relay.storage import spreads
from relay.storage.database import Database
from relay.storage.tables import KEYS, SUMS, rollups, tag_rollups

SPANS = {"minute": 60, "hour": 3600, "day": 86400}
_REACH_S = {60: 2 * 86400, 3600: 60 * 86400}
"""How far back minutes and hours are kept."""
_METADATA = "metadata."
_METADATA_S = 7 * 86400
_MOST_GROUPS = 10_000
_PERCENTILES = (50, 95, 99)
_NAMES = {"duration": "latency_ms", "first_byte": "first_byte_ms", "own": "overhead_ms"}


@dataclass(frozen=True, slots=True)
class Question:
    """From and until when, in seconds since 1970; by what; of which calls only."""

    since_s: float
    until_s: float
    now_s: float
    by: Sequence[str] = ()
    """Of KEYS, or one `metadata.NAME` alone."""
    bucket: str | None = None
    """minute, hour or day: a row for each."""
    only: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Group:
    sums: Sequence[int]
    spread: int = 0


def keys_of(text: str) -> list[str]:
    """`provider,model` as keys. Raises BadQuestion."""
    by = [name for name in text.split(",") if name]
    for name in by:
        if name not in KEYS and not name.startswith(_METADATA):
            raise BadQuestion(f"by '{name[:40]}': it goes by {', '.join(KEYS)} or metadata.NAME")
    return by


async def usage(database: Database, asked: Question) -> dict[str, Any]:
    """`{"since", "until", "rows": [{…keys, requests, errors, …}], "total": {…}}`. The time is taken
    down to the span that answers. Raises BadQuestion, DatabaseAway.
    """
    tagged = [name for name in asked.by if name.startswith(_METADATA)]
    if tagged:
        return await _by_metadata(database, asked, tagged)
    span_s = _span_s(asked)
    since_s = int(asked.since_s // span_s) * span_s
    columns = [rollups.c[name] for name in asked.by]
    if asked.bucket is not None:
        columns = [rollups.c.at_s, *columns]
    within = (
        rollups.c.span_s == span_s,
        rollups.c.at_s >= since_s,
        rollups.c.at_s < asked.until_s,
        *(rollups.c[name] == clean(value) for name, value in asked.only.items()),
    )
    rows = await _summed(database, rollups, columns, within)
    names = (["at"] if asked.bucket is not None else []) + list(asked.by)
    return await asyncio.to_thread(_answer, since_s, asked.until_s, names, rows)


def _span_s(asked: Question) -> int:
    """The span of the rollup that answers: as coarse as may be, or as was asked for."""
    if asked.bucket is not None:
        return SPANS[asked.bucket]
    for span_s, most_s in ((60, 6 * 3600), (3600, 3 * 86400)):
        within_reach = asked.now_s - asked.since_s <= _REACH_S[span_s]
        if asked.until_s - asked.since_s <= most_s and within_reach:
            return span_s
    return 86400


async def _by_metadata(database: Database, asked: Question, tagged: list[str]) -> dict[str, Any]:
    if len(asked.by) > 1 or asked.bucket is not None or asked.only:
        raise BadQuestion("by metadata goes alone: no bucket, no other key, no condition")
    if asked.until_s - asked.since_s > _METADATA_S + 60:
        raise BadQuestion("by metadata goes back seven days at most")
    since_s = int(asked.since_s // 3600) * 3600
    within = (
        tag_rollups.c.name == clean(tagged[0].removeprefix(_METADATA)),
        tag_rollups.c.at_s >= since_s,
        tag_rollups.c.at_s < asked.until_s,
    )
    rows = await _summed(database, tag_rollups, [tag_rollups.c.value], within)
    return await asyncio.to_thread(_answer, since_s, asked.until_s, tagged, rows)


async def _summed(
    database: Database, table: sa.Table, columns: list[Any], within: Sequence[Any]
) -> Sequence[sa.Row[Any]]:
    """Columns, sums and spreads, a row a group. Raises BadQuestion where there are too many."""
    sums = [sa.func.sum(table.c[name]) for name in SUMS]
    spread = spreads.summed(table.c.spread, is_sqlite=database.is_sqlite)
    asked = sa.select(*columns, *sums, spread).where(*within).group_by(*columns)
    rows = await database.rows(asked.limit(_MOST_GROUPS + 1))
    if len(rows) > _MOST_GROUPS:
        raise BadQuestion(f"more than {_MOST_GROUPS} rows: ask for less time, or fewer keys")
    return rows


def _group(row: Sequence[Any]) -> _Group:
    *sums, spread = row
    return _Group([int(n) for n in sums], spreads.whole(spread))


def _answer(
    since_s: float, until_s: float, names: list[str], found: Sequence[sa.Row[Any]]
) -> dict[str, Any]:
    """On a thread of its own: of ten thousand groups it takes longer than a stream may wait."""
    keys = len(names)
    # Without keys there is one row, whether there was a call or not.
    groups = [(row[:keys], _group(row[keys:])) for row in found if row[keys]]
    total = _Group([sum(column) for column in zip(*(g.sums for _, g in groups), strict=True)])
    total.spread = sum(group.spread for _, group in groups)
    rows = []
    by_cost = SUMS.index("cost_nano_usd")
    timed = "at" in names
    groups.sort(
        key=lambda item: (item[0][0] if timed else 0, -item[1].sums[by_cost], -item[1].sums[0]),
    )
    for key, group in groups:
        named = dict(zip(names, key, strict=True))
        if timed:
            named["at"] = iso(named["at"])
        rows.append(named | _shown(group))
    return {
        "since": iso(since_s),
        "until": iso(until_s),
        "rows": rows,
        "total": _shown(total if total.sums else _Group([0] * len(SUMS))),
    }


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
            shown: percentiles(group.spread, measure, _PERCENTILES)
            for measure, shown in _NAMES.items()
        },
    }
