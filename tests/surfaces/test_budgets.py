"""Budgets over HTTP: their state, pages and changes, and the sum of the ledger beside them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import sqlalchemy as sa

from relay.storage.tables import budget_workers, exchanges
from tests.conftest import StartRelay
from tests.gate.test_budgets import CALL, PRICED, metered, post  # noqa: F401
from tests.relays import Relay, canary, provider
from tests.surfaces.test_openapi import DOCUMENT as OPENAPI
from tests.surfaces.test_openapi import _check
from tests.upstream.raw import RawUpstream, ok

API = "/api/v1/ai-gateway"
ADMIN, READ = canary("budgets-admin"), canary("budgets-read")
ZERO = ("raised_usd", "leased_usd", "reserved_usd", "unaccounted_usd", "unpriced_usd", "over_usd", "reset_usd")


def document(database: str, *rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"database": database, "access": {"admin_token": ADMIN, "read_token": READ}, "budgets": {"rules": list(rules)} | more}


async def manage(relay: Relay, method: str, path: str, body: Any = None, token: str = ADMIN) -> tuple[int, Any]:
    status, headers, answer = await relay.call(method, f"{relay.url}{API}/{path}", json=body, headers={"Authorization": f"Bearer {token}"})
    assert status >= 400 or headers["cache-control"] == "no-store"
    return status, json.loads(answer)


async def listed(relay: Relay, query: str = "") -> list[dict[str, Any]]:
    await relay.idle()
    status, page = await manage(relay, "GET", f"budgets?{query}")
    assert status == 200
    return page["budgets"]


async def one(relay: Relay) -> dict[str, Any]:
    (budget,) = await listed(relay)
    return budget


async def ledger(relay: Relay, key: str) -> dict[str, Any]:
    await relay.idle()
    status, answer = await manage(relay, "GET", f"budgets/ledger?key={key}")
    assert status == 200
    _check(answer, OPENAPI["paths"][f"{API}/budgets/ledger"]["get"]["responses"]["200"]["content"]["application/json"]["schema"], "ledger")
    return answer["ledger"]


async def test_the_state_of_a_budget_has_every_amount(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    metered[0].factor = 1.5
    relay = await start(document(database_setting, {"usd": 1, "period": "month", "name": "monthly", "per": "user"}), openai=metered[1])
    assert (await post(relay, CALL | {"user": "eve"}))[0] == 200
    budget = await one(relay)
    assert (budget["key"], budget["rule"], budget["subject"], budget["period"]) == ("monthly|eve", "monthly", "user=eve", "month")
    assert budget["starts_at"] < budget["resets_at"] and budget["starts_at"][7:] == budget["resets_at"][7:] == "-01T00:00:00Z"
    amounts = {name: budget[name] for name in ("limit_usd", "spent_usd", "left_usd", "spent_percent", "over_usd", "leased_usd")}
    # A fiftieth of what was left was leased, and a bill of 0.015 for a call that may cost 0.01.
    assert amounts == {"limit_usd": 1, "spent_usd": 0.015, "left_usd": 0.985, "spent_percent": 1.5, "over_usd": 0.005, "leased_usd": 0.005}
    _check(budget, OPENAPI["components"]["schemas"]["Budget"], "budget")


async def test_what_calls_in_flight_have_reserved_is_shown(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    metered[0].gate.clear()
    relay = await start(document(database_setting, {"usd": 0.02, "period": "total"}), openai=metered[1])
    call = asyncio.create_task(post(relay))
    while not metered[0].calls:
        await asyncio.sleep(0.001)
    assert relay.gateway.leases is not None
    await relay.gateway.leases.watch()  # as every ten seconds
    _, page = await manage(relay, "GET", "budgets")
    budget = page["budgets"][0]
    assert (budget["reserved_usd"], budget["leased_usd"], budget["spent_usd"], budget["resets_at"]) == (0.01, 0.01, 0, None)
    metered[0].gate.set()
    await call
    await relay.idle()
    await relay.gateway.leases.watch()
    assert (await one(relay))["reserved_usd"] == 0


async def test_a_raise_lets_refused_calls_pass_for_the_rest_of_the_period(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    relay = await start(document(database_setting, {"usd": 0.01, "period": "day"}), openai=metered[1])
    statuses = [(await post(relay))[0]]
    await relay.idle()
    statuses.append((await post(relay))[0])
    status, raised = await manage(relay, "POST", "budgets/raise", {"key": "usd-day", "usd": 0.01})
    assert (status, raised["limit_usd"], raised["raised_usd"], raised["spent_usd"], raised["left_usd"]) == (200, 0.01, 0.01, 0.01, 0.01)
    statuses.append((await post(relay))[0])
    await relay.idle()
    statuses.append((await post(relay))[0])
    assert statuses == [200, 429, 200, 429]
    assert relay.gateway.leases is not None
    tomorrow = relay.gateway.leases.clock() + 86400
    relay.gateway.leases.clock = lambda: tomorrow
    assert [(await post(relay, CALL | {"max_tokens": tokens}))[0] for tokens in (11, 10)] == [429, 200]


async def test_a_reset_lets_the_period_begin_anew_any_number_of_times(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    relay = await start(document(database_setting, {"usd": 0.01, "period": "total"}), openai=metered[1])
    for number in range(1, 4):
        assert (await post(relay))[0] == 200
        await relay.idle()
        assert (await post(relay))[0] == 429
        status, reset = await manage(relay, "POST", "budgets/reset", {"key": "usd-total"})
        assert (status, reset["spent_usd"], reset["left_usd"], reset["raised_usd"], reset["reset_usd"]) == (200, 0, 0.01, 0, round(0.01 * number, 9))
    again = await manage(relay, "POST", "budgets/reset", {"key": "usd-total"})
    assert again == (200, reset)
    found = await ledger(relay, "usd-total")
    assert (found["ledger_usd"], found["difference_usd"]) == (0.03, -0.03)
    assert found["explained"] == {"unpriced_usd": 0, "reset_usd": -0.03, "other_usd": 0}


async def test_warnings_are_given_again_after_a_reset(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    relay = await start(document(database_setting, {"usd": 0.02, "period": "day"}), openai=metered[1])
    assert relay.gateway.leases is not None
    for _ in range(2):
        for _ in range(2):
            assert (await post(relay))[0] == 200
            await relay.idle()
        await relay.gateway.leases.watch()
        await manage(relay, "POST", "budgets/reset", {"key": "usd-day"})
    warned = [json.loads(line)["percent"] for line in relay.logged.lines if '"budgets.warning"' in line]
    assert warned == [95, 95]
    assert "x-relay-budget" not in (await post(relay))[1]


async def test_unaccounted_money_is_shown_and_released(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    relay = await start(document(database_setting, {"usd": 0.02, "period": "total"}), openai=metered[1])
    metered[0].factor = 0.5
    await post(relay)
    await relay.idle()
    assert relay.gateway.ledger.database is not None
    async with relay.gateway.ledger.database.writing() as connection:  # the process is killed, and a minute passes
        await connection.execute(sa.update(budget_workers).values(heartbeat_s=0))
    budget = await one(relay)
    assert (budget["unaccounted_usd"], budget["leased_usd"], budget["left_usd"], budget["spent_percent"]) == (0.005, 0, 0.01, 50)
    status, released = await manage(relay, "POST", "budgets/release", {"key": "usd-total"})
    assert (status, released["unaccounted_usd"], released["left_usd"]) == (200, 0, 0.015)


async def test_every_change_is_in_the_audit_and_in_the_log(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    relay = await start(document(database_setting, {"usd": 1, "period": "day"}), openai=metered[1])
    await post(relay)
    await relay.idle()
    for action, more in (("raise", {"usd": "0.5"}), ("reset", {}), ("release", {})):
        assert (await manage(relay, "POST", f"budgets/{action}", {"key": "usd-day"} | more))[0] == 200
    _, audit = await manage(relay, "GET", "audit")
    rows = [(row["action"], row["target"], row["actor"]) for row in reversed(audit["audit"])]
    assert rows == [(f"budget.{each}", "usd-day", "admin 127.0.0.1") for each in ("raise", "reset", "release")]
    details = [row["details"] for row in reversed(audit["audit"])]
    assert (details[0]["nano_usd"], details[1]["spent_nano"], details[2]["unaccounted_nano"]) == (500_000_000, 10_000_000, 0)
    assert [event["action"] for event in await relay.events("budgets.changed", 3)] == ["raise", "reset", "release"]


async def test_budgets_are_listed_in_pages_and_filtered(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    rules = ({"usd": 0.02, "period": "day", "per": "user", "name": "daily"}, {"usd": 1, "period": "total", "name": "all"})
    relay = await start(document(database_setting, *rules), openai=metered[1])
    users = ["eve", "a, user=b", "x|y", "ünï", "z" * 300]
    for user in users:
        assert (await post(relay, CALL | {"user": user}))[0] == 200
        await relay.idle()
    assert (await post(relay, CALL | {"user": "eve"}))[0] == 200
    seen, cursor = [], ""
    while cursor is not None:
        _, page = await manage(relay, "GET", f"budgets?limit=2{cursor and '&cursor=' + cursor}")
        assert len(page["budgets"]) <= 2
        seen += [each["key"] for each in page["budgets"]]
        cursor = page["cursor"]
    assert len(seen) == len(set(seen)) == 6
    assert {each["subject"] for each in await listed(relay, "rule=daily")} >= {f"user={user}" for user in users[:4]}
    assert [each["subject"] for each in await listed(relay, "spent_percent=75")] == ["user=eve"]
    assert [each["rule"] for each in await listed(relay, "subject=user=eve")] == ["daily"] and await listed(relay, "key=all|eve") == []
    assert relay.gateway.leases is not None
    later = relay.gateway.leases.clock() + 86400
    relay.gateway.leases.clock = lambda: later
    assert [each["rule"] for each in await listed(relay)] == ["all"] and len(await listed(relay, "periods=all")) == 6


async def test_the_ledger_has_the_same_sum_for_each_budget(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    keys = {name: "rk_" + canary(name) for name in ("web", "app")}
    clients = {
        "web": {"key": keys["web"], "budgets": [{"usd": 1, "period": "month", "name": "own"}], "metadata": {"team": "growth"}},
        "app": {"key": keys["app"]},
    }
    rules = ({"usd": 1, "period": "day", "per": ["client", "user"], "name": "each"}, {"usd": 1, "period": "week", "per": "team", "name": "team"})
    rules += ({"usd": 1, "period": "total", "name": "apps", "clients": ["app"]},)  # type: ignore[assignment]
    relay = await start(document(database_setting, *rules) | {"clients": clients}, openai=metered[1])
    for name, user, tokens in (("web", "eve", 3), ("web", "eve, user=x", 5), ("web", None, 7), ("app", "eve", 11), ("app", "ü" * 300, 13)):
        body = CALL | {"max_tokens": tokens} | ({"user": user} if user else {})
        assert (await post(relay, body, headers={"Authorization": f"Bearer {keys[name]}"}))[0] == 200
    budgets = await listed(relay)
    assert {each["subject"]: each["spent_usd"] for each in budgets if each["rule"] == "team"} == {"team=growth": 0.015, "no team, client=app": 0.024}
    assert len(budgets) == 5 + 2 + 1 + 1
    for budget in budgets:
        found = await ledger(relay, budget["key"].replace("|", "%7C").replace("=", "%3D").replace("'", "%27").replace(", ", "%2C%20"))
        assert found is not None, budget
        assert found["ledger_usd"] == budget["spent_usd"] > 0 == found["difference_usd"], budget


async def test_the_difference_to_the_ledger_is_explained(start: StartRelay, raw: RawUpstream, metered: Any, database_setting: str) -> None:  # noqa: F811
    raw.plays(ok(b'{"model": "unheard-of", "usage": {"prompt_tokens": 5, "completion_tokens": 5}}', "Content-Type: application/json"))
    relay = await start(document(database_setting, {"usd": 1, "period": "day"}, unpriced={"usd": 0.02}), openai=metered[1], other=provider(raw.url))
    for _ in range(2):
        assert (await post(relay))[0] == 200
    assert (await relay.call("POST", relay.path("other", "chat/completions"), json=CALL | {"model": "unheard-of"}))[0] == 200
    await relay.idle()
    assert relay.gateway.ledger.database is not None
    async with relay.gateway.ledger.database.writing() as connection:
        first = sa.select(sa.func.min(exchanges.c.id)).scalar_subquery()
        await connection.execute(sa.delete(exchanges).where(exchanges.c.id == first))
    found = await ledger(relay, "usd-day")
    assert found == {
        "ledger_usd": 0.01, "calls": 2, "calls_without_cost": 1, "difference_usd": 0.03,
        "explained": {"unpriced_usd": 0.02, "reset_usd": 0, "other_usd": 0.01},
    }  # fmt: skip


async def test_the_ledgers_sum_of_a_rule_that_was_removed_is_not_known(start: StartRelay, metered: Any, sqlite_setting: str) -> None:  # noqa: F811
    relay = await start(document(sqlite_setting, {"usd": 1, "period": "total", "name": "old"}), openai=metered[1])
    await post(relay)
    await relay.idle()
    await relay.runner.cleanup()
    again = await start(document(sqlite_setting, {"usd": 1, "period": "total", "name": "new"}), openai=metered[1])
    status, answer = await manage(again, "GET", "budgets/ledger?key=old")
    assert (status, answer["ledger"], answer["budget"]["spent_usd"]) == (200, None, 0.01)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "budgets/raise", {"key": "usd-day", "usd": 0}, 400, "usd is not an amount"),
        ("POST", "budgets/raise", {"key": "usd-day", "usd": -1}, 400, "usd is not an amount"),
        ("POST", "budgets/raise", {"key": "usd-day", "usd": "NaN"}, 400, "usd"),
        ("POST", "budgets/raise", {"key": "usd-day", "usd": "1e999999"}, 400, "usd is not an amount"),
        ("POST", "budgets/raise", {"key": "usd-day", "usd": "0.0000000001"}, 400, "usd is not an amount"),
        ("POST", "budgets/raise", {"key": "usd-day", "usd": 1_000_000_000}, 400, "at most 1000000000 US dollars, so this one can be raised by 999999999 more"),
        *(("POST", "budgets/raise", {"key": "usd-day", "usd": text}, 400, "usd is not an amount") for text in ("1_0", "\u0663", " 5", "+5", "", [1], None, True)),
        ("POST", "budgets/raise", {"key": "usd-day"}, 400, "usd"),
        ("POST", "budgets/raise", {"key": "nobody", "usd": 1}, 404, "no budget 'nobody'"),
        ("POST", "budgets/reset", {"key": "\x00"}, 404, "no budget"),
        ("POST", "budgets/reset", {"key": "usd-day", "usd": 1}, 400, "usd"),
        ("POST", "budgets/release", {"key": "x" * 5000}, 404, "no budget"),
        ("GET", "budgets?limit=0", None, 400, "limit"),
        ("GET", "budgets?limit=501", None, 400, "limit"),
        ("GET", "budgets?cursor=x", None, 400, "cursor"),
        ("GET", "budgets?periods=last", None, 400, "periods"),
        ("GET", "budgets?spent_percent=1001", None, 400, "spent_percent"),
        ("GET", "budgets?colour=red", None, 400, "colour"),
        ("GET", "budgets/ledger", None, 400, "key"),
        ("GET", "budgets/ledger?key=nobody", None, 404, "nobody"),
    ],
)
async def test_a_bad_request_is_refused_and_changes_nothing(
    start: StartRelay, metered: Any, sqlite_setting: str, method: str, path: str, body: Any, status: int, words: str  # noqa: F811
) -> None:
    relay = await start(document(sqlite_setting, {"usd": 1, "period": "day"}), openai=metered[1])
    await post(relay)
    before = await one(relay)
    found, answer = await manage(relay, method, path, body)
    assert found == status and words in answer["error"]["message"], answer
    after = await one(relay)
    assert {name: after[name] for name in ("raised_usd", "spent_usd", "reset_usd")} == {name: before[name] for name in ("raised_usd", "spent_usd", "reset_usd")}


async def test_the_read_token_reads_budgets_and_changes_none(start: StartRelay, metered: Any, sqlite_setting: str) -> None:  # noqa: F811
    relay = await start(document(sqlite_setting, {"usd": 1, "period": "day"}), openai=metered[1])
    await post(relay)
    await relay.idle()
    assert (await manage(relay, "GET", "budgets", token=READ))[0] == 200
    status, answer = await manage(relay, "POST", "budgets/reset", {"key": "usd-day"}, token=READ)
    assert (status, answer["error"]["code"]) == (403, "management_denied")


async def test_without_a_database_there_are_no_budgets_to_manage(start: StartRelay) -> None:
    relay = await start({"database": None, "access": {"admin_token": ADMIN}})
    assert (await manage(relay, "GET", "budgets"))[1]["error"]["code"] == "store_unavailable"
    assert (await manage(relay, "POST", "budgets/reset", {"key": "x"}))[1]["error"]["code"] == "store_unavailable"
