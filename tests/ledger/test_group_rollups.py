"""Rollups by user and by metadata: the rows of every report add up to its total."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from relay.core.record import Record
from relay.core.usage import COUNTS, Usage
from relay.gateway import new_id
from relay.ledger.group_rollups import MAX_VALUES, Grouping
from relay.ledger.queries import BadQuery
from relay.ledger.retention import Retention, sweep
from relay.ledger.rollups import Key, Rollups, Sums, by_key
from relay.ledger.rows import GROUP_SUM, SUM, entry_of
from relay.ledger.usage import UsageQuery, keys_of, usage
from relay.ledger.writer import Lost, Writer
from relay.registry.load import ConfigError, Sources, load
from relay.storage.database import Database, database_url
from relay.storage.tables import SUMS, group_rollups, group_values, rollups
from tests.conftest import StartRelay
from tests.ledger.test_ledger import USAGE, post, rows
from tests.relays import HANG_GUARD_S, Relay, provider, write_config
from tests.surfaces.test_questions import JSON, ask
from tests.upstream.raw import RawUpstream, ok

NAMES = ("user", "metadata.team", "metadata.env", "agent_session")
GROUPING = Grouping(NAMES)
KEEP = Retention(86400, 86400)
INTEGER_SUMS = ("requests", "errors", "cache_hits", "unpriced", "estimated", *COUNTS)
"""The sums of a report besides the costs."""


def call(draw: random.Random, **facts: Any) -> Record:
    """A record with a random team, user, provider and model, or without them."""
    names = {name: value for name in ("team", "env") if (value := draw.choice(["a", "b", "=c", None]))}
    created = Record(
        new_id(), "rest", "native", "POST", draw.choice(["openai", "anthropic"]), "chat/completions", draw.choice([200, 200, 502]),
        draw.choice(["relayed", "cached", "failed"]), draw.uniform(1, 900), 10, 20, f"10.0.0.{draw.randrange(3)}",
    )  # fmt: skip
    created.via, created.model, created.user, created.metadata = "direct", draw.choice(["gpt-5", "m", None]), draw.choice(["ann", "bob", None]), names or None
    created.usage = draw.choice([Usage(draw.randrange(99), draw.randrange(99), audio_ms=3), Usage(1, 2, characters=9, estimated=True), None])
    created.cost_nano_usd = draw.choice([draw.randrange(10**9), 0, None])
    for name, value in facts.items():
        setattr(created, name, value)
    return created


async def start_writer(setting: str) -> Writer:
    """Start a writer with its own `Database`."""
    created = Writer(Database(database_url(setting)), new_id, Lost())
    await created.start(lambda: KEEP, lambda: GROUPING)
    return created


def submit(writer: Writer, records: Sequence[Record]) -> None:
    writer.take([entry_of(record, None, None) for record in records], records, by_key(records))


async def report(database: Database, by: str, grouping: Grouping = GROUPING, **options: Any) -> dict[str, Any]:
    now_s = time.time()
    return await usage(database, UsageQuery(now_s - 3600, now_s + 1, now_s, keys_of(by), **options), grouping)


def nano_usd_of(row: dict[str, Any], name: str = "cost_usd") -> int:
    whole, _, part = bytes(row[name]).decode().partition(".")
    return int(whole) * 10**9 + int(part.ljust(9, "0"))


def rows_add_up(answer: dict[str, Any]) -> bool:
    total, found = answer["total"], answer["rows"]
    money = all(sum(nano_usd_of(row, name) for row in found) == nano_usd_of(total, name) for name in ("cost_usd", "saved_usd"))
    return money and all(sum(row[name] for row in found) == total[name] for name in INTEGER_SUMS)


async def test_every_grouping_of_a_report_adds_up_to_the_same_total(database_setting: str, database: Database) -> None:
    draw = random.Random(1)
    writer = await start_writer(database_setting)
    records = [call(draw, agent_session=draw.choice(["s1", "s2", None])) for _ in range(120)]
    for at in range(0, 120, 20):
        submit(writer, records[at : at + 20])
    await writer.stop()
    expected = (await report(database, "provider"))["total"]
    assert (expected["requests"], nano_usd_of(expected)) == (120, sum(record.cost_nano_usd or 0 for record in records))
    for name in NAMES:
        for more, bucket in (("", None), (",model", "hour"), (",model,provider", "day")):
            answer = await report(database, name + more, bucket=bucket)
            assert rows_add_up(answer) and answer["total"] == expected, (name, more, bucket)
    by_team = {row["metadata.team"]: row for row in (await report(database, "metadata.team"))["rows"]}
    assert set(by_team) == {"a", "b", "=c", "(none)"}
    of_a = [record for record in records if (record.metadata or {}).get("team") == "a"]
    assert (by_team["a"]["requests"], nano_usd_of(by_team["a"])) == (len(of_a), sum(record.cost_nano_usd or 0 for record in of_a))
    sessions = {row["agent_session"]: row["requests"] for row in (await report(database, "agent_session"))["rows"]}
    assert sessions == Counter(record.agent_session or "(none)" for record in records)
    by_user = {(row["user"], row["model"]): row["requests"] for row in (await report(database, "user,model"))["rows"]}
    assert by_user["ann", "gpt-5"] == sum(1 for record in records if (record.user, record.model) == ("ann", "gpt-5"))


async def test_reports_add_up_at_every_moment_while_two_writers_race(database_setting: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """New, known and surplus values arrive; a query reads both kinds of sums at one moment."""
    monkeypatch.setattr("relay.ledger.group_rollups.MAX_VALUES", 10)
    draw = random.Random(2)
    writers = [await start_writer(database_setting) for _ in range(2)]
    submitted = 0
    for number in range(15):
        for writer in writers:
            records = [call(draw, metadata={"team": f"team-{draw.randrange(number + 2)}"} if draw.random() < 0.8 else None) for _ in range(4)]
            submitted += len(records)
            submit(writer, records)
        answer = await report(database, draw.choice(["metadata.team", "metadata.team,model", "user,provider"]))
        assert rows_add_up(answer)
    for writer in writers:
        await writer.stop()
    answer = await report(database, "metadata.team")
    values = {row["metadata.team"] for row in answer["rows"]}
    assert rows_add_up(answer) and answer["total"]["requests"] == submitted == (await report(database, "client"))["total"]["requests"]
    assert len(values - {"(other)", "(none)"}) == 10 and {"(other)", "(none)"} <= values


async def test_calls_during_the_choice_of_values_get_both_kinds_of_sums_in_one_write(database_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, written = random.Random(10), []
    writer = await start_writer(database_setting)
    choose, write = writer._by_group._choose, writer.database.write
    late = [call(draw, user="late", metadata=None)]

    async def choose_late(*options: Any) -> set[str]:
        if late:
            submit(writer, [late.pop()])
        return await choose(*options)

    async def count(batch: Any) -> None:
        written.append([sum(row[len(into.columns) - len(SUMS) - 1] for row in rows if row[0] == 3600) for into, rows in batch if into in (SUM, GROUP_SUM)])
        await write(batch)

    monkeypatch.setattr(writer._by_group, "_choose", choose_late)
    monkeypatch.setattr(writer.database, "write", count)
    submit(writer, [call(draw, user="early", metadata=None)])
    await writer.stop()
    assert written[0] == [2, 2]


async def test_the_limit_of_values_a_day_holds_for_all_writers_of_a_database_together(database_setting: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ledger.group_rollups.MAX_VALUES", 5)
    draw = random.Random(3)
    for number in range(3):  # two writers at once, with two restarts
        both = [await start_writer(database_setting) for _ in range(2)]
        for at, writer in enumerate(both):
            for value in range(4):
                submit(writer, [call(draw, user=f"user-{number}-{at}-{value}")])
        for writer in both:
            await writer.stop()
    answer = await report(database, "user")
    found = {row["user"]: row["requests"] for row in answer["rows"]}
    assert len(found) == 6 and found["(other)"] == 3 * 2 * 4 - 5 and rows_add_up(answer)
    kept = await database.rows(sa.select(group_values.c.value).where(group_values.c.name == "user"))
    assert len(kept) == 5


async def test_a_known_value_keeps_its_sums_when_the_limit_of_the_day_is_reached(database_setting: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ledger.group_rollups.MAX_VALUES", 2)
    draw = random.Random(4)
    writer = await start_writer(database_setting)
    for user in ("a", "b", "c", "a", "b", "c", "d"):
        submit(writer, [call(draw, user=user)])
    await writer.stop()
    assert {row["user"]: row["requests"] for row in (await report(database, "user"))["rows"]} == {"a": 2, "b": 2, "(other)": 3}


def test_the_limit_is_a_thousand_values_a_day() -> None:
    assert MAX_VALUES == 1000


async def test_missing_empty_and_none_values_are_one_group(database_setting: str, database: Database) -> None:
    draw = random.Random(5)
    writer = await start_writer(database_setting)
    submit(writer, [call(draw, metadata=submitted) for submitted in (None, {"team": ""}, {"team": "(none)"}, {"other": 1}, {"team": False}, {"team": 7})])
    await writer.stop()
    assert {row["metadata.team"]: row["requests"] for row in (await report(database, "metadata.team"))["rows"]} == {"(none)": 4, "false": 1, "7": 1}


async def test_long_values_are_truncated_and_those_with_a_common_beginning_stay_distinct(database_setting: str, database: Database) -> None:
    draw = random.Random(6)
    writer = await start_writer(database_setting)
    submit(writer, [call(draw, metadata={"team": 10**3000}), call(draw, metadata={"team": 10**3000 + 1})])
    await writer.stop()
    found = [row["metadata.team"] for row in (await report(database, "metadata.team"))["rows"]]
    assert len(set(found)) == 2 and max(map(len, found)) <= 256


async def test_sums_of_new_values_are_kept_while_the_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "not-yet").write_text("a file where a folder should be")
    writer = await start_writer(str(tmp_path / "not-yet" / "relay.db"))
    draw = random.Random(7)
    async with asyncio.timeout(HANG_GUARD_S):
        for team in ("a", "b", "a"):
            submit(writer, [call(draw, metadata={"team": team}), call(draw, metadata=None)])
        while not writer.unavailable:
            await asyncio.sleep(0.01)
        (tmp_path / "not-yet").unlink()
    await writer.stop()
    reader = Database(database_url(str(tmp_path / "not-yet" / "relay.db")))
    answer = await report(reader, "metadata.team")
    assert {row["metadata.team"]: row["requests"] for row in answer["rows"]} == {"a": 2, "b": 1, "(none)": 3} and rows_add_up(answer)
    await reader.close()


async def test_pending_values_above_the_limit_count_as_other(database_setting: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ledger.group_rollups._MAX_UNDECIDED", 3)
    draw = random.Random(8)
    writer = await start_writer(database_setting)
    submit(writer, [call(draw, user=f"u{number}", provider="openai", model="m", metadata=None) for number in range(5)])
    await writer.stop()
    answer = await report(database, "user")
    assert {row["user"]: row["requests"] for row in answer["rows"]} == {"u0": 1, "u1": 1, "u2": 1, "(other)": 2} and rows_add_up(answer)


def test_a_clock_that_is_set_back_reduces_no_sum() -> None:
    """A row is overwritten as a whole, so sums that left memory must not restart under its key."""
    ids = iter(("first", "second", "third"))
    rollups = Rollups(lambda: next(ids))
    written: dict[tuple[Any, ...], int] = {}
    for now_s in (7195.0, 7205.0, 7196.0):
        sums = Sums()
        sums.requests = 1
        rollups.take({Key("c", "p", "m", "rest", "native", "relayed"): sums}, now_s)
        for span_s, at_s, *rest in rollups.begin():
            written[span_s, at_s, *rest[:7]] = rest[7]  # key and writer, then requests
        rollups.written(now_s)
    assert sum(requests for key, requests in written.items() if key[0] == 3600) == 3


async def test_sums_by_group_are_deleted_after_their_retention(database_setting: str, database: Database) -> None:
    draw = random.Random(9)
    writer = await start_writer(database_setting)
    submit(writer, [call(draw, user="ann")])
    await writer.stop()
    keep = Retention(86400, 86400, 86400)
    await sweep(database, keep)
    assert len(await database.rows(sa.select(group_rollups))) >= 2
    async with database.writing() as connection:
        for table in (group_rollups, group_values):
            await connection.execute(sa.update(table).values(at_s=table.c.at_s - 3 * 86400))
    await sweep(database, keep)
    for table in (group_rollups, group_values):
        assert list(await database.rows(sa.select(table))) == []
    assert len(await database.rows(sa.select(rollups).where(rollups.c.span_s == 86400))) == 1


@pytest.mark.parametrize(
    ("by", "options", "reason"),
    [
        ("metadata.cost_center", {}, "list cost_center under ledger.group_by"), ("metadata.team,user", {}, "by metadata.team cannot be combined with user"),
        ("metadata.team,client", {}, "provider and model only, not with client"), ("user", {"only": {"outcome": "failed"}}, "not with outcome"),
        ("user", {"bucket": "minute"}, "hours and days, no minutes"), ("metadata.team,colour", {}, "user, team, agent_session or metadata.NAME"),
    ],
)  # fmt: skip
async def test_a_report_that_cannot_be_made_is_refused_with_the_reason(database: Database, by: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadQuery, match=reason):
        await report(database, by, **options)


async def test_a_report_reaches_back_as_far_as_its_sums_are_kept(database: Database) -> None:
    now_s = time.time()
    answer = await usage(database, UsageQuery(now_s - 60 * 86400, now_s, now_s, ["user"]), GROUPING)
    assert answer["rows"] == []
    with pytest.raises(BadQuery, match="sums by user are kept for 60 days"):
        await usage(database, UsageQuery(now_s - 61 * 86400, now_s, now_s, ["user"]), GROUPING)
    with pytest.raises(BadQuery, match="hourly sums by user are kept for 60 days"):
        await usage(database, UsageQuery(now_s - 61 * 86400, now_s, now_s, ["user"], "hour"), Grouping(NAMES, 99 * 86400))


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream, database_setting: str) -> Relay:
    """A relay after three calls of team a, one of team b and one without a team."""
    raw.plays(ok(USAGE, JSON))
    created = await start({"database": database_setting, "ledger": {"group_by": ["team"]}}, openai=provider(raw.url))
    for team in ("a", "a", "a", "b", None):
        await post(created, headers={"cf-aig-metadata": json.dumps({"team": team, "env": "x"})} if team else {})
    await rows(created)
    return created


async def test_a_relay_groups_calls_by_the_names_in_its_configuration(relay: Relay) -> None:
    _, answer = await ask(relay, "usage?by=metadata.team,model&since=7d")
    found = {(row["metadata.team"], row["model"]): (row["requests"], row["input_tokens"]) for row in answer["rows"]}
    assert found == {("a", "gpt-4o-mini"): (3, 3000), ("b", "gpt-4o-mini"): (1, 1000), ("(none)", "gpt-4o-mini"): (1, 1000)}
    assert answer["total"] == (await ask(relay, "usage?by=provider&since=7d"))[1]["total"]
    assert all(row["latency_ms"]["p50"] > 0 for row in answer["rows"])
    status, answer = await ask(relay, "usage?by=metadata.env")
    assert (status, answer["error"]["code"]) == (400, "bad_request") and "ledger.group_by" in answer["error"]["message"]


async def test_a_report_is_filtered_by_provider_and_model(relay: Relay) -> None:
    assert (await ask(relay, "usage?by=metadata.team&provider=openai&model=gpt-4o-mini"))[1]["total"]["requests"] == 5
    _, answer = await ask(relay, "usage?by=metadata.team&provider=other")
    assert (answer["rows"], answer["total"]["requests"]) == ([], 0)


async def test_calls_are_grouped_by_user_by_default(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, JSON))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    for user in ("ann", "ann", None):
        await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m"} | ({"user": user} if user else {}))
    await rows(relay)
    _, answer = await ask(relay, "usage?by=user")
    assert {row["user"]: row["requests"] for row in answer["rows"]} == {"ann": 2, "(none)": 1}


async def test_the_user_of_a_call_or_session_is_the_one_that_limits_count(start: StartRelay, vendors: Any, database_setting: str) -> None:
    relay = await start({"database": database_setting, "providers": vendors.entries()})
    for header, body in (({"user": "ann"}, "bob"), ({"user": 7}, None), ({"user": ""}, "bob"), ({"team": "a"}, "bob"), (["no object"], "bob")):
        call = {"model": "m", "messages": []} | ({"user": body} if body else {})
        await relay.call("POST", relay.path("openai", "chat/completions"), json=call, headers={"cf-aig-metadata": json.dumps(header)})
    async with relay.client.ws_connect(relay.ws("openai"), headers={"cf-aig-metadata": '{"user": "ann"}'}):
        pass
    await rows(relay)
    _, answer = await ask(relay, "usage?by=user")
    assert {row["user"]: row["requests"] for row in answer["rows"]} == {"ann": 2, "bob": 3, "7": 1}
    _, answer = await ask(relay, "logs?user=ann")
    assert {call["transport"] for call in answer["logs"]} == {"rest", "websocket"}


async def test_calls_before_a_name_was_configured_count_as_none(relay: Relay, raw: RawUpstream) -> None:
    settings = relay.gateway.settings
    object.__setattr__(settings, "ledger", settings.ledger.model_copy(update={"group_by": ["team", "env"]}))
    await post(relay, headers={"cf-aig-metadata": '{"env": "x"}'})
    await rows(relay)
    _, answer = await ask(relay, "usage?by=metadata.env")
    assert {row["metadata.env"]: row["requests"] for row in answer["rows"]} == {"x": 1, "(none)": 5} and answer["total"]["requests"] == 6


async def test_rows_are_sorted_and_those_after_the_top_are_one_row(relay: Relay) -> None:
    for sort, order in (("cost", ["a", "(none)", "b"]), ("requests", ["a", "(none)", "b"]), ("name", ["(none)", "a", "b"]), ("tokens", ["a", "(none)", "b"])):
        _, answer = await ask(relay, f"usage?by=metadata.team&sort={sort}")
        assert [row["metadata.team"] for row in answer["rows"]] == order, sort
    for bucket in ("", "&bucket=day"):
        _, answer = await ask(relay, f"usage?by=metadata.team,model&top=1{bucket}")
        assert [(row["metadata.team"], row["model"], row["requests"]) for row in answer["rows"]] == [("a", "gpt-4o-mini", 3), ("(rest)", "(rest)", 2)]
        assert sum(row["requests"] for row in answer["rows"]) == answer["total"]["requests"] == 5
    _, answer = await ask(relay, "usage?by=metadata.team&top=3")
    assert len(answer["rows"]) == 3
    for bad in ("top=0", "top=x", "top=10001", "sort=colour", "format=xml"):
        status, answer = await ask(relay, f"usage?{bad}")
        assert status == 400 and bad.partition("=")[0] in answer["error"]["message"]


@pytest.mark.parametrize("group_by", [["a", "b", "c", "d", "e"], ["a,b"], ["metadata.team"], ["cf.x"], [""], ["a", "a"], [7], {"a": 1}])
def test_invalid_names_to_group_by_are_refused_at_start(tmp_path: Path, group_by: Any) -> None:
    write_config(tmp_path, {"ledger": {"group_by": group_by}, "providers": {}})
    with pytest.raises(ConfigError) as refused:
        load(Sources(tmp_path / "gateway.yaml", None))
    assert "ledger" in str(refused.value.problems[0]) and "group_by" in str(refused.value.problems[0])


def test_a_single_name_needs_no_list(tmp_path: Path) -> None:
    write_config(tmp_path, {"ledger": {"group_by": "team"}, "providers": {}})
    assert load(Sources(tmp_path / "gateway.yaml", None)).settings.ledger.group_by == ["team"]
