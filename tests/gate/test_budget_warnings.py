"""Warnings near the end of a budget: headers of responses, one log event over all processes, and
metrics; and what a refusal says in its headers.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from relay.core.budget_headers import warning_headers
from relay.core.budgets import Account, BudgetRule, BudgetUse, Period, span_of
from tests.conftest import StartRelay
from tests.gate.test_budgets import CALL, PRICED, budgeted, metered, post  # noqa: F401
from tests.relays import Relay, provider
from tests.upstream.raw import RawUpstream, ok

UNIFIED = "anthropic-ratelimit-unified-"


async def look(relay: Relay) -> None:
    """What the relay does every ten seconds."""
    await relay.idle()
    assert relay.gateway.leases is not None
    await relay.gateway.leases.watch()


def warnings(relay: Relay) -> list[dict[str, Any]]:
    return [json.loads(line) for line in relay.logged.lines if '"budgets.warning"' in line]


def budget_headers(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items() if name.lower().startswith(("x-relay-budget", UNIFIED))}


async def test_a_response_says_what_is_left_once_three_quarters_are_spent(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    relay = await start(budgeted(database_setting, {"usd": 0.1, "period": "day", "name": "small"}, {"usd": 9, "period": "day"}), openai=metered[1])
    found = []
    for _ in range(10):
        status, headers, _ = await post(relay)
        assert status == 200
        found.append(budget_headers(headers))
        await relay.idle()
    assert found[:8] == [{}] * 8  # the ninth call begins when 0.08 of 0.1 are spent
    assert [each["x-relay-budget-remaining-usd"] for each in found[8:]] == ["0.02", "0.01"]
    assert found[8]["x-relay-budget"] == "small" and found[8]["x-relay-budget-resets-at"].endswith("T00:00:00Z")
    assert not any(name.startswith(UNIFIED) for name in found[8])


async def test_other_processes_count_for_a_warning(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    document = budgeted(database_setting, {"usd": 0.1, "period": "total"})
    relays = [await start(document, openai=metered[1]) for _ in range(2)]
    await post(relays[1], CALL | {"max_tokens": 1})
    for _ in range(8):
        assert (await post(relays[0]))[0] == 200
        await relays[0].idle()
    headers = (await post(relays[1]))[1]
    assert headers["x-relay-budget-remaining-usd"] == "0.019" and "x-relay-budget-resets-at" not in headers


async def test_each_level_is_logged_and_counted_once_by_whichever_process_sees_it_first(
    start: StartRelay, metered: Any, database_setting: str  # noqa: F811
) -> None:
    document = budgeted(database_setting, {"usd": 0.1, "period": "day", "name": "small", "per": "user"})
    relays = [await start(document, openai=metered[1]) for _ in range(2)]
    for relay in relays:
        for _ in range(4):
            assert (await post(relay, CALL | {"user": "eve"}))[0] == 200
            await relay.idle()
    for relay in relays * 2:
        await look(relay)
    (event,) = warnings(relays[0]) + warnings(relays[1])
    told = {name: event[name] for name in ("budget", "subject", "percent", "spent_usd", "limit_usd")}
    assert told == {"budget": "small", "subject": "user=eve", "percent": 75, "spent_usd": "0.08", "limit_usd": "0.1"}
    for _ in range(2):
        await post(relays[1], CALL | {"user": "eve"})
        await relays[1].idle()
    for relay in relays * 2:
        await look(relay)
    assert sorted(each["percent"] for each in warnings(relays[0]) + warnings(relays[1])) == [75, 95]
    counted = [relay.gateway.counters()["relay_budget_warnings_total", "small", level] for level in ("75", "95") for relay in relays]
    assert sorted(counted[:2]) == [0, 1] and sorted(counted[2:]) == [0, 1]


async def test_a_warning_is_given_when_a_process_stops(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    relay = await start(budgeted(database_setting, {"usd": 0.01, "period": "day"}), openai=metered[1])
    await post(relay)
    await relay.idle()
    await relay.runner.cleanup()
    assert [each["percent"] for each in warnings(relay)] == [95]


async def test_money_that_is_only_reserved_is_no_reason_to_warn(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    metered[0].factor = 0.1
    relay = await start(budgeted(database_setting, {"usd": 0.01, "period": "day"}), openai=metered[1])
    assert budget_headers((await post(relay))[1]) == {}
    await look(relay)
    assert budget_headers((await post(relay, CALL | {"max_tokens": 9}))[1]) == {} == {each["percent"]: each for each in warnings(relay)}


@pytest.mark.parametrize("own", [(), (UNIFIED + "status: allowed",)])
async def test_claude_code_is_warned_unless_the_provider_sent_its_own_state(start: StartRelay, raw: RawUpstream, tmp_path: Path, own: tuple[str, ...]) -> None:
    answer = {"type": "message", "model": "claude-x", "stop_reason": "end_turn", "usage": {"input_tokens": 0, "output_tokens": 10}}
    raw.plays(ok(json.dumps(answer).encode(), "Content-Type: application/json", *own))
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 0.04, "period": "month"}), claude=provider(raw.url, format="anthropic", **PRICED))
    found = []
    for _ in range(5):
        status, headers, _ = await relay.call("POST", relay.path("claude", "v1/messages"), json={"model": "claude-x", "max_tokens": 10, "messages": []})
        found.append((status, budget_headers(headers)))
        await relay.idle()
    assert [status for status, _ in found] == [200, 200, 200, 200, 429]
    near, gone = found[3][1], found[4][1]
    assert near.pop("x-relay-budget-remaining-usd") == "0.01" and gone.pop("x-relay-budget-remaining-usd") == "0"
    resets_at = datetime.fromisoformat(gone.pop("x-relay-budget-resets-at"))
    state = {UNIFIED + "representative-claim": "overage", UNIFIED + "reset": str(int(resets_at.timestamp())), UNIFIED + "overage-reset": str(int(resets_at.timestamp()))}
    rejected = state | {UNIFIED + "status": "rejected", UNIFIED + "overage-status": "rejected", UNIFIED + "overage-utilization": "1.0000"}
    assert gone == rejected | {"x-relay-budget": "usd-month"}
    warned = {UNIFIED + "status": "allowed_warning", UNIFIED + "overage-status": "allowed_warning", UNIFIED + "overage-utilization": "0.7500"}
    warned |= state | {UNIFIED + "overage-surpassed-threshold": "0.75"}
    assert datetime.fromisoformat(near.pop("x-relay-budget-resets-at")) == resets_at
    assert near == ({UNIFIED + "status": "allowed"} if own else warned) | {"x-relay-budget": "usd-month"}


def _account(limit: int, spent: int, period: Period = "day", name: str = "r") -> Account:
    rule = BudgetRule(name=name, limit_nano=limit, period=period)
    return Account(rule, name, "all", span_of(period, 0), "w", "w/1", lost_nano=spent)


def _warned(*accounts: Account, given: dict[str, str] | None = None, format_: str = "openai") -> dict[str, str]:
    return dict(warning_headers(BudgetUse(accounts, 0), given or {}, format_))


@pytest.mark.parametrize(("spent", "threshold"), [(749, None), (750, "0.75"), (949, "0.75"), (950, "0.95"), (2000, "0.95")])
def test_the_levels_are_75_and_95_percent(spent: int, threshold: str | None) -> None:
    found = _warned(_account(1000, spent), format_="anthropic")
    assert found.get(UNIFIED + "overage-surpassed-threshold") == threshold
    assert found.get(UNIFIED + "status") == (threshold and "allowed_warning")


def test_the_budget_with_the_least_left_is_the_one_that_is_named() -> None:
    found = _warned(_account(10**10, 8 * 10**9, name="large"), _account(10**9, 8 * 10**8, name="small"), _account(10, 0, name="untouched"))
    assert found == {"x-relay-budget": "small", "x-relay-budget-remaining-usd": "0.2", "x-relay-budget-resets-at": "1970-01-02T00:00:00Z"}


@pytest.mark.parametrize("given", [{"anthropic-ratelimit-unified-status": "allowed"}, {"Anthropic-RateLimit-Unified-5h-Utilization": "0.5"}])
def test_the_state_of_the_account_at_the_provider_is_not_covered(given: dict[str, str]) -> None:
    found = _warned(_account(10, 9), given=given, format_="anthropic")
    assert set(found) == {"x-relay-budget", "x-relay-budget-remaining-usd", "x-relay-budget-resets-at"}


@pytest.mark.parametrize(
    ("format_", "endpoint", "expected"),
    [
        ("openai", "chat/completions", {"type": "insufficient_quota", "code": "insufficient_quota"}),
        ("openai", "responses", {"type": "insufficient_quota", "code": "insufficient_quota"}),
        ("anthropic", "v1/messages", {"type": "billing_error"}),
        ("google", "models/m:generateContent", {"status": "RESOURCE_EXHAUSTED"}),
    ],
)
async def test_a_refusal_says_in_headers_which_budget_it_is_and_when_it_resets(
    start: StartRelay, raw: RawUpstream, tmp_path: Path, format_: str, endpoint: str, expected: dict[str, str]
) -> None:
    price = [{"input_per_mtok": 1_000_000, "output_per_mtok": 1_000_000}]
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 0.001, "period": "week", "name": "small"}), p=provider(raw.url, format=format_, pricing=price))
    body = {"model": "m", "max_tokens": 10, "generationConfig": {"maxOutputTokens": 10}, "stream": True}
    status, headers, answer = await relay.call("POST", relay.path("p", endpoint), json=body, headers={"Origin": relay.url})
    assert (status, headers["x-relay-error"], headers["x-should-retry"]) == (429, "budget_exhausted", "false") and "retry-after" not in headers
    assert headers["x-relay-budget"] == "small" and headers["x-relay-budget-remaining-usd"] == "0.001"
    resets = headers["x-relay-budget-resets-at"]
    error = json.loads(answer)["error"]
    assert error.items() >= expected.items() and resets in error["message"]
    if format_ == "google":
        assert error["details"][0]["metadata"].items() >= {"budget": "small", "remaining_usd": "0.001", "resets_at": resets}.items()
    assert (headers.get(UNIFIED + "status") == "rejected") == (format_ == "anthropic")


async def test_refusals_are_counted_by_the_name_of_the_rule(start: StartRelay, metered: Any, database_setting: str) -> None:  # noqa: F811
    relay = await start(budgeted(database_setting, {"usd": 0.001, "period": "day", "name": "small"}), openai=metered[1])
    assert relay.gateway.counters()["relay_budget_refusals_total", "small"] == 0
    assert [(await post(relay))[0] for _ in range(2)] == [429, 429]
    assert relay.gateway.counters()["relay_budget_refusals_total", "small"] == 2
