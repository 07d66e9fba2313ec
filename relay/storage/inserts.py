"""Insert rows into tables, many at a time.

Owns the text of INSERT statements for several rows, and the thread that writes to SQLite. A whole
transaction is one job of that thread: each switch between threads costs as much as ten rows.
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
    """An INSERT into some columns of a table. A row that exists already stays as it is, or gets the
    new values of the columns in `replace`.
    """

    def __init__(
        self, table: sa.Table, columns: Sequence[str], *, replace: Sequence[str] = ()
    ) -> None:
        self.columns = tuple(columns)
        self._head = f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES "  # noqa: S608 (names of ours)
        self._tail = " ON CONFLICT DO NOTHING"
        if replace:
            key = ", ".join(column.name for column in table.primary_key.columns)
            updates = ", ".join(f"{name} = excluded.{name}" for name in replace)
            self._tail = f" ON CONFLICT ({key}) DO UPDATE SET {updates}"
        numbers = ", ".join(f"${at + 1}" for at in range(len(columns)))
        self.numbered_sql = f"{self._head}({numbers}){self._tail}"
        """The statement for one row, with PostgreSQL's names of parameters."""
        names = ", ".join(f":{name}" for name in columns)
        self.named_sql = f"{self._head}({names}){self._tail}"
        """The statement for one row, with SQLAlchemy's parameters."""
        self._by_rows: dict[int, str] = {}

    def sql(self, rows: int) -> str:
        """Return the statement for `rows` rows, with SQLite's parameters."""
        sql = self._by_rows.get(rows)
        if sql is None:
            row = f"({', '.join('?' * len(self.columns))})"
            sql = self._by_rows[rows] = self._head + ", ".join([row] * rows) + self._tail
        return sql


class Update:
    """A statement that is executed once for each row of parameters: `$1`, `$2` and so on."""

    def __init__(self, sql: str) -> None:
        self.numbered_sql = sql
        """The statement with PostgreSQL's names of parameters."""
        self.sqlite_sql = sql.replace("$", "?")


Batch = Sequence[tuple[Insert | Update, Rows]]
"""Statements and their rows, which are written in one transaction, in this order."""


def sizes(count: int) -> Iterator[int]:
    """Split `count` into few parts of few different sizes: SQLite prepares a statement for each
    size once.
    """
    while count:
        size = min(count, _MAX_AT_ONCE)
        if size > _FEW:
            size -= size % _FEW
        yield size
        count -= size


class SqliteWriter:
    """The connection and the thread that write rows for the whole process. `set_up` is called with
    each new connection.
    """

    def __init__(self, url: sa.URL, set_up: Callable[[Any, Any], None]) -> None:
        self._engine = sa.create_engine(url.set(drivername="sqlite"), pool_size=1, max_overflow=0)
        sa.event.listen(self._engine, "connect", set_up)
        self._thread = ThreadPoolExecutor(1, "database")

    async def write(self, batch: Batch) -> None:
        """Write a batch, all of it or nothing. Raises the driver's errors."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._write, batch)

    def _write(self, batch: Batch) -> None:
        connection = self._engine.raw_connection()
        try:
            driver = connection.driver_connection
            assert driver is not None
            run = driver.execute  # without SQLAlchemy, which adds the cost of ten rows to each
            run("BEGIN IMMEDIATE")
            for into, rows in batch:
                if isinstance(into, Update):
                    for row in rows:
                        run(into.sqlite_sql, row)
                    continue
                done = 0
                for size in sizes(len(rows)):
                    flat = tuple(itertools.chain.from_iterable(rows[done : done + size]))
                    run(into.sql(size), flat)
                    done += size
            run("COMMIT")
        finally:
            connection.close()  # rolls back an open transaction

    def close(self) -> None:
        """Close the connection after the current write."""
        self._thread.submit(self._engine.dispose)
        self._thread.shutdown(wait=False)
