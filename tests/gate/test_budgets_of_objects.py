"""Budgets of calls whose usage a later call reads: responses in background are charged once."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import sqlalchemy as sa
from aiohttp import web

from relay.ledger.retention import Retention, sweep
from relay.storage.budget_reports import BudgetChange, BudgetFilter, BudgetReport, BudgetReports
from relay.storage.database import Database
from relay.storage.tables import budgets, provisional_charges
from tests.conftest import StartRelay
from tests.gate.test_budgets import PRICED, TOKEN_NANO, accounts, budgeted, ledger_nano, scalar
from tests.relays import Relay, provider
from tests.upstream.vendors import vendor

DAY_S = 86400
CREATE = {"model": "m", "input": "", "background": True, "max_output_tokens": 10}
"""A call that may cost 10 tokens."""
CLIENTS = {"ada": {"key": "ada-key-ada-key-ada-key"}, "ben": {"key": "ben-key-ben-key-ben-key"}}


class Jobs:
    """A stand-in of OpenAI that makes responses in background."""

    def __init__(self) -> None:
        self.status, self.tokens = "queued", 0
        self.fees: dict[str, int] = {}

    def response(self) -> web.Response:
        usage = {"input_tokens": 0, "output_tokens": self.tokens} | self.fees if self.tokens else None
        return web.json_response({"id": "resp_1", "object": "response", "status": self.status, "background": True, "model": "m", "output": [], "usage": usage})

    async def create(self, _request: web.Request) -> web.Response:
        return self.response()

    async def read(self, _request: web.Request) -> web.Response:
        return self.response()

    def end(self, tokens: int, status: str = "completed") -> None:
        self.tokens, self.status = tokens, status


@pytest.fixture
async def jobs(aiohttp_server: Any) -> tuple[Jobs, dict[str, Any]]:
    """The stand-in, and its provider entry."""
    jobs = Jobs()
    server = await aiohttp_server(vendor(("POST", "/responses", jobs.create), ("GET", "/responses/{id}", jobs.read)))
    return jobs, provider(str(server.make_url("")).rstrip("/"), **PRICED)


def headers(client: str) -> dict[str, str]:
    return {"x-relay-key": CLIENTS[client]["key"]}


async def create(relay: Relay, client: str | None = None) -> None:
    status, _, _ = await relay.call("POST", relay.path("openai", "responses"), json=CREATE, headers=headers(client) if client else None)
    assert status == 200
    await relay.idle()


async def read(relay: Relay, client: str | None = None) -> None:
    status, _, _ = await relay.call("GET", relay.path("openai", "responses/resp_1"), headers=headers(client) if client else None)
    assert status == 200
    await relay.idle()


def database_of(relay: Relay) -> Database:
    database = relay.gateway.ledger.database
    assert database is not None
    return database


async def report_of(relay: Relay, key: str) -> BudgetReport:
    (found,) = await BudgetReports(database_of(relay)).page(BudgetFilter(key=key), ("", 0), 1, time.time())
    return found


async def charged(relay: Relay, key: str = "b") -> tuple[int, int]:
    """What the budget has lost, in tokens: the ledger's costs, and what was charged without one."""
    found = await report_of(relay, key)
    return found.spent_nano // TOKEN_NANO, found.unpriced_nano // TOKEN_NANO


async def test_a_response_in_background_is_charged_what_it_reserved_until_its_usage_is_read(start: StartRelay, jobs: Any, database_setting: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"}), openai=jobs[1])
    await create(relay)
    await read(relay)
    assert await charged(relay) == (0, 10)
    jobs[0].end(tokens=4)
    for _ in range(3):
        await read(relay)
        assert await charged(relay) == (4, 0)
    assert await ledger_nano(relay) == 4 * TOKEN_NANO


async def test_its_usage_is_charged_once_after_a_restart_too(start: StartRelay, jobs: Any, database_setting: str) -> None:
    document = budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"})
    first = await start(document, openai=jobs[1])
    await create(first)
    await first.runner.cleanup()
    second = await start(document, openai=jobs[1])
    jobs[0].end(tokens=4)
    await read(second)
    assert await charged(second) == (4, 0)


async def test_the_money_can_be_spent_again(start: StartRelay, jobs: Any, database_setting: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 0.015, "period": "total", "name": "b"}), openai=jobs[1])
    await create(relay)
    assert (await relay.call("POST", relay.path("openai", "responses"), json=CREATE))[0] == 429
    jobs[0].end(tokens=1)
    await read(relay)
    await create(relay)


@pytest.mark.parametrize(("status", "expected"), [("failed", 0), ("cancelled", 10), ("completed", 10)])
async def test_only_a_response_that_failed_without_usage_costs_nothing(
    start: StartRelay, jobs: Any, database_setting: str, status: str, expected: int
) -> None:
    """What else ends without a report of its usage may be billed, as a video is."""
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"}), openai=jobs[1])
    await create(relay)
    jobs[0].end(tokens=0, status=status)
    await read(relay)
    assert await charged(relay) == (0, expected)


async def test_a_budget_that_is_not_charged_the_usage_gets_nothing_back(start: StartRelay, jobs: Any, database_setting: str) -> None:
    document = budgeted(database_setting, {"usd": 1, "period": "day", "per": "client", "name": "b", "clients": ["ada"]})
    relay = await start(document | {"clients": CLIENTS}, openai=jobs[1])
    await create(relay, "ada")
    jobs[0].end(tokens=4)
    await read(relay, "ben")
    await read(relay, "ada")
    assert await charged(relay, "b|ada") == (0, 10)


async def test_the_day_that_was_charged_gets_it_back(start: StartRelay, jobs: Any, database_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"}), openai=jobs[1])
    await create(relay)
    leases = relay.gateway.leases
    assert leases is not None
    yesterday = accounts(relay)["b"].span.start_s
    now_s = leases.clock
    monkeypatch.setattr(leases, "clock", lambda: now_s() + DAY_S)
    jobs[0].end(tokens=4)
    await read(relay)
    await leases.tidy()
    query = sa.select(budgets.c.unpriced_nano).where(budgets.c.period_start_s == yesterday)
    assert await scalar(relay, query) == 0
    assert accounts(relay)["b"].span.start_s == yesterday + DAY_S and accounts(relay)["b"].charged.spent_nano == 4 * TOKEN_NANO


async def test_a_budget_that_was_reset_gets_nothing_back(start: StartRelay, jobs: Any, database_setting: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"}), openai=jobs[1])
    await create(relay)
    reset = await BudgetReports(database_of(relay)).reset(BudgetChange("b", "admin", time.time()))
    assert reset is not None and reset.counted_nano == 0
    jobs[0].end(tokens=4)
    await read(relay)
    assert (await report_of(relay, "b")).counted_nano == 4 * TOKEN_NANO


async def test_what_is_never_read_is_forgotten_after_90_days_and_stays_charged(start: StartRelay, jobs: Any, database_setting: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "total", "name": "b"}), openai=jobs[1])
    await create(relay)
    database = database_of(relay)
    async with database.writing() as connection:
        await connection.execute(sa.update(provisional_charges).values(at_s=int(time.time()) - 91 * DAY_S))
    await sweep(database, Retention(DAY_S, DAY_S))
    assert await scalar(relay, sa.select(sa.func.count()).select_from(provisional_charges)) == 0
    assert await charged(relay) == (0, 10)


BATCH_ANSWER = {"type": "message", "model": "m", "content": [], "stop_reason": "end_turn", "usage": {"input_tokens": 0, "output_tokens": 2}}


def results(*answers: dict[str, Any]) -> bytes:
    """The results of an Anthropic batch."""
    return b"".join(json.dumps({"custom_id": str(n), "result": {"type": "succeeded", "message": answer}}).encode() + b"\n" for n, answer in enumerate(answers))


async def read_batch(relay: Relay, batch: str = "b1") -> None:
    status, _, _ = await relay.call("GET", relay.path("anthropic", f"v1/messages/batches/{batch}/results"))
    assert status == 200
    await relay.idle()


@pytest.fixture
async def batches(aiohttp_server: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The results of each batch, and the entry of a provider that sends each at once."""
    stored: dict[str, bytes] = {}

    async def read(request: web.Request) -> web.Response:
        return web.Response(body=stored[request.match_info["id"]], content_type="application/x-jsonl")

    async def create(_request: web.Request) -> web.Response:
        return web.json_response({"id": "b1", "type": "message_batch", "processing_status": "in_progress"})

    server = await aiohttp_server(vendor(("GET", "/v1/messages/batches/{id}/results", read), ("POST", "/v1/messages/batches", create)))
    return stored, provider(str(server.make_url("")).rstrip("/"), format="anthropic", **PRICED)


@pytest.mark.parametrize("answers", [100, 500, 5000])
async def test_the_results_of_a_batch_are_charged_in_full_in_one_piece_too(start: StartRelay, batches: Any, database_setting: str, answers: int) -> None:
    batches[0]["b1"] = results(*[BATCH_ANSWER] * answers)
    relay = await start(budgeted(database_setting, {"usd": 100, "period": "day", "name": "b"}), anthropic=batches[1])
    await read_batch(relay)
    assert await charged(relay) == (2 * answers, 0)


async def test_results_of_which_a_part_has_no_cost_are_charged_the_rest(start: StartRelay, batches: Any, database_setting: str) -> None:
    """Code that ran at the provider is billed by the hour."""
    ran_code = BATCH_ANSWER | {"usage": {"input_tokens": 0, "output_tokens": 3, "server_tool_use": {"code_execution_requests": 1}}}
    batches[0]["b1"] = results(BATCH_ANSWER, ran_code)
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"}), anthropic=batches[1])
    for _ in range(2):
        await read_batch(relay)
        assert await charged(relay) == (0, 5)


@pytest.mark.parametrize(("reserved", "expected"), [(9, 9), (2, 5)])
async def test_of_a_response_whose_cost_is_known_in_part_the_higher_of_both_charges_stays(
    start: StartRelay, jobs: Any, database_setting: str, reserved: int, expected: int
) -> None:
    """Of a response in background that searched, for a fee: what it reserved, or its tokens."""
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"}), openai=jobs[1])
    status, _, _ = await relay.call("POST", relay.path("openai", "responses"), json=CREATE | {"max_output_tokens": reserved})
    await relay.idle()
    jobs[0].end(tokens=5)
    jobs[0].fees = {"num_sources_used": 2}
    await read(relay)
    assert status == 200 and await charged(relay) == (0, expected)


async def create_batch(relay: Relay, *max_tokens: int, model: str = "m", body: bytes | None = None) -> tuple[int, str | None]:
    """Make a batch of requests. Returns the status, and the code of an error."""
    requests = [{"custom_id": str(n), "params": {"model": model, "max_tokens": most, "messages": []}} for n, most in enumerate(max_tokens)]
    data = json.dumps({"requests": requests}).encode() if body is None else body
    status, headers, _ = await relay.call("POST", relay.path("anthropic", "v1/messages/batches"), data=data, headers={"Content-Type": "application/json"})
    await relay.idle()
    return status, headers.get("x-relay-error")


async def test_a_batch_is_charged_what_its_requests_may_cost_until_its_results_are_read(start: StartRelay, batches: Any, database_setting: str) -> None:
    batches[0]["b1"] = results(BATCH_ANSWER, BATCH_ANSWER)
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"}), anthropic=batches[1])
    assert await create_batch(relay, 100, 200) == (200, None)
    assert await charged(relay) == (0, 300)
    await read_batch(relay)
    assert await charged(relay) == (4, 0)


async def test_a_batch_whose_requests_all_failed_costs_nothing(start: StartRelay, batches: Any, database_setting: str) -> None:
    batches[0]["b1"] = b'{"custom_id": "0", "result": {"type": "errored", "error": {"type": "error", "error": {"type": "api_error"}}}}\n{"custom_id": "1", "result": {"type": "expired"}}\n'
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"}), anthropic=batches[1])
    await create_batch(relay, 100, 200)
    await read_batch(relay)
    assert await charged(relay) == (0, 0)


async def test_a_batch_that_may_cost_more_than_is_left_is_refused(start: StartRelay, batches: Any, database_setting: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"}), anthropic=batches[1])
    assert await create_batch(relay, *[2] * 501) == (429, "budget_exhausted")
    assert await create_batch(relay, *[2] * 499) == (200, None)


UNREADABLE = {
    "not strict JSON": b'{"requests": [{"custom_id": "0", "params": {"model": "m", "max_tokens": 100, "temperature": NaN}}]}',
    "no requests": b"{}",
    "no list": b'{"requests": {}}',
    "no params": b'{"requests": [{}]}',
    "two models": b'{"requests": [{"custom_id": "0", "params": {"model": "m", "model": "n", "max_tokens": 1}}]}',
    "no model": b'{"requests": [{"custom_id": "0", "params": {"max_tokens": 1}}]}',
}


@pytest.mark.parametrize("case", UNREADABLE)
async def test_a_batch_that_cannot_be_read_in_one_way_is_refused_under_a_hard_budget(start: StartRelay, batches: Any, database_setting: str, case: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"}), anthropic=batches[1])
    assert await create_batch(relay, body=UNREADABLE[case]) == (403, "model_unknown")


async def test_a_batch_that_cannot_be_read_is_sent_under_a_budget_that_only_warns(start: StartRelay, batches: Any, database_setting: str) -> None:
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day", "name": "b", "mode": "warn"}), anthropic=batches[1])
    assert await create_batch(relay, body=b"{}") == (200, None)


@pytest.mark.parametrize(("unpriced", "answer", "cost"), [("refuse", (403, "price_unknown"), None), ({"usd": 0.01}, (200, None), 20), ("allow", (200, None), None)])
async def test_the_requests_of_a_batch_without_a_price_are_charged_as_calls_without_one(
    start: StartRelay, batches: Any, database_setting: str, unpriced: Any, answer: tuple[int, str | None], cost: int | None
) -> None:
    document = budgeted(database_setting, {"usd": 1, "period": "day", "name": "b"}, unpriced=unpriced)
    relay = await start(document, anthropic=batches[1] | {"pricing": []})
    assert await create_batch(relay, 100, 200, model="unknown") == answer
    if cost is not None:
        assert await charged(relay) == (0, cost)
