"""Slow queries of the ledger delay neither its writer nor, beyond a bound, each other; on both
databases.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa

from relay.core.exchange import uuid7
from relay.ledger import changes
from relay.ledger.rows import ROWS
from relay.storage import readers
from relay.storage.database import (
    Database,
    DatabaseNewer,
    DatabaseUnavailable,
    RowsRefused,
    database_url,
)
from relay.storage.readers import AT_ONCE, MAX_WAITING, QueryTooSlow, TooManyQueries
from relay.storage.tables import booked, exchanges
from tests.conftest import StartRelay
from tests.ledger.test_ledger import USAGE, post, rows
from tests.relays import HANG_GUARD_S, Relay, provider
from tests.surfaces.test_questions import JSON, ask
from tests.upstream.raw import RawUpstream, ok

FOREVER = {True: "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n", False: "SELECT pg_sleep(60)"}
BATCH = ((ROWS[14], [(uuid7(1, lambda _: 7), "rest", "native", "openai", "m", "c", 200, "relayed", 1.0, 0, 0, 0, "{}", None)]),)


@contextlib.asynccontextmanager
async def asked_by(database: Database, count: int) -> AsyncIterator[asyncio.Event]:
    """A number of queries that have begun, each in its transaction, until they are released."""
    go_on, begun = asyncio.Event(), asyncio.Semaphore(0)

    async def question(connection: Any) -> None:
        await connection.execute(sa.select(sa.func.count()).select_from(exchanges))
        begun.release()
        await go_on.wait()

    asking = [asyncio.create_task(database.read(question)) for _ in range(count)]
    try:
        async with asyncio.timeout(HANG_GUARD_S):
            for _ in range(min(count, AT_ONCE)):
                await begun.acquire()
        yield go_on
    finally:
        go_on.set()
        await asyncio.gather(*asking)


async def test_a_batch_and_a_change_never_wait_for_queries(database: Database) -> None:
    await database.prepare()
    async with asked_by(database, AT_ONCE + MAX_WAITING), asyncio.timeout(HANG_GUARD_S):
        await database.write(BATCH)
        for number in range(8):
            async with database.writing() as connection:
                await connection.execute(sa.insert(booked).values(provider="p", object_id=str(number), at_s=1))
    assert len(await database.rows(sa.select(exchanges))) == 1


async def test_queries_beyond_those_that_may_run_and_wait_are_refused(database: Database) -> None:
    await database.prepare()
    async with asked_by(database, AT_ONCE) as go_on:
        waiting = [asyncio.create_task(database.rows(sa.select(exchanges))) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(TooManyQueries):
            await database.rows(sa.select(exchanges))
        assert not any(task.done() for task in waiting)
        go_on.set()
        assert await asyncio.gather(*waiting) == [[]] * MAX_WAITING
    assert list(await database.rows(sa.select(exchanges))) == []


async def test_a_query_waits_no_longer_than_it_may_run(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await database.prepare()
    async with asked_by(database, AT_ONCE):
        monkeypatch.setattr(readers, "READ_S", 0.01)
        with pytest.raises(TooManyQueries):
            await database.rows(sa.select(exchanges))
        monkeypatch.undo()
    assert list(await database.rows(sa.select(exchanges))) == []


async def test_a_query_changes_nothing(database: Database) -> None:
    change = sa.insert(booked).values(provider="p", object_id="o", at_s=1)
    with pytest.raises((DatabaseUnavailable, RowsRefused)):
        await database.read(lambda connection: connection.execute(change))
    assert list(await database.rows(sa.select(booked))) == []
    async with database.writing() as connection:  # and no limit is left behind for a writer
        await connection.execute(change)


async def test_a_query_that_is_too_slow_is_ended_in_the_server_too(postgres: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(database_url(await postgres.database()))
    await database.prepare()
    monkeypatch.setattr(readers, "READ_S", 0.1)
    with pytest.raises(QueryTooSlow):
        await database.read(lambda connection: connection.execute(sa.text(FOREVER[False])))
    monkeypatch.undo()
    running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()"
    ((count,),) = await database.rows(sa.text(running))
    assert count == 0
    await database.close()


async def test_a_change_of_a_call_is_finished_when_its_client_leaves(database: Database) -> None:
    """The error of a cancelled caller must not keep a lock: here it is kept until the end."""
    await database.write(BATCH)
    call_id, errors, steps = BATCH[0][1][0][0], [], 8
    for step in range(steps):
        changing = asyncio.create_task(changes.change(database, call_id, score=step))
        for _ in range(step + 1):
            await asyncio.sleep(0)
        changing.cancel()
        errors += await asyncio.gather(changing, return_exceptions=True)
        async with asyncio.timeout(HANG_GUARD_S):
            while [row.score for row in await database.rows(sa.select(exchanges.c.score))] != [step]:
                await asyncio.sleep(0.001)
    assert [type(error) for error in errors] == [asyncio.CancelledError] * steps
    assert await changes.delete_ids(database, [call_id]) == 1


async def test_a_newer_database_refuses_queries_too(database: Database) -> None:
    async with database.writing() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    database._prepared = False
    with pytest.raises(DatabaseNewer):
        await database.rows(sa.select(exchanges))


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream, database_setting: str) -> Relay:
    """A relay with one call."""
    raw.plays(ok(USAGE, JSON))
    made = await start({"database": database_setting}, openai=provider(raw.url))
    await post(made)
    await rows(made)
    return made


@pytest.mark.parametrize("path", ["logs", "usage", "logs/export", "usage?by=user&format=csv"])
async def test_over_http_too_many_queries_get_503_with_retry_after(relay: Relay, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    database = relay.gateway.ledger.database
    assert database is not None
    monkeypatch.setattr(readers, "MAX_WAITING", 0)
    async with asked_by(database, AT_ONCE):
        status, headers, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/{path}")
        assert (status, json.loads(body)["error"]["code"], headers["retry-after"]) == (503, "ledger_busy", "1")
        assert (await post(relay))[0] == 200
        async with asyncio.timeout(HANG_GUARD_S):
            await relay.idle()  # its row is written meanwhile
        assert relay.gateway.ledger.state == "ok" and relay.gateway.ledger.waiting == 0
    assert (await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/{path}"))[0] == 200


async def test_over_http_a_query_that_is_too_slow_gets_503_with_advice(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    database = relay.gateway.ledger.database
    assert database is not None
    slow = sa.text(FOREVER[database.is_sqlite])

    async def page(*_: Any) -> None:
        await database.read(lambda connection: connection.execute(slow))

    monkeypatch.setattr("relay.ledger.queries.page", page)
    monkeypatch.setattr(readers, "READ_S", 0.1)
    status, answer = await ask(relay, "logs")
    assert (status, answer["error"]["code"]) == (503, "query_timeout") and "Query a shorter time" in answer["error"]["message"]
    assert relay.gateway.ledger.state == "ok"
