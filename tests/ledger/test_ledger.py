"""Rows: every call has one, with what it used and cost, whatever becomes of it; on both databases."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa

from relay.core.exchange import min_id_at
from relay.ledger.queries import Filter, export
from relay.ledger.retention import Retention, sweep
from relay.storage.database import Database, DatabaseNewer, database_url
from relay.storage.readers import QueryTooSlow
from relay.storage.tables import exchanges, rollups, tags
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, provider
from tests.upstream.raw import CLOSE, LAST_CHUNK, SSE_HEAD, RawUpstream, chunk, ok

USAGE = b'{"model": "gpt-4o-mini", "usage": {"prompt_tokens": 1000, "completion_tokens": 500, "prompt_tokens_details": {"cached_tokens": 200}}}'
COST_NANO_USD = 800 * 150 + 200 * 75 + 500 * 600
"""gpt-4o-mini: 0.15 dollars a million tokens in, 0.075 from the cache, 0.60 out."""
CALL = {"model": "gpt-4o-mini", "messages": []}


async def rows(relay: Relay) -> list[dict[str, Any]]:
    """All rows, the oldest first, once nothing runs any more."""
    await relay.idle()
    assert relay.gateway.ledger.database is not None
    return [call async for call in export(relay.gateway.ledger.database, Filter())]


async def post(relay: Relay, **options: Any) -> tuple[int, Any, bytes]:
    return await relay.call("POST", relay.path("openai", "chat/completions"), json=CALL, **options)


async def test_a_call_has_one_row_with_what_it_used_and_cost(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    headers = {"cf-aig-metadata": '{"team": "a", "paid": true}', "cf-aig-event-id": "event-1", "X-Request-Id": "req-1"}
    _, answered, _ = await post(relay, headers=headers)
    (row,) = await rows(relay)
    assert row["id"] == answered["cf-aig-log-id"]
    assert (row["provider"], row["model"], row["status"], row["outcome"]) == ("openai", "gpt-4o-mini", 200, "relayed")
    assert row["usage"] == {"input_tokens": 1000, "output_tokens": 500, "cache_read_tokens": 200}
    assert bytes(row["cost_usd"]) == b"0.000435" and COST_NANO_USD == 435_000
    assert (row["event_id"], row["request_id"], row["metadata"]) == ("event-1", "req-1", {"team": "a", "paid": True})
    assert 0 < row["overhead_ms"] <= row["first_byte_ms"] <= row["duration_ms"] and row["bytes_up"] and row["bytes_down"] == len(USAGE)


async def test_the_row_and_the_log_line_say_the_same(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
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
    assert found == {  # calls that begin in the same millisecond have no order
        "openai": ("failed", 200, "upstream_disconnected"), "gone": ("failed", 502, "upstream_unreachable"), "nobody": ("refused", 404, "unknown_provider"),
    }  # fmt: skip


async def test_a_client_that_leaves_has_a_row_with_what_was_used_till_then(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(SSE_HEAD, chunk(b'data: {"choices":[{"delta":{"content":"word"}}]}\n\n'), asyncio.Event())
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    async with relay.client.post(relay.path("openai", "chat/completions"), json=CALL) as answer:
        await answer.content.readany()
    (row,) = await rows(relay)
    assert (row["outcome"], row["error"], row["usage"]["estimated"]) == ("client_gone", "client_gone", True)
    assert row["usage"]["output_tokens"] == 1 and row["cost_usd"] is not None


async def test_attempts_stand_in_the_row_with_status_and_time(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(b"{}", status="503 Busy"))
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting, "retries": {"max_attempts": 2, "delay_s": 0.001}}, openai=provider(raw.url))
    await post(relay)
    (row,) = await rows(relay)
    assert [attempt["status"] for attempt in row["attempts"]] == [503, 200]
    assert all(attempt["duration_s"] > 0 and attempt["key"] == "OPENAI_API_KEY" for attempt in row["attempts"])


async def test_an_answer_from_the_cache_costs_nothing_and_tells_what_it_saved(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE[:-1] + b', "choices": [{"finish_reason": "stop"}]}', "Content-Type: application/json"))
    relay = await start({"database": database_setting, "cache": {"ttl_s": 60}}, openai=provider(raw.url))
    await post(relay)
    await post(relay)
    missed, hit = await rows(relay)
    assert (bytes(missed["cost_usd"]), missed["saved_usd"]) == (b"0.000435", None)
    assert (hit["outcome"], bytes(hit["cost_usd"]), bytes(hit["saved_usd"])) == ("cached", b"0", b"0.000435")


async def test_an_answer_shared_with_an_identical_call_tells_what_it_saved(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting, "cache": {"coalesce": True}}, openai=provider(raw.url))
    calls = [asyncio.create_task(post(relay)) for _ in range(2)]
    while len(relay.gateway.running) < 3:  # the two, and the one that is made for both
        await asyncio.sleep(0.01)
    gate.set()
    await asyncio.gather(*calls)
    by_outcome = {row["outcome"]: row for row in await rows(relay)}
    assert (bytes(by_outcome["relayed"]["cost_usd"]), by_outcome["relayed"]["saved_usd"]) == (b"0.000435", None)
    assert (bytes(by_outcome["cached"]["cost_usd"]), bytes(by_outcome["cached"]["saved_usd"])) == (b"0", b"0.000435")


async def test_what_the_client_says_that_a_call_costs_holds(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    await post(relay, headers={"cf-aig-custom-cost": '{"per_token_in": 0.001, "per_token_out": 0.002}'})
    assert bytes((await rows(relay))[0]["cost_usd"]) == b"2"


async def test_what_has_no_price_is_unknown_and_counted_and_never_nothing(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE.replace(b"gpt-4o-mini", b"nobody-knows"), "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "nobody-knows"})
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


async def test_text_that_no_database_takes_loses_no_row(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    body = b'{"model": "a\\u0000b", "user": "\\u0000", "messages": []}'
    headers = {"cf-aig-metadata": '{"n\\u0000": "\\u0000x"}', "cf-aig-event-id": "caf\u00e9"}
    await relay.call("POST", relay.path("openai", "chat/completions"), data=body, headers=headers)
    await post(relay)
    assert len(await rows(relay)) == 2 and relay.gateway.ledger.lost.rows == 0


async def test_numbers_that_nobody_can_have_used_are_not_believed(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    """Nor do they void the numbers beside them, but of what the call costs too little is known then."""
    raw.plays(ok(b'{"usage": {"prompt_tokens": 99999999999999999999, "completion_tokens": 1}}', "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    await post(relay)
    (row,) = await rows(relay)
    assert row["usage"] == {"output_tokens": 1, "incomplete": True} and row["cost_usd"] is None and relay.gateway.ledger.lost.usage_fields == 1


BODIES = [("off", {}, False), ("asked", {}, False), ("asked", {"cf-aig-collect-log-payload": "true"}, True), ("on", {}, True), ("on", {"cf-aig-collect-log-payload": "false"}, False), ("on", {"cf-aig-collect-log": "false"}, False)]  # fmt: skip


@pytest.mark.parametrize(("bodies", "headers", "kept"), BODIES)
async def test_bodies_are_kept_only_where_that_is_switched_on(start: StartRelay, raw: RawUpstream, database_setting: str, bodies: str, headers: dict[str, str], kept: bool) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting, "ledger": {"bodies": bodies}}, openai=provider(raw.url))
    _, answered, _ = await post(relay, headers=headers)
    await relay.idle()
    at = f"{relay.url}/api/v1/ai-gateway/logs/{answered['cf-aig-log-id']}"
    status, _, said = await relay.call("GET", f"{at}/request")
    _, _, told = await relay.call("GET", f"{at}/response")
    assert (status == 200) is kept
    assert not kept or (json.loads(said), told) == (CALL, USAGE)


async def test_a_body_is_capped_and_shows_no_key_of_ours(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    from tests.relays import KEYS

    raw.plays(ok(f'{{"echo": "{KEYS["OPENAI_API_KEY"]}", "rest": "{"x" * 500}"}}'.encode(), "Content-Type: application/json"))
    relay = await start({"database": database_setting, "ledger": {"bodies": "on", "body_bytes": 200}}, openai=provider(raw.url))
    _, answered, _ = await post(relay)
    await relay.idle()
    at = f"{relay.url}/api/v1/ai-gateway/logs/{answered['cf-aig-log-id']}/response"
    _, headers, told = await relay.call("GET", at)
    assert headers["x-relay-complete"] == "false" and b"[redacted]" in told and len(told) <= 200
    assert KEYS["OPENAI_API_KEY"].encode() not in told


async def test_while_the_database_is_away_calls_go_on_and_their_rows_come_later(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
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


async def test_a_row_that_the_database_refuses_keeps_no_other_from_being_written(start: StartRelay, raw: RawUpstream, postgres: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    monkeypatch.setattr("relay.core.metadata.clean", lambda text: text)  # so that PostgreSQL meets a NUL
    relay = await start({"database": await postgres.database()}, openai=provider(raw.url))
    bad = {"cf-aig-metadata": json.dumps({"team": chr(0)})}
    await asyncio.gather(*(post(relay, headers=headers) for headers in ({}, bad, {}, {})))
    assert len(await rows(relay)) == 3 and relay.gateway.ledger.lost.rows == 1
    await relay.events("ledger.row_refused")


async def test_a_full_disk_is_borne_and_got_over_without_a_restart(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": str(tmp_path / "relay.db")}, openai=provider(raw.url))
    await post(relay)
    await rows(relay)
    database = relay.gateway.ledger.database
    assert database is not None and database._writer is not None
    engine = database._writer._engine

    def limit(pages: int) -> None:
        """As a disk that is full: no page more than there are."""
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


async def test_lines_and_metrics_do_not_wait_for_a_database_that_takes_its_time(start: StartRelay, raw: RawUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.storage.readers._BUSY_MS", 60_000)
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": str(tmp_path / "relay.db"), "metrics": {"enabled": True}}, openai=provider(raw.url))
    other = sqlite3.connect(tmp_path / "relay.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # another process writes, and does not end
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


async def test_a_database_that_is_lost_and_comes_back_gets_every_row_once(start: StartRelay, raw: RawUpstream, postgres: Any) -> None:
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


async def test_what_is_too_much_to_hold_is_dropped_bodies_first_and_the_sums_are_right(start: StartRelay, raw: RawUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_old_rows_go_with_their_bodies_and_metadata_and_the_days_stay(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start({"database": database_setting, "ledger": {"bodies": "on"}}, openai=provider(raw.url))
    await post(relay, headers={"cf-aig-metadata": '{"team": "a"}'})
    await rows(relay)
    database = relay.gateway.ledger.database
    assert database is not None
    assert await sweep(database, Retention(3600, 3600)) == 0
    assert await sweep(database, Retention(-3600, -3600)) >= 1
    assert await rows(relay) == [] and list(await database.rows(sa.select(tags))) == []
    kept = await database.rows(sa.select(rollups.c.requests).where(rollups.c.span_s == 86400))
    assert [each.requests for each in kept] == [1]


async def test_a_database_of_a_newer_relay_is_refused(database: Database) -> None:
    async with database.writing() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    database._prepared = False
    with pytest.raises(DatabaseNewer, match="newer relay"):
        await database.prepare()


async def test_two_that_open_a_new_database_at_once_make_it_once(new_database_setting: str) -> None:
    both = [Database(database_url(new_database_setting)) for _ in range(2)]
    await asyncio.gather(*(one.prepare() for one in both))
    for one in both:
        assert list(await one.rows(sa.select(exchanges))) == []
        await one.close()


async def test_the_steps_make_what_the_tables_say(new_database_setting: str) -> None:
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


async def test_a_question_that_takes_too_long_is_ended(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.storage.readers.READ_S", 0.2)
    forever = {
        True: "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        False: "SELECT pg_sleep(60)",
    }[database.is_sqlite]
    with pytest.raises(QueryTooSlow):
        await database.read(lambda connection: connection.execute(sa.text(forever)))
    assert list(await database.rows(sa.select(exchanges))) == []


async def test_a_question_that_nobody_waits_for_any_more_ends_at_once(database: Database) -> None:
    forever = {
        True: "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        False: "SELECT pg_sleep(60)",
    }[database.is_sqlite]
    await database.prepare()
    for _ in range(6):  # more than there are connections
        asking = asyncio.create_task(database.read(lambda connection: connection.execute(sa.text(forever))))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert list(await database.rows(sa.select(exchanges))) == []
    assert [task for task in asyncio.all_tasks() if "read" in repr(task.get_coro())] == []


def test_an_id_of_a_time_is_below_all_that_are_made_from_then_on() -> None:
    from relay.gateway import new_id

    ids = [new_id() for _ in range(100)]
    import time

    assert min_id_at(time.time() - 1) < min(ids) and max(ids) < min_id_at(time.time() + 1)


async def test_a_stream_has_its_row_when_it_ends(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(SSE_HEAD, chunk(b'data: {"model": "gpt-4o-mini", "choices": []}\n\n'), chunk(b"data: " + USAGE + b"\n\n"), LAST_CHUNK)
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    await relay.call("POST", relay.path("openai", "chat/completions"), json=CALL | {"stream": True})
    (row,) = await rows(relay)
    assert row["stream"] is True and bytes(row["cost_usd"]) == b"0.000435"


async def test_the_file_of_the_ledger_is_for_the_relays_user_alone(tmp_path: Path) -> None:
    database = Database(database_url(str(tmp_path / "data" / "relay.db")))
    await database.prepare()
    await database.close()
    assert [oct(file.stat().st_mode & 0o777) for file in (tmp_path / "data").iterdir()] == ["0o600"]
