"""`relay budgets`: print the state of budgets, raise, reset and release them.

Works on the database of gateway.yaml, whether or not a relay runs. Running relays see a change with
the next call for which they ask the database, so at the latest before they refuse one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from typing import Any

import uvloop

from relay.cli.ledger_access import (
    acting_user,
    add_action,
    open_ledger,
    table_row,
    to_json,
)
from relay.cli.options import nano_usd, whole
from relay.cli.sources import load_config
from relay.core.budgets import utc_text
from relay.core.errors import OperatorError
from relay.core.pricing import usd_text
from relay.core.text import escaped, quoted
from relay.ledger.budget_reports import compare, describe
from relay.registry.load import Config
from relay.storage.budget_reports import (
    MAX_PAGE_BUDGETS,
    MAX_PERCENT,
    BudgetChange,
    BudgetFilter,
    BudgetReport,
    BudgetReports,
)
from relay.storage.database import Database, RowsRefused

_KEY = "the key of a budget, as `list` prints it"


class BudgetsFailed(OperatorError):
    """The command failed; the text says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of the command, with their options."""
    actions = parser.add_subparsers(required=True, metavar="action", dest="action")
    listing = add_action(actions, "list", "print the budgets of the current period")
    listing.add_argument("--rule", help="only budgets of this rule")
    listing.add_argument("--subject", help="only of this subject, such as client=web")
    listing.add_argument(
        "--spent",
        type=whole(0, MAX_PERCENT),
        default=0,
        metavar="PERCENT",
        help="only those with so much spent",
    )
    listing.add_argument("--all-periods", action="store_true", help="earlier periods too")
    show = add_action(actions, "show", "print a budget, beside the ledger's sum of its calls")
    show.add_argument("key", metavar="KEY", help=_KEY)
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="JSON, for programs")
    raised = add_action(actions, "raise", "add to the limit of a budget for the rest of the period")
    raised.add_argument("key", metavar="KEY", help=_KEY)
    raised.add_argument("usd", metavar="USD", type=nano_usd, help="US dollars, such as 20 or 0.5")
    reset = add_action(
        actions, "reset", "let the period of a budget begin anew, with nothing spent"
    )
    release = add_action(actions, "release", "give back what dead processes left unaccounted")
    for action in (reset, release):
        action.add_argument("key", metavar="KEY", help=_KEY)


def run(options: argparse.Namespace) -> int:
    """Carry out one action; 0."""
    uvloop.run(carry_out(load_config(options), options, print))
    return 0


async def carry_out(
    config: Config, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    """Carry out one action. Raises OperatorError."""
    async with open_ledger(config) as database:
        now_s = time.time()
        if options.action == "list":
            await _list(BudgetReports(database), options, now_s, out)
        elif options.action == "show":
            await _show(database, config, options, out)
        else:
            await _change(BudgetReports(database), options, now_s, out)


async def _list(
    reports: BudgetReports, options: argparse.Namespace, now_s: float, out: Callable[[str], None]
) -> None:
    at_s = None if options.all_periods else int(now_s)
    wanted = BudgetFilter(None, options.rule, options.subject, at_s, options.spent)
    if not options.json:
        out(table_row(_HEADS, _WIDTHS))
    async for report in _pages(reports, wanted, now_s):
        out(to_json(describe(report)) if options.json else _budget_row(report))


async def _pages(
    reports: BudgetReports, wanted: BudgetFilter, now_s: float
) -> AsyncIterator[BudgetReport]:
    after = ("", -1)
    while page := await reports.page(wanted, after, MAX_PAGE_BUDGETS, now_s):
        for report in page:
            yield report
        after = page[-1].key, page[-1].period_start_s


async def _show(
    database: Database, config: Config, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    now_s = time.time()
    wanted = BudgetFilter(options.key, at_s=int(now_s))
    found = await BudgetReports(database).page(wanted, ("", -1), 1, now_s)
    if not found:
        raise _unknown(options.key)
    ledger = await compare(database, found[0], config.budgets.rules)
    shown = to_json({"budget": describe(found[0]), "ledger": ledger})
    if options.json:
        out(shown)
        return
    # Decimal: every digit of the amounts.
    parts: dict[str, Any] = json.loads(shown, parse_float=Decimal)
    if ledger is None:
        parts["ledger"] = {"ledger": "gateway.yaml has no rule of this name any more"}
    else:
        parts["explained"] = parts["ledger"].pop("explained")
    for part in parts.values():
        for name, value in part.items():
            out(_line(name, value))


async def _change(
    reports: BudgetReports, options: argparse.Namespace, now_s: float, out: Callable[[str], None]
) -> None:
    change = BudgetChange(options.key, f"cli:{acting_user()}", now_s)
    with _refusals():
        if options.action == "raise":
            report = await reports.raise_limit(change, options.usd)
        elif options.action == "reset":
            report = await reports.reset(change)
        else:
            report = await reports.release(change)
    if report is None:
        raise _unknown(options.key)
    out(table_row(_HEADS, _WIDTHS))
    out(_budget_row(report))


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except RowsRefused as error:
        raise BudgetsFailed(str(error)) from error


def _unknown(key: str) -> BudgetsFailed:
    return BudgetsFailed(
        f"there is no budget '{quoted(key)}' in the current period; `relay budgets list` prints"
        " those that are"
    )


_HEADS = ("limit", "spent", "left", "leased", "unaccounted", "resets", "key", "subject")
_WIDTHS = (12, 12, 12, 12, 12, 20, 32)


def _budget_row(report: BudgetReport) -> str:
    amounts = (
        report.limit_nano + report.raised_nano, report.counted_nano, report.left_nano,
        report.leased_nano, report.unaccounted_nano,
    )  # fmt: skip
    end_s = report.period_end_s
    resets = "never" if end_s is None else utc_text(end_s)
    return table_row((*map(usd_text, amounts), resets, report.key, report.subject), _WIDTHS)


def _line(name: str, value: Any) -> str:
    return escaped(f"{name:22} {'-' if value is None else value}")
