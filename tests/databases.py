"""Provide both databases, SQLite and PostgreSQL, so that each test of one runs on the other."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from relay.storage.database import Database, database_url, try_out
from tests.postgres import PostgresServer, running
from tests.relays import HANG_GUARD_S


@pytest.fixture(autouse=True)
def patient_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the limits on the duration of a query: a busy machine may exceed the defaults.

    The tests of those limits set their own.
    """
    for limit in ("READ_S", "_COMMAND_S", "_LIMIT_S"):
        monkeypatch.setattr(f"relay.storage.readers.{limit}", HANG_GUARD_S)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Run a real PostgreSQL."""
    server = running()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
async def new_database_setting(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The value of `database` in gateway.yaml, for a database without tables."""
    if request.param == "sqlite":
        return str(tmp_path / "data" / "relay.db")
    server: PostgresServer = request.getfixturevalue("postgres")
    return await server.database()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of an SQLite file with all tables, which the first test that needs it creates.

    Creating one takes 50 ms of CPU, so later tests copy it.
    """
    return tmp_path_factory.mktemp("migrated") / "relay.db"


@pytest.fixture
async def sqlite_setting(tmp_path: Path, migrated_sqlite: Path) -> str:
    """The value of `database` in gateway.yaml, for an SQLite file with empty tables."""
    return await _copy(migrated_sqlite, tmp_path / "data")


async def _copy(migrated_sqlite: Path, folder: Path) -> str:
    if not migrated_sqlite.exists():
        await try_out(str(migrated_sqlite))
    folder.mkdir(mode=0o700)
    return str(shutil.copy(migrated_sqlite, folder))


@pytest.fixture(params=["sqlite", "postgresql"])
async def database_setting(request: pytest.FixtureRequest, tmp_path: Path, migrated_sqlite: Path) -> str:
    """The value of `database` in gateway.yaml, for a database with empty tables."""
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return await server.migrated_database()
    return await _copy(migrated_sqlite, tmp_path / "data")


@pytest.fixture
async def database(database_setting: str) -> AsyncIterator[Database]:
    """An open `Database` with empty tables."""
    opened = Database(database_url(database_setting))
    yield opened
    await opened.close()


@pytest.fixture
async def other_database(database_setting: str) -> AsyncIterator[Database]:
    """A second `Database` on the same tables, as another process has it."""
    opened = Database(database_url(database_setting))
    yield opened
    await opened.close()
