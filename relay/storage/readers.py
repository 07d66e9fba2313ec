"""Database connections for questions, apart from those that write.

Owns: how many questions are asked at once, how many more wait, how long each may take, and that
none of them writes. A slow question holds up other questions at most: a batch of the ledger's, a
change or a migration never waits for one. SQLite's readers see the last commit (WAL) and take no
lock that a writer needs.
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
"""Questions that run at once, each on a connection of its own."""
MAX_WAITING = 32
"""Questions that wait for one of those."""
READ_S = 5.0
"""How long a question waits at most, and then how long it runs at most."""
_SERVER_MARGIN_S = 1.0
"""PostgreSQL ends a question by itself; this much later its connection is cut."""
_INTERRUPT_AGAIN_S = 0.05
_BUSY_MS = 5000
T = TypeVar("T")


class QueryRefused(Exception):
    """The database is there, but a question got no answer. Base class only."""


class TooManyQueries(QueryRefused):
    """As many questions run and wait as may."""

    def __init__(self) -> None:
        super().__init__(f"{AT_ONCE} questions run and {MAX_WAITING} wait already")


class QueryTooSlow(QueryRefused):
    """It ran for as long as a question may, and was ended."""

    def __init__(self, after_s: float) -> None:
        super().__init__(f"the question took longer than {after_s:g} s: ask for less time")
        self.after_s = after_s


class Readers:
    """The readers of one database. They connect with the first question."""

    def __init__(self, url: sa.URL) -> None:
        self._is_sqlite = url.get_backend_name() == "sqlite"
        self._engine = create_async_engine(
            url,
            pool_size=AT_ONCE,
            max_overflow=0,
            pool_pre_ping=not self._is_sqlite,  # a server that was restarted is no failure
            connect_args={"factory": HistogramConnection} if self._is_sqlite else {"timeout": 5},
        )
        if self._is_sqlite:
            sa.event.listen(self._engine.sync_engine, "connect", _forbid_writes)
        self._free = asyncio.Semaphore(AT_ONCE)
        self._asked = 0

    async def ask(self, question: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """What `question` finds, in one transaction. Raises QueryRefused, and what the driver
        raises.
        """
        async with self._turn(), self._engine.connect() as connection:
            if not self._is_sqlite:
                await _bound(connection)
            asking = asyncio.ensure_future(question(connection))
            limit_s = READ_S if self._is_sqlite else READ_S + _SERVER_MARGIN_S
            try:
                await asyncio.wait({asking}, timeout=limit_s)
            finally:
                # Out of time, or nobody waits any more: it must not go on by itself.
                is_late = not asking.done()
                if is_late:
                    await self._stop(connection, asking)
            if is_late or _is_ended_by_server(asking.exception()):
                raise QueryTooSlow(READ_S)
            return asking.result()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._asked >= AT_ONCE + MAX_WAITING:
            raise TooManyQueries
        self._asked += 1
        try:
            try:
                async with asyncio.timeout(READ_S):
                    await self._free.acquire()
            except TimeoutError:
                raise TooManyQueries from None
            try:
                yield
            finally:
                self._free.release()
        finally:
            self._asked -= 1

    async def _stop(self, connection: AsyncConnection, asking: asyncio.Future[Any]) -> None:
        """End a question. SQLite forgets an interrupt that comes between two statements."""
        driver = (await connection.get_raw_connection()).driver_connection
        while not asking.done():
            if driver is not None:
                await (driver.interrupt() if self._is_sqlite else _terminate(driver))
            await asyncio.wait({asking}, timeout=_INTERRUPT_AGAIN_S)
        asking.exception()  # seen: it is the interrupt's

    async def close(self) -> None:
        """Let go of all connections."""
        await self._engine.dispose()


async def _bound(connection: AsyncConnection) -> None:
    """PostgreSQL's limits, for this transaction alone: the connection may be a pooler's."""
    limits = "set_config('transaction_read_only', 'on', true), set_config('statement_timeout', "
    await connection.exec_driver_sql(f"SELECT {limits}'{READ_S * 1000:.0f}', true)")


async def _terminate(driver: Any) -> None:
    driver.terminate()


def _is_ended_by_server(error: BaseException | None) -> bool:
    """True of PostgreSQL's query_canceled."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) == "57014"


def _forbid_writes(connection: Any, _record: Any) -> None:
    set_pragmas(connection, "query_only = ON")


def set_pragmas(connection: Any, *settings: str) -> None:
    """Set up a new SQLite connection."""
    connection.isolation_level = None
    cursor = connection.cursor()
    for setting in (f"busy_timeout = {_BUSY_MS}", *settings):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()
