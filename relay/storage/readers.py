"""Run queries on read-only database connections, apart from those that write.

Owns how many queries run at once, how many more wait, how long each may take, and that none of them
writes. A slow query can delay only other queries: no write of the ledger, change or migration waits
for one. SQLite's readers see the last commit (WAL) and take no lock that a writer needs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from relay.storage.histograms import HistogramConnection

AT_ONCE = 4
"""How many reports run at once, each on a connection of its own."""
MAX_WAITING = 32
"""How many more queries may wait for a connection."""
READ_S = 5.0
"""How long a query may wait, and then how long it may run."""
_SERVER_MARGIN_S = 1.0
"""PostgreSQL ends a slow query by itself; so much later its connection is cut."""
_CONNECT_S = 5.0
_COMMAND_S = READ_S + _SERVER_MARGIN_S
"""Without this limit, the driver would wait for a rollback or a cancel request forever while the
network hangs.
"""
_LIMIT_S = 10.0
"""How long a query may take with everything around it: the connection and its transaction."""
_INTERRUPT_AGAIN_S = 0.05
_BUSY_MS = 5000
T = TypeVar("T")


class QueryRefused(Exception):
    """The database is available, but a query got no answer. Base class only."""


class TooManyQueries(QueryRefused):
    """As many queries are running and waiting as is allowed."""

    def __init__(self, at_once: int) -> None:
        super().__init__(f"{at_once} queries are running and {MAX_WAITING} are waiting")


class QueryTooSlow(QueryRefused):
    """A query ran for as long as is allowed, and was ended."""

    def __init__(self, after_s: float) -> None:
        super().__init__(f"the query took longer than {after_s:g} s: query a shorter time")
        self.after_s = after_s


class Readers:
    """The read-only connections to one database, opened with the first query: at most `at_once`."""

    def __init__(self, url: sa.URL, at_once: int = AT_ONCE) -> None:
        self._at_once = at_once
        self._is_sqlite = url.get_backend_name() == "sqlite"
        limits = {"timeout": _CONNECT_S, "command_timeout": _COMMAND_S}
        self._engine = create_async_engine(
            url,
            pool_size=at_once,
            max_overflow=0,
            connect_args={"factory": HistogramConnection} if self._is_sqlite else limits,
        )
        if self._is_sqlite:
            sa.event.listen(self._engine.sync_engine, "connect", _forbid_writes)
        self._free = asyncio.Semaphore(at_once)
        self._queries = 0
        """Number of queries that run or wait."""

    async def ask(self, query: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Return the result of `query`, which runs in one transaction. Raises QueryRefused,
        TimeoutError, and the driver's errors.
        """
        async with self._turn(), asyncio.timeout(_LIMIT_S), self._connection() as connection:
            running = asyncio.ensure_future(query(connection))
            limit_s = READ_S if self._is_sqlite else READ_S + _SERVER_MARGIN_S
            try:
                await asyncio.wait({running}, timeout=limit_s)
            finally:
                # Too slow, or the caller was cancelled: the query must not continue.
                is_late = not running.done()
                if is_late:
                    await self._stop(connection, running)
            if is_late or _is_ended_by_server(running.exception()):
                raise QueryTooSlow(READ_S)
            return running.result()

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection]:
        async with self._engine.connect() as connection:
            try:
                await self._set_limits(connection)
            except sa.exc.DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            else:
                yield connection
                return
        # The server has closed that connection, as it does when it restarts.
        async with self._engine.connect() as connection:
            await self._set_limits(connection)
            yield connection

    async def _set_limits(self, connection: AsyncConnection) -> None:
        """Set PostgreSQL's limits for this transaction alone: a pooler may share the connection."""
        if not self._is_sqlite:
            limits = "set_config('transaction_read_only', 'on', true), "
            limits += f"set_config('statement_timeout', '{READ_S * 1000:.0f}', true)"
            await connection.exec_driver_sql(f"SELECT {limits}")

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._queries >= self._at_once + MAX_WAITING:
            raise TooManyQueries(self._at_once)
        self._queries += 1
        try:
            try:
                async with asyncio.timeout(READ_S):
                    await self._free.acquire()
            except TimeoutError:
                raise TooManyQueries(self._at_once) from None
            try:
                yield
            finally:
                self._free.release()
        finally:
            self._queries -= 1

    async def _stop(self, connection: AsyncConnection, running: asyncio.Future[Any]) -> None:
        """End a query. It is interrupted repeatedly, since SQLite ignores an interrupt between two
        statements.
        """
        driver = (await connection.get_raw_connection()).driver_connection
        while not running.done():
            if driver is not None:
                await (driver.interrupt() if self._is_sqlite else _terminate(driver))
            await asyncio.wait({running}, timeout=_INTERRUPT_AGAIN_S)
        running.exception()  # retrieved, so that asyncio does not log it

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


async def _terminate(driver: Any) -> None:
    driver.terminate()


def _is_ended_by_server(error: BaseException | None) -> bool:
    """True for PostgreSQL's error query_canceled."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) == "57014"


def _forbid_writes(connection: Any, _record: Any) -> None:
    set_pragmas(connection, "query_only = ON")


def set_pragmas(connection: Any, *settings: str) -> None:
    """Set the options of a new SQLite connection."""
    connection.isolation_level = None
    cursor = connection.cursor()
    for setting in (f"busy_timeout = {_BUSY_MS}", *settings):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()
