"""Say how much is left of a budget, in headers of responses near its end and of refusals.

Owns the names of these headers. `anthropic-ratelimit-unified-*` are those from which Claude Code
warns its user; a relay's budget is what they call overage: money, and not a window of time.
"""

from __future__ import annotations

from collections.abc import Mapping

from relay.core.budgets import BudgetUse, utc_text
from relay.core.errors import BudgetExhausted
from relay.core.pricing import usd_text

_UNIFIED = "anthropic-ratelimit-unified-"
Pairs = list[tuple[str, str]]


def warning_headers(use: BudgetUse, given: Mapping[str, str], format_: str) -> Pairs:
    """Return the headers of a response whose call is under a budget that warns: about the one with
    the least left. `given` are the headers that the provider sent.
    """
    near = [account for account in use.accounts if account.is_near_limit]
    if not near:
        return []
    tightest = min(near, key=lambda account: account.left_nano)
    resets_s = tightest.span.end_s
    pairs = _headers(tightest.rule.name, usd_text(tightest.left_nano), resets_s)
    if format_ == "anthropic" and not any(name.lower().startswith(_UNIFIED) for name in given):
        share = tightest.spent_nano / tightest.limit_nano
        pairs += _unified("allowed_warning", share, resets_s)
        pairs.append((f"{_UNIFIED}overage-surpassed-threshold", f"{tightest.level / 100:.2f}"))
    return pairs


def refusal_headers(error: BudgetExhausted, format_: str) -> Pairs:
    """Return the headers of a refusal."""
    pairs = _headers(error.budget, error.left, error.resets_s)
    if format_ == "anthropic":
        pairs += _unified("rejected", 1.0, error.resets_s)
    return pairs


def _headers(budget: str, left_usd: str, resets_s: int | None) -> Pairs:
    pairs = [("x-relay-budget", budget), ("x-relay-budget-remaining-usd", left_usd)]
    if resets_s is not None:
        pairs.append(("x-relay-budget-resets-at", utc_text(resets_s)))
    return pairs


def _unified(status: str, share: float, resets_s: int | None) -> Pairs:
    pairs = [
        (f"{_UNIFIED}status", status),
        (f"{_UNIFIED}representative-claim", "overage"),
        (f"{_UNIFIED}overage-status", status),
        (f"{_UNIFIED}overage-utilization", f"{share:.4f}"),
    ]
    if resets_s is not None:
        pairs.append((f"{_UNIFIED}reset", str(resets_s)))
        pairs.append((f"{_UNIFIED}overage-reset", str(resets_s)))
    return pairs
