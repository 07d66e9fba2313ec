"""Describe budgets for reports, beside the sum that the ledger has of the same calls.

Owns the names of the fields, and the explanation of the difference between the two sums.
storage/budget_reports.py reads the budgets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from relay.core.budgets import PERIODS, BudgetRule, Period, span_of, utc_text
from relay.core.exchange import min_id_at
from relay.core.limits import key_part
from relay.ledger.queries import usd
from relay.storage.budget_reports import BudgetReport
from relay.storage.database import Database
from relay.storage.tables import exchanges

_COLUMNS = {"client": "client", "team": "team", "user": "end_user"}
_PART = re.compile(r"(?:(client|team|user)=|no (client|team|user), client=)")


def describe(report: BudgetReport) -> dict[str, Any]:
    """Describe a budget in JSON; amounts are in US dollars."""
    start_s, end_s = report.period_start_s, report.period_end_s
    limit_nano = report.limit_nano + report.raised_nano
    return {
        "key": report.key,
        "rule": report.rule,
        "subject": report.subject,
        "period": _period(report),
        "starts_at": None if end_s is None else utc_text(start_s),
        "resets_at": None if end_s is None else utc_text(end_s),
        "limit_usd": usd(report.limit_nano),
        "raised_usd": usd(report.raised_nano),
        "spent_usd": usd(report.counted_nano),
        "left_usd": usd(report.left_nano),
        "spent_percent": round(100 * report.lost_nano / max(1, limit_nano), 1),
        "leased_usd": usd(report.leased_nano),
        "reserved_usd": usd(report.reserved_nano),
        "unaccounted_usd": usd(report.unaccounted_nano),
        "unpriced_usd": usd(report.unpriced_nano),
        "over_usd": usd(report.over_nano),
        "reset_usd": usd(report.reset_nano),
    }


def _period(report: BudgetReport) -> Period:
    """Return the length of a period, the shortest possible one if it ended early: its rule has got
    another one.
    """
    start_s, end_s = report.period_start_s, report.period_end_s
    for period in PERIODS:
        span = span_of(period, start_s)
        is_within = span.end_s is None or (end_s is not None and end_s <= span.end_s)
        if span.start_s == start_s and is_within:
            return period
    return "total"


async def compare(
    database: Database, report: BudgetReport, rules: Sequence[BudgetRule]
) -> dict[str, Any] | None:
    """Return the ledger's sum of the calls under a budget, and why the budget has another one. None
    if it is not known which calls these are, since gateway.yaml has no such rule any more. Raises
    DatabaseUnavailable, QueryRefused.
    """
    conditions = _calls_of(report, {rule.name: rule for rule in rules})
    if conditions is None:
        return None
    cost = exchanges.c.cost_nano_usd
    query = sa.select(sa.func.count(), sa.func.count(cost), sa.func.sum(cost)).where(*conditions)
    calls, priced, total = tuple((await database.rows(query))[0])
    ledger_nano = int(total or 0)
    difference_nano = report.counted_nano - ledger_nano
    other_nano = difference_nano - report.unpriced_nano + report.reset_nano
    return {
        "ledger_usd": usd(ledger_nano),
        "calls": calls,
        "calls_without_cost": calls - priced,
        "difference_usd": usd(difference_nano),
        "explained": {
            "unpriced_usd": usd(report.unpriced_nano),
            "reset_usd": usd(-report.reset_nano),
            "other_usd": usd(other_nano),
        },
    }


def _calls_of(
    report: BudgetReport, rules: Mapping[str, BudgetRule]
) -> list[sa.ColumnElement[bool]] | None:
    """Return the conditions for the rows of the calls under a budget."""
    row = exchanges.c
    conditions = [row.id >= min_id_at(report.period_start_s)]
    if report.period_end_s is not None:
        conditions.append(row.id < min_id_at(report.period_end_s))
    rule = rules.get(report.rule)
    if rule is not None and rule.clients:
        conditions.append(row.client.in_(rule.clients))
    elif rule is None and "'" not in report.rule:
        return None
    key = report.rule
    for name, value, client in _subject_of(report.subject):
        column = row[_COLUMNS[name]]
        conditions.append(column == value if value else column.is_(None))
        if not value:
            conditions.append(row.client == client)
        key += f"|{key_part(value, client)}"
    return conditions if key == report.key else None


def _subject_of(subject: str) -> list[tuple[str, str, str]]:
    """Return (name, value, client) of each part of a subject: the value, or the client of a call
    that has none.
    """
    found: dict[str, re.Match[str]] = {}
    for match in _PART.finditer(subject):
        found.setdefault(match[1] or match[2], match)  # a later one is text that a caller chose
    begins = [match.start() - len(", ") for match in found.values()]
    parts = []
    for (name, match), end in zip(found.items(), [*begins[1:], len(subject)], strict=False):
        text = subject[match.end() : end]
        parts.append((name, text, "") if match[1] else (name, "", text))
    return parts
