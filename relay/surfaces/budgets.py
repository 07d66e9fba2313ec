"""Budgets over HTTP: …/budgets and its changes, a part of management.

Owns the requests and the pages; storage/budget_reports.py reads and changes budgets,
ledger/budget_reports.py describes them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import web

from relay import log
from relay.core.budgets import nano_of_text
from relay.core.errors import BadRequest, BudgetNotFound
from relay.core.numbers import LATEST_S
from relay.gateway import GATEWAY
from relay.ledger.budget_reports import compare, describe
from relay.storage.budget_reports import (
    MAX_PAGE_BUDGETS,
    MAX_PERCENT,
    BudgetChange,
    BudgetFilter,
    BudgetReport,
    BudgetReports,
    LimitTooLarge,
)
from relay.surfaces.logs import client_errors, whole_of
from relay.surfaces.management import (
    authorize,
    database_of,
    limit_of,
    parameters_of,
    private_json,
    read_json,
)

_PAGE_BUDGETS = 50
_MAX_TEXT = 1000


class ChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST …/budgets/reset and …/release."""

    key: str


class RaiseBody(ChangeBody):
    """The body of POST …/budgets/raise."""

    usd: msgspec.Raw
    """A number, or the text of one."""


Body = TypeVar("Body", bound=ChangeBody)


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the routes under `prefix`."""
    router = app.router
    router.add_get(f"{prefix}/budgets", list_budgets)
    router.add_get(f"{prefix}/budgets/ledger", compare_with_ledger)
    router.add_post(f"{prefix}/budgets/raise", raise_budget)
    router.add_post(f"{prefix}/budgets/reset", reset_budget)
    router.add_post(f"{prefix}/budgets/release", release_budget)


async def list_budgets(request: web.Request) -> web.Response:
    """A page of the budgets by their keys: `{"budgets": […], "cursor"}`. Those of the current
    period; with `periods=all` those of earlier ones too.
    """
    authorize(request)
    database, now_s = database_of(request), _now_s(request)
    parameters = parameters_of(
        request, "key", "rule", "subject", "periods", "spent_percent", "cursor", "limit"
    )
    limit = limit_of(parameters, _PAGE_BUDGETS, MAX_PAGE_BUDGETS)
    with client_errors():
        after = _place_of(parameters.get("cursor", ""))
        wanted = _filter(parameters, now_s)
        found = await BudgetReports(database).page(wanted, after, limit, now_s)
    cursor = _cursor_of(found[-1]) if len(found) == limit else None
    return private_json({"budgets": [describe(each) for each in found], "cursor": cursor})


async def compare_with_ledger(request: web.Request) -> web.Response:
    """One budget in the current period, and what the ledger has of its calls."""
    authorize(request)
    database, parameters = database_of(request), dict(request.query)
    now_s = _now_s(request)
    with client_errors():
        key = parameters.pop("key", "")
        if parameters or not key:
            raise BadRequest("the one parameter is `key`, which names a budget")
        wanted = BudgetFilter(key=key, at_s=int(now_s))
        found = await BudgetReports(database).page(wanted, ("", -1), 1, now_s)
        if not found:
            raise BudgetNotFound(key)
        rules = request.app[GATEWAY].config.budgets.rules
        ledger = await compare(database, found[0], rules)
    return private_json({"budget": describe(found[0]), "ledger": ledger})


async def raise_budget(request: web.Request) -> web.Response:
    """Add to the limit of a budget for the rest of the period. 200 with its state."""

    async def raise_limit(
        reports: BudgetReports, change: BudgetChange, body: RaiseBody
    ) -> BudgetReport | None:
        try:
            nano_usd = nano_of_text(bytes(body.usd).decode().removeprefix('"').removesuffix('"'))
        except ValueError as error:
            raise BadRequest(f"usd {error}") from None
        try:
            return await reports.raise_limit(change, nano_usd)
        except LimitTooLarge as error:
            raise BadRequest(str(error)) from None

    return await _change(request, "raise", RaiseBody, raise_limit)


async def reset_budget(request: web.Request) -> web.Response:
    """Let the period of a budget begin anew. 200 with its state."""
    return await _change(
        request, "reset", ChangeBody, lambda reports, change, body: reports.reset(change)
    )


async def release_budget(request: web.Request) -> web.Response:
    """Give back what dead processes have left unaccounted of a budget. 200 with its state."""
    return await _change(
        request, "release", ChangeBody, lambda reports, change, body: reports.release(change)
    )


async def _change(
    request: web.Request,
    action: str,
    kind: type[Body],
    work: Callable[[BudgetReports, BudgetChange, Body], Awaitable[BudgetReport | None]],
) -> web.Response:
    manager = authorize(request)
    reports = BudgetReports(database_of(request))
    body = await read_json(request, kind)
    change = BudgetChange(body.key[:_MAX_TEXT], str(manager), _now_s(request))
    with client_errors():
        report = await work(reports, change, body)
    if report is None:
        raise BudgetNotFound(change.key)
    log.event("budgets.changed", action=action, budget=report.key, actor=change.actor)
    return private_json(describe(report))


def _now_s(request: web.Request) -> float:
    """The time of day, by the clock of the leases."""
    leases = request.app[GATEWAY].leases
    assert leases is not None
    return leases.clock()


def _filter(parameters: dict[str, str], now_s: float) -> BudgetFilter:
    periods = parameters.get("periods", "current")
    if periods not in ("current", "all"):
        raise BadRequest("periods is not `current` or `all`")
    return BudgetFilter(
        parameters.get("key"),
        parameters.get("rule"),
        parameters.get("subject"),
        int(now_s) if periods == "current" else None,
        whole_of("spent_percent", parameters.get("spent_percent", "0"), 0, MAX_PERCENT),
    )


def _cursor_of(report: BudgetReport) -> str:
    return f"{report.period_start_s}.{report.key}"


def _place_of(cursor: str) -> tuple[str, int]:
    """The key and period after which a page begins. Raises BadQuery."""
    if not cursor:
        return "", -1
    start_s, _, key = cursor.partition(".")
    return key, whole_of("cursor", start_s, 0, LATEST_S)
