"""The database of what must last: SQLite beside the relay, or PostgreSQL.

Owns: the connections that write, and the schema's version. Questions have connections of their own
(readers.py). The driver's errors come out as DatabaseUnavailable, RowsRefused or DatabaseNewer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from relay.core.errors import OperatorError
from relay.storage.inserts import Batch, SqliteWriter
from relay.storage.readers import Readers, set_pragmas

HEAD = "0004"
"""The schema that this relay writes: the newest of migrations/versions."""
_CONNECTION_S = 1.0
"""How long a change waits for a connection while others use all of them."""
_WAL_BYTES = 64 * 1024 * 1024
_MIGRATING = 7_201_453
"""The advisory lock that one of many holds while it changes the schema."""
_LOST = (sa.exc.SQLAlchemyError, OSError, sqlite3.Error, asyncio.TimeoutError)
_VALUES = (ValueError, OverflowError)
_REFUSED = (
    sa.exc.DataError, sa.exc.IntegrityError, sqlite3.DataError, sqlite3.IntegrityError,
)  # fmt: skip
_DATA_STATES = ("22", "23")  # data exceptions, and broken constraints
T = TypeVar("T")


class DatabaseUnavailable(Exception):
    """It cannot be reached, written, or asked in time. The text is the driver's kind of error."""


class RowsRefused(Exception):
    """It does not take these values, however often they are sent."""


class DatabaseNewer(OperatorError):
    """A newer relay has changed its schema: this one must not write to it."""


class BadDatabaseUrl(OperatorError):
    """The setting names no database that there is a driver for."""


def database_url(given: str) -> sa.URL:
    """A path is a SQLite file. Raises BadDatabaseUrl."""
    if "://" not in given:
        return sa.URL.create("sqlite+aiosqlite", database=given)
    try:
        url = make_url(given)
    except sa.exc.ArgumentError:
        raise BadDatabaseUrl("is not a URL") from None
    driver = _DRIVERS.get(url.drivername)
    if driver is None:
        raise BadDatabaseUrl("should be a path, sqlite:///PATH or postgresql+asyncpg://…")
    return url.set(drivername=driver)


_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}


async def try_out(given: str) -> None:
    """Bring a database's schema up to date, if it is there. Raises DatabaseNewer."""
    database = Database(database_url(given))
    with contextlib.suppress(DatabaseUnavailable):
        await database.prepare()
    await database.close()


class Database:
    """One database. It opens with the first use."""

    def __init__(self, url: sa.URL) -> None:
        """Raises BadDatabaseUrl where the driver is not installed."""
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._path = url.database or ""
        self._prepared = False
        options: dict[str, Any] = {"pool_size": 4, "max_overflow": 0}
        if not self.is_sqlite:
            options["connect_args"] = {"timeout": 5, "command_timeout": 30}
        try:
            self._engine: AsyncEngine = create_async_engine(
                url, pool_timeout=_CONNECTION_S, **options
            )
            self._readers = Readers(url)
        except (ImportError, sa.exc.NoSuchModuleError):
            raise BadDatabaseUrl(
                "needs a driver: pip install 'ai-gateway-relay[postgres]'"
            ) from None
        self._writer: SqliteWriter | None = None
        if self.is_sqlite:
            sa.event.listen(self._engine.sync_engine, "connect", _tuned)
            self._writer = SqliteWriter(url, _tuned)

    async def prepare(self) -> None:
        """Bring its schema up to date, once. Raises DatabaseNewer, DatabaseUnavailable."""
        if self._prepared:
            return
        with _mapped():
            if self.is_sqlite:
                _create(Path(self._path))
            async with self._engine.connect() as connection:
                if await _version(connection) != HEAD:
                    await connection.rollback()
                    await self._migrate(connection)
            self._prepared = True

    async def _migrate(self, connection: AsyncConnection) -> None:
        if self.is_sqlite:
            # A lock from the first statement on: another process waits until this one is done.
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            await connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_MIGRATING})"))
        await connection.run_sync(_upgrade)
        await connection.commit()

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """One transaction: all of it, or nothing. Raises DatabaseUnavailable, DatabaseNewer."""
        await self.prepare()
        with _mapped():
            async with self._engine.connect() as connection:
                if self.is_sqlite:
                    await connection.exec_driver_sql("BEGIN IMMEDIATE")
                try:
                    yield connection
                    await connection.commit()
                except BaseException:
                    with contextlib.suppress(*_LOST):
                        await connection.rollback()
                    raise

    async def read(self, ask: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """What `ask` finds, in one transaction that changes nothing. Raises all three, and
        QueryRefused.
        """
        await self.prepare()
        with _mapped():
            return await self._readers.ask(ask)

    async def rows(self, query: sa.Executable) -> Sequence[sa.Row[Any]]:
        """All rows of a query. Raises DatabaseUnavailable, DatabaseNewer, QueryRefused."""

        async def ask(connection: AsyncConnection) -> Sequence[sa.Row[Any]]:
            found: Sequence[sa.Row[Any]] = (await connection.execute(query)).all()
            return found

        return await self.read(ask)

    def histogram_sum(self, column: sa.Column[bytes]) -> sa.ColumnElement[Any]:
        """The expression for the sum of a column; histograms.read_sum reads its value."""
        return sa.func.histogram_sum(column) if self.is_sqlite else sa.func.array_agg(column)

    async def write(self, batch: Batch) -> None:
        """Insert plain rows, all of them or none. Raises all three."""
        await self.prepare()
        with _mapped():
            if self._writer is not None:
                await self._writer.write(batch)
                return
            async with self._engine.begin() as connection:
                for into, rows in batch:
                    if rows:
                        await connection.exec_driver_sql(into.numbered_sql, list(rows))

    async def close(self) -> None:
        """Let go of all connections."""
        if self._writer is not None:
            self._writer.close()
        with contextlib.suppress(*_LOST):
            await self._readers.close()
            await self._engine.dispose()

    def __repr__(self) -> str:
        return f"<Database {'sqlite' if self.is_sqlite else 'postgresql'}>"


def _create(file: Path) -> None:
    """An empty file that nobody else may read, if there is none: bodies may stand in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


@contextlib.contextmanager
def _mapped() -> Any:
    """What the driver raises, as DatabaseUnavailable or RowsRefused."""
    try:
        yield
    except (*_LOST, *_VALUES) as error:
        origin = getattr(error, "orig", None) or error
        kind = RowsRefused if _is_refusal(error, origin) else DatabaseUnavailable
        raise kind(type(origin).__name__) from error


def _is_refusal(error: BaseException, origin: BaseException) -> bool:
    """True if the values are what is wrong, so that another try is of no use."""
    if isinstance(error, _REFUSED):
        return True
    if isinstance(origin, _VALUES) or isinstance(origin.__cause__, _VALUES):
        return True  # found before it was sent
    return str(getattr(origin, "sqlstate", None) or "").startswith(_DATA_STATES)


def _tuned(connection: Any, _record: Any) -> None:
    """Each new SQLite connection. A commit is safe from a crash of the relay; from a power loss the
    last of them may not be, as with most databases of logs.
    """
    size_limit = f"journal_size_limit = {_WAL_BYTES}"
    set_pragmas(connection, "journal_mode = WAL", "synchronous = NORMAL", size_limit)


async def _version(connection: AsyncConnection) -> str | None:
    """The schema that is there; None if none is."""
    if not await connection.run_sync(lambda sync: sa.inspect(sync).has_table("alembic_version")):
        return None
    found = await connection.execute(sa.text("SELECT version_num FROM alembic_version"))
    version = found.scalar()
    return None if version is None else str(version)


def _upgrade(connection: sa.Connection) -> None:
    # Imported only where there is something to change: it takes a tenth of a second.
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    there = MigrationContext.configure(connection).get_current_revision()
    if there is not None and there not in known:
        raise DatabaseNewer(
            f"the database is of a newer relay (schema {there}, this one knows {HEAD})"
        )
    command.upgrade(config, "head")
