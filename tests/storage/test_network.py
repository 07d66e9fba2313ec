"""PostgreSQL behind a network that hangs: no answer arrives, and no connection ends."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.storage.database import Database, DatabaseUnavailable, database_url
from tests.postgres import Network, PostgresServer
from tests.relays import HANG_GUARD_S

CHUNKS = 16
"""At least as many as a connection and one query exchange."""


async def one(connection: AsyncConnection) -> int:
    return int((await connection.execute(sa.text("SELECT 1"))).scalar_one())


async def test_a_query_ends_wherever_the_network_hangs_and_the_next_one_finds_it_recovered(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = await postgres.migrated_database()
    ended = 0

    async def hang_after(chunks: int) -> None:
        nonlocal ended
        async with Network(postgres.port) as network:
            await network.connect()
            database = Database(database_url(network.url(url)))
            assert await database.read(one) == 1
            network.hangs_after = chunks
            network.reset()
            try:
                for _ in range(2):
                    assert await database.read(one) == 1
            except DatabaseUnavailable:
                ended += 1
            assert not network.passes.is_set()
            network.recover()
            assert await database.read(one) == 1
            await database.close()

    async with asyncio.timeout(HANG_GUARD_S):
        monkeypatch.setattr("relay.storage.readers._LIMIT_S", 3)
        monkeypatch.setattr("relay.storage.readers._COMMAND_S", 1)
        await asyncio.gather(*map(hang_after, range(CHUNKS)))
    assert ended == CHUNKS
