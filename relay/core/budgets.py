"""Budgets as rules, and the money of one budget that a process has leased.

Owns the periods, the amounts of leases, and the arithmetic of reserving and settling. All amounts
are whole billionths of a US dollar. gate/budgets.py finds the budgets of a call, gate/leases.py
leases money from the database, storage/budgets.py stores it, and ledger/charges.py writes what
calls cost together with their rows.
"""

from __future__ import annotations

import asyncio
from calendar import timegm
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, NamedTuple

import msgspec

from relay.core.pricing import usd_of, usd_text

Period = Literal["day", "week", "month", "total"]
PERIODS: tuple[Period, ...] = ("day", "week", "month", "total")
MAX_NANO_USD = 10**18
"""A billion US dollars, the largest budget, and the most that a lease is charged."""
MAX_SUM_NANO = 4 * MAX_NANO_USD
"""Nothing is added to a sum of a budget that has reached it. Budgets that only warn have no other
limit, and a larger sum would soon exceed 64 bits."""
_NANO = 10**9
_DAY_S = 86400
_LEASED_SHARE = 50
"""A lease is at most a fiftieth (2 %) of what is left of a budget, unless a call needs more."""
_SCARCE_SHARE = 20
"""Below a twentieth (5 %) of the limit, each call leases exactly what it reserves."""
WARNING_LEVELS = (95, 75)
"""A budget warns when so many percent of it are spent."""
FIRST_LEVEL = min(WARNING_LEVELS)


class Span(NamedTuple):
    """A period of a budget, in seconds since 1970."""

    start_s: int
    end_s: int | None
    """None: it never ends."""


def span_of(period: Period, unix_s: float) -> Span:
    """Return the period that contains a time. Days begin at 00:00 UTC, weeks on Monday."""
    day = int(unix_s // _DAY_S)
    if period == "total":
        return Span(0, None)
    if period == "day":
        return Span(day * _DAY_S, (day + 1) * _DAY_S)
    if period == "week":
        monday = day - (day + 3) % 7  # 1 January 1970 was a Thursday
        return Span(monday * _DAY_S, (monday + 7) * _DAY_S)
    year, month, _ = date_of(unix_s)
    after = (year + 1, 1) if month == 12 else (year, month + 1)
    return Span(timegm((year, month, 1, 0, 0, 0)), timegm((*after, 1, 0, 0, 0)))


def date_of(unix_s: float) -> tuple[int, int, int]:
    """Return year, month and day (UTC) in the Gregorian calendar."""
    # Counted from 1 March of the year 0, so that the leap day is the last day of a year.
    days = int(unix_s // _DAY_S) + 719468
    era, day_of_era = divmod(days, 146097)
    year = (day_of_era - day_of_era // 1460 + day_of_era // 36524 - day_of_era // 146096) // 365
    day_of_year = day_of_era - (365 * year + year // 4 - year // 100)
    month = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * month + 2) // 5 + 1
    month = month + 3 if month < 10 else month - 9
    return year + era * 400 + (month <= 2), month, day


def utc_text(unix_s: int) -> str:
    """Format a time: `2026-11-28T00:00:00Z`."""
    year, month, day = date_of(unix_s)
    minutes, seconds = divmod(unix_s % _DAY_S, 60)
    return f"{year:04d}-{month:02d}-{day:02d}T{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}Z"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BudgetRule:
    """A rule of `budgets`: so much money in each period for each value of `per`."""

    name: str
    """Unique among the rules, and part of the keys of its budgets."""
    limit_nano: int
    period: Period
    per: tuple[str, ...] = ()
    """Any of client, team and user; empty: one budget for all."""
    is_hard: bool = True
    """False: the budget warns and never refuses."""
    clients: frozenset[str] = frozenset()
    """Only calls of these clients count; empty: of all."""

    @property
    def text(self) -> str:
        """The rule for error messages: `$5 per day`."""
        return f"${usd_text(self.limit_nano)} {self.when}"

    @property
    def when(self) -> str:
        """`per day`, or `in total`."""
        return "in total" if self.period == "total" else f"per {self.period}"


@dataclass(frozen=True, slots=True)
class Unpriced:
    """What `budgets.unpriced` says of a call whose price is unknown."""

    refuses: bool = False
    nano_usd: int = 0
    """What such a call is charged."""


@dataclass(frozen=True, slots=True)
class BudgetRules:
    """The section `budgets` of gateway.yaml."""

    rules: tuple[BudgetRule, ...] = ()
    default_output_tokens: int = 8192
    unpriced: Unpriced = Unpriced()


class Charged(NamedTuple):
    """What calls were charged."""

    spent_nano: int = 0
    """The costs that the ledger has."""
    unpriced_nano: int = 0
    """Charged for calls of which the ledger does not know the cost."""
    over_nano: int = 0
    """The part of both that was not reserved: what providers billed above the bounds of calls."""

    @property
    def total_nano(self) -> int:
        """What the budget has lost."""
        return self.spent_nano + self.unpriced_nano

    def plus(self, other: Charged) -> Charged:
        """Return the sum of two charges."""
        spent_nano, unpriced_nano, over_nano = other
        return Charged(self[0] + spent_nano, self[1] + unpriced_nano, self[2] + over_nano)

    def capped(self) -> Charged:
        """Return what a lease is charged of it: at most MAX_NANO_USD of each."""
        return Charged(*[min(each, MAX_NANO_USD) for each in self])


NOTHING = Charged()


def nano_of_usd(usd: Decimal) -> int:
    """Return dollars as billionths. Raises ValueError for an amount that no budget has."""
    is_within = usd.is_finite() and 0 < usd <= MAX_NANO_USD // _NANO
    nano_usd = usd * _NANO if is_within else Decimal(0)
    if not nano_usd or nano_usd != nano_usd.to_integral_value():
        raise ValueError(
            "is not an amount from 0.000000001 to 1000000000 with at most nine decimal places"
        )
    return int(nano_usd)


def nano_of_text(text: str) -> int:
    """Parse an amount in dollars, such as `20` or `0.5`, into billionths. Raises ValueError for
    other text, as Python's Decimal accepts, and for an amount that no budget has.
    """
    return nano_of_usd(usd_of(text) or Decimal(0))


def warning_level(spent_nano: int, limit_nano: int) -> int:
    """Return the highest of WARNING_LEVELS that is reached; 0 below all of them."""
    for level in WARNING_LEVELS:
        if spent_nano * 100 >= limit_nano * level:
            return level
    return 0


def lease_nano(left_nano: int, rule: BudgetRule, missing_nano: Sequence[int]) -> int:
    """Return how much to lease for calls that miss so much: for each in turn if there is enough for
    it, and more than that while plenty is left, so that the next calls make no statement.
    """
    if not rule.is_hard:
        return max(sum(missing_nano), rule.limit_nano // _LEASED_SHARE)
    amount_nano = 0
    for nano_usd in missing_nano:
        if amount_nano + nano_usd <= left_nano:
            amount_nano += nano_usd
    if not amount_nano or left_nano * _SCARCE_SHARE < rule.limit_nano:
        return amount_nano
    return max(amount_nano, left_nano // _LEASED_SHARE)


@dataclass(slots=True, eq=False)
class Account:
    """The lease of one process of one budget in one period. Written by gate/leases.py (`granted`),
    gate/budgets.py (what calls reserve), BudgetUse (`settle`) and the ledger (`written`).

    The database has the same lease as a row: what it has granted there is never less than here, and
    what it was charged there is `written`. So whatever becomes of this process, no money of the
    lease is spent twice, and what is missing in the row is known.
    """

    rule: BudgetRule
    key: str
    subject: str
    """Whose budget it is, for people: `client=web`."""
    span: Span
    worker: str
    """The id of the process, as the database knows it."""
    lease_id: str
    granted_nano: int = 0
    """Leased so far, without what was given back."""
    reserved_nano: int = 0
    """Reserved by calls that have not been settled."""
    running_nano: int = 0
    """The part of it that running streams and sessions are known to have spent."""
    lost_nano: int = 0
    """What all settled calls were charged."""
    unpriced_nano: int = 0
    """The part of it that was charged for calls of unknown cost."""
    over_nano: int = 0
    """The part of it that was not reserved."""
    written: Charged = NOTHING
    """The part of `charged` that is in the database."""
    is_stored: bool = False
    """True if the database is known to have the row of the lease."""
    may_be_stored: bool = False
    """True if money was leased, even if no answer came: the database may have the row."""
    used_s: float = 0.0
    """When a call last reserved money."""
    others_nano: int = 0
    """What the budget had lost without this lease since its last reset, when the database was last
    asked (see storage.budgets.Leased)."""
    raised_nano: int = 0
    """What an administrator had added to the limit by then."""
    waiting: int = 0
    """Number of calls that wait for more money."""
    changes: int = 0
    """Number of changes of the lease in the database that run, or wait for the lock."""
    calls: int = 0
    """Number of calls that will be charged here, including those that have reserved nothing."""
    recalled_s: float = 0.0
    """When the leases of other processes were last recalled."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the lease changes in the database."""
    warns_at_nano: int = field(init=False)
    """The value of `lost_nano` from which the budget warns: kept, since every call looks at it."""

    def __post_init__(self) -> None:
        self._note_warning()

    def _note_warning(self) -> None:
        # Rounded up, as `warning_level` compares.
        self.warns_at_nano = -(-self.limit_nano * FIRST_LEVEL // 100) - self.others_nano

    def apply(self, rule: BudgetRule) -> None:
        """Apply a rule that a reload has changed, with the same periods."""
        self.rule = rule
        self._note_warning()

    def note_others(self, others_nano: int, raised_nano: int) -> None:
        """Note what the budget has lost elsewhere, and what was added to its limit."""
        self.others_nano, self.raised_nano = others_nano, raised_nano
        self._note_warning()

    @property
    def charged(self) -> Charged:
        """What all settled calls were charged."""
        return Charged(self.lost_nano - self.unpriced_nano, self.unpriced_nano, self.over_nano)

    @property
    def free_nano(self) -> int:
        """What calls may still reserve; negative after bills above the bounds of calls."""
        return self.granted_nano - self.lost_nano - self.reserved_nano

    @property
    def limit_nano(self) -> int:
        """The limit of the period, as far as this process knows."""
        return self.rule.limit_nano + self.raised_nano

    @property
    def spent_nano(self) -> int:
        """What is spent in the period, as far as this process knows."""
        return self.others_nano + self.lost_nano

    @property
    def left_nano(self) -> int:
        """What is not spent of the limit, as far as this process knows."""
        return max(0, self.limit_nano - self.spent_nano)

    @property
    def level(self) -> int:
        """The warning level that is reached; 0 below all of them."""
        return warning_level(self.spent_nano, self.limit_nano)

    @property
    def is_near_limit(self) -> bool:
        """True if a warning level is reached."""
        return self.lost_nano >= self.warns_at_nano

    @property
    def is_settled(self) -> bool:
        """True if no call uses the account, and the database has everything."""
        is_used = self.calls or self.waiting or self.reserved_nano
        return not is_used and self.charged == self.written

    def begin(self, nano_usd: int, unix_s: float) -> None:
        """Reserve money for a new call: it must be free, unless the budget only warns."""
        self.calls += 1
        self.reserve(nano_usd, unix_s)

    def cancel(self, nano_usd: int) -> None:
        """Undo `begin`: another budget refuses the call."""
        self.calls -= 1
        self.release(nano_usd)

    def reserve(self, nano_usd: int, unix_s: float) -> None:
        """Reserve more for a running call, under the conditions of `begin`."""
        self.reserved_nano += nano_usd
        self.used_s = unix_s

    def release(self, nano_usd: int) -> None:
        """Undo `reserve`: another budget refuses the call."""
        self.reserved_nano -= nano_usd


@dataclass(slots=True)
class BudgetCounts:
    """What budgets did since the start of the process, for metrics."""

    refusals: Counter[str] = field(default_factory=Counter)
    """Calls that were refused, by the name of the rule."""
    warnings: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Warnings, by the name of the rule and the level."""
    unaccounted_nano: int = 0
    """What this process found in the leases of dead ones."""


class BudgetUse(msgspec.Struct, eq=False, gc=False):
    """The budgets of a call, under each of which it has reserved the same amount. Written by
    gate/budgets.py while the call runs, then by the ledger.
    """

    accounts: tuple[Account, ...]
    reserved_nano: int
    """What the call has reserved under each budget; 0 after it was settled."""
    is_near_limit: bool = False
    """True if one of the budgets warned when the call began."""
    running_nano: int = 0
    """What a running stream or session has spent, as far as its meter knows."""
    known_nano: int = 0
    """What the call has cost at least, known even if the whole cost is not. It may be more than
    what is reserved."""
    is_settled: bool = False
    charged_nano: int = 0
    """What each budget was charged."""
    unpriced_nano: int = 0
    """The part of it that was charged because the cost is unknown."""
    over_nano: int = 0
    """The part of it that was not reserved."""

    @property
    def charged(self) -> Charged:
        """What each budget was charged."""
        return Charged(self.charged_nano - self.unpriced_nano, self.unpriced_nano, self.over_nano)

    def give_back(self) -> None:
        """Release what the call has reserved. It stays under its budgets, and is settled."""
        for account in self.accounts:
            account.release(self.reserved_nano)
        self.reserved_nano = 0

    def note_running(self, nano_usd: int) -> None:
        """Note what the call has spent so far: no running call will give that back."""
        grown_nano, self.running_nano = nano_usd - self.running_nano, nano_usd
        for account in self.accounts:
            account.running_nano += grown_nano

    def note_known(self, nano_usd: int) -> None:
        """Note what the call has cost at least."""
        self.known_nano = max(self.known_nano, nano_usd)

    def settle(self, cost_nano: int | None) -> None:
        """Settle the call, once: charge its budgets. A call of which the cost is unknown is charged
        what it reserved, or what it has cost at least if that is more.
        """
        if self.is_settled:
            return
        if self.running_nano:
            self.note_running(0)
        reserved_nano, self.reserved_nano, self.is_settled = self.reserved_nano, 0, True
        unpriced_nano = over_nano = 0
        if cost_nano is None:
            lost_nano = unpriced_nano = self.unpriced_nano = max(reserved_nano, self.known_nano)
            over_nano = self.over_nano = lost_nano - reserved_nano
        elif (lost_nano := cost_nano) > reserved_nano:
            over_nano = self.over_nano = lost_nano - reserved_nano
        self.charged_nano = lost_nano
        for account in self.accounts:
            account.calls -= 1
            account.reserved_nano -= reserved_nano
            account.lost_nano += lost_nano
            if unpriced_nano or over_nano:
                account.unpriced_nano += unpriced_nano
                account.over_nano += over_nano
