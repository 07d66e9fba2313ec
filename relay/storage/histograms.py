"""Spreads, added up where they lie.

Owns: how each database is asked for the sum of a column of them. SQLite is taught an aggregate: to
fetch a row costs more than to add what is in it. PostgreSQL hands over what it has.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from relay.core.histogram import from_bytes, to_bytes


class _Sum:
    """One aggregate, as sqlite3 has them: `step` for every row, then `finalize`."""

    __slots__ = ("_whole",)

    def __init__(self) -> None:
        self._whole = 0

    def step(self, stored: bytes) -> None:
        self._whole += from_bytes(stored)

    def finalize(self) -> bytes:
        return to_bytes(self._whole)


class Connection(sqlite3.Connection):
    """One that can add spreads up."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.create_aggregate("spread_sum", 1, _Sum)  # type: ignore[arg-type]  # returns bytes


def summed(column: sa.Column[bytes], *, is_sqlite: bool) -> sa.ColumnElement[Any]:
    """What to ask for in place of the column; `whole` reads what comes of it."""
    return sa.func.spread_sum(column) if is_sqlite else sa.func.array_agg(column)


def whole(found: bytes | Iterable[bytes]) -> int:
    """The Spread of what `summed` found."""
    return from_bytes(found) if isinstance(found, bytes) else sum(map(from_bytes, found))
