"""Build the rules of core/budgets.py from `budgets` in gateway.yaml and in records of clients.

Owns their names and checks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from decimal import Decimal

from relay.core.budgets import BudgetRule, BudgetRules, Unpriced
from relay.registry.limits import unique_name
from relay.registry.problems import Document, Where
from relay.registry.schema import Budgets, ClientBudget, GatewayFile

_NANO = 10**9


def budget_rules(settings: GatewayFile, document: Document) -> BudgetRules:
    """Return the section `budgets`. Problems go into `document`."""
    rules: list[BudgetRule] = []
    for at, entry in enumerate(settings.budgets.rules):
        where: Where = ("budgets", "rules", at)
        taken = {rule.name for rule in rules}
        if entry.name in taken:
            document.add_problem((*where, "name"), "another budget has this name")
        rule = _rule(entry, entry.per, taken)
        rules.append(replace(rule, clients=frozenset(entry.clients)))
    if rules and settings.database is None:
        document.add_problem(("budgets", "rules"), _NO_DATABASE)
    return BudgetRules(
        tuple(rules), settings.budgets.default_output_tokens, _unpriced(settings.budgets)
    )


_NO_DATABASE = "needs a database, which keeps what was spent: set `database`"


def _unpriced(budgets: Budgets) -> Unpriced:
    if isinstance(budgets.unpriced, str):
        return Unpriced(refuses=budgets.unpriced == "refuse")
    return Unpriced(nano_usd=_nano(budgets.unpriced.usd))


def check_client_budgets(
    entries: Sequence[ClientBudget], settings: GatewayFile, where: Where, document: Document
) -> None:
    """Check the budgets of a client's record. Problems go into `document`."""
    if entries and settings.database is None:
        document.add_problem(where, _NO_DATABASE)
    names = [entry.name for entry in entries]
    for at, name in enumerate(names):
        if name is not None and name in names[:at]:
            document.add_problem((*where, at, "name"), "another budget has this name")


def budgets_of_client(entries: Sequence[ClientBudget]) -> tuple[BudgetRule, ...]:
    """Return the budgets of a client's record, in which `per` divides the client's own calls."""
    rules: list[BudgetRule] = []
    for entry in entries:
        per = ["client", *(name for name in entry.per if name != "client")]
        rule = _rule(entry.model_copy(update={"name": None}), per, {each.name for each in rules})
        # No rule of `budgets` has a name with an apostrophe, so the budgets stay apart.
        rules.append(replace(rule, name=f"client's {entry.name or rule.name}"))
    return tuple(rules)


def _rule(entry: ClientBudget, per: Sequence[str], taken: Collection[str]) -> BudgetRule:
    names = tuple(dict.fromkeys(name for name in per if name != "all"))
    name = "-".join(["usd", *(["per", *names] if names else []), entry.period])
    return BudgetRule(
        name=entry.name or unique_name(name, taken),
        limit_nano=_nano(entry.usd),
        period=entry.period,
        per=names,
        is_hard=entry.mode == "hard",
    )


def _nano(usd: Decimal) -> int:
    return int(usd * _NANO)
