"""Databases that an older relay made: they are opened in place, and what stands in them still adds up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import create_async_engine

import relay.storage.migrations as migrations
from relay.storage.database import HEAD, Database, database_url
from relay.storage.tables import exchanges, group_rollups, rollups

ROWS = {"sqlite": 1_000_000, "postgresql": 100_000}
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


async def old_database(setting: str, revision: str) -> int:
    """Make the database of an older relay, with rows in each of its large tables. Their number."""
    url = database_url(setting)
    engine, dialect = create_async_engine(url), url.get_backend_name()
    if dialect == "sqlite":
        Path(setting).parent.mkdir()

    def upgrade(connection: sa.Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)

    series, row_id = SERIES[dialect].format(rows=ROWS[dialect]), ID[dialect]
    statements = (
        "INSERT INTO exchanges (id, surface, provider, model, client, status, outcome, duration_ms, input_tokens, output_tokens, cost_nano_usd, record)"
        f" {series} SELECT {row_id}, 'rest', 'openai', 'gpt-x', '127.0.0.1', 200, 'relayed', 12.5, 10, 20, 5000, '{{\"id\":\"' || {row_id} || '\"}}' FROM s",
        f"INSERT INTO rollups (span_s, at_s, client, provider, model, surface, outcome, writer, {SUMS}, spread)"
        f" {series} SELECT 3600, i * 3600, '127.0.0.1', 'openai', 'gpt-x', 'rest', 'relayed', 'w', {ONE_REQUEST}, {EMPTY[dialect]} FROM s WHERE i % 10 = 0",
        f"INSERT INTO tag_rollups (name, at_s, value, writer, {SUMS}, spread)"
        f" {series} SELECT 'team', i * 3600, 'growth', 'w', {ONE_REQUEST}, {EMPTY[dialect]} FROM s WHERE i % 10 = 0",
    )
    try:
        async with engine.begin() as connection:
            await connection.run_sync(upgrade)
            for statement in statements:
                await connection.exec_driver_sql(statement)
    finally:
        await engine.dispose()
    return ROWS[dialect]


@pytest.mark.parametrize("revision", ["0001"])
async def test_a_large_database_of_an_older_relay_is_opened_in_half_a_minute(revision: str, database_setting: str, database: Database) -> None:
    """The bound is many times what it takes: a step that rewrites every row would pass it."""
    number = await old_database(database_setting, revision)
    async with asyncio.timeout(OPENING_S):
        await database.prepare()
    ((version,),) = await database.rows(sa.select(sa.column("version_num")).select_from(sa.table("alembic_version")))
    ((rows, cost_nano_usd),) = await database.rows(sa.select(sa.func.count(), sa.func.sum(exchanges.c.cost_nano_usd)))
    assert (version, rows, cost_nano_usd) == (HEAD, number, number * 5000)
    ((requests, pages),) = await database.rows(sa.select(sa.func.sum(rollups.c.requests), sa.func.sum(rollups.c.pages)))
    assert (requests, pages) == (number // 10, 0), "the sums hold, and what is new in them is 0"
    assert list(await database.rows(sa.select(group_rollups))) == [], "sums without provider and model are not taken over"
