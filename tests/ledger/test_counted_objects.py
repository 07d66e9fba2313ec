"""The usage of an object of a provider counts once, however often and through any relay."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import aiohttp
import aiosqlite
import asyncpg
import pytest
import sqlalchemy as sa

from relay.ledger import counted_objects as module
from relay.ledger.counted_objects import MAX_OBJECTS, CountedObjects
from relay.ledger.retention import Retention, sweep
from relay.storage.database import Database, database_url
from relay.storage.tables import booked
from tests.conftest import StartRelay
from tests.core.meters.recorded import RESULTS
from tests.ledger.test_ledger import rows
from tests.relays import HANG_GUARD_S, Relay, provider, stop_relay
from tests.upstream.raw import CLOSE, LAST_CHUNK, SSE_HEAD, RawUpstream, chunk, ok

JSON = "Content-Type: application/json"
USAGE = {"input_tokens": 1000, "output_tokens": 200, "total_tokens": 1200}
COUNTED = {"input_tokens": 1000, "output_tokens": 200}


def stored(status: str = "completed", usage: Any = USAGE, object_id: str = "resp_1") -> bytes:
    final_usage = usage if status == "completed" else None
    return json.dumps({"id": object_id, "object": "response", "status": status, "background": True, "model": "gpt-5-mini", "output": [], "usage": final_usage}).encode()


def answers(raw: RawUpstream, *bodies: bytes) -> None:
    for body in bodies:
        raw.plays(ok(body, JSON))


async def usages(relay: Relay, *calls: tuple[str, str], name: str = "openai") -> list[Any]:
    """Make calls one after another. Returns the usage of each."""
    before = sum('"event": "exchange"' in line or '"event":"exchange"' in line for line in relay.logged.lines)
    for method, endpoint in calls:
        status, _, _ = await relay.call(method, relay.path(name, endpoint), json={"model": "gpt-5-mini"} if method == "POST" else None)
        assert status == 200
    lines = await relay.events(count=before + len(calls))
    return [line.get("usage") for line in lines[before:]]


READ = ("GET", "responses/resp_1")


@pytest.mark.parametrize("with_database", [True, False], ids=["a database", "none"])
async def test_reading_and_cancelling_an_object_of_a_call_adds_no_usage(with_database: bool, start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    answers(raw, stored())
    relay = await start({"database": str(tmp_path / "r.db")} if with_database else {}, openai=provider(raw.url))
    calls = [("POST", "responses"), READ, READ, ("POST", "responses/resp_1/cancel"), ("GET", "responses/resp_1/input_items"), ("DELETE", "responses/resp_1")]
    assert await usages(relay, *calls) == [COUNTED, *[None] * 5]


async def test_a_queued_object_counts_when_it_is_first_seen_final(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    answers(raw, stored("queued"), stored("in_progress"), stored(), stored())
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    assert await usages(relay, ("POST", "responses"), READ, READ, READ) == [None, None, COUNTED, None]
    found = await rows(relay)
    assert [row["cost_usd"] is not None for row in found if row.get("usage")] == [True]


async def test_two_relays_with_one_database_count_an_object_once(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    answers(raw, stored())
    first, second = [await start({"database": database_setting}, openai=provider(raw.url)) for _ in range(2)]
    status, _, _ = await first.call("POST", first.path("openai", "responses"), json={"model": "gpt-5-mini"})
    assert status == 200
    await first.idle()
    for _ in range(2):
        await second.call("GET", second.path("openai", "responses/resp_1"))
    found = await rows(second)
    assert [row.get("usage") for row in found] == [COUNTED, None, None]
    assert [row["cost_usd"] is not None for row in found] == [True, False, False]
    _, _, body = await second.call("GET", f"{second.url}/api/v1/ai-gateway/usage?since=1h&by=provider")
    assert json.loads(body)["rows"][0]["input_tokens"] == 1000


async def test_concurrent_reads_by_two_relays_count_an_object_once(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    answers(raw, stored())
    relays = [await start({"database": database_setting}, openai=provider(raw.url)) for _ in range(2)]
    await asyncio.gather(*(relay.call("GET", relay.path("openai", "responses/resp_1")) for relay in relays for _ in range(5)))
    for relay in relays:
        await relay.idle()
    counted = [row["usage"] for row in await rows(relays[0]) if row.get("usage")]
    assert counted == [COUNTED]


async def test_an_object_is_not_counted_again_after_a_restart(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    answers(raw, stored())
    before = await start({"database": database_setting}, openai=provider(raw.url))
    assert await usages(before, ("POST", "responses")) == [COUNTED]
    await stop_relay(before)
    after = await start({"database": database_setting}, openai=provider(raw.url))
    assert await usages(after, READ) == [None]


async def test_two_responses_with_the_same_id_both_count(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    answers(raw, stored())
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    assert await usages(relay, ("POST", "responses"), ("POST", "responses"), READ) == [COUNTED, COUNTED, None]


async def test_the_same_id_at_another_provider_counts_separately(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    answers(raw, stored())
    relay = await start({"database": database_setting}, openai=provider(raw.url), other=provider(raw.url))
    assert await usages(relay, READ) == [COUNTED]
    assert await usages(relay, READ, name="other") == [COUNTED]


def test_without_a_database_the_last_ten_thousand_objects_are_known() -> None:
    known = CountedObjects(None)
    assert all(known.claim(("p", str(number))) for number in range(MAX_OBJECTS))
    assert not known.claim(("p", "0")) and not known.claim(("p", str(MAX_OBJECTS - 1)))
    assert known.claim(("p", "one more"))
    assert known.claim(("p", "0")), "the oldest is forgotten"
    assert not known.claim(("p", "2")) and len(known._known) == MAX_OBJECTS


async def test_without_a_reachable_database_each_process_counts_by_itself(start: StartRelay, raw: RawUpstream) -> None:
    answers(raw, stored())
    relay = await start({"database": "postgresql://nobody@127.0.0.1:1/none"}, openai=provider(raw.url))
    assert await usages(relay, READ, READ) == [COUNTED, None]


async def test_a_slow_database_delays_no_call(start: StartRelay, raw: RawUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAIT_S", 0.05)
    answers(raw, stored())
    path = tmp_path / "r.db"
    relay = await start({"database": str(path)}, openai=provider(raw.url))
    assert await usages(relay, ("POST", "responses")) == [COUNTED]
    await relay.idle()
    locked = sqlite3.connect(path, isolation_level=None)
    locked.execute("BEGIN IMMEDIATE")
    try:
        answers(raw, stored(object_id="resp_2"))
        raw.scripts.pop(0)
        async with asyncio.timeout(HANG_GUARD_S):
            status, _, _ = await relay.call("GET", relay.path("openai", "responses/resp_2"))
            (line,) = await relay.events()
        assert status == 200 and line["usage"] == COUNTED
    finally:
        locked.execute("ROLLBACK")
        locked.close()


async def test_a_broken_booking_loses_no_row(start: StartRelay, raw: RawUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: CountedObjects, claimed: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(CountedObjects, "counted_elsewhere", broken)
    answers(raw, stored())
    relay = await start({"database": str(tmp_path / "r.db")}, openai=provider(raw.url))
    assert await usages(relay, READ) == [COUNTED]
    assert len(await rows(relay)) == 1 and relay.gateway.ledger.lost.meters == 1
    assert await relay.events("ledger.booking_failed")


def replayed(status: str, usage: Any) -> bytes:
    response = {"id": "resp_1", "status": status, "background": True, "model": "gpt-5-mini", "usage": usage}
    return b"data: " + json.dumps({"type": f"response.{status}", "response": response}).encode() + b"\n\n"


async def test_a_replay_whose_client_disconnects_counts_nothing_and_the_next_read_counts(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(SSE_HEAD, chunk(replayed("in_progress", None)), asyncio.Event())
    answers(raw, stored())
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    async with relay.client.get(relay.path("openai", "responses/resp_1?stream=true")) as answer:
        await answer.content.readany()
    (left,) = await relay.events()
    assert left["outcome"] == "client_gone" and "usage" not in left
    assert await usages(relay, READ) == [COUNTED]


async def test_a_truncated_stream_is_estimated_and_a_later_read_adds_nothing(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    created = {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress", "background": False, "model": "gpt-5-mini", "usage": None}}
    delta = {"type": "response.output_text.delta", "delta": "word "}
    began = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in (created, *[delta] * 400))
    raw.plays(SSE_HEAD, chunk(began), CLOSE)
    answers(raw, stored())
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    with pytest.raises(aiohttp.ClientError):
        await relay.call("POST", relay.path("openai", "responses"), json={"model": "gpt-5-mini", "stream": True})
    (line,) = await relay.events()
    assert line["usage"]["estimated"] and 300 <= line["usage"]["output_tokens"] <= 700
    assert await usages(relay, READ) == [None]


async def test_a_truncated_stream_of_a_background_response_is_not_estimated(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(SSE_HEAD, chunk(replayed("in_progress", None)), CLOSE)
    answers(raw, stored())
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    with pytest.raises(aiohttp.ClientError):
        await relay.call("POST", relay.path("openai", "responses"), json={"model": "gpt-5-mini", "stream": True, "background": True})
    (line,) = await relay.events()
    assert "usage" not in line
    assert await usages(relay, READ) == [COUNTED]


RESULTS_PATH = ("GET", "v1/messages/batches/msgbatch_1/results")


async def test_the_results_of_a_batch_count_once_and_only_if_complete(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    headers = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-jsonl\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw.plays(headers, chunk(RESULTS[:-50]), CLOSE)
    raw.plays(headers, chunk(RESULTS), LAST_CHUNK)
    relay = await start({"database": database_setting}, claude=provider(raw.url, format="anthropic", priced_as="anthropic"))
    with pytest.raises(aiohttp.ClientError):
        await relay.call("GET", relay.path("claude", RESULTS_PATH[1]))
    (cut,) = await relay.events()
    assert "usage" not in cut
    whole, again = await usages(relay, RESULTS_PATH, RESULTS_PATH, name="claude")
    assert (whole["input_tokens"], whole["output_tokens"], again) == (34, 13, None)
    found = await rows(relay)
    # Half of Sonnet's prices for 30 input, 3 cached and 12 output tokens, half of Haiku's for
    # one input and one output token.
    assert round(float(found[1]["cost_usd"]) * 1e9) == 30 * 1500 + 3 * 150 + 12 * 7500 + 500 + 2500


async def test_a_response_of_fal_counts_once(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(b'{"images": []}', JSON, "x-fal-billable-units: 3.008", "x-fal-request-id: f-1"))
    relay = await start({"database": database_setting}, fal=provider(raw.url, format="fal"))
    calls = [("POST", "fal-ai/flux"), ("GET", "queue/fal-ai/flux/requests/f-1"), ("GET", "queue/fal-ai/flux/requests/f-1")]
    assert await usages(relay, *calls, name="fal") == [{"units_milli": 3008}, None, None]


async def test_a_coalesced_call_and_a_cache_hit_count_an_object_once(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(stored(), JSON))
    relay = await start({"database": database_setting, "cache": {"coalesce": True, "ttl_s": 60}}, openai=provider(raw.url))
    calls = [asyncio.create_task(relay.call("POST", relay.path("openai", "responses"), json={"model": "gpt-5-mini"})) for _ in range(3)]
    async with asyncio.timeout(HANG_GUARD_S):
        while len(relay.gateway.running) < 4:  # three callers, and the upstream call that they share
            await asyncio.sleep(0.01)
    gate.set()
    await asyncio.gather(*calls)
    await relay.call("POST", relay.path("openai", "responses"), json={"model": "gpt-5-mini"})
    assert len(raw.arrived) == 1
    found = await rows(relay)
    assert [row["usage"] for row in found if row.get("usage")] == [COUNTED]
    assert await usages(relay, READ) == [None]


async def test_counted_objects_are_forgotten_after_sixty_days(database: Database) -> None:
    await database.prepare()
    now = int(time.time())
    async with database.writing() as connection:
        await connection.execute(sa.insert(booked), [{"provider": "p", "object_id": f"{days}", "at_s": now - days * 86400} for days in (1, 59, 61, 400)])
    await sweep(database, Retention(3600, 3600))
    assert sorted(each.object_id for each in await database.rows(sa.select(booked.c.object_id))) == ["1", "59"]


async def test_many_objects_are_claimed_in_one_query(database: Database) -> None:
    await database.prepare()
    names = [("p", f"object {number}") for number in range(450)]
    first, second = CountedObjects(database), CountedObjects(database)
    assert not await first.counted_elsewhere(names[:300])
    assert set(await second.counted_elsewhere(names)) == set(names[:300])


def test_counted_objects_are_shared_only_with_a_database(tmp_path: Path) -> None:
    assert not CountedObjects(None).is_shared and CountedObjects(Database(database_url(str(tmp_path / "r.db")))).is_shared


async def test_a_wait_for_the_database_that_is_cut_off_leaves_no_lock(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut off at each operation of the driver in turn."""
    objects, task, left = CountedObjects(database), None, 0
    await objects.counted_elsewhere([("openai", "first")])
    kind = aiosqlite.Connection if database.is_sqlite else asyncpg.Connection
    name = "_execute" if database.is_sqlite else "prepare"
    operation = getattr(kind, name)

    async def cancelling(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and task is not None:
            asyncio.get_running_loop().call_soon(task.cancel)
        return await operation(self, *arguments, **options)

    monkeypatch.setattr(kind, name, cancelling)
    for number in range(1, 20):
        left, task = number, asyncio.create_task(objects.counted_elsewhere([("openai", f"object {number}")]))
        await asyncio.gather(task, return_exceptions=True)
        is_over, task = left > 0, None
        async with database.writing() as connection:  # fails after seconds if the other is still open
            await connection.execute(sa.delete(booked))
        if is_over:
            break
    assert is_over
