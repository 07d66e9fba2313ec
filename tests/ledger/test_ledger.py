"""Rows of the ledger: each call has one, with its usage and cost, however it ends."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.core.exchange import min_id_at
from relay.ledger.queries import Filter, export
from relay.ledger.retention import Retention, sweep
from relay.storage.database import Database, DatabaseNewer, database_url
from relay.storage.readers import QueryTooSlow
from relay.storage.tables import exchanges, rollups, tags, tickets
from tests.conftest import StartRelay
from tests.relays import CLIENT_KEY, HANG_GUARD_S, Relay, provider
from tests.upstream.raw import CLOSE, LAST_CHUNK, SSE_HEAD, RawUpstream, chunk, ok

USAGE = b'{"model": "gpt-4o-mini", "usage": {"prompt_tokens": 1000, "completion_tokens": 500, "prompt_tokens_details": {"cached_tokens": 200}}}'
COST_NANO_USD = 800 * 150 + 200 * 75 + 500 * 600
"""The price of gpt-4o-mini per million tokens: $0.15 input, $0.075 cached input, $0.60 output."""
CALL = {"model": "gpt-4o-mini", "messages": []}


async def rows(relay: Relay) -> list[dict[str, Any]]:
    """Wait until no call runs. Returns all rows, the oldest first."""
    await relay.idle()
    assert relay.gateway.ledger.database is not None
    return [call async for call in export(relay.gateway.ledger.database, Filter())]


async def post(relay: Relay, **options: Any) -> tuple[int, Any, bytes]:
    return await relay.call("POST", relay.path("openai", "chat/completions"), json=CALL, **options)


async def test_a_call_has_one_row_with_its_usage_and_cost(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    headers = {"cf-aig-metadata": '{"team": "a", "paid": true}', "cf-aig-event-id": "event-1", "X-Request-Id": "req-1"}
    _, response_headers, _ = await post(relay, headers=headers)
    (row,) = await rows(relay)
    assert row["id"] == response_headers["cf-aig-log-id"]
    assert (row["provider"], row["model"], row["status"], row["outcome"]) == ("openai", "gpt-4o-mini", 200, "relayed")
    assert row["usage"] == {"input_tokens": 1000, "output_tokens": 500, "cache_read_tokens": 200}
    assert bytes(row["cost_usd"]) == b"0.000435" and COST_NANO_USD == 435_000
    assert (row["event_id"], row["request_id"], row["metadata"]) == ("event-1", "req-1", {"team": "a", "paid": True})
    assert 0 < row["overhead_ms"] <= row["first_byte_ms"] <= row["duration_ms"] and row["bytes_up"] and row["bytes_down"] == len(USAGE)


async def test_the_row_and_the_log_line_have_the_same_values(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    await post(relay)
    (row,) = await rows(relay)
    (line,) = await relay.events()
    shared = set(line) - {"event", "level", "timestamp", "cost_nano_usd"}
    assert {name: row[name] for name in shared} == {name: line[name] for name in shared}


async def test_a_refused_a_failed_and_a_cut_call_have_their_rows(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(SSE_HEAD, chunk(b"data: {}\n\n"), CLOSE)
    relay = await start({"database": database_setting}, openai=provider(raw.url), gone=provider("http://127.0.0.1:1"))
    with pytest.raises(aiohttp.ClientError):
        await post(relay)
    await relay.call("POST", relay.path("gone", "chat/completions"), json=CALL)
    await relay.call("POST", relay.path("nobody", "x"), data=b"")
    found = {row["provider"]: (row["outcome"], row["status"], row["error"]) for row in await rows(relay)}
    # By provider: the order of calls that begin in the same millisecond is not defined.
    assert found == {
        "openai": ("failed", 200, "upstream_disconnected"), "gone": ("failed", 502, "upstream_unreachable"), "nobody": ("refused", 404, "unknown_provider"),
    }  # fmt: skip


async def test_a_call_whose_client_disconnects_has_a_row_with_the_usage_so_far(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(SSE_HEAD, chunk(b'data: {"choices":[{"delta":{"content":"word"}}]}\n\n'), asyncio.Event())
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    async with relay.client.post(relay.path("openai", "chat/completions"), json=CALL) as answer:
        await answer.content.readany()
    (row,) = await rows(relay)
    assert (row["outcome"], row["error"], row["usage"]["estimated"]) == ("client_gone", "client_gone", True)
    assert row["usage"]["output_tokens"] == 1 and row["cost_usd"] is not None


async def test_the_row_lists_attempts_with_status_and_duration(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(b"{}", status="503 Busy"))
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting, "retries": {"max_attempts": 2, "delay_s": 0.001}}, openai=provider(raw.url))
    await post(relay)
    (row,) = await rows(relay)
    assert [attempt["status"] for attempt in row["attempts"]] == [503, 200]
    assert all(attempt["duration_s"] > 0 and attempt["key"] == "OPENAI_API_KEY" for attempt in row["attempts"])


async def test_a_cache_hit_costs_nothing_and_records_the_saved_cost(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE[:-1] + b', "choices": [{"finish_reason": "stop"}]}', "Content-Type: application/json"))
    relay = await start({"database": database_setting, "cache": {"ttl_s": 60}}, openai=provider(raw.url))
    await post(relay)
    await post(relay)
    missed, hit = await rows(relay)
    assert (bytes(missed["cost_usd"]), missed["saved_usd"]) == (b"0.000435", None)
    assert (hit["outcome"], bytes(hit["cost_usd"]), bytes(hit["saved_usd"])) == ("cached", b"0", b"0.000435")


async def test_a_coalesced_call_records_the_saved_cost(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting, "cache": {"coalesce": True}}, openai=provider(raw.url))
    calls = [asyncio.create_task(post(relay)) for _ in range(2)]
    while len(relay.gateway.running) < 3:  # databases, and the upstream call that they share
        await asyncio.sleep(0.01)
    gate.set()
    await asyncio.gather(*calls)
    by_outcome = {row["outcome"]: row for row in await rows(relay)}
    assert (bytes(by_outcome["relayed"]["cost_usd"]), by_outcome["relayed"]["saved_usd"]) == (b"0.000435", None)
    assert (bytes(by_outcome["cached"]["cost_usd"]), bytes(by_outcome["cached"]["saved_usd"])) == (b"0", b"0.000435")


async def test_a_custom_cost_of_the_client_overrides_the_price(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    await post(relay, headers={"cf-aig-custom-cost": '{"per_token_in": 0.001, "per_token_out": 0.002}'})
    assert bytes((await rows(relay))[0]["cost_usd"]) == b"2"


async def test_a_call_without_a_price_has_an_unknown_cost_and_is_counted(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE.replace(b"gpt-4o-mini", b"unheard-of"), "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "unheard-of"})
    assert (await rows(relay))[0]["cost_usd"] is None
    _, _, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/usage")
    assert json.loads(body)["total"]["unpriced"] == 1


async def test_a_clean_stop_loses_nothing(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    await asyncio.gather(*(post(relay) for _ in range(300)))
    await relay.runner.cleanup()
    database = Database(database_url(database_setting))
    counted = await database.rows(sa.select(sa.func.count(sa.distinct(exchanges.c.id))))
    summed = await database.rows(sa.select(sa.func.sum(rollups.c.requests)).where(rollups.c.span_s == 86400))
    await database.close()
    assert int(counted[0][0]) == int(summed[0][0]) == 300


async def test_text_that_no_database_stores_loses_no_row(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    body = b'{"model": "a\\u0000b", "user": "\\u0000", "messages": []}'
    headers = {"cf-aig-metadata": '{"n\\u0000": "\\u0000x"}', "cf-aig-event-id": "caf\u00e9"}
    await relay.call("POST", relay.path("openai", "chat/completions"), data=body, headers=headers)
    await post(relay)
    assert len(await rows(relay)) == 2 and relay.gateway.ledger.lost.rows == 0


async def test_impossible_token_counts_are_ignored(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    """The valid numbers are used, but the cost of the call is unknown."""
    raw.plays(ok(b'{"usage": {"prompt_tokens": 99999999999999999999, "completion_tokens": 1}}', "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    await post(relay)
    (row,) = await rows(relay)
    assert row["usage"] == {"output_tokens": 1, "incomplete": True} and row["cost_usd"] is None and relay.gateway.ledger.lost.usage_fields == 1


BODIES = [("off", {}, False), ("asked", {}, False), ("asked", {"cf-aig-collect-log-payload": "true"}, True), ("on", {}, True), ("on", {"cf-aig-collect-log-payload": "false"}, False), ("on", {"cf-aig-collect-log": "false"}, False)]  # fmt: skip


@pytest.mark.parametrize(("bodies", "headers", "stored"), BODIES)
async def test_bodies_are_stored_only_if_switched_on(start: StartRelay, raw: RawUpstream, database_setting: str, bodies: str, headers: dict[str, str], stored: bool) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting, "ledger": {"bodies": bodies}}, openai=provider(raw.url))
    _, response_headers, _ = await post(relay, headers=headers)
    await relay.idle()
    at = f"{relay.url}/api/v1/ai-gateway/logs/{response_headers['cf-aig-log-id']}"
    status, _, request = await relay.call("GET", f"{at}/request")
    _, _, response = await relay.call("GET", f"{at}/response")
    assert (status == 200) is stored
    assert not stored or (json.loads(request), response) == (CALL, USAGE)


async def test_a_stored_body_is_truncated_and_redacted(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    from tests.relays import KEYS

    raw.plays(ok(f'{{"echo": "{KEYS["OPENAI_API_KEY"]}", "rest": "{"x" * 500}"}}'.encode(), "Content-Type: application/json"))
    relay = await start({"database": database_setting, "ledger": {"bodies": "on", "body_bytes": 200}}, openai=provider(raw.url))
    _, response_headers, _ = await post(relay)
    await relay.idle()
    at = f"{relay.url}/api/v1/ai-gateway/logs/{response_headers['cf-aig-log-id']}/response"
    _, headers, body = await relay.call("GET", at)
    assert headers["x-relay-complete"] == "false" and b"[redacted]" in body and len(body) <= 200
    assert KEYS["OPENAI_API_KEY"].encode() not in body


async def test_calls_continue_while_the_database_is_unavailable_and_their_rows_are_written_later(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    folder = tmp_path / "not-yet"
    folder.write_text("a file where a folder should be")
    relay = await start({"database": str(folder / "relay.db")}, openai=provider(raw.url))
    assert (await post(relay))[0] == 200
    await relay.events("database.unavailable")
    _, _, ready = await relay.call("GET", f"{relay.url}/readyz")
    assert json.loads(ready)["ledger"] == "unavailable"
    folder.unlink()
    await relay.events("database.recovered")
    assert len(await rows(relay)) == 1


async def test_a_row_that_the_database_refuses_does_not_block_other_rows(start: StartRelay, raw: RawUpstream, postgres: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    monkeypatch.setattr("relay.core.metadata.clean", lambda text: text)  # PostgreSQL gets a NUL
    relay = await start({"database": await postgres.database()}, openai=provider(raw.url))
    bad = {"cf-aig-metadata": json.dumps({"team": chr(0)})}
    await asyncio.gather(*(post(relay, headers=headers) for headers in ({}, bad, {}, {})))
    assert len(await rows(relay)) == 3 and relay.gateway.ledger.lost.rows == 1
    await relay.events("ledger.row_refused")


async def test_the_ledger_recovers_from_a_full_disk_without_a_restart(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": str(tmp_path / "relay.db")}, openai=provider(raw.url))
    await post(relay)
    await rows(relay)
    database = relay.gateway.ledger.database
    assert database is not None and database._writer is not None
    engine = database._writer._engine

    def limit(pages: int) -> None:
        """Limit the pages of the file. A limit below its size has the effect of a full disk."""
        with engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    limit(1)
    headers = {"cf-aig-metadata": json.dumps({"filler": "x" * 4000})}
    for _ in range(40):
        assert (await post(relay, headers=headers))[0] == 200
    await relay.events("database.unavailable")
    limit(1_000_000)
    await relay.events("database.recovered")
    assert len(await rows(relay)) == 41


async def test_log_lines_and_metrics_do_not_wait_for_a_slow_database(start: StartRelay, raw: RawUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.storage.readers._BUSY_MS", 60_000)
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": str(tmp_path / "relay.db"), "metrics": {"enabled": True}}, openai=provider(raw.url))
    other = sqlite3.connect(tmp_path / "relay.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # another process holds the write lock
    writer = relay.gateway.ledger._writer
    assert writer is not None
    async with asyncio.timeout(HANG_GUARD_S):
        await post(relay)
        while not writer._writing:
            await asyncio.sleep(0.01)
        await post(relay)
        while b'outcome="relayed",provider="openai",transport="rest"} 2.0' not in (await relay.call("GET", f"{relay.url}/metrics"))[2]:
            await asyncio.sleep(0.01)
        assert len(await relay.events(count=2)) == 2
    assert (relay.gateway.ledger.waiting, relay.gateway.ledger.lost.failures) == (2, 0)
    other.execute("ROLLBACK")
    other.close()
    assert len(await rows(relay)) == 2


async def test_a_database_gets_every_row_once_after_an_outage(start: StartRelay, raw: RawUpstream, postgres: Any) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": await postgres.database()}, openai=provider(raw.url))
    await post(relay)
    await rows(relay)
    postgres.stop()
    for _ in range(20):
        assert (await post(relay))[0] == 200
    await relay.events("database.unavailable")
    postgres.start()
    await relay.events("database.recovered")
    found = await rows(relay)
    assert len({row["id"] for row in found}) == len(found) == 21
    _, _, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/usage")
    assert json.loads(body)["total"]["requests"] == 21


async def test_above_the_memory_limit_bodies_are_dropped_before_rows_and_the_sums_are_right(start: StartRelay, raw: RawUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ledger.writer.MAX_ROWS", 5)
    monkeypatch.setattr("relay.ledger.writer.MAX_BODIES_BYTES", 3 * (len(USAGE) + len(json.dumps(CALL))))
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    folder = tmp_path / "not-yet"
    folder.write_text("")
    relay = await start({"database": str(folder / "relay.db"), "ledger": {"bodies": "on"}}, openai=provider(raw.url))
    for _ in range(8):
        await post(relay)
    await relay.events("database.unavailable")
    async with asyncio.timeout(10):
        while relay.gateway.ledger.lost.rows < 3:
            await asyncio.sleep(0.01)
    folder.unlink()
    await relay.events("database.recovered")
    assert len(await rows(relay)) == 5
    assert (relay.gateway.ledger.lost.rows, relay.gateway.ledger.lost.bodies >= 3) == (3, True)
    _, _, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/usage")
    assert json.loads(body)["total"]["requests"] == 8


async def test_old_tickets_are_deleted_with_the_old_rows(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    document = {"database": database_setting, "clients": {"web": {"key": CLIENT_KEY}}}
    relay = await start(document, openai=provider(raw.url, websocket={"default_path": "x"}))
    url = f"{relay.url}/api/v1/ai-gateway/tickets"
    for _ in range(2):
        assert (await relay.call("POST", url, json={"provider": "openai"}, headers={"x-relay-key": CLIENT_KEY}))[0] == 201
    database = relay.gateway.ledger.database
    assert database is not None
    first = sa.select(tickets.c.sha256).order_by(tickets.c.sha256).limit(1).scalar_subquery()

    async def expire_one(connection: AsyncConnection) -> None:
        await connection.execute(sa.update(tickets).where(tickets.c.sha256 == first).values(expires_s=1))

    await database.change(expire_one)
    assert await sweep(database, Retention(3600, 3600)) == 1
    assert len(await database.rows(sa.select(tickets))) == 1


async def test_old_rows_are_deleted_with_their_bodies_and_metadata_and_daily_sums_stay(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting, "ledger": {"bodies": "on"}}, openai=provider(raw.url))
    await post(relay, headers={"cf-aig-metadata": '{"team": "a"}'})
    await rows(relay)
    database = relay.gateway.ledger.database
    assert database is not None
    assert await sweep(database, Retention(3600, 3600)) == 0
    assert await sweep(database, Retention(-3600, -3600)) >= 1
    assert await rows(relay) == [] and list(await database.rows(sa.select(tags))) == []
    stored = await database.rows(sa.select(rollups.c.requests).where(rollups.c.span_s == 86400))
    assert [each.requests for each in stored] == [1]


async def test_a_database_of_a_newer_relay_is_refused(database: Database) -> None:
    async with database.writing() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    database._prepared = False
    with pytest.raises(DatabaseNewer, match="newer relay"):
        await database.prepare()


async def test_two_processes_that_open_a_new_database_at_once_create_it_once(new_database_setting: str) -> None:
    databases = [Database(database_url(new_database_setting)) for _ in range(2)]
    await asyncio.gather(*(one.prepare() for one in databases))
    for one in databases:
        assert list(await one.rows(sa.select(exchanges))) == []
        await one.close()


async def test_the_migrations_create_the_declared_tables(new_database_setting: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    import relay.storage.migrations as steps
    from relay.storage.database import HEAD
    from relay.storage.tables import metadata

    database = Database(database_url(new_database_setting))
    await database.prepare()

    def differences(sync: sa.Connection) -> list[Any]:
        return list(compare_metadata(MigrationContext.configure(sync), metadata))

    async with database.writing() as connection:
        assert await connection.run_sync(differences) == []
    await database.close()
    assert ScriptDirectory(str(Path(steps.__file__).parent)).get_current_head() == HEAD


async def test_a_query_that_takes_too_long_is_stopped(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.storage.readers.READ_S", 0.2)
    forever = {
        True: "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        False: "SELECT pg_sleep(60)",
    }[database.is_sqlite]
    with pytest.raises(QueryTooSlow):
        await database.read(lambda connection: connection.execute(sa.text(forever)))
    assert list(await database.rows(sa.select(exchanges))) == []


async def test_a_cancelled_query_is_stopped_at_once(database: Database) -> None:
    forever = {
        True: "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        False: "SELECT pg_sleep(60)",
    }[database.is_sqlite]
    await database.prepare()
    for _ in range(6):  # more than the number of connections
        query = asyncio.create_task(database.read(lambda connection: connection.execute(sa.text(forever))))
        await asyncio.sleep(0.05)
        query.cancel()
        with pytest.raises(asyncio.CancelledError):
            await query
    assert list(await database.rows(sa.select(exchanges))) == []
    assert [task for task in asyncio.all_tasks() if "read" in repr(task.get_coro())] == []


def test_the_least_id_of_a_time_is_below_all_later_ids() -> None:
    from relay.gateway import new_id

    ids = [new_id() for _ in range(100)]
    import time

    assert min_id_at(time.time() - 1) < min(ids) and max(ids) < min_id_at(time.time() + 1)


async def test_a_stream_has_a_row_when_it_ends(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(SSE_HEAD, chunk(b'data: {"model": "gpt-4o-mini", "choices": []}\n\n'), chunk(b"data: " + USAGE + b"\n\n"), LAST_CHUNK)
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    await relay.call("POST", relay.path("openai", "chat/completions"), json=CALL | {"stream": True})
    (row,) = await rows(relay)
    assert row["stream"] is True and bytes(row["cost_usd"]) == b"0.000435"


async def test_only_the_user_of_the_relay_can_read_the_database_file(tmp_path: Path) -> None:
    database = Database(database_url(str(tmp_path / "data" / "relay.db")))
    await database.prepare()
    await database.close()
    assert [oct(file.stat().st_mode & 0o777) for file in (tmp_path / "data").iterdir()] == ["0o600"]
