"""Backup, restore and rollback: the commands of docs/operations.md, with a running relay."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from relay.storage.database import HEAD, Database, database_url
from relay.storage.tables import exchanges
from tests.conftest import StartRelay
from tests.ledger.test_ledger import COST_NANO_USD, USAGE, post, rows
from tests.postgres import PostgresServer
from tests.processes import ROOT
from tests.relays import Relay, provider, stop_relay
from tests.storage.test_migrations import old_database
from tests.surfaces.test_questions import ask
from tests.tools import need
from tests.upstream.raw import RawUpstream, ok

pytestmark = pytest.mark.programs
TEXT = (ROOT / "docs/operations.md").read_text()
ROWS_BEFORE = 5
OLD_ROW = (
    "INSERT INTO exchanges (id, surface, provider, model, client, status, outcome, duration_ms, input_tokens, output_tokens, cost_nano_usd, record)"
    " VALUES ('00000001-0000-7000-8000-000000000000', 'rest', 'openai', 'gpt-x', '127.0.0.1', 200, 'relayed', 12.5, 10, 20, 5000, '{}')"
)


def commands(heading: str) -> list[str]:
    """The indented code blocks below a heading, each as one string."""
    section = re.split(r"^##", TEXT.partition(f"\n### {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"(?:^    .*\n)+", section, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks]


SQLITE, IN_CONTAINER, SQLITE_RESTORE = commands("SQLite")
POSTGRESQL, POSTGRESQL_RESTORE = commands("PostgreSQL")


async def execute(script: str, folder: Path, url: str = "") -> None:
    """Run commands in a shell, as an operator does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec("bash", "-euc", script, cwd=folder, env={"PATH": path, "DATABASE_URL": url.replace("+asyncpg", "")}, stderr=asyncio.subprocess.PIPE)
    _, error = await process.communicate()
    assert process.returncode == 0, error.decode()


async def sums(relay: Relay) -> Any:
    """The rows and the total of `relay usage`."""
    _, report = await ask(relay, "usage", params={"by": "provider,model", "since": "24h"})
    return report["rows"], report["total"]


async def _call(relay: Relay, times: int) -> None:
    assert {(await post(relay))[0] for _ in range(times)} == {200}
    await relay.idle()


@pytest.mark.parametrize("backup", [SQLITE, IN_CONTAINER], ids=["sqlite3", "python"])
async def test_a_backup_of_a_running_relay_restores_its_rows_and_sums(backup: str, start: StartRelay, raw: RawUpstream, tmp_path: Path, database_file: str) -> None:
    need("sqlite3")
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_file}, openai=provider(raw.url))
    await _call(relay, ROWS_BEFORE)
    before = await rows(relay), await sums(relay)
    await execute(backup, tmp_path)
    if backup is IN_CONTAINER:
        await execute("mkdir backup; mv data/backup.db backup/relay.db", tmp_path)  # copied out of the container
    await _call(relay, 2)
    assert len(await rows(relay)) == ROWS_BEFORE + 2, "the relay continued to write"
    await stop_relay(relay)
    await execute(SQLITE_RESTORE, tmp_path)
    restored = await start({"database": database_file}, openai=provider(raw.url))
    assert (await rows(restored), await sums(restored)) == before
    assert before[1][1]["requests"] == len(before[0]) == ROWS_BEFORE
    await _call(restored, 1)
    assert len(await rows(restored)) == ROWS_BEFORE + 1


@pytest.fixture
def database_file(tmp_path: Path) -> str:
    """The path of the database in docs/operations.md."""
    return str(tmp_path / "data" / "relay.db")


@pytest.mark.parametrize("target", ["the same database", "an empty one"])
async def test_a_dump_of_a_running_relay_restores_its_rows_and_sums(target: str, start: StartRelay, raw: RawUpstream, tmp_path: Path, postgres: PostgresServer) -> None:
    need("pg_dump")
    url = await postgres.migrated_database()
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": url}, openai=provider(raw.url))
    await _call(relay, ROWS_BEFORE)
    before = await rows(relay), await sums(relay)
    await execute(POSTGRESQL, tmp_path, url)
    await _call(relay, 2)
    await stop_relay(relay)
    into = url if target == "the same database" else await postgres.database()
    await execute(POSTGRESQL_RESTORE, tmp_path, into)
    restored = await start({"database": into}, openai=provider(raw.url))
    assert (await rows(restored), await sums(restored)) == before
    await _call(restored, 1)
    assert len(await rows(restored)) == ROWS_BEFORE + 1


async def _version_and_cost(setting: str) -> tuple[str, int]:
    """The version of the schema, and the sum of all costs."""
    database = Database(database_url(setting))
    database._prepared = True  # it is read without a migration
    ((version,),) = await database.rows(sa.select(sa.column("version_num")).select_from(sa.table("alembic_version")))
    ((cost,),) = await database.rows(sa.select(sa.func.sum(exchanges.c.cost_nano_usd)))
    await database.close()
    return version, cost


async def test_a_rollback_restores_the_schema_and_the_rows_from_before_the_upgrade(start: StartRelay, raw: RawUpstream, tmp_path: Path, database_file: str) -> None:
    await old_database(database_file, "0003", [OLD_ROW])
    await execute(SQLITE, tmp_path)
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    upgraded = await start({"database": database_file}, openai=provider(raw.url))
    await _call(upgraded, 1)
    await stop_relay(upgraded)
    assert await _version_and_cost(database_file) == (HEAD, 5000 + COST_NANO_USD)
    await execute(SQLITE_RESTORE, tmp_path)
    assert await _version_and_cost(database_file) == ("0003", 5000)


async def test_a_rollback_of_postgresql_restores_into_a_new_database(start: StartRelay, raw: RawUpstream, tmp_path: Path, postgres: PostgresServer) -> None:
    need("pg_dump")
    url, fresh = await postgres.database(), await postgres.database()
    await old_database(url, "0003", [OLD_ROW])
    await execute(POSTGRESQL, tmp_path, url)
    await stop_relay(await start({"database": url}, openai=provider(raw.url)))
    assert await _version_and_cost(url) == (HEAD, 5000)
    await execute(POSTGRESQL_RESTORE, tmp_path, fresh)
    assert await _version_and_cost(fresh) == ("0003", 5000)
