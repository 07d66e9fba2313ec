"""The ledger's tables, for SQLite and PostgreSQL alike.

Owns: their columns. How they came to be, step by step, stands in migrations/; a test holds both to
the same.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    text,
)

from relay.core.usage import COUNTS

metadata = MetaData()
_Big = BigInteger().with_variant(Integer, "sqlite")

SUMS = (
    "requests", "errors", "cache_hits", "unpriced", "estimated", "cost_nano_usd", "saved_nano_usd",
    *COUNTS,
)  # fmt: skip
"""What is added up, wherever something is."""
KEYS = ("client", "provider", "model", "transport", "surface", "outcome")
"""What usage is told apart by, besides time."""

exchanges = Table(
    "exchanges",
    metadata,
    # In the order of writing. The order of beginning is that of `id`, a UUIDv7.
    Column("seq", _Big, primary_key=True, autoincrement=True),
    Column("id", String(36), nullable=False, unique=True),
    Column("transport", Text, nullable=False),
    Column("surface", Text, nullable=False, server_default="native"),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("client", Text, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("cache", Text),
    Column("duration_ms", Float, nullable=False),
    Column("input_tokens", _Big, nullable=False),
    Column("output_tokens", _Big, nullable=False),
    Column("cost_nano_usd", _Big),
    Column("event_id", Text),
    Column("end_user", Text),
    Column("metadata", Text),
    Column("record", Text, nullable=False),
    Column("feedback", SmallInteger),
    Column("score", Float),
    sqlite_autoincrement=True,
)  # fmt: skip
WENT_WRONG = "(status >= 400 OR outcome IN ('failed', 'refused'))"
"""Of an exchange: its client did not get what it asked for. The index is for this very text."""
_FAILED = text(WENT_WRONG)
Index("exchanges_failed", exchanges.c.id, sqlite_where=_FAILED, postgresql_where=_FAILED)
_NAMED = text("event_id IS NOT NULL")
Index("exchanges_event", exchanges.c.event_id, sqlite_where=_NAMED, postgresql_where=_NAMED)

tags = Table(
    "tags",
    metadata,
    Column("name", Text, primary_key=True),
    Column("id", String(36), primary_key=True),
    Column("value", Text, nullable=False),
    sqlite_with_rowid=False,
)
"""One row an entry of a call's metadata."""


_ADDED_LATER = ("web_searches", "pages")
"""0 in the rows that were there before."""


def _key(*names: str, kind: Any = Text) -> list[Column[Any]]:
    return [Column(name, kind, primary_key=True) for name in names]


def _rollup(name: str, *keys: Column[Any]) -> Table:
    """Sums under keys. Each writer has its own: it writes whole values, never adds to another's."""
    defaults = dict.fromkeys(_ADDED_LATER, "0")
    return Table(
        name,
        metadata,
        *keys,
        Column("writer", String(36), primary_key=True),
        *(Column(n, _Big, nullable=False, server_default=defaults.get(n)) for n in SUMS),
        Column("spread", LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )


group_rollups = _rollup(
    "group_rollups",
    *_key("name"),
    *_key("span_s", kind=Integer),
    *_key("at_s", kind=_Big),
    *_key("value", "provider", "model"),
)
"""Sums by hour and day of the calls that have a value of this name: `user`, or a `metadata.NAME` of
`ledger.group_by`. Calls without a value are the rest of `rollups`."""

group_values = Table(
    "group_values",
    metadata,
    *_key("at_s", kind=_Big),
    *_key("name", "value"),
    sqlite_with_rowid=False,
)
"""The values of each name that have sums of their own on the day that begins at `at_s`."""

bodies = Table(
    "bodies",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("request", LargeBinary),
    Column("request_complete", SmallInteger, nullable=False),
    Column("response", LargeBinary),
    Column("response_complete", SmallInteger, nullable=False),
)

booked = Table(
    "booked",
    metadata,
    *_key("provider", "object_id"),
    Column("at_s", _Big, nullable=False),
    sqlite_with_rowid=False,
)
"""The provider's objects whose usage is counted, such as a response: reading one again adds
nothing."""
Index("booked_at", booked.c.at_s)

rollups = _rollup("rollups", *_key("span_s", kind=Integer), *_key("at_s", kind=_Big), *_key(*KEYS))
