"""Sum histograms in SQL queries.

Owns how each database does that. SQLite gets an aggregate function in Python, since fetching a row
costs more than adding its histogram. PostgreSQL returns all histograms of a group, which are added
here. core/histogram.py has the format of a histogram.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

from relay.core.histogram import from_bytes, to_bytes


class _Sum:
    """An aggregate function for sqlite3, which calls `step` for each row, then `finalize`."""

    __slots__ = ("_sum",)

    def __init__(self) -> None:
        self._sum = 0

    def step(self, stored: bytes) -> None:
        self._sum += from_bytes(stored)

    def finalize(self) -> bytes:
        return to_bytes(self._sum)


class HistogramConnection(sqlite3.Connection):
    """A SQLite connection with the SQL function `histogram_sum`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.create_aggregate("histogram_sum", 1, _Sum)  # type: ignore[arg-type]  # returns bytes


def read_sum(found: bytes | Iterable[bytes]) -> int:
    """Return the sum from a value of Database.histogram_sum."""
    return from_bytes(found) if isinstance(found, bytes) else sum(map(from_bytes, found))
