"""Read the state of budgets, and change it for an administrator.

Owns the sums over a budget and its leases, and the changes of a budget: raised, reset, released;
each is one durable transaction with its row in the audit. budgets.py has the transactions of calls.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.core.budgets import MAX_NANO_USD, WARNING_LEVELS, warning_level
from relay.core.pricing import usd_text
from relay.storage.access_rows import audit_values
from relay.storage.budgets import BudgetStore, is_dead, release_dead, unspent
from relay.storage.database import Database, RowsRefused
from relay.storage.provisional_charges import forget
from relay.storage.tables import audit, budget_leases, budget_workers, budgets

MAX_PAGE_BUDGETS = 500
MAX_PERCENT = 1000
"""Of a limit; a budget can be overspent."""


class LimitTooLarge(RowsRefused):
    """A budget cannot be raised by so much; the text says how much is possible."""


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """The state of one budget in one period."""

    key: str
    period_start_s: int
    period_end_s: int | None
    rule: str
    subject: str
    limit_nano: int
    """Of the rule."""
    extra_nano: int
    reset_nano: int
    warned: int
    """The highest level of which was warned."""
    spent_nano: int
    """The costs of calls, as the ledger has them, also those before a reset."""
    unpriced_nano: int
    over_nano: int
    reserved_nano: int
    leased_nano: int
    """What running processes have leased and not spent; it includes `reserved_nano`."""
    unaccounted_nano: int

    @property
    def raised_nano(self) -> int:
        """What an administrator added to the limit of this period."""
        return self.extra_nano - self.reset_nano

    @property
    def counted_nano(self) -> int:
        """What counts against the limit: all charges since the last reset."""
        return self.spent_nano + self.unpriced_nano - self.reset_nano

    @property
    def lost_nano(self) -> int:
        """What cannot be spent any more."""
        return self.counted_nano + self.unaccounted_nano

    @property
    def left_nano(self) -> int:
        """What is not lost of the limit; negative after bills above the bounds of calls."""
        return self.limit_nano + self.raised_nano - self.lost_nano

    @property
    def level(self) -> int:
        """The warning level that is reached; 0 below all of them."""
        return warning_level(self.lost_nano, self.limit_nano + self.raised_nano)


@dataclass(frozen=True, slots=True)
class BudgetFilter:
    """Which budgets are meant; None: all."""

    key: str | None = None
    rule: str | None = None
    subject: str | None = None
    at_s: int | None = None
    """Only of the periods that contain this time."""
    spent_percent: int = 0
    """Only those of which at least so much is spent or unaccounted."""


@dataclass(frozen=True, slots=True)
class BudgetChange:
    """Who changes the current period of which budget, and when."""

    key: str
    actor: str
    now_s: float


class BudgetReports:
    """The budgets of a database, for reports and administrators. `now_s` is the time by which
    processes write their heartbeats. Every method raises DatabaseUnavailable, DatabaseNewer and
    RowsRefused; `page` raises QueryRefused too.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self, wanted: BudgetFilter, after: tuple[str, int], limit: int, now_s: float
    ) -> list[BudgetReport]:
        """Return budgets by key and period, beginning after one of them."""
        budget = budgets.c
        place = sa.tuple_(sa.literal(after[0]), sa.literal(after[1], budget.period_start_s.type))
        query = _reports(wanted, now_s).where(sa.tuple_(budget.key, budget.period_start_s) > place)
        query = query.order_by(budget.key, budget.period_start_s)
        query = query.limit(min(limit, MAX_PAGE_BUDGETS))
        return await self._database.read(partial(_read, query))

    async def near_limit(self, worker: str, now_s: float) -> list[BudgetReport]:
        """Return the budgets that a process has leases of, and of which enough is spent for a
        warning.
        """
        mine = sa.select(budget_leases.c.key, budget_leases.c.period_start_s).where(
            budget_leases.c.worker == worker
        )
        wanted = BudgetFilter(spent_percent=min(WARNING_LEVELS))
        query = _reports(wanted, now_s).where(
            sa.tuple_(budgets.c.key, budgets.c.period_start_s).in_(mine)
        )
        return await self._database.watch(partial(_read, query))

    async def warn(self, report: BudgetReport, level: int) -> bool:
        """Note that a level is reached; False if it was noted before, by whichever process."""
        budget = budgets.c
        lower = sa.update(budgets).where(_is(report), budget.warned < level).values(warned=level)

        async def note(connection: AsyncConnection) -> bool:
            return (await connection.execute(lower)).rowcount == 1

        return await self._database.change(note)

    async def note_reserved(self, reserved_nano: Mapping[str, int]) -> None:
        """Write what the calls of this process have reserved of its leases, by their ids."""
        values = [{"lease": id, "nano": nano} for id, nano in reserved_nano.items()]
        if not values:
            return
        query = sa.update(budget_leases).where(budget_leases.c.id == sa.bindparam("lease"))
        query = query.values(reserved_nano=sa.bindparam("nano"))

        async def write(connection: AsyncConnection) -> None:
            await connection.execute(query, values)

        await self._database.change(write)

    async def raise_limit(self, change: BudgetChange, nano_usd: int) -> BudgetReport | None:
        """Add to the limit of a period. Returns the new state; None if there is no such budget.
        Raises LimitTooLarge.
        """

        async def add(connection: AsyncConnection, report: BudgetReport) -> Mapping[str, Any]:
            room_nano = MAX_NANO_USD - report.limit_nano - report.extra_nano
            if nano_usd > room_nano:
                raise LimitTooLarge(
                    f"the limit of a budget is at most {usd_text(MAX_NANO_USD)} US dollars, so this"
                    f" one can be raised by {usd_text(max(0, room_nano))} more"
                )
            await _set(connection, report, extra_nano=budgets.c.extra_nano + nano_usd)
            return {"nano_usd": nano_usd}

        return await self._change(change, "budget.raise", add)

    async def reset(self, change: BudgetChange) -> BudgetReport | None:
        """Let a period begin anew: what was spent and what is unaccounted do not count any more.
        Returns as `raise_limit`.
        """
        await BudgetStore(self._database).bury(change.now_s)

        async def begin_anew(
            connection: AsyncConnection, report: BudgetReport
        ) -> Mapping[str, Any]:
            counted, released = report.counted_nano, await release_dead(connection, *_id(report))
            await forget(connection, *_id(report))
            await _set(
                connection,
                report,
                extra_nano=budgets.c.extra_nano + counted,
                reset_nano=budgets.c.reset_nano + counted,
            )
            return {"spent_nano": counted, "unaccounted_nano": released}

        return await self._change(change, "budget.reset", begin_anew)

    async def release(self, change: BudgetChange) -> BudgetReport | None:
        """Give back what dead processes have left unaccounted. Returns as `raise_limit`."""
        await BudgetStore(self._database).bury(change.now_s)

        async def give_back(connection: AsyncConnection, report: BudgetReport) -> Mapping[str, Any]:
            return {"unaccounted_nano": await release_dead(connection, *_id(report))}

        return await self._change(change, "budget.release", give_back)

    async def _change(
        self,
        change: BudgetChange,
        action: str,
        work: Callable[[AsyncConnection, BudgetReport], Awaitable[Mapping[str, Any]]],
    ) -> BudgetReport | None:
        query = _reports(BudgetFilter(key=change.key, at_s=int(change.now_s)), change.now_s)
        # Of a rule whose period was changed, two budgets may contain the time until the next lease.
        query = query.order_by(budgets.c.period_start_s.desc()).limit(1)

        async def carry_out(connection: AsyncConnection) -> BudgetReport | None:
            await _lock(connection, change.key)
            before = await _read(query, connection)
            if not before:
                return None
            details = await work(connection, before[0])
            (report,) = await _read(query, connection)
            # What is reached again later is warned of again.
            await _set(connection, report, warned=min(report.warned, report.level))
            details = {"period_start_s": report.period_start_s, **details}
            row = audit_values(int(change.now_s), change.actor, action, change.key, details)
            await connection.execute(sa.insert(audit), row)
            return report

        return await self._database.change_durably(carry_out)


async def _read(query: sa.Select[Any], connection: AsyncConnection) -> list[BudgetReport]:
    return [BudgetReport(*row) for row in await connection.execute(query)]


async def _lock(connection: AsyncConnection, key: str) -> None:
    """Let no other change of these budgets run at the same time."""
    lease = budget_leases.c
    dead = sa.select(budget_workers.c.id).where(budget_workers.c.dead_s.is_not(None))
    of_dead = sa.select(lease.id).where(lease.key == key, lease.worker.in_(dead))
    await connection.execute(of_dead.with_for_update())
    await connection.execute(sa.select(budgets.c.key).where(budgets.c.key == key).with_for_update())


def _reports(wanted: BudgetFilter, now_s: float) -> sa.Select[Any]:
    """Build the query for the columns of BudgetReport."""
    budget, lease = budgets.c, budget_leases.c
    dead = is_dead(now_s)
    spent = budget.spent_nano + _sum(lease.spent_nano)
    unpriced = budget.unpriced_nano + _sum(lease.unpriced_nano)
    unaccounted = _sum(sa.case((dead, unspent()), else_=0))
    query = (
        sa.select(
            budget.key, budget.period_start_s, budget.period_end_s, budget.rule, budget.subject,
            budget.limit_nano, budget.extra_nano, budget.reset_nano, budget.warned,
            spent, unpriced, budget.over_nano + _sum(lease.over_nano),
            _sum(sa.case((dead, 0), else_=lease.reserved_nano)),
            _sum(sa.case((dead, 0), else_=unspent())),
            unaccounted,
        )
        .join_from(
            budgets,
            budget_leases,
            sa.and_(lease.key == budget.key, lease.period_start_s == budget.period_start_s),
            isouter=True,
        )
        .join(budget_workers, budget_workers.c.id == lease.worker, isouter=True)
        .group_by(budget.key, budget.period_start_s)
    )  # fmt: skip
    for column, value in (
        (budget.key, wanted.key), (budget.rule, wanted.rule), (budget.subject, wanted.subject),
    ):  # fmt: skip
        if value is not None:
            query = query.where(column == value)
    if wanted.at_s is not None:
        end = budget.period_end_s
        query = query.where(
            budget.period_start_s <= wanted.at_s, sa.or_(end.is_(None), end > wanted.at_s)
        )
    if wanted.spent_percent:
        lost = spent + unpriced + unaccounted - budget.reset_nano
        limit = budget.limit_nano + budget.extra_nano - budget.reset_nano
        # A hundred times the largest budget does not fit into 64 bits. Rounding keeps the order.
        percent = sa.cast(limit, sa.Double) * wanted.spent_percent
        query = query.having(sa.cast(lost, sa.Double) * 100 >= percent)
    return query


def _sum(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    # PostgreSQL's sum of integers is a decimal number.
    return sa.cast(sa.func.coalesce(sa.func.sum(column), 0), budgets.c.spent_nano.type)


def _is(report: BudgetReport) -> sa.ColumnElement[bool]:
    budget = budgets.c
    return sa.and_(budget.key == report.key, budget.period_start_s == report.period_start_s)


def _id(report: BudgetReport) -> tuple[str, int]:
    return report.key, report.period_start_s


async def _set(connection: AsyncConnection, report: BudgetReport, **values: Any) -> None:
    await connection.execute(sa.update(budgets).where(_is(report)).values(**values))
