"""`relay budgets`: on the database of gateway.yaml, while no relay runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from relay.cli.budgets import BudgetsFailed, carry_out
from relay.cli.ledger_access import NoAnswer
from relay.cli.main import build_parser
from relay.core.budgets import Account, BudgetRule, Charged, span_of
from relay.registry.load import Config
from relay.storage.budgets import BudgetStore, charge_batch
from relay.storage.database import Database, database_url
from relay.storage.tables import audit
from tests.cli.test_keys import configure, migrated  # noqa: F401

NANO = 10**9


async def budgets(config: Config, *arguments: str) -> list[str]:
    """Run `relay budgets ARGUMENTS`. Returns the lines of standard output."""
    lines: list[str] = []
    await carry_out(config, build_parser(["budgets"]).parse_args(["budgets", *arguments]), lines.append)
    return lines


async def listed(config: Config, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in await budgets(config, "list", "--json", *arguments)]


@pytest.fixture
async def config(tmp_path: Path, migrated: str) -> Config:  # noqa: F811
    """A configuration whose database has a budget of 2 dollars for two users, and 1.5 spent by one.
    The process that leased a fiftieth more died.
    """
    rule = BudgetRule(name="each", limit_nano=2 * NANO, period="total", per=("user",))
    database = Database(database_url(migrated))
    store = BudgetStore(database)
    await store.begin_worker("w", 0)
    for number, (user, spent) in enumerate([("ada", 1_500_000_000), ("e\nve", 0)]):
        account = Account(rule, f"each|{user}", f"user={user}", span_of("total", 0), "w", f"w/{number}")
        await store.lease(account, [max(1, spent)], 0)
        account.is_stored = True
        await database.write(charge_batch({account: Charged(spent)}))
    await database.close()
    return configure(tmp_path, migrated, budgets={"rules": [{"usd": 2, "period": "total", "per": "user", "name": "each"}]})


async def test_budgets_are_listed_as_lines_and_as_json(config: Config) -> None:
    head, ada, eve = await budgets(config, "list")
    assert head.split() == ["limit", "spent", "left", "leased", "unaccounted", "resets", "key", "subject"]
    assert ada.split() == ["2", "1.5", "0.5", "0", "0", "never", "each|ada", "user=ada"]
    assert eve.split() == ["2", "0", "1.96", "0", "0.04", "never", "each|e\\nve", "user=e\\nve"]
    assert [each["spent_usd"] for each in await listed(config)] == [1.5, 0]
    assert [each["key"] for each in await listed(config, "--spent", "75")] == ["each|ada"]
    assert [each["key"] for each in await listed(config, "--subject", "user=ada", "--rule", "each", "--all-periods")] == ["each|ada"]


async def test_a_budget_is_shown_beside_the_sum_of_the_ledger(config: Config) -> None:
    (line,) = await budgets(config, "show", "each|ada", "--json")
    shown = json.loads(line)
    # The charge was written here without a row of the ledger.
    assert shown["ledger"]["explained"] == {"unpriced_usd": 0, "reset_usd": 0, "other_usd": 1.5}
    lines = dict(line.split(maxsplit=1) for line in await budgets(config, "show", "each|ada"))
    assert (lines["subject"], lines["left_usd"], lines["ledger_usd"], lines["other_usd"], lines["resets_at"]) == ("user=ada", "0.5", "0", "1.5", "-")


async def test_a_budget_is_raised_reset_and_released(config: Config, migrated: str) -> None:  # noqa: F811
    _, line = await budgets(config, "raise", "each|ada", "0.5")
    assert line.split()[:3] == ["2.5", "1.5", "1"]
    assert (await budgets(config, "reset", "each|ada"))[1].split()[:3] == ["2.5", "0", "2.5"]
    assert (await budgets(config, "release", "each|e\nve"))[1].split()[:5] == ["2", "0", "2", "0", "0"]
    database = Database(database_url(migrated))
    rows = await database.rows(sa.select(audit.c.action, audit.c.target, audit.c.actor).order_by(audit.c.seq))
    await database.close()
    assert [(row.action, row.target) for row in rows] == [("budget.raise", "each|ada"), ("budget.reset", "each|ada"), ("budget.release", "each|e\ufffdve")]
    assert all(row.actor.startswith("cli:") for row in rows)


@pytest.mark.parametrize("arguments", [("show", "each|bob"), ("raise", "each|bob", "1"), ("reset", "each"), ("release", "")])
async def test_an_unknown_budget_is_named(config: Config, arguments: tuple[str, ...]) -> None:
    with pytest.raises(BudgetsFailed, match="there is no budget"):
        await budgets(config, *arguments)


async def test_a_raise_above_the_largest_limit_says_how_much_is_possible(config: Config) -> None:
    with pytest.raises(BudgetsFailed, match="at most 1000000000 US dollars, so this one can be raised by 999999998 more"):
        await budgets(config, "raise", "each|ada", "1000000000")


async def test_without_a_database_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoAnswer, match="`database` is not set"):
        await budgets(configure(tmp_path, None), "list")
