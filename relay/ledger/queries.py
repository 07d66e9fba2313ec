"""Query the ledger for calls: one, a page, an export, or those written since the last query.

Owns these queries, and their bounds: a page looks at SCANNED rows at most, with any filter.
usage.py queries the sums.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import sqlalchemy as sa

from relay.core.exchange import min_id_at
from relay.core.numbers import unix_time_s
from relay.core.pricing import usd_text
from relay.core.record import is_failure, with_current_names
from relay.core.text import clean
from relay.storage.database import Database
from relay.storage.tables import WENT_WRONG, bodies, exchanges, tags

SCANNED = 50_000
"""Rows that a page looks at; the next page continues after them, from the cursor."""
_EXPORTED = 500


class BadQuery(ValueError):
    """The parameters of a query are invalid; the text says why."""


def moment_s(name: str, text: str, now_s: float) -> float:
    """Parse the time in the parameter `name` (core/numbers.py). Raises BadQuery."""
    when = unix_time_s(text, now_s)
    if when is None:
        raise BadQuery(f"{name} is not a time such as 7d, 12h, 2026-11-24, 2026-11-24T12:30:00Z")
    return when


@dataclass(frozen=True, slots=True)
class Filter:
    """The conditions for calls. `equal` and `above` are by column, with values as stored there."""

    since_s: float | None = None
    until_s: float | None = None
    equal: Mapping[str, str | int] = field(default_factory=dict)
    above: Mapping[str, int | float] = field(default_factory=dict)
    failed: bool | None = None
    cached: bool | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


EQUAL = (
    "id", "provider", "model", "client", "transport", "surface", "outcome", "status",
    "event_id", "end_user", "feedback", "key_id", "team", "user_agent", "agent_session",
    "agent_parent",
)  # fmt: skip
ABOVE = ("duration_ms", "input_tokens", "output_tokens", "cost_nano_usd", "score")


@dataclass(frozen=True, slots=True)
class Page:
    """Calls, the latest first. `cursor` is that of the next page; None at the end."""

    logs: Sequence[dict[str, Any]]
    cursor: str | None


async def page(database: Database, which: Filter, cursor: str | None, limit: int) -> Page:
    """Return a page of calls. It may hold fewer than `limit` and not be the last. Raises
    DatabaseUnavailable.
    """
    bounds = _bounds(which)
    if cursor is not None:
        bounds.append(exchanges.c.id < cursor)
    newest = sa.select(exchanges).where(*bounds).order_by(exchanges.c.id.desc())
    end = None
    if not (which.failed or "event_id" in which.equal or "id" in which.equal):  # no index
        ids = newest.with_only_columns(exchanges.c.id)
        edge = await database.rows(ids.offset(SCANNED - 1).limit(1))
        end = edge[0].id if edge else None
    if end is not None:
        newest = newest.where(exchanges.c.id >= end)
    found = await database.rows(newest.where(*_conditions(which)).limit(limit))
    return Page([shown(row) for row in found], found[-1].id if len(found) == limit else end)


def _bounds(which: Filter) -> list[sa.ColumnElement[bool]]:
    bounds = []
    if which.since_s is not None:
        bounds.append(exchanges.c.id >= min_id_at(which.since_s))
    if which.until_s is not None:
        bounds.append(exchanges.c.id < min_id_at(which.until_s))
    return bounds


def _conditions(which: Filter) -> list[sa.ColumnElement[bool]]:
    columns = exchanges.c
    conditions = [_equal(columns[name], value) for name, value in which.equal.items()]
    conditions += [columns[name] > value for name, value in which.above.items()]
    if which.failed is not None:
        failed: Any = sa.text(WENT_WRONG if which.failed else f"NOT {WENT_WRONG}")
        conditions.append(failed)
    if which.cached is not None:
        conditions.append((columns.outcome == "cached") == which.cached)
    for name, value in which.metadata.items():
        tagged = sa.select(1).where(
            tags.c.name == clean(name), tags.c.id == columns.id, tags.c.value == clean(value)
        )
        conditions.append(sa.exists(tagged))
    return conditions


def _equal(column: sa.Column[Any], value: str | int) -> sa.ColumnElement[bool]:
    if not isinstance(value, str):
        return column == value
    if column is exchanges.c.user_agent and value.endswith("*"):
        start = clean(value[:-1])  # any version of a program
        return sa.func.substr(column, 1, len(start)) == start
    return column == clean(value)  # a long text is stored truncated


async def one(database: Database, id: str) -> dict[str, Any] | None:
    """Return the call with this id; None if there is none. Raises DatabaseUnavailable."""
    found = await database.rows(sa.select(exchanges).where(exchanges.c.id == id))
    return shown(found[0]) if found else None


async def body(database: Database, id: str, side: str) -> tuple[bytes, bool] | None:
    """Return the body of a call's `request` or `response`, and whether it is complete; None if none
    is stored. Raises DatabaseUnavailable.
    """
    query = sa.select(bodies.c[side], bodies.c[f"{side}_complete"]).where(bodies.c.id == id)
    found = await database.rows(query)
    if not found:
        return None
    stored, is_complete = tuple(found[0])
    return bytes(stored or b""), bool(is_complete)


async def after(
    database: Database, seq: int, which: Filter, limit: int = 500
) -> list[tuple[int, dict[str, Any]]]:
    """Return the calls that were written after the one with this `seq`, each with its own."""
    later = sa.select(exchanges).where(exchanges.c.seq > seq, *_bounds(which), *_conditions(which))
    rows = await database.rows(later.order_by(exchanges.c.seq).limit(limit))
    return [(row.seq, shown(row)) for row in rows]


async def last_seq(database: Database) -> int:
    """Return the `seq` of the call that was written last."""
    found = await database.rows(sa.select(sa.func.max(exchanges.c.seq).label("last")))
    return int(found[0].last or 0)


async def export(database: Database, which: Filter) -> AsyncIterator[dict[str, Any]]:
    """Yield all calls that match, the oldest first. Each page is a query of its own, so that no
    connection is held for a slow reader. Raises DatabaseUnavailable.
    """
    at = ""
    while True:
        bounds = [*_bounds(which), exchanges.c.id > at]
        ids = sa.select(exchanges.c.id).where(*bounds).order_by(exchanges.c.id)
        edge = await database.rows(ids.offset(_EXPORTED - 1).limit(1))
        query = sa.select(exchanges).where(*bounds, *_conditions(which))
        if edge:
            query = query.where(exchanges.c.id <= edge[0].id)
        for row in await database.rows(query.order_by(exchanges.c.id)):
            yield shown(row)
        if not edge:
            return
        at = edge[0].id


def shown(row: Any) -> dict[str, Any]:
    """Return a call as the API and the command line show it."""
    record = with_current_names(json.loads(row.record))
    for name in ("event", "level"):
        record.pop(name, None)
    cost, saved = record.pop("cost_nano_usd", None), record.pop("saved_nano_usd", None)
    created_ms = int(row.id[:8] + row.id[9:13], 16)
    return {
        "id": row.id,
        "created_at": iso(created_ms / 1000, "milliseconds"),
        "ended_at": record.pop("timestamp", None),
        **record,
        "success": not is_failure(row.status, row.outcome),
        "cost_usd": usd(cost),
        "saved_usd": usd(saved),
        "team": row.team,
        "metadata": json.loads(row.metadata) if row.metadata else None,
        "feedback": row.feedback,
        "score": row.score,
    }


def iso(unix_s: float, timespec: str = "seconds") -> str:
    """Format a time as ISO 8601 in UTC."""
    moment = datetime.datetime.fromtimestamp(unix_s, datetime.UTC)
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


def usd(nano: int | None) -> msgspec.Raw | None:
    """Format billionths of a dollar as dollars, a JSON number with every digit; None is unknown."""
    return None if nano is None else msgspec.Raw(usd_text(int(nano)).encode())
