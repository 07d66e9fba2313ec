"""Both databases that there are: what is tested of one is tested of the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from relay.storage.database import Database, database_url
from tests.postgres import PostgresServer, running
from tests.relays import HANG_GUARD_S


@pytest.fixture(autouse=True)
def patient_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine an answer may take longer than a relay waits for one; the test of that limit sets its own."""
    monkeypatch.setattr("relay.storage.readers.READ_S", HANG_GUARD_S)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL."""
    server = running()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
async def database_setting(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What gateway.yaml says under `database`."""
    if request.param == "sqlite":
        return str(tmp_path / "data" / "relay.db")
    server: PostgresServer = request.getfixturevalue("postgres")
    return await server.database()


@pytest.fixture
async def database(database_setting: str) -> AsyncIterator[Database]:
    """It, open."""
    made = Database(database_url(database_setting))
    yield made
    await made.close()
