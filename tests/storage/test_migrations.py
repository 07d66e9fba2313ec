"""Databases of older relays: they are migrated in place, and their sums stay right."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import create_async_engine

import relay.storage.migrations as migrations
from relay.storage.access import AccessStore
from relay.storage.database import HEAD, Database, database_url
from relay.storage.tables import exchanges, group_rollups, rollups
from tests.conftest import StartRelay
from tests.ledger.test_ledger import USAGE, post, rows
from tests.relays import Relay, provider
from tests.surfaces.test_questions import ask
from tests.upstream.raw import RawUpstream, ok

ROWS = {"sqlite": 300_000, "postgresql": 100_000}
OPENING_S = 30
SERIES = {
    "sqlite": "WITH RECURSIVE s(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM s WHERE i < {rows})",
    "postgresql": "WITH s AS (SELECT i FROM generate_series(1, {rows}) AS i)",
}
ID = {"sqlite": "printf('%08x-0000-7000-8000-000000000000', i)", "postgresql": "lpad(to_hex(i), 8, '0') || '-0000-7000-8000-000000000000'"}
SUMS = (
    "requests, errors, cache_hits, unpriced, estimated, cost_nano_usd, saved_nano_usd, input_tokens, output_tokens, cache_read_tokens, cache_write_tokens,"
    " cache_write_1h_tokens, reasoning_tokens, input_audio_tokens, output_audio_tokens, cache_audio_read_tokens, input_image_tokens, output_image_tokens,"
    " cache_image_read_tokens, characters, audio_ms, units_milli, images"
)
ONE_REQUEST = "1, 0, 0, 0, 0, 5000, 0, 10, 20" + ", 0" * 14
EMPTY = {"sqlite": "x''", "postgresql": "''::bytea"}


@pytest.fixture
async def database_setting(new_database_setting: str) -> str:
    """A database without tables: each test creates those of an older relay first."""
    return new_database_setting


async def old_database(setting: str, revision: str, statements: Sequence[str]) -> None:
    """Create the tables of an older relay, and run statements in them."""
    url = database_url(setting)
    if url.get_backend_name() == "sqlite":
        Path(setting).parent.mkdir()
    await migrate(setting, command.upgrade, revision, statements)


async def migrate(setting: str, step: Callable[[Config, str], None], revision: str, statements: Sequence[str] = ()) -> None:
    """Bring a database to a revision with `command.upgrade` or `downgrade`, then run statements."""
    engine = create_async_engine(database_url(setting))

    def run(connection: sa.Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        config.attributes["connection"] = connection
        step(config, revision)

    try:
        async with engine.begin() as connection:
            await connection.run_sync(run)
            for statement in statements:
                await connection.exec_driver_sql(statement)
    finally:
        await engine.dispose()


async def large_old_database(setting: str) -> int:
    """Create a database of the first relay with rows in each large table. Returns their number."""
    dialect = database_url(setting).get_backend_name()
    series, row_id = SERIES[dialect].format(rows=ROWS[dialect]), ID[dialect]
    statements = (
        "INSERT INTO exchanges (id, surface, provider, model, client, status, outcome, duration_ms, input_tokens, output_tokens, cost_nano_usd, record)"
        f" {series} SELECT {row_id}, 'rest', 'openai', 'gpt-x', '127.0.0.1', 200, 'relayed', 12.5, 10, 20, 5000, '{{\"id\":\"' || {row_id} || '\"}}' FROM s",
        f"INSERT INTO rollups (span_s, at_s, client, provider, model, surface, outcome, writer, {SUMS}, spread)"
        f" {series} SELECT 3600, i * 3600, '127.0.0.1', 'openai', 'gpt-x', 'rest', 'relayed', 'w', {ONE_REQUEST}, {EMPTY[dialect]} FROM s WHERE i % 10 = 0",
        f"INSERT INTO tag_rollups (name, at_s, value, writer, {SUMS}, spread)"
        f" {series} SELECT 'team', i * 3600, 'growth', 'w', {ONE_REQUEST}, {EMPTY[dialect]} FROM s WHERE i % 10 = 0",
    )
    await old_database(setting, "0001", statements)
    return ROWS[dialect]


async def test_a_large_database_of_an_older_relay_is_migrated_in_half_a_minute(database_setting: str, database: Database) -> None:
    """The bound is many times the usual duration; a step that rewrites every row exceeds it."""
    number = await large_old_database(database_setting)
    async with asyncio.timeout(OPENING_S):
        await database.prepare()
    ((version,),) = await database.rows(sa.select(sa.column("version_num")).select_from(sa.table("alembic_version")))
    ((rows, cost_nano_usd),) = await database.rows(sa.select(sa.func.count(), sa.func.sum(exchanges.c.cost_nano_usd)))
    assert (version, rows, cost_nano_usd) == (HEAD, number, number * 5000)
    ((requests, pages),) = await database.rows(sa.select(sa.func.sum(rollups.c.requests), sa.func.sum(rollups.c.pages)))
    assert (requests, pages) == (number // 10, 0), "the sums are kept, and their new columns are 0"
    assert list(await database.rows(sa.select(group_rollups))) == [], "sums without provider and model are not migrated"


async def test_the_tables_of_access_can_be_dropped_and_created_again(database_setting: str) -> None:
    """The calls stay. A relay of before does not know the tables, one of after creates them."""
    await old_database(database_setting, HEAD, [])
    database = Database(database_url(database_setting))
    await AccessStore(database).put_client("web", "{}", "admin")
    await database.close()
    names = ["access_state", "audit", "client_keys", "clients", "tickets"]
    before = await table_names(database_setting)
    await migrate(database_setting, command.downgrade, "0004")
    assert await table_names(database_setting) == sorted(set(before) - {*names, "budgets", "budget_leases", "budget_workers", "made_objects", "provisional_charges"})
    database = Database(database_url(database_setting))
    assert await AccessStore(database).version() == 0
    await database.close()
    assert await table_names(database_setting) == before


async def table_names(setting: str) -> list[str]:
    """The tables of a database, except SQLite's own."""
    engine = create_async_engine(database_url(setting))
    async with engine.connect() as connection:
        names: list[str] = await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names())
    await engine.dispose()
    return sorted(names)


@pytest.fixture
async def upgraded(start: StartRelay, raw: RawUpstream, database_setting: str) -> Relay:
    """A relay on a database from before `transport` existed, with two calls and a session."""
    hour_s, empty = int(time.time() // 3600) * 3600, EMPTY[database_url(database_setting).get_backend_name()]
    statements = []
    for number, old in enumerate(("rest", "rest", "websocket")):
        row_id = f"0000000{number}-0000-7000-8000-000000000000"
        record = json.dumps({"id": row_id, "surface": old, "method": "GET", "provider": "openai", "endpoint": "realtime", "status": 200, "outcome": "relayed", "duration_ms": 12.5, "own_ms": 0.25, "turns": [{"at_ms": 1.0, "own_ms": 0.5}]})
        statements += [
            "INSERT INTO exchanges (id, surface, provider, model, client, status, outcome, duration_ms, input_tokens, output_tokens, cost_nano_usd, record)"
            f" VALUES ('{row_id}', '{old}', 'openai', 'gpt-x', '127.0.0.1', 200, 'relayed', 12.5, 10, 20, 5000, '{record}')",
            f"INSERT INTO rollups (span_s, at_s, client, provider, model, surface, outcome, writer, {SUMS}, spread)"
            f" VALUES (3600, {hour_s}, '127.0.0.1', 'openai', 'gpt-x', '{old}', 'relayed', 'w{number}', {ONE_REQUEST}, {empty})",
        ]
    await old_database(database_setting, "0003", statements)
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    return await start({"database": database_setting}, openai=provider(raw.url))


async def test_rows_of_an_older_relay_have_the_new_names(upgraded: Relay) -> None:
    _, page = await ask(upgraded, "logs")
    shown = [(call["transport"], call["surface"]) for call in page["logs"]]
    assert shown == [("websocket", "native"), ("rest", "native"), ("rest", "native")]
    overheads = [(call["overhead_ms"], call["turns"]) for call in page["logs"]]
    assert overheads == [(0.25, [{"at_ms": 1.0, "overhead_ms": 0.5}])] * 3 and "own_ms" not in str(page)
    _, call = await ask(upgraded, f"logs/{page['logs'][0]['id']}")
    assert call == page["logs"][0]


async def test_rows_of_an_older_relay_and_new_ones_are_found_by_transport_and_surface(upgraded: Relay) -> None:
    await post(upgraded)
    await rows(upgraded)
    for condition, number in (("transport=rest", 3), ("transport=websocket", 1), ("surface=native", 4), ("surface=rest", 0)):
        _, page = await ask(upgraded, f"logs?{condition}")
        assert len(page["logs"]) == number, condition


async def test_sums_of_an_older_relay_add_up_with_new_ones(upgraded: Relay) -> None:
    await post(upgraded)
    await rows(upgraded)
    _, used = await ask(upgraded, "usage?by=transport,surface&sort=name")
    assert [(row["transport"], row["surface"], row["requests"]) for row in used["rows"]] == [("rest", "native", 3), ("websocket", "native", 1)]
    assert used["total"]["requests"] == 4
    _, used = await ask(upgraded, "usage?transport=websocket")
    assert used["total"]["requests"] == 1
