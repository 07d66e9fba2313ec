"""Budgets through a running relay: which calls are refused, and that the ledger and the budgets
agree to the nano-dollar.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
from aiohttp import web

from relay.core.budgets import Account
from relay.core.pricing import MAX_CALL_NANO_USD
from relay.registry.load import ConfigError
from relay.storage.budgets import release_dead
from relay.storage.database import Database, DatabaseUnavailable, database_url
from relay.storage.tables import budget_leases, budgets, exchanges
from tests.conftest import StartRelay
from tests.processes import serve
from tests.relays import HANG_GUARD_S, Relay, configured, provider
from tests.upstream.raw import CLOSE, RawUpstream, ok
from tests.upstream.vendors import vendor
from tests.whole_run import canary

TOKEN_NANO = 1_000_000
"""The price of an output token below: 0.001 US dollars. Input is free."""
PRICED: dict[str, Any] = {"pricing": [{"input_per_mtok": 0, "output_per_mtok": 1000}]}
CALL = {"model": "m", "messages": [], "max_tokens": 10}
"""A call that may cost 0.01 US dollars."""


def budgeted(database: str, *rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"database": database, "budgets": {"rules": list(rules)} | more}


class Metered:
    """A stand-in of OpenAI that answers with `factor` times as many tokens as the call allows."""

    def __init__(self, factor: float = 1) -> None:
        self.factor, self.calls = factor, 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def answer(self, request: web.Request) -> web.Response:
        self.calls += 1
        sent = await request.json()
        await self.gate.wait()
        tokens = int(sent.get("max_tokens", 10) * self.factor)
        usage = {"prompt_tokens": 0, "completion_tokens": tokens}
        return web.json_response({"model": sent["model"], "choices": [{"finish_reason": "stop"}], "usage": usage})


@pytest.fixture
async def metered(aiohttp_server: Any) -> tuple[Metered, dict[str, Any]]:
    """The stand-in, and its provider entry."""
    metered = Metered()
    server = await aiohttp_server(vendor(("POST", "/chat/completions", metered.answer)))
    return metered, provider(str(server.make_url("")).rstrip("/"), **PRICED)


async def post(relay: Relay, body: Any = CALL, **options: Any) -> tuple[int, Any, bytes]:
    return await relay.call("POST", relay.path("openai", "chat/completions"), json=body, **options)


async def scalar(relay: Relay, query: Any) -> int:
    assert relay.gateway.ledger.database is not None
    ((found,),) = await relay.gateway.ledger.database.rows(query)
    return int(found or 0)


async def ledger_nano(relay: Relay) -> int:
    """The sum of all costs in the ledger."""
    await relay.idle()
    return await scalar(relay, sa.select(sa.func.sum(exchanges.c.cost_nano_usd)))


async def budget_sums(relay: Relay) -> Counter[str]:
    """The sums over all budgets, with their leases."""
    await relay.idle()
    found: Counter[str] = Counter()
    for table, names in ((budgets, ("spent_nano", "unpriced_nano", "over_nano")), (budget_leases, ("spent_nano", "unpriced_nano", "over_nano"))):
        for name in names:
            found[name] += await scalar(relay, sa.select(sa.func.sum(table.c[name])))
    found["granted_nano"] = await scalar(relay, sa.select(sa.func.sum(budgets.c.granted_nano)))
    return found


def accounts(relay: Relay) -> dict[str, Account]:
    assert relay.gateway.leases is not None
    return relay.gateway.leases._accounts


async def test_a_call_is_charged_what_the_ledger_has(start: StartRelay, metered: Any, database_setting: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day"}), openai=metered[1])
    assert (await post(relay))[0] == 200
    assert (await ledger_nano(relay), (await budget_sums(relay))["spent_nano"]) == (10 * TOKEN_NANO, 10 * TOKEN_NANO)


async def test_a_call_on_a_warm_lease_makes_no_statement(start: StartRelay, metered: Any, database_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await start(budgeted(database_setting, {"usd": 100, "period": "day"}), openai=metered[1])
    await post(relay)

    async def fail(*_arguments: Any) -> Any:
        raise AssertionError("a statement")

    assert relay.gateway.leases is not None
    monkeypatch.setattr(relay.gateway.leases.store, "lease", fail)
    assert {(await post(relay))[0] for _ in range(20)} == {200}
    (account,) = accounts(relay).values()
    assert account.granted_nano == 2_000_000_000  # 2 % of the limit


async def test_a_limit_that_a_reload_lowers_refuses_the_next_call(start: StartRelay, metered: Any, database_setting: str) -> None:
    def document(usd: float) -> dict[str, Any]:
        return budgeted(database_setting, {"usd": usd, "period": "total", "name": "mine"}) | {"providers": {"openai": metered[1]}}

    relay = await start(document(100))
    assert [(await post(relay))[0] for _ in range(3)] == [200] * 3
    await relay.idle()
    relay.gateway.replace(configured(relay.folder, document(0.04))[0])
    assert [(await post(relay))[0] for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("factor", [1, 2])
async def test_200_parallel_calls_against_room_for_10_admit_at_most_10(start: StartRelay, metered: Any, database_setting: str, factor: int) -> None:
    metered[0].factor = factor
    relay = await start(budgeted(database_setting, {"usd": 0.1, "period": "total"}), openai=metered[1])
    answers = await asyncio.gather(*(post(relay) for _ in range(200)))
    statuses = Counter(status for status, _, _ in answers)
    assert 0 < statuses[200] <= 10 and set(statuses) <= {200, 429, 503} and statuses[200] == metered[0].calls
    spent, sums = await ledger_nano(relay), await budget_sums(relay)
    assert spent == sums["spent_nano"] == statuses[200] * 10 * TOKEN_NANO * factor
    assert spent <= 100 * TOKEN_NANO + sums["over_nano"]
    assert sums["over_nano"] == (factor - 1) * statuses[200] * 10 * TOKEN_NANO


async def test_200_parallel_calls_over_two_workers_admit_at_most_10(
    start: StartRelay, metered: Any, database_setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.gate.leases._POLL_S", 0.01)
    document = budgeted(database_setting, {"usd": 0.1, "period": "total"})
    relays = [await start(document, openai=metered[1]) for _ in range(2)]
    answers = await asyncio.gather(*(post(relays[number % 2]) for number in range(200)))
    admitted = sum(status == 200 for status, _, _ in answers)
    assert 0 < admitted <= 10
    await asyncio.gather(*(relay.idle() for relay in relays))
    assert await ledger_nano(relays[0]) == (await budget_sums(relays[0]))["spent_nano"] == admitted * 10 * TOKEN_NANO


async def test_the_whole_budget_can_be_spent_by_calls_one_after_another_on_two_workers(
    start: StartRelay, metered: Any, database_setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Money that one worker has leased and does not need comes back to the other."""
    monkeypatch.setattr("relay.gate.leases._POLL_S", 0.01)
    document = budgeted(database_setting, {"usd": 0.2, "period": "total"})
    relays = [await start(document, openai=metered[1]) for _ in range(2)]
    # The first worker leases for a call that costs half of what it may cost, and keeps the rest.
    metered[0].factor = 0.5
    assert (await post(relays[0], CALL | {"max_tokens": 160}))[0] == 200
    metered[0].factor = 1
    await relays[0].idle()
    statuses = [(await post(relays[1]))[0] for _ in range(12)]
    assert statuses == [200] * 12
    await relays[1].idle()
    status, headers, _ = await post(relays[1])
    assert (status, headers["x-relay-error"]) == (429, "budget_exhausted")
    assert await ledger_nano(relays[0]) == 200 * TOKEN_NANO == (await budget_sums(relays[1]))["spent_nano"]


async def test_a_budget_whose_money_is_reserved_by_running_calls_is_busy_and_not_exhausted(start: StartRelay, metered: Any, database_setting: str) -> None:
    metered[0].gate.clear()
    relay = await start(budgeted(database_setting, {"usd": 0.01, "period": "day", "name": "mine"}), openai=metered[1])
    running = asyncio.create_task(post(relay))
    async with asyncio.timeout(HANG_GUARD_S):
        while not metered[0].calls:
            await asyncio.sleep(0.01)
    status, headers, body = await post(relay)
    assert (status, headers["x-relay-error"], headers["retry-after"]) == (503, "budget_busy", "1")
    assert "x-should-retry" not in headers and "mine" in json.loads(body)["error"]["message"]
    metered[0].factor = 0.1
    metered[0].gate.set()
    assert (await running)[0] == 200
    await relay.idle()
    assert (await post(relay, CALL | {"max_tokens": 9}))[0] == 200  # the first has cost a tenth


@pytest.mark.parametrize(
    ("format_", "endpoint", "expected"),
    [
        ("openai", "chat/completions", ("error", "type", "insufficient_quota")),
        ("anthropic", "messages", ("error", "type", "billing_error")),
        ("google", "models/m:generateContent", ("error", "status", "RESOURCE_EXHAUSTED")),
        ("elevenlabs", "text-to-speech/x", ("detail", "status", "budget_exhausted")),
    ],
)
async def test_a_refusal_is_final_in_every_format(
    start: StartRelay, raw: RawUpstream, tmp_path: Path, format_: str, endpoint: str, expected: tuple[str, str, str]
) -> None:
    price = [{"input_per_mtok": 1_000_000, "output_per_mtok": 1_000_000, "characters_per_million": 1_000_000}]
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 0.001, "period": "month", "name": "small"}), p=provider(raw.url, format=format_, pricing=price))
    body = {"model": "m", "max_tokens": 10, "text": "Hello.", "generationConfig": {"maxOutputTokens": 10}}
    status, headers, answer = await relay.call("POST", relay.path("p", endpoint), json=body)
    assert (status, headers["x-should-retry"], headers["x-relay-error"]) == (429, "false", "budget_exhausted")
    place, name, value = expected
    error = json.loads(answer)[place]
    assert error[name] == value and "'small' ($0.001 per month)" in error["message"] and "-01T00:00:00Z" in error["message"]
    assert not raw.arrived


async def test_an_unknown_price_is_allowed_refused_or_charged_as_the_operator_says(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(b'{"model": "unheard-of", "usage": {"prompt_tokens": 5, "completion_tokens": 5}}', "Content-Type: application/json"))
    rule = {"usd": 0.025, "period": "day"}
    for number, (unpriced, statuses) in enumerate([("allow", [200, 200, 200]), ("refuse", [403, 403, 403]), ({"usd": 0.01}, [200, 200, 429])]):
        document = budgeted(database_setting, rule | {"name": f"rule {number}"}, unpriced=unpriced)
        relay = await start(document, openai=provider(raw.url))
        found = []
        for _ in statuses:
            status, headers, _ = await post(relay, CALL | {"model": "unheard-of"})
            assert status != 403 or (headers["x-relay-error"], headers["x-should-retry"]) == ("price_unknown", "false")
            await relay.idle()
            found.append(status)
        assert found == statuses
    sums = await budget_sums(relay)
    assert (sums["spent_nano"], sums["unpriced_nano"], await ledger_nano(relay)) == (0, 20_000_000, 0)


async def test_a_call_of_unknown_price_that_is_billed_all_the_same_does_not_pass_a_budget_that_is_spent(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    """The deployment has no price, the model that its response names has one."""
    raw.plays(ok(b'{"model": "m", "usage": {"prompt_tokens": 0, "completion_tokens": 30}}', "Content-Type: application/json"))
    own = provider(raw.url, pricing=[{"models": ["m"], "input_per_mtok": 0, "output_per_mtok": 1000}])
    relay = await start(budgeted(database_setting, {"usd": 0.05, "period": "day"}), openai=own)
    statuses = []
    for _ in range(4):
        statuses.append((await post(relay, CALL | {"model": "deployment"}))[0])
        await relay.idle()
    assert statuses == [200, 200, 429, 429]
    assert (await budget_sums(relay))["spent_nano"] == 60 * TOKEN_NANO == await ledger_nano(relay)


@pytest.mark.parametrize(("unpriced", "status", "charged"), [("allow", 200, 0), ("refuse", 403, 0), ({"usd": 0.02}, 200, 20)])
async def test_a_call_that_may_fall_back_to_a_target_without_a_price_is_one_of_unknown_price(
    start: StartRelay, raw: RawUpstream, metered: Any, database_setting: str, unpriced: Any, status: int, charged: int
) -> None:
    raw.plays(ok(b'{"model": "unheard-of", "usage": {"prompt_tokens": 0, "completion_tokens": 5}}', "Content-Type: application/json"))
    priced = metered[1] | {"base_url": "http://127.0.0.1:9", "fallback": [{"provider": "other", "model": "unheard-of"}]}
    document = budgeted(database_setting, {"usd": 1, "period": "day"}, unpriced=unpriced)
    relay = await start(document, openai=priced, other=provider(raw.url))
    answered, headers, _ = await post(relay, CALL | {"max_tokens": 5})
    assert (answered, headers.get("x-relay-error")) == (status, "price_unknown" if status == 403 else None)
    assert len(raw.arrived) == (status == 200)
    assert (await budget_sums(relay))["unpriced_nano"] == (charged or 5 * (status == 200)) * TOKEN_NANO


async def test_a_client_cannot_set_the_price_of_its_calls(start: StartRelay, metered: Any, database_setting: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day"}), openai=metered[1])
    await post(relay, headers={"cf-aig-custom-cost": '{"total_cost": 0}'})
    assert await ledger_nano(relay) == 10 * TOKEN_NANO == (await budget_sums(relay))["spent_nano"]


@pytest.mark.parametrize(
    ("body", "default"),
    [
        (b'{"model": "m", "max_tokens": 5, "max_tokens": 20}', 5),
        (b'{"model": "m", "max_tokens": 20, "max_tokens": 5}', 5),
        (b'{"model": "m", "max_tokens": 5, "max_completion_tokens": 20}', 5),
        (b'{"model": "m", "max_tokens": 5, "n": 4}', 5),
        (b'{"model": "m", "max_tokens": 5, "n": 4, "n": 1}', 5),
        (b'{"model": "m", "max\\u005ftokens": 20}', 5),
        (b'{"model": "m", "max_tokens": "20"}', 5),
        (b'{"model": "m", "max_tokens": 2e1}', 5),
        (b'{"model": "m", "max_tokens": 99999999999}', 5),
        (b'{"model": "m"}', 20),
        (b'{"model": "m", "max_tokens": -5}', 20),
        (b'{"model": "m", "max_tokens": null}', 20),
    ],
)
async def test_the_bound_of_a_call_is_the_highest_that_a_provider_may_read(start: StartRelay, metered: Any, tmp_path: Path, body: bytes, default: int) -> None:
    """Room for 19 tokens: what may become 20 or more is refused."""
    document = budgeted(str(tmp_path / "relay.db"), {"usd": 0.019, "period": "day"}, default_output_tokens=default)
    relay = await start(document, openai=metered[1])
    status, headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), data=body, headers={"Content-Type": "application/json"})
    assert (status, headers.get("x-relay-error")) == (429, "budget_exhausted") and not metered[0].calls


@pytest.mark.parametrize("body", [b'{"model": "m", "model": "cheap"}', b'{"model": "m", "mod\\u0065l": "cheap"}', b"{"])
async def test_a_call_whose_model_two_parsers_may_read_differently_is_refused(start: StartRelay, metered: Any, tmp_path: Path, body: bytes) -> None:
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 1, "period": "day"}), openai=metered[1])
    status, headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), data=body, headers={"Content-Type": "application/json"})
    assert (status, headers["x-relay-error"]) == (403, "model_unknown") and not metered[0].calls


async def test_max_output_tokens_of_pricing_bounds_a_call_that_sets_none(start: StartRelay, metered: Any, tmp_path: Path) -> None:
    entry = metered[1] | {"pricing": [PRICED["pricing"][0] | {"max_output_tokens": 10}]}
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 0.01, "period": "day"}), openai=entry)
    assert (await post(relay, {"model": "m"}))[0] == 200


async def test_a_budget_per_client_team_and_user_counts_each_apart(start: StartRelay, metered: Any, database_setting: str) -> None:
    keys = {name: "rk_" + canary(name) for name in ("web", "app")}
    document = budgeted(database_setting, {"usd": 0.01, "period": "day", "per": ["client", "user"], "name": "daily"}) | {
        "clients": {"web": {"key": keys["web"]}, "app": {"key": keys["app"], "metadata": {"user": "fixed"}}}
    }
    relay = await start(document, openai=metered[1])

    async def status(key: str, user: str) -> int:
        found, _, _ = await post(relay, CALL | {"user": user}, headers={"Authorization": f"Bearer {keys[key]}"})
        await relay.idle()
        return found

    assert [await status("web", "a"), await status("web", "a"), await status("web", "b")] == [200, 429, 200]
    # The client's own user wins, so another name in the body is no other budget.
    assert [await status("app", "a"), await status("app", "b")] == [200, 429]
    assert {account.subject for account in accounts(relay).values()} == {"client=web, user=a", "client=web, user=b", "client=app, user=fixed"}


async def test_a_client_has_budgets_of_its_own_besides_those_of_all(start: StartRelay, metered: Any, database_setting: str) -> None:
    key = "rk_" + canary("own")
    clients = {"web": {"key": key, "budgets": [{"usd": 0.02, "period": "month"}]}}
    relay = await start(budgeted(database_setting, {"usd": 0.03, "period": "day", "clients": ["web"]}) | {"clients": clients}, openai=metered[1])
    headers = {"Authorization": f"Bearer {key}"}
    found = []
    for _ in range(3):
        found.append((await post(relay, headers=headers))[0])
        await relay.idle()
    assert found == [200, 200, 429]
    assert (await post(relay))[0] == 200  # another client: no budget
    mine = {each.rule.name: each.charged.total_nano for each in accounts(relay).values()}
    assert mine == {"usd-day": 20 * TOKEN_NANO, "client's usd-per-client-month": 20 * TOKEN_NANO}
    assert {each.reserved_nano for each in accounts(relay).values()} == {0}  # all of a refused call or nothing


async def test_a_warning_budget_counts_and_never_refuses(start: StartRelay, metered: Any, database_setting: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 0.01, "period": "day", "mode": "warn"}), openai=metered[1])
    assert {(await post(relay))[0] for _ in range(4)} == {200}
    assert await ledger_nano(relay) == 40 * TOKEN_NANO == (await budget_sums(relay))["spent_nano"]


async def test_calls_that_are_answered_from_the_cache_or_together_are_charged_once(start: StartRelay, metered: Any, database_setting: str) -> None:
    metered[0].gate.clear()
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day"}) | {"cache": {"coalesce": True, "ttl_s": 60}}, openai=metered[1])
    calls = [asyncio.create_task(post(relay)) for _ in range(3)]
    async with asyncio.timeout(HANG_GUARD_S):
        while len(relay.gateway.running) < 4:
            await asyncio.sleep(0.01)
    metered[0].gate.set()
    assert {status for status, _, _ in await asyncio.gather(*calls)} == {200}
    await relay.idle()
    assert (await post(relay))[0] == 200
    assert await ledger_nano(relay) == 10 * TOKEN_NANO == (await budget_sums(relay))["spent_nano"]
    assert metered[0].calls == 1 and all(not each.reserved_nano for each in accounts(relay).values())


async def test_a_call_that_its_client_leaves_before_the_answer_is_charged_what_it_reserved(start: StartRelay, metered: Any, database_setting: str) -> None:
    metered[0].gate.clear()
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day"}), openai=metered[1])
    call = asyncio.create_task(post(relay))
    async with asyncio.timeout(HANG_GUARD_S):
        while not metered[0].calls:
            await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    sums = await budget_sums(relay)
    assert (await ledger_nano(relay), sums["spent_nano"], sums["unpriced_nano"]) == (0, 0, 10 * TOKEN_NANO)


@pytest.mark.parametrize("script", [ok(b"{}", status="500 Failed"), b"not HTTP"])
async def test_a_call_that_the_provider_fails_costs_nothing(start: StartRelay, raw: RawUpstream, tmp_path: Path, script: bytes) -> None:
    raw.plays(script, CLOSE)
    document = budgeted(str(tmp_path / "relay.db"), {"usd": 0.01, "period": "day"})
    relay = await start(document, openai=provider(raw.url, **PRICED), gone=provider("http://127.0.0.1:1", **PRICED))
    for _ in range(3):
        assert (await post(relay))[0] in (500, 502)
        await relay.idle()
        assert (await relay.call("POST", relay.path("gone", "chat/completions"), json=CALL))[0] == 502
        await relay.idle()
    sums = await budget_sums(relay)
    assert (sums["spent_nano"], sums["unpriced_nano"]) == (0, 0)


async def test_a_stop_gives_the_lease_back_and_a_restart_goes_on_where_it_was(start: StartRelay, metered: Any, database_setting: str) -> None:
    document = budgeted(database_setting, {"usd": 1, "period": "total"})
    relay = await start(document, openai=metered[1])
    await post(relay)
    await relay.idle()
    await relay.runner.cleanup()
    again = await start(document, openai=metered[1])
    sums = await budget_sums(again)
    assert (sums["spent_nano"], sums["granted_nano"]) == (10 * TOKEN_NANO, 10 * TOKEN_NANO)
    assert (await post(again, CALL | {"max_tokens": 991}))[0] == 429
    assert (await post(again, CALL | {"max_tokens": 990}))[0] == 200


async def test_a_period_begins_with_nothing_spent(start: StartRelay, metered: Any, database_setting: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 0.01, "period": "day"}), openai=metered[1])
    assert relay.gateway.leases is not None
    found = []
    for day in (0, 0, 1):
        relay.gateway.leases.clock = lambda day=day: 1_700_000_000.0 + day * 86400  # type: ignore[misc]
        found.append((await post(relay))[0])
        await relay.idle()
    assert found == [200, 429, 200]


async def test_without_the_database_a_lease_is_spent_and_then_calls_are_refused(
    start: StartRelay, metered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 2, "period": "day"}), openai=metered[1])
    await post(relay)  # leases 2 %: enough for four calls

    async def unavailable(*_arguments: Any) -> Any:
        raise DatabaseUnavailable("gone")

    assert relay.gateway.leases is not None
    monkeypatch.setattr(relay.gateway.leases.store, "lease", unavailable)
    statuses = []
    for _ in range(4):
        status, headers, _ = await post(relay)
        statuses.append(status)
        await relay.idle()
    assert statuses == [200, 200, 200, 503] and headers["x-relay-error"] == "store_unavailable"


async def test_a_row_that_is_dropped_is_charged_all_the_same(start: StartRelay, metered: Any, database_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ledger.writer.MAX_ROWS", 0)
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day"}), openai=metered[1])
    await post(relay)
    async with asyncio.timeout(HANG_GUARD_S):
        while not (await budget_sums(relay))["spent_nano"]:
            await asyncio.sleep(0.01)
    assert await scalar(relay, sa.select(sa.func.count()).select_from(exchanges)) == 0


async def test_charges_that_the_database_refuses_hold_up_no_rows_and_no_other_charges(start: StartRelay, metered: Any, tmp_path: Path) -> None:
    clients = {name: {"key": canary(f"the-client-{name}"), "budgets": [{"usd": 1, "period": "day", "name": name}]} for name in ("bad", "good")}
    document = {"database": str(tmp_path / "relay.db"), "access": {"mode": "required"}, "clients": clients}
    relay = await start(document, openai=metered[1])
    await relay.idle()
    with contextlib.closing(sqlite3.connect(tmp_path / "relay.db", isolation_level=None)) as file:
        file.execute("CREATE TRIGGER refuse BEFORE UPDATE OF spent_nano ON budget_leases WHEN NEW.key LIKE '%bad%' BEGIN SELECT RAISE(ABORT, 'no'); END")
    answers = await asyncio.gather(*(post(relay, headers={"x-relay-key": canary(f"the-client-{name}")}) for name in ("bad", "good", "bad", "good")))
    assert [status for status, _, _ in answers] == [200] * 4
    await relay.events("ledger.charges_refused")
    assert await ledger_nano(relay) == 40 * TOKEN_NANO, "every row is written"
    assert (await budget_sums(relay))["spent_nano"] == 20 * TOKEN_NANO


async def test_a_client_that_leaves_is_charged_no_more_than_a_call_can_cost(start: StartRelay, metered: Any, database_setting: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "mode": "warn"}), openai=metered[1])
    metered[0].gate.clear()
    call = asyncio.create_task(post(relay, CALL | {"max_tokens": 2**31 - 1, "n": 60_000}))
    async with asyncio.timeout(HANG_GUARD_S):
        while not metered[0].calls:
            await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert (await budget_sums(relay))["unpriced_nano"] == MAX_CALL_NANO_USD


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"budgets": {"rules": [{"usd": 1, "period": "day"}]}}, "needs a database"),
        ({"clients": {"web": {"key": "x" * 20, "budgets": [{"usd": 1, "period": "day"}]}}}, "needs a database"),
        ({"database": "x.db", "budgets": {"rules": [{"usd": 0, "period": "day"}]}}, "budgets.rules.0.usd"),
        ({"database": "x.db", "budgets": {"rules": [{"usd": "1e-10", "period": "day"}]}}, "budgets.rules.0.usd"),
        ({"database": "x.db", "budgets": {"rules": [{"usd": 1.0000000001, "period": "day"}]}}, "nine decimal places"),
        ({"database": "x.db", "budgets": {"rules": [{"usd": 1, "period": "hour"}]}}, "budgets.rules.0.period"),
        ({"database": "x.db", "budgets": {"rules": [{"usd": 1, "period": "day", "name": "a"}] * 2}}, "another budget has this name"),
        ({"database": "x.db", "budgets": {"unpriced": {"usd": -1}}}, "budgets.unpriced"),
        ({"database": "x.db", "budgets": {"unpriced": "deny"}}, "budgets.unpriced"),
    ],
)
def test_a_bad_budget_is_refused_at_start(tmp_path: Path, document: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(tmp_path, document)
    assert problem in str(refused.value) and "gateway.yaml:" in str(refused.value)


async def test_a_killed_worker_neither_spends_nor_loses_money(start: StartRelay, metered: Any, tmp_path: Path, database_setting: str) -> None:
    """Two workers, and one of them is killed while calls are in flight, most likely at both."""
    limit_nano = 300 * TOKEN_NANO
    document = budgeted(database_setting, {"usd": 0.3, "period": "total"}) | {"providers": {"openai": metered[1]}}
    served = await serve(tmp_path, document, "--workers", "2")
    victim = int((await served.until(r'"pid":(\d+).*"worker.ready"')).group(1))
    metered[0].gate.clear()

    async def call() -> int:
        # A connection of its own for each call, so that both workers get some.
        async with aiohttp.ClientSession() as client:
            try:
                async with client.post(served.path("openai", "chat/completions"), json=CALL) as answer:
                    await answer.read()
                    return answer.status
            except aiohttp.ClientError:
                return 0

    calls = [asyncio.create_task(call()) for _ in range(25)]
    async with asyncio.timeout(HANG_GUARD_S):
        while metered[0].calls < 10:
            await asyncio.sleep(0.01)
    os.kill(victim, signal.SIGKILL)
    metered[0].gate.set()
    statuses = Counter(await asyncio.gather(*calls))
    assert set(statuses) <= {0, 200, 429, 503} and metered[0].calls <= 25
    await served.stop()

    database = Database(database_url(database_setting))
    # Without a row if all calls were at the killed worker.
    spent = int((await database.rows(sa.select(sa.func.sum(exchanges.c.cost_nano_usd))))[0][0] or 0)
    (budget,) = await database.rows(sa.select(budgets))
    left = await database.rows(sa.select(budget_leases))
    unaccounted = sum(each.granted_nano - each.spent_nano - each.unpriced_nano for each in left)
    written = budget.spent_nano + sum(each.spent_nano for each in left)
    charged = written + budget.unpriced_nano + sum(each.unpriced_nano for each in left)
    assert spent == written and spent + unaccounted <= limit_nano
    assert budget.granted_nano == charged + unaccounted
    # What the killed worker had sent is not free again, and an administrator can release it.
    assert metered[0].calls * 10 * TOKEN_NANO <= charged + unaccounted

    relay = await start(document, openai=metered[1])
    assert relay.gateway.leases is not None
    later = time.time() + 61
    relay.gateway.leases.clock = lambda: later
    rest = (limit_nano - charged - unaccounted) // TOKEN_NANO
    status, headers, _ = await post(relay, CALL | {"max_tokens": rest + 1})
    assert (status, headers["x-relay-error"]) == (429, "budget_exhausted")
    await relay.gateway.leases.tidy()
    assert await database.change_durably(partial(release_dead, key=budget.key, period_start_s=0)) == unaccounted
    status, _, _ = await post(relay, CALL | {"max_tokens": (limit_nano - charged) // TOKEN_NANO})
    assert status == 200
    await database.close()


async def test_a_budget_for_a_client_that_is_unknown_at_the_start_is_warned_of(start: StartRelay, metered: Any, sqlite_setting: str) -> None:
    rule = {"usd": 1, "period": "day", "name": "b", "clients": ["ada", "nobody", "127.0.0.1"]}
    relay = await start(budgeted(sqlite_setting, rule) | {"clients": {"ada": {"key": canary("ada-of-the-budget")}}}, openai=metered[1])
    (event,) = await relay.events("budgets.client_unknown", 1)
    assert (event["level"], event["budget"], event["client"]) == ("warning", "b", "nobody")
    assert sum("budgets.client_unknown" in line for line in relay.logged.lines) == 1
