"""Plain rows into tables, many at a time.

Owns: the text of an INSERT of so many rows, and SQLite's thread for them. A transaction is one step
between the threads, whatever is in it: each such step costs as much as ten rows.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sqlalchemy as sa

_MAX_AT_ONCE = 128
_FEW = 8

Rows = Sequence[tuple[Any, ...]]


class Insert:
    """An INSERT into some columns of a table. What is there already stays, or is replaced in
    the columns of `replace`.
    """

    def __init__(
        self, table: sa.Table, columns: Sequence[str], *, replace: Sequence[str] = ()
    ) -> None:
        self._columns = len(columns)
        self._head = f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES "  # noqa: S608 (names of ours)
        self._tail = " ON CONFLICT DO NOTHING"
        if replace:
            key = ", ".join(column.name for column in table.primary_key.columns)
            taken = ", ".join(f"{name} = excluded.{name}" for name in replace)
            self._tail = f" ON CONFLICT ({key}) DO UPDATE SET {taken}"
        numbers = ", ".join(f"${at + 1}" for at in range(len(columns)))
        self.numbered_sql = f"{self._head}({numbers}){self._tail}"
        """For one row, as PostgreSQL names parameters."""
        self._by_rows: dict[int, str] = {}

    def sql(self, rows: int) -> str:
        """For so many rows."""
        sql = self._by_rows.get(rows)
        if sql is None:
            row = f"({', '.join('?' * self._columns)})"
            sql = self._by_rows[rows] = self._head + ", ".join([row] * rows) + self._tail
        return sql


Batch = Sequence[tuple[Insert, Rows]]
"""What is written together."""


def sizes(count: int) -> Iterator[int]:
    """`count` in few parts of few sizes: each size is a statement of its own, prepared once."""
    while count:
        size = min(count, _MAX_AT_ONCE)
        if size > _FEW:
            size -= size % _FEW
        yield size
        count -= size


class SqliteWriter:
    """A connection and a thread that write for the whole process. `tune` is told of each new
    connection.
    """

    def __init__(self, url: sa.URL, tune: Callable[[Any, Any], None]) -> None:
        self._engine = sa.create_engine(url.set(drivername="sqlite"), pool_size=1, max_overflow=0)
        sa.event.listen(self._engine, "connect", tune)
        self._thread = ThreadPoolExecutor(1, "database")

    async def write(self, batch: Batch) -> None:
        """All of it, or nothing. Raises what the driver raises."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._write, batch)

    def _write(self, batch: Batch) -> None:
        connection = self._engine.raw_connection()
        try:
            driver = connection.driver_connection
            assert driver is not None
            run = driver.execute  # SQLAlchemy adds to each statement what ten rows cost
            run("BEGIN IMMEDIATE")
            for into, rows in batch:
                done = 0
                for size in sizes(len(rows)):
                    flat = tuple(itertools.chain.from_iterable(rows[done : done + size]))
                    run(into.sql(size), flat)
                    done += size
            run("COMMIT")
        finally:
            connection.close()  # what is not committed is rolled back

    def close(self) -> None:
        """Let go of the connection, after what is being written."""
        self._thread.submit(self._engine.dispose)
        self._thread.shutdown(wait=False)
