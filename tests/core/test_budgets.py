"""Periods of budgets, and the arithmetic of reserving and settling."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.budgets import (
    NOTHING,
    Account,
    BudgetRule,
    BudgetUse,
    Charged,
    Period,
    Span,
    span_of,
    utc_text,
)

UTC = datetime.UTC
TIMES = st.integers(0, 253370764799)


def at(text: str) -> int:
    return int(datetime.datetime.fromisoformat(f"{text}+00:00").timestamp())


@pytest.mark.parametrize(
    ("period", "when", "start", "end"),
    [
        ("day", "2026-11-27T03:11:49", "2026-11-27", "2026-11-28"),
        ("day", "2026-12-31T23:59:59", "2026-12-31", "2027-01-01"),
        ("week", "2026-11-27T03:11:49", "2026-11-23", "2026-11-30"),
        ("week", "2026-11-23T00:00:00", "2026-11-23", "2026-11-30"),
        ("week", "2026-11-29T23:59:59", "2026-11-23", "2026-11-30"),
        ("month", "2026-11-01T00:00:00", "2026-11-01", "2026-12-01"),
        ("month", "2026-12-31T23:59:59", "2026-12-01", "2027-01-01"),
        ("month", "2028-02-29T12:00:00", "2028-02-01", "2028-03-01"),
    ],
)
def test_a_period_begins_and_ends_in_utc(period: Period, when: str, start: str, end: str) -> None:
    assert span_of(period, at(when)) == Span(at(start), at(end))


def test_a_budget_in_total_never_ends() -> None:
    assert span_of("total", at("2026-11-27")) == Span(0, None)


@given(TIMES, st.sampled_from(["day", "week", "month"]))
def test_every_time_is_in_exactly_one_period(unix_s: int, period: Period) -> None:
    span = span_of(period, unix_s)
    assert span.end_s is not None and span.start_s <= unix_s < span.end_s
    assert span_of(period, span.start_s) == span == span_of(period, span.end_s - 1)
    assert span_of(period, span.end_s).start_s == span.end_s


@given(TIMES)
def test_a_time_is_shown_in_utc(unix_s: int) -> None:
    assert utc_text(unix_s) == datetime.datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")


def use(nano: int) -> tuple[BudgetUse, list[Account]]:
    rule = BudgetRule(name="mine", limit_nano=1000, period="total")
    accounts = [Account(rule, str(n), "all", Span(0, None), "w", f"w/{n}", granted_nano=500) for n in range(2)]
    for account in accounts:
        account.begin(nano, 0.0)
    return BudgetUse(tuple(accounts), nano), accounts


@pytest.mark.parametrize(
    ("cost", "charged", "free"),
    [(0, NOTHING, 500), (30, Charged(30), 470), (100, Charged(100), 400), (130, Charged(130, 0, 30), 370), (None, Charged(0, 100), 400)],
)
def test_a_call_is_charged_its_cost_or_what_it_reserved_if_that_is_unknown(cost: int | None, charged: Charged, free: int) -> None:
    reserved, accounts = use(100)
    assert [account.free_nano for account in accounts] == [400, 400]
    reserved.settle(cost)
    assert reserved.charged == charged
    for account in accounts:
        assert (account.charged, account.free_nano, account.reserved_nano, account.calls) == (charged, free, 0, 0)


@pytest.mark.parametrize(("known", "charged"), [(30, Charged(0, 100)), (130, Charged(0, 130, 30))])
def test_a_call_of_unknown_cost_is_charged_what_is_known_of_it_at_least(known: int, charged: Charged) -> None:
    reserved, (account, _) = use(100)
    reserved.note_known(known)
    reserved.settle(None)
    assert reserved.charged == account.charged == charged and account.reserved_nano == 0


def test_what_was_known_of_a_cost_does_not_matter_once_the_cost_is_known() -> None:
    reserved, _ = use(100)
    reserved.note_known(130)
    reserved.settle(30)
    assert reserved.charged == Charged(30)


def test_a_call_is_settled_once() -> None:
    reserved, (account, _) = use(100)
    for cost in (30, 40, None):
        reserved.settle(cost)
        assert reserved.charged == account.charged == Charged(30)


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(-(10**6), 10**6), st.integers(0, 10**6), st.integers(1, 10**6))
def test_an_account_warns_from_the_first_level_on_whatever_changes(limit: int, lost: int, others: int, raised: int, other_limit: int) -> None:
    _, (account, _) = use(0)
    rules = [BudgetRule(name="mine", limit_nano=each, period="total") for each in (limit, other_limit)]
    account.lost_nano = lost
    changes: tuple[Callable[[], None], ...] = (lambda: account.apply(rules[0]), lambda: account.note_others(others, raised), lambda: account.apply(rules[1]))
    for change in changes:
        change()
        assert account.is_near_limit == (account.level > 0)
