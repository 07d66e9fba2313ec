"""Sums of histograms, made in the database.

Owns: how each database makes them. SQLite gets an aggregate function: to fetch a row costs more
than to add what is in it. PostgreSQL returns all values of a group.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

from relay.core.histogram import from_bytes, to_bytes


class _Sum:
    """One aggregate, as sqlite3 has them: `step` for every row, then `finalize`."""

    __slots__ = ("_sum",)

    def __init__(self) -> None:
        self._sum = 0

    def step(self, stored: bytes) -> None:
        self._sum += from_bytes(stored)

    def finalize(self) -> bytes:
        return to_bytes(self._sum)


class HistogramConnection(sqlite3.Connection):
    """A connection whose SQL knows `histogram_sum`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.create_aggregate("histogram_sum", 1, _Sum)  # type: ignore[arg-type]  # returns bytes


def read_sum(found: bytes | Iterable[bytes]) -> int:
    """The value of Database.histogram_sum."""
    return from_bytes(found) if isinstance(found, bytes) else sum(map(from_bytes, found))
