"""Who made a call, in the ledger: client, key, team, user, program, and the session of an agent."""

from __future__ import annotations

import csv
import itertools
import json
from typing import Any

import pytest
import sqlalchemy as sa

from relay.cli.logs import print_calls
from relay.core.record import Record
from relay.core.text import clean
from relay.ledger.rows import ROWS, row
from relay.storage.tables import exchanges
from tests.cli.test_reports import options
from tests.conftest import StartRelay
from tests.ledger.test_ledger import CALL, USAGE, rows
from tests.relays import Relay, provider
from tests.surfaces.test_questions import JSON, ask
from tests.upstream.raw import RawUpstream, ok
from tests.upstream.vendors import echo, vendor
from tests.whole_run import canary

KEYS = {name: canary(f"ledger-{name}") for name in ("web", "web2", "ci")}
CLIENTS: dict[str, Any] = {
    "web": {"key": [KEYS["web"], KEYS["web2"]], "metadata": {"team": "growth"}},
    "ci": {"key": KEYS["ci"], "metadata": {"team": "growth", "user": "bot", "cost": 7}},
}
SESSION, ACCOUNT = "5f2c9f5a-session", "7d52a1ce-4c1e-4a51-9a51-0e5f0c1d2e3f"
CLAUDE = {"User-Agent": "claude-cli/2.1.126 (external, cli)", "x-claude-code-session-id": SESSION}


def sent(name: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"} | headers


async def call(relay: Relay, headers: dict[str, str], **body: Any) -> None:
    headers = {"User-Agent": "OpenAI/Python 1.109.1"} | headers
    assert (await relay.call("POST", relay.path("openai", "chat/completions"), json=CALL | body, headers=headers))[0] == 200


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream, database_setting: str) -> Relay:
    """Calls of `web` with each key, of `ci`, of Claude Code and a sub-agent, and without a key."""
    raw.plays(ok(USAGE, JSON))
    started = await start({"database": database_setting, "clients": CLIENTS}, openai=provider(raw.url))
    await call(started, sent("web"), user="ann")
    await call(started, sent("web2"))
    await call(started, sent("ci", **{"cf-aig-metadata": '{"team": "other", "user": "eve", "env": "x"}'}), user="eve")
    await call(started, sent("web", **CLAUDE))
    await call(started, sent("web", **CLAUDE, **{"x-claude-code-agent-id": "a1"}))
    await call(started, {"cf-aig-metadata": '{"team": "mine"}'})
    await rows(started)
    return started


async def test_a_row_says_who_called(relay: Relay) -> None:
    found = {tuple(row.get(name) for name in ("client", "key_id", "team", "user", "user_agent", "agent_session", "agent_parent")) for row in await rows(relay)}
    python, claude = "OpenAI/Python 1.109.1", CLAUDE["User-Agent"]
    assert found == {
        ("web", "web/1", "growth", "ann", python, None, None),
        ("web", "web/2", "growth", None, python, None, None),
        ("ci", "ci/1", "growth", "bot", python, None, None),
        ("web", "web/1", "growth", None, claude, SESSION, None),
        ("web", "web/1", "growth", None, claude, SESSION, SESSION),
        ("127.0.0.1", None, "mine", None, python, None, None),
    }
    [by_ci] = [row for row in await rows(relay) if row["client"] == "ci"]
    assert by_ci["metadata"] == {"team": "growth", "user": "bot", "env": "x", "cost": 7}


async def test_the_log_line_names_the_key(relay: Relay) -> None:
    lines = await relay.events(count=6)
    assert [(line["client"], line.get("key_id")) for line in lines] == [("web", "web/1"), ("web", "web/2"), ("ci", "ci/1"), ("web", "web/1"), ("web", "web/1"), ("127.0.0.1", None)]
    assert lines[4]["agent_session"] == lines[4]["agent_parent"] == SESSION and lines[4]["user_agent"] == CLAUDE["User-Agent"]
    assert not any("CANARY" in line for line in relay.logged.lines)


CONDITIONS = {
    "client=web": 4, "client=ci": 1, "key_id=web/1": 3, "key_id=web/2": 1, "key_id=web": 0, "team=growth": 5, "team=mine": 1, "team=other": 0, "user=bot": 1,
    "user=eve": 0, f"agent_session={SESSION}": 2, f"agent_parent={SESSION}": 1, "user_agent=OpenAI/Python%201.109.1": 4, "user_agent=claude-cli/*": 2,
    "user_agent=claude-cli/": 0, "user_agent=*": 6, "user_agent=claude%25*": 0, "client=web&team=growth&user=ann": 1,
    "key_id=%00": 0, "team=%00": 0, "user_agent=%00*": 0, "agent_session=%ED%A0%80": 0, f"user_agent={'x' * 3000}*": 0,
}  # fmt: skip


async def test_calls_are_found_by_their_caller(relay: Relay) -> None:
    assert {condition: len((await ask(relay, f"logs?{condition}"))[1]["logs"]) for condition in CONDITIONS} == CONDITIONS


async def test_an_export_as_csv_has_the_callers(relay: Relay) -> None:
    _, _, text = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/logs/export?format=csv")
    found = {(line["client"], line["key_id"], line["team"], line["agent_session"], line["agent_parent"]) for line in csv.DictReader(text.decode().splitlines())}
    assert {("web", "web/2", "growth", "", ""), ("web", "web/1", "growth", SESSION, SESSION)} <= found


SELECTIONS = {("--client", "web"): 4, ("--team", "growth"): 5, ("--key-id", "web/2"): 1, ("--user-agent", "claude-cli/*"): 2, ("--agent-session", SESSION): 2, ("--agent-parent", SESSION): 1}


async def test_relay_logs_selects_by_caller(relay: Relay) -> None:
    for arguments, count in SELECTIONS.items():
        lines: list[str] = []
        await print_calls(relay.gateway.config, options("logs", *arguments), lines.append)
        assert len(lines) == count, arguments


async def test_usage_by_client_and_by_team_adds_up(relay: Relay) -> None:
    """Teams are summed without `ledger.group_by`."""
    _, used = await ask(relay, "usage?by=client&sort=requests")
    assert [(row["client"], row["requests"]) for row in used["rows"]] == [("web", 4), ("127.0.0.1", 1), ("ci", 1)]
    for key in ("team", "metadata.team"):
        _, of_teams = await ask(relay, f"usage?by={key},model&sort=requests")
        assert [(row[key], row["requests"]) for row in of_teams["rows"]] == [("growth", 5), ("mine", 1)]
        assert of_teams["total"] == used["total"]
    _, used = await ask(relay, "usage?by=user&sort=requests")
    assert [(row["user"], row["requests"]) for row in used["rows"]] == [("(none)", 4), ("ann", 1), ("bot", 1)]


async def test_team_is_not_combined_with_other_names(relay: Relay) -> None:
    for keys in ("team,metadata.team", "team,user", "team,client"):
        status, answer = await ask(relay, f"usage?by={keys}")
        assert status == 400 and "by team can" in answer["error"]["message"]


async def test_the_team_of_a_call_follows_its_changed_metadata(relay: Relay) -> None:
    _, page = await ask(relay, "logs?key_id=web/2")
    at = f"logs/{page['logs'][0]['id']}"
    _, changed = await ask(relay, at, "PATCH", json={"metadata": {"team": "search"}})
    assert (changed["team"], changed["metadata"]) == ("search", {"team": "search"})
    assert [len((await ask(relay, f"logs?team={team}"))[1]["logs"]) for team in ("search", "growth")] == [1, 4]
    _, changed = await ask(relay, at, "PATCH", json={"metadata": None})
    assert (changed["team"], changed["metadata"]) == (None, None)


async def test_a_session_over_a_websocket_has_its_caller(start: StartRelay, aiohttp_server: Any, database_setting: str) -> None:
    server = await aiohttp_server(vendor(("GET", "/responses", echo)))
    entry = provider(str(server.make_url("")), websocket={"default_path": "responses"})
    relay = await start({"database": database_setting, "clients": CLIENTS}, openai=entry)
    headers = sent("ci", **{"session-id": SESSION, "x-codex-parent-thread-id": "t1", "User-Agent": "codex_cli_rs/0.140.0"})
    async with relay.client.ws_connect(relay.ws("openai"), headers=headers):
        pass
    (found,) = await rows(relay)
    assert (found["client"], found["key_id"], found["team"], found["user"]) == ("ci", "ci/1", "growth", "bot")
    assert (found["agent_session"], found["agent_parent"], found["user_agent"]) == (SESSION, "t1", "codex_cli_rs/0.140.0")


async def test_a_refused_call_of_a_client_has_its_caller(start: StartRelay, database_setting: str) -> None:
    known = CLIENTS | {"ci": CLIENTS["ci"] | {"providers": ["other"]}}
    relay = await start({"database": database_setting, "clients": known}, openai=provider("http://127.0.0.1:1"), other=provider("http://127.0.0.1:1"))
    status, _, _ = await relay.call("POST", relay.path("openai", "x"), data=b"{}", headers=sent("ci"))
    (found,) = await rows(relay)
    assert (status, found["error"], found["client"], found["key_id"]) == (403, "provider_not_allowed", "ci", "ci/1")


async def test_the_texts_of_a_caller_are_bounded_and_cleaned(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, JSON))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    names = {"User-Agent": "u" * 3000, "session-id": "s" * 3000, "x-codex-parent-thread-id": "\u202ep" * 900}
    await call(relay, names)
    (found,) = await rows(relay)
    assert found["user_agent"] == clean("u" * 3000) and found["agent_session"] == clean("s" * 3000)
    assert len(found["agent_parent"]) <= 256 and found["agent_parent"].isprintable()
    for condition in (f"user_agent={'u' * 3000}", f"agent_session={'s' * 3000}"):
        assert len((await ask(relay, f"logs?{condition}"))[1]["logs"]) == 1


async def test_sessions_of_one_account_of_claude_code_are_one_user(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    """In both forms of `metadata.user_id`, for rows, sums and limits."""
    raw.plays(ok(USAGE, JSON))
    relay = await start({"database": database_setting, "limits": [{"requests": 4, "per": "user"}]}, openai=provider(raw.url))
    new = [json.dumps({"device_id": "d", "account_uuid": ACCOUNT, "session_id": f"s{n}"}) for n in range(2)]
    for user_id in (*new, *(f"user_d_account_{ACCOUNT}_session_s{n}" for n in range(2))):
        await call(relay, {}, metadata={"user_id": user_id})
    url = relay.path("openai", "chat/completions")
    assert (await relay.call("POST", url, json=CALL | {"metadata": {"user_id": new[0]}}))[0] == 429
    assert {row["user"] for row in await rows(relay)} == {ACCOUNT}
    _, used = await ask(relay, "usage?by=user")
    assert [(row["user"], row["requests"]) for row in used["rows"]] == [(ACCOUNT, 5)]


OPTIONAL = {
    "key_id": "web/1", "metadata": {"team": "growth"}, "cache": "HIT", "event_id": "e", "user": "ann", "user_agent": "curl/8", "agent_session": "s", "agent_parent": "p",
}  # fmt: skip


def test_every_insert_has_the_columns_of_its_values() -> None:
    """A row has few columns if it has few values, but never fewer than values."""
    columns = {"user": "end_user"}
    for number in range(len(OPTIONAL) + 1):
        for names in itertools.combinations(OPTIONAL, number):
            if "agent_parent" in names and "agent_session" not in names:
                continue
            record = Record("id", "rest", "native", "GET", "openai", "models", 200, "relayed", 1.5, 0, 2, "web", **{name: OPTIONAL[name] for name in names})  # type: ignore[arg-type]
            made = row(record, b"{}")
            stored = dict(zip(ROWS[len(made)].columns, made, strict=True))
            given = {columns.get(name, name): OPTIONAL[name] for name in names}
            if "metadata" in given:
                given |= {"metadata": '{"team":"growth"}', "team": "growth"}
            known = {name: value for name, value in stored.items() if name in {*(columns.get(n, n) for n in OPTIONAL), "team"} and value is not None}
            assert known == given


async def test_a_call_that_says_nothing_leaves_the_columns_empty(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(USAGE, JSON))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    async with relay.client.post(relay.path("openai", "x"), skip_auto_headers=["User-Agent"], data=b"{}") as answer:
        assert answer.status == 200
    await relay.idle()
    database = relay.gateway.ledger.database
    assert database is not None
    names = ("key_id", "team", "user_agent", "agent_session", "agent_parent", "end_user", "metadata")
    ((*values,),) = await database.rows(sa.select(*(exchanges.c[name] for name in names)))
    assert values == [None] * len(names)
