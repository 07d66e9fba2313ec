"""Connect to the database of the ledger and of access: a SQLite file, or PostgreSQL.

Owns the connections that write, the version of the schema, and the mapping of the driver's errors
to DatabaseUnavailable and RowsRefused. readers.py has the connections that only read, inserts.py
the bulk inserts, tables.py the tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from relay.core.errors import OperatorError, PackageMissing
from relay.storage.inserts import Batch, SqliteWriter
from relay.storage.readers import QueryRefused, Readers, set_pragmas

HEAD = "0010"
"""The version of the schema that this relay uses: the newest in migrations/versions."""
_CONNECTION_S = 1.0
"""How long a change of the ledger waits for a connection while all are in use."""
_DURABLE_CONNECTION_S = 5.0
"""The same for a durable change, each of which may wait for the disk."""
_WAL_BYTES = 64 * 1024 * 1024
_MIGRATING = 7_201_453
"""The advisory lock of PostgreSQL under which one process at a time changes the schema."""
_LOST = (sa.exc.SQLAlchemyError, OSError, sqlite3.Error, asyncio.TimeoutError)
_VALUES = (ValueError, OverflowError)
_REFUSED = (
    sa.exc.DataError, sa.exc.IntegrityError, sqlite3.DataError, sqlite3.IntegrityError,
)  # fmt: skip
_DATA_STATES = ("22", "23")  # data exceptions, and broken constraints
T = TypeVar("T")


class DatabaseUnavailable(Exception):
    """The database cannot be reached or written, or did not answer in time. The text is the type of
    the driver's error.
    """


class RowsRefused(Exception):
    """The database refuses these values; to send them again is of no use."""


class DatabaseNewer(OperatorError):
    """A newer relay has changed the schema of the database: this relay must not write to it."""


class BadDatabaseUrl(OperatorError):
    """The setting `database` is not a path or URL for which there is a driver."""


def database_url(given: str) -> sa.URL:
    """Parse the setting `database`; a path is that of a SQLite file. Raises BadDatabaseUrl."""
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
    """Update the schema of a database, if the database is available. Raises DatabaseNewer."""
    database = Database(database_url(given))
    with contextlib.suppress(DatabaseUnavailable):
        await database.prepare()
    await database.close()


class Database:
    """One database. It connects with the first use."""

    def __init__(self, url: sa.URL) -> None:
        """Raises PackageMissing if the driver is not installed."""
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._path = url.database or ""
        self._prepared = False
        self._changes: set[asyncio.Task[Any]] = set()
        """Transactions that run, also those whose callers were cancelled."""
        options: dict[str, Any] = {"pool_size": 4, "max_overflow": 0}
        if not self.is_sqlite:
            options["connect_args"] = {"timeout": 5, "command_timeout": 30}
        try:
            self._engine: AsyncEngine = create_async_engine(
                url, pool_timeout=_CONNECTION_S, **options
            )
            self._durable_engine = create_async_engine(
                url, pool_timeout=_DURABLE_CONNECTION_S, **self._durable_options(options)
            )
            self._readers = Readers(url)
            self._watcher = Readers(url, at_once=1)
        except ImportError:
            raise PackageMissing("a database in PostgreSQL", "asyncpg") from None
        self._writer: SqliteWriter | None = None
        if self.is_sqlite:
            sa.event.listen(self._engine.sync_engine, "connect", _set_up)
            sa.event.listen(self._durable_engine.sync_engine, "connect", _set_up_durable)
            self._writer = SqliteWriter(url, _set_up)

    def _durable_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """SQLite gets one connection: changes of one process wait in the order of their arrival
        instead of polling for the write lock. PostgreSQL's reconnect after a restart of the server.
        """
        if self.is_sqlite:
            return options | {"pool_size": 1}
        limits = {"timeout": 5, "command_timeout": 10}
        return options | {"pool_pre_ping": True, "connect_args": limits}

    async def prepare(self) -> None:
        """Update the schema, once. Raises DatabaseNewer, DatabaseUnavailable."""
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
            # IMMEDIATE takes the write lock now, for which other processes wait.
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            await connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_MIGRATING})"))
        await connection.run_sync(_upgrade)
        await connection.commit()

    async def change(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Return the result of `work`, which runs in one transaction for writing. Raises the same
        errors as `writing`.

        The transaction ends by itself if the caller is cancelled, as it is when its client leaves.
        A statement that is cut off there may keep SQLite's write lock for as long as its traceback
        exists.
        """
        return await self._finish(self._work(self._engine, work))

    async def change_durably(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Do the same as `change`. Once the transaction is committed, it survives a loss of power;
        PostgreSQL waits for the disk as its `synchronous_commit` says.
        """
        return await self._finish(self._work(self._durable_engine, work))

    async def _work(
        self, engine: AsyncEngine, work: Callable[[AsyncConnection], Awaitable[T]]
    ) -> T:
        async with self._transaction(engine) as connection:
            return await work(connection)

    async def _finish(self, transaction: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(transaction)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    def writing(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a transaction for writing, which is committed or rolled back as a whole. Raises
        DatabaseUnavailable, RowsRefused, DatabaseNewer.
        """
        return self._transaction(self._engine)

    @contextlib.asynccontextmanager
    async def _transaction(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        await self.prepare()
        with _mapped():
            async with engine.connect() as connection:
                if self.is_sqlite:
                    await connection.exec_driver_sql("BEGIN IMMEDIATE")
                try:
                    yield connection
                    await connection.commit()
                except BaseException:
                    with contextlib.suppress(*_LOST):
                        await connection.rollback()
                    raise

    async def read(self, query: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Return the result of `query`, which runs in one read-only transaction. Raises
        DatabaseUnavailable, RowsRefused, DatabaseNewer, QueryRefused.
        """
        await self.prepare()
        with _mapped():
            return await self._readers.ask(query)

    async def watch(self, query: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Return the result of a short `query`, on a connection which no report can hold up. Only
        the polling of access uses it: requests from outside must not be able to fill its queue.
        Raises DatabaseUnavailable, DatabaseNewer.
        """
        await self.prepare()
        with _mapped():
            try:
                return await self._watcher.ask(query)
            except QueryRefused as error:
                raise DatabaseUnavailable(type(error).__name__) from error

    async def rows(self, query: sa.Executable) -> Sequence[sa.Row[Any]]:
        """Return all rows of a query. Raises the same errors as `read`."""

        async def execute(connection: AsyncConnection) -> Sequence[sa.Row[Any]]:
            found: Sequence[sa.Row[Any]] = (await connection.execute(query)).all()
            return found

        return await self.read(execute)

    def histogram_sum(self, column: sa.Column[bytes]) -> sa.ColumnElement[Any]:
        """Return the expression for the sum of a column; histograms.read_sum reads its value."""
        return sa.func.histogram_sum(column) if self.is_sqlite else sa.func.array_agg(column)

    async def write(self, batch: Batch) -> None:
        """Insert rows, all of them or none. Raises DatabaseUnavailable, RowsRefused,
        DatabaseNewer.
        """
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
        """Close all connections, when the transactions of `change` have ended."""
        await asyncio.gather(*self._changes, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
        with contextlib.suppress(*_LOST):
            await self._readers.close()
            await self._watcher.close()
            await self._engine.dispose()
            await self._durable_engine.dispose()

    def __repr__(self) -> str:
        return f"<Database {'sqlite' if self.is_sqlite else 'postgresql'}>"


def insert_of(database: Database) -> Any:
    """Return the `insert` of a database's dialect, which has `on_conflict_do_nothing`. Importing a
    dialect takes 50 ms.
    """
    if database.is_sqlite:
        from sqlalchemy.dialects.sqlite import insert as into_sqlite

        return into_sqlite
    from sqlalchemy.dialects.postgresql import insert as into_postgresql

    return into_postgresql


def _create(file: Path) -> None:
    """Create an empty file that only its owner may read, unless it exists: the database may hold
    request and response bodies.

    The file is in WAL mode before it gets its name: of two processes that switch to WAL at once,
    SQLite refuses one ("database is locked") without waiting.
    """
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as folder:
        made = Path(folder, "new")
        os.close(os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with contextlib.closing(sqlite3.connect(made)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        try:
            os.link(made, file)
        except FileExistsError:
            return
        except OSError:  # the file system has no hard links
            file.touch(0o600)


@contextlib.contextmanager
def _mapped() -> Any:
    """Raise the driver's errors as DatabaseUnavailable or RowsRefused."""
    try:
        yield
    except (*_LOST, *_VALUES) as error:
        origin = getattr(error, "orig", None) or error
        kind = RowsRefused if _is_refusal(error, origin) else DatabaseUnavailable
        raise kind(type(origin).__name__) from error


def _is_refusal(error: BaseException, origin: BaseException) -> bool:
    """True if the values are the cause of the error, so that a retry is of no use."""
    if isinstance(error, _REFUSED):
        return True
    if isinstance(origin, _VALUES) or isinstance(origin.__cause__, _VALUES):
        return True  # the driver refused a value before it sent the statement
    return str(getattr(origin, "sqlstate", None) or "").startswith(_DATA_STATES)


def _set_up(connection: Any, _record: Any) -> None:
    """Set up a new SQLite connection for writing. A commit survives a crash of the relay; the last
    commits before a power loss may be lost.
    """
    size_limit = f"journal_size_limit = {_WAL_BYTES}"
    set_pragmas(connection, "journal_mode = WAL", "synchronous = NORMAL", size_limit)


def _set_up_durable(connection: Any, record: Any) -> None:
    """Set up a new SQLite connection whose commits survive a power loss."""
    _set_up(connection, record)
    set_pragmas(connection, "synchronous = FULL")


async def _version(connection: AsyncConnection) -> str | None:
    """Return the version of the database's schema; None for a new database."""
    if not await connection.run_sync(lambda sync: sa.inspect(sync).has_table("alembic_version")):
        return None
    found = await connection.execute(sa.text("SELECT version_num FROM alembic_version"))
    version = found.scalar()
    return None if version is None else str(version)


def _upgrade(connection: sa.Connection) -> None:
    # Imported only if the schema changes: the import takes a tenth of a second.
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in known:
        raise DatabaseNewer(
            f"the database is of a newer relay: its schema is {current}, this relay has {HEAD}"
        )
    command.upgrade(config, "head")
