"""Sums by user and by chosen names of metadata: whatever a report goes by, it adds up to the total; on both databases."""

from __future__ import annotations

import asyncio
import json
import random
import time
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

NAMES = ("user", "metadata.team", "metadata.env")
GROUPING = Grouping(NAMES)
KEEP = Retention(86400, 86400)
WHOLE = ("requests", "errors", "cache_hits", "unpriced", "estimated", *COUNTS)
"""What is added up besides money."""


def call(draw: random.Random, **facts: Any) -> Record:
    """A call of some team, user, provider and model, or of none."""
    names = {name: value for name in ("team", "env") if (value := draw.choice(["a", "b", "=c", None]))}
    made = Record(
        new_id(), "rest", "native", "POST", draw.choice(["openai", "anthropic"]), "chat/completions", draw.choice([200, 200, 502]),
        draw.choice(["relayed", "cached", "failed"]), draw.uniform(1, 900), 10, 20, f"10.0.0.{draw.randrange(3)}",
    )  # fmt: skip
    made.via, made.model, made.user, made.metadata = "direct", draw.choice(["gpt-5", "m", None]), draw.choice(["ann", "bob", None]), names or None
    made.usage = draw.choice([Usage(draw.randrange(99), draw.randrange(99), audio_ms=3), Usage(1, 2, characters=9, estimated=True), None])
    made.cost_nano_usd = draw.choice([draw.randrange(10**9), 0, None])
    for name, value in facts.items():
        setattr(made, name, value)
    return made


async def writing(setting: str) -> Writer:
    """A writer that has begun, on a database object of its own."""
    made = Writer(Database(database_url(setting)), new_id, Lost())
    await made.start(lambda: KEEP, lambda: GROUPING)
    return made


def give(writer: Writer, records: Sequence[Record]) -> None:
    writer.take([entry_of(record, None, None) for record in records], records, by_key(records))


async def used(database: Database, by: str, grouping: Grouping = GROUPING, **asked: Any) -> dict[str, Any]:
    now_s = time.time()
    return await usage(database, UsageQuery(now_s - 3600, now_s + 1, now_s, keys_of(by), **asked), grouping)


def nano(row: dict[str, Any], name: str = "cost_usd") -> int:
    whole, _, part = bytes(row[name]).decode().partition(".")
    return int(whole) * 10**9 + int(part.ljust(9, "0"))


def adds_up(answer: dict[str, Any]) -> bool:
    total, found = answer["total"], answer["rows"]
    money = all(sum(nano(row, name) for row in found) == nano(total, name) for name in ("cost_usd", "saved_usd"))
    return money and all(sum(row[name] for row in found) == total[name] for name in WHOLE)


async def test_whatever_a_report_goes_by_it_adds_up_to_the_same_total(database_setting: str, database: Database) -> None:
    draw = random.Random(1)
    writer = await writing(database_setting)
    records = [call(draw) for _ in range(120)]
    for at in range(0, 120, 20):
        give(writer, records[at : at + 20])
    await writer.stop()
    expected = (await used(database, "provider"))["total"]
    assert (expected["requests"], nano(expected)) == (120, sum(record.cost_nano_usd or 0 for record in records))
    for name in NAMES:
        for more, bucket in (("", None), (",model", "hour"), (",model,provider", "day")):
            answer = await used(database, name + more, bucket=bucket)
            assert adds_up(answer) and answer["total"] == expected, (name, more, bucket)
    by_team = {row["metadata.team"]: row for row in (await used(database, "metadata.team"))["rows"]}
    assert set(by_team) == {"a", "b", "=c", "(none)"}
    of_a = [record for record in records if (record.metadata or {}).get("team") == "a"]
    assert (by_team["a"]["requests"], nano(by_team["a"])) == (len(of_a), sum(record.cost_nano_usd or 0 for record in of_a))
    by_user = {(row["user"], row["model"]): row["requests"] for row in (await used(database, "user,model"))["rows"]}
    assert by_user["ann", "gpt-5"] == sum(1 for record in records if (record.user, record.model) == ("ann", "gpt-5"))


async def test_reports_add_up_at_every_moment_while_two_writers_race(database_setting: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are new, known and too many, all the time; a question sees both kinds of sums at one moment."""
    monkeypatch.setattr("relay.ledger.group_rollups.MAX_VALUES", 10)
    draw = random.Random(2)
    writers = [await writing(database_setting) for _ in range(2)]
    given = 0
    for number in range(15):
        for writer in writers:
            records = [call(draw, metadata={"team": f"team-{draw.randrange(number + 2)}"} if draw.random() < 0.8 else None) for _ in range(4)]
            given += len(records)
            give(writer, records)
        answer = await used(database, draw.choice(["metadata.team", "metadata.team,model", "user,provider"]))
        assert adds_up(answer)
    for writer in writers:
        await writer.stop()
    answer = await used(database, "metadata.team")
    values = {row["metadata.team"] for row in answer["rows"]}
    assert adds_up(answer) and answer["total"]["requests"] == given == (await used(database, "client"))["total"]["requests"]
    assert len(values - {"(other)", "(none)"}) == 10 and {"(other)", "(none)"} <= values


async def test_calls_that_come_while_values_are_decided_have_both_kinds_of_sums_written_at_once(database_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, written = random.Random(10), []
    writer = await writing(database_setting)
    choose, write = writer._by_group._choose, writer.database.write
    late = [call(draw, user="late", metadata=None)]

    async def choosing(*asked: Any) -> set[str]:
        if late:
            give(writer, [late.pop()])
        return await choose(*asked)

    async def count(batch: Any) -> None:
        written.append([sum(row[into._columns - len(SUMS) - 1] for row in rows if row[0] == 3600) for into, rows in batch if into in (SUM, GROUP_SUM)])
        await write(batch)

    monkeypatch.setattr(writer._by_group, "_choose", choosing)
    monkeypatch.setattr(writer.database, "write", count)
    give(writer, [call(draw, user="early", metadata=None)])
    await writer.stop()
    assert written[0] == [2, 2]


async def test_all_writers_of_a_database_together_keep_so_many_values_a_day(database_setting: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ledger.group_rollups.MAX_VALUES", 5)
    draw = random.Random(3)
    for number in range(3):  # two at once, and one after a restart
        both = [await writing(database_setting) for _ in range(2)]
        for at, writer in enumerate(both):
            for value in range(4):
                give(writer, [call(draw, user=f"user-{number}-{at}-{value}")])
        for writer in both:
            await writer.stop()
    answer = await used(database, "user")
    found = {row["user"]: row["requests"] for row in answer["rows"]}
    assert len(found) == 6 and found["(other)"] == 3 * 2 * 4 - 5 and adds_up(answer)
    kept = await database.rows(sa.select(group_values.c.value).where(group_values.c.name == "user"))
    assert len(kept) == 5


async def test_a_value_that_is_known_keeps_its_sums_when_the_day_is_full(database_setting: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ledger.group_rollups.MAX_VALUES", 2)
    draw = random.Random(4)
    writer = await writing(database_setting)
    for user in ("a", "b", "c", "a", "b", "c", "d"):
        give(writer, [call(draw, user=user)])
    await writer.stop()
    assert {row["user"]: row["requests"] for row in (await used(database, "user"))["rows"]} == {"a": 2, "b": 2, "(other)": 3}


def test_a_thousand_values_a_day_have_sums_of_their_own() -> None:
    assert MAX_VALUES == 1000


async def test_no_value_an_empty_one_and_one_that_says_none_are_the_same(database_setting: str, database: Database) -> None:
    draw = random.Random(5)
    writer = await writing(database_setting)
    give(writer, [call(draw, metadata=given) for given in (None, {"team": ""}, {"team": "(none)"}, {"other": 1}, {"team": False}, {"team": 7})])
    await writer.stop()
    assert {row["metadata.team"]: row["requests"] for row in (await used(database, "metadata.team"))["rows"]} == {"(none)": 4, "false": 1, "7": 1}


async def test_a_value_of_endless_length_is_cut_and_two_that_begin_alike_remain_two(database_setting: str, database: Database) -> None:
    draw = random.Random(6)
    writer = await writing(database_setting)
    give(writer, [call(draw, metadata={"team": 10**3000}), call(draw, metadata={"team": 10**3000 + 1})])
    await writer.stop()
    found = [row["metadata.team"] for row in (await used(database, "metadata.team"))["rows"]]
    assert len(set(found)) == 2 and max(map(len, found)) <= 256


async def test_sums_of_new_values_wait_while_the_database_is_away(tmp_path: Path) -> None:
    (tmp_path / "not-yet").write_text("a file where a folder should be")
    writer = await writing(str(tmp_path / "not-yet" / "relay.db"))
    draw = random.Random(7)
    async with asyncio.timeout(HANG_GUARD_S):
        for team in ("a", "b", "a"):
            give(writer, [call(draw, metadata={"team": team}), call(draw, metadata=None)])
        while not writer.unavailable:
            await asyncio.sleep(0.01)
        (tmp_path / "not-yet").unlink()
    await writer.stop()
    reader = Database(database_url(str(tmp_path / "not-yet" / "relay.db")))
    answer = await used(reader, "metadata.team")
    assert {row["metadata.team"]: row["requests"] for row in answer["rows"]} == {"a": 2, "b": 1, "(none)": 3} and adds_up(answer)
    await reader.close()


async def test_more_values_than_may_wait_to_be_decided_go_to_the_others(database_setting: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ledger.group_rollups._MAX_UNDECIDED", 3)
    draw = random.Random(8)
    writer = await writing(database_setting)
    give(writer, [call(draw, user=f"u{number}", provider="openai", model="m", metadata=None) for number in range(5)])
    await writer.stop()
    answer = await used(database, "user")
    assert {row["user"]: row["requests"] for row in answer["rows"]} == {"u0": 1, "u1": 1, "u2": 1, "(other)": 2} and adds_up(answer)


def test_a_clock_that_goes_back_makes_no_sum_smaller() -> None:
    """A row is written whole: what was let go of must not begin again at nothing under the same key."""
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


async def test_sums_by_name_are_kept_for_as_long_as_asked(database_setting: str, database: Database) -> None:
    draw = random.Random(9)
    writer = await writing(database_setting)
    give(writer, [call(draw, user="ann")])
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
    ("by", "asked", "why"),
    [
        ("metadata.cost_center", {}, "list cost_center under ledger.group_by"), ("metadata.team,user", {}, "by metadata.team cannot be combined with user"),
        ("metadata.team,client", {}, "provider and model only, not with client"), ("user", {"only": {"outcome": "failed"}}, "not with outcome"),
        ("user", {"bucket": "minute"}, "hours and days, no minutes"), ("metadata.team,colour", {}, "user or metadata.NAME"),
    ],
)  # fmt: skip
async def test_a_report_that_cannot_be_made_says_why(database: Database, by: str, asked: dict[str, Any], why: str) -> None:
    with pytest.raises(BadQuery, match=why):
        await used(database, by, **asked)


async def test_a_report_goes_back_as_far_as_its_sums_are_kept(database: Database) -> None:
    now_s = time.time()
    answer = await usage(database, UsageQuery(now_s - 60 * 86400, now_s, now_s, ["user"]), GROUPING)
    assert answer["rows"] == []
    with pytest.raises(BadQuery, match="sums by user are kept for 60 days"):
        await usage(database, UsageQuery(now_s - 61 * 86400, now_s, now_s, ["user"]), GROUPING)
    with pytest.raises(BadQuery, match="hourly sums by user are kept for 60 days"):
        await usage(database, UsageQuery(now_s - 61 * 86400, now_s, now_s, ["user"], "hour"), Grouping(NAMES, 99 * 86400))


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream, database_setting: str) -> Relay:
    """Three calls of team a, one of team b, one of nobody."""
    raw.plays(ok(USAGE, JSON))
    made = await start({"database": database_setting, "ledger": {"group_by": ["team"]}}, openai=provider(raw.url))
    for team in ("a", "a", "a", "b", None):
        await post(made, headers={"cf-aig-metadata": json.dumps({"team": team, "env": "x"})} if team else {})
    await rows(made)
    return made


async def test_a_relay_adds_calls_up_by_the_names_of_its_file(relay: Relay) -> None:
    _, answer = await ask(relay, "usage?by=metadata.team,model&since=7d")
    found = {(row["metadata.team"], row["model"]): (row["requests"], row["input_tokens"]) for row in answer["rows"]}
    assert found == {("a", "gpt-4o-mini"): (3, 3000), ("b", "gpt-4o-mini"): (1, 1000), ("(none)", "gpt-4o-mini"): (1, 1000)}
    assert answer["total"] == (await ask(relay, "usage?by=provider&since=7d"))[1]["total"]
    assert all(row["latency_ms"]["p50"] > 0 for row in answer["rows"])
    status, answer = await ask(relay, "usage?by=metadata.env")
    assert (status, answer["error"]["code"]) == (400, "bad_request") and "ledger.group_by" in answer["error"]["message"]


async def test_a_report_counts_the_calls_of_one_provider_or_model(relay: Relay) -> None:
    assert (await ask(relay, "usage?by=metadata.team&provider=openai&model=gpt-4o-mini"))[1]["total"]["requests"] == 5
    _, answer = await ask(relay, "usage?by=metadata.team&provider=other")
    assert (answer["rows"], answer["total"]["requests"]) == ([], 0)


async def test_calls_are_added_up_by_user_without_any_setting(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
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


async def test_a_name_that_comes_later_has_the_calls_before_under_none(relay: Relay, raw: RawUpstream) -> None:
    settings = relay.gateway.settings
    object.__setattr__(settings, "ledger", settings.ledger.model_copy(update={"group_by": ["team", "env"]}))
    await post(relay, headers={"cf-aig-metadata": '{"env": "x"}'})
    await rows(relay)
    _, answer = await ask(relay, "usage?by=metadata.env")
    assert {row["metadata.env"]: row["requests"] for row in answer["rows"]} == {"x": 1, "(none)": 5} and answer["total"]["requests"] == 6


async def test_rows_are_sorted_and_the_rest_after_the_top_is_one_row(relay: Relay) -> None:
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
def test_names_that_cannot_be_added_up_by_are_refused_at_start(tmp_path: Path, group_by: Any) -> None:
    write_config(tmp_path, {"ledger": {"group_by": group_by}, "providers": {}})
    with pytest.raises(ConfigError) as refused:
        load(Sources(tmp_path / "gateway.yaml", None))
    assert "ledger" in str(refused.value.problems[0]) and "group_by" in str(refused.value.problems[0])


def test_one_name_may_stand_without_a_list(tmp_path: Path) -> None:
    write_config(tmp_path, {"ledger": {"group_by": "team"}, "providers": {}})
    assert load(Sources(tmp_path / "gateway.yaml", None)).settings.ledger.group_by == ["team"]
