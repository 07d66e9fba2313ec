"""Store what is spent of each budget, and the leases of the processes that may spend it.

Owns the transactions that move money between a budget and a lease, so that in every committed state
`granted_nano` of a budget is what its closed leases have spent and what its open leases hold, and
is within the limit of a hard budget, except for `over_nano`. The ledger writes what calls cost in
the transaction of their rows, with the statements of `charge_batch`: each process writes the sums
of its own leases, so a repeated write changes nothing.

Transactions lock a lease before its budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.core.budgets import MAX_SUM_NANO, Account, Charged, lease_nano, warning_level
from relay.storage.database import Database, insert_of
from relay.storage.inserts import Batch, Insert, Update
from relay.storage.tables import budget_leases, budget_workers, budgets

DEAD_S = 60
"""A process whose last heartbeat is older is dead: what is left of its leases is charged."""
_CLOSED_AT_ONCE = 100
_RECALLS_AT_ONCE = 1000

_OPEN_BUDGET = Insert(
    budgets, ("key", "period_start_s", "period_end_s", "rule", "subject", "limit_nano")
)
_OPEN_LEASE = Insert(budget_leases, ("id", "worker", "key", "period_start_s"))
_CHARGE = Update(
    "UPDATE budget_leases SET spent_nano = $1, unpriced_nano = $2, over_nano = $3 WHERE id = $4"
)
# What is charged above the lease is added to the budget, for it is spent whatever the limit: bills
# above the bounds of calls, and calls whose process was taken for dead and whose lease an
# administrator has released. The rows decide, since such a process does not know of that.
_OVERDRAW_BUDGET = Update(
    "UPDATE budgets SET granted_nano = granted_nano + (SELECT l.spent_nano + l.unpriced_nano"
    " - l.granted_nano FROM budget_leases l WHERE l.id = $1) WHERE key = $2 AND period_start_s = $3"
    " AND granted_nano < $4"
    " AND EXISTS (SELECT 1 FROM budget_leases l WHERE l.id = $1"
    " AND l.spent_nano + l.unpriced_nano > l.granted_nano)"
)
_OVERDRAW_LEASE = Update(
    "UPDATE budget_leases SET granted_nano = spent_nano + unpriced_nano WHERE id = $1"
    " AND spent_nano + unpriced_nano > granted_nano"
)


class BudgetState(NamedTuple):
    """The money of one budget in one period, without that of one lease."""

    limit_nano: int
    """The limit of the rule, and what an administrator added to it."""
    charged: Charged
    """What other leases were charged, open or closed."""
    others_nano: int
    """What other running processes have leased and not spent."""
    unaccounted_nano: int
    """What dead processes have leased, and may have spent."""

    @property
    def lost_nano(self) -> int:
        """What the budget has lost without that one lease."""
        return self.charged.total_nano + self.unaccounted_nano


class Leased(NamedTuple):
    """The result of `lease`, and the state of a budget that had too little left."""

    granted_nano: int
    """What the lease has by now."""
    raised_nano: int
    """What an administrator has added to the limit."""
    others_nano: int
    """What the budget has lost without this lease since its last reset; without what others have
    lost, if it is too little for a warning."""
    shortage: BudgetState | None = None


class Buried(NamedTuple):
    """A process that was found dead, and what is left of its leases."""

    worker: str
    unaccounted_nano: int


class Recall(NamedTuple):
    """A lease that another process wants back, and the number of that recall."""

    lease_id: str
    number: int


class BudgetStore:
    """The budgets of a database. Every method raises DatabaseUnavailable, DatabaseNewer and
    RowsRefused. `now_s` is the time of the clock by which processes write their heartbeats.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin_worker(self, worker: str, now_s: float) -> bool:
        """Add a process, or write its heartbeat if an attempt whose answer was lost has added it.
        False if it counts as dead.
        """
        row = {"id": worker, "heartbeat_s": int(now_s), "dead_s": None}
        query = insert_of(self._database)(budget_workers).values(row)
        query = query.on_conflict_do_update(
            index_elements=[budget_workers.c.id],
            set_={"heartbeat_s": int(now_s)},
            where=budget_workers.c.dead_s.is_(None),
        )
        return await self._database.change_durably(partial(_run, query)) == 1

    async def beat(self, worker: str, now_s: float) -> bool:
        """Write the heartbeat of a process; False if it counts as dead, and must not spend what is
        left of its leases.
        """
        query = sa.update(budget_workers).where(
            budget_workers.c.id == worker, budget_workers.c.dead_s.is_(None)
        )
        return await self._database.change(partial(_run, query.values(heartbeat_s=int(now_s)))) == 1

    async def bury(self, now_s: float) -> list[Buried]:
        """Mark the processes whose heartbeat is too old as dead, and return those that this call
        has marked. Their rows are kept while they have leases.
        """
        return await self._database.change(partial(_bury, now_s=int(now_s)))

    async def end_worker(self, worker: str) -> None:
        """Remove a process that has ended; one that still has leases is found dead later."""
        ended = sa.delete(budget_workers).where(budget_workers.c.id == worker, ~_has_lease())
        await self._database.change(partial(_run, ended))

    async def lease(self, account: Account, missing_nano: Sequence[int], now_s: float) -> Leased:
        """Add to a lease what calls miss, as far as a hard budget has it. If that is not enough for
        all of them, the state of the budget is returned too. What the lease has and `account` does
        not know of returns to the budget before: the answer that granted it was lost, or the
        process has forgotten it on purpose.
        """
        work = partial(
            _lease, account=account, known_nano=account.granted_nano, missing_nano=missing_nano,
            now_s=now_s,
        )  # fmt: skip
        return await self._database.change_durably(work)

    async def give_back(self, account: Account, answered: int) -> int:
        """Return what a lease has and `account` does not know of, and note which recall that
        answers, and the limit of the rule. Returns what the lease has left.
        """
        known_nano = account.granted_nano
        work = partial(_give_back, account=account, known_nano=known_nano, answered=answered)
        return await self._database.change_durably(work)

    async def close(self, accounts: Sequence[Account]) -> None:
        """Close leases that are settled: what is left of them returns to their budgets."""
        for at in range(0, len(accounts), _CLOSED_AT_ONCE):
            batch = sorted(accounts[at : at + _CLOSED_AT_ONCE], key=lambda each: each.key)
            await self._database.change_durably(partial(_close_all, accounts=batch))

    async def recall(self, account: Account) -> None:
        """Ask every process to give back what it does not need of its lease."""
        where = _of_budget(account)
        await self._database.change(partial(_add_to_budget, where=where, amounts={"recalls": 1}))

    async def recalls(self, worker: str) -> list[Recall]:
        """Return the recalls that a process has not answered."""
        lease = budget_leases.c
        query = (
            sa.select(lease.id, budgets.c.recalls)
            .join_from(budget_leases, budgets, _same_budget())
            .where(lease.worker == worker, lease.answered < budgets.c.recalls)
            .limit(_RECALLS_AT_ONCE)
        )

        async def find(connection: AsyncConnection) -> list[Recall]:
            return [Recall(*row) for row in await connection.execute(query)]

        return await self._database.watch(find)

    async def is_answered(self, account: Account, now_s: float) -> bool:
        """True if no other running process still has to answer the last recall of a budget."""
        lease = budget_leases.c
        query = (
            sa.select(lease.id)
            .join_from(budget_leases, budgets, _same_budget())
            .join(budget_workers, budget_workers.c.id == lease.worker)
            .where(
                _of_budget(account),
                lease.worker != account.worker,
                lease.answered < budgets.c.recalls,
                ~is_dead(now_s),
                unspent() > 0,
            )
            .limit(1)
        )

        async def find(connection: AsyncConnection) -> bool:
            return (await connection.execute(query)).first() is None

        return await self._database.change(find)


async def delete_ended(connection: AsyncConnection, before_s: float, limit: int) -> int:
    """Delete the budgets of periods that ended before a time, with the leases that dead processes
    have left there, and the dead processes that have no lease. Returns how many budgets.
    """
    budget, lease, worker = budgets.c, budget_leases.c, budget_workers.c
    ended = sa.select(budget.key, budget.period_start_s).where(budget.period_end_s < before_s)
    found = (await connection.execute(ended.order_by(budget.period_end_s).limit(limit))).all()
    if found:
        named = [tuple(row) for row in found]
        of_leases = sa.tuple_(lease.key, lease.period_start_s).in_(named)
        await connection.execute(sa.delete(budget_leases).where(of_leases))
        of_budgets = sa.tuple_(budget.key, budget.period_start_s).in_(named)
        await connection.execute(sa.delete(budgets).where(of_budgets))
        dead = worker.dead_s.is_not(None)
        await connection.execute(sa.delete(budget_workers).where(dead, ~_has_lease()))
    return len(found)


def charge_batch(written: Mapping[Account, Charged]) -> Batch:
    """Return the statements that write what the leases of this process were charged so far."""
    accounts = sorted(written, key=lambda account: account.key)
    unknown = [account for account in accounts if not account.is_stored]
    return (
        (_OPEN_BUDGET, [_budget_row(account) for account in unknown]),
        (_OPEN_LEASE, [_lease_row(account) for account in unknown]),
        (_CHARGE, [(*written[account], account.lease_id) for account in accounts]),
        (
            _OVERDRAW_BUDGET,
            [(each.lease_id, each.key, each.span.start_s, MAX_SUM_NANO) for each in accounts],
        ),
        (_OVERDRAW_LEASE, [(each.lease_id,) for each in accounts]),
    )


def _budget_row(account: Account) -> tuple[Any, ...]:
    rule, span = account.rule, account.span
    return (
        account.key, span.start_s, span.end_s, rule.name, account.subject, rule.limit_nano
    )  # fmt: skip


def _lease_row(account: Account) -> tuple[Any, ...]:
    return (account.lease_id, account.worker, account.key, account.span.start_s)


async def _run(query: sa.Executable, connection: AsyncConnection) -> int:
    """Run a statement, and return how many rows it changed."""
    return int((await connection.execute(query)).rowcount)


async def _bury(connection: AsyncConnection, now_s: int) -> list[Buried]:
    worker = budget_workers.c
    silent = sa.and_(worker.dead_s.is_(None), worker.heartbeat_s < now_s - DEAD_S)
    if not (await connection.execute(sa.select(worker.id).where(silent))).first():
        return []
    await connection.execute(sa.delete(budget_workers).where(silent, ~_has_lease()))
    dead = sa.update(budget_workers).where(silent).values(dead_s=now_s).returning(worker.id)
    left = _sum(unspent()).where(budget_leases.c.worker == sa.bindparam("worker"))
    return [
        Buried(each, int((await connection.execute(left, {"worker": each})).scalar_one()))
        for each in (await connection.execute(dead)).scalars().all()
    ]


async def _lease(
    connection: AsyncConnection, account: Account, known_nano: int, missing_nano: Sequence[int],
    now_s: float,
) -> Leased:  # fmt: skip
    held = await _held(connection, account, known_nano)
    if held is None:
        await _open(connection, account)
        held = Held(0, 0)
    of_budget, rule = _of_budget(account), account.rule
    budget = budgets.c
    query = sa.select(
        budget.extra_nano, budget.granted_nano, budget.reset_nano, budget.limit_nano,
        budget.period_end_s,
    ).where(of_budget)  # fmt: skip
    row = (await connection.execute(query.with_for_update())).one()
    extra, granted, reset, limit, end_s = row
    if not held.known_nano or end_s != account.span.end_s:
        await _make_current(connection, account, now_s)
    raised, granted = extra - reset, granted - held.unknown_nano
    amount = lease_nano(rule.limit_nano + extra - granted, rule, missing_nano)
    amount = max(0, min(amount, MAX_SUM_NANO - granted))
    if amount or held.unknown_nano or limit != rule.limit_nano:
        values = {"granted_nano": granted + amount, "limit_nano": rule.limit_nano}
        await connection.execute(sa.update(budgets).where(of_budget).values(values))
        await _grant(connection, account.lease_id, amount - held.unknown_nano)
    is_enough, state = amount >= sum(missing_nano), None
    if not is_enough or warning_level(granted + amount - reset, rule.limit_nano + raised):
        state = await read_state(connection, account, now_s)
    others = (0 if state is None else state.lost_nano) - reset
    return Leased(held.known_nano + amount, raised, others, None if is_enough else state)


class Held(NamedTuple):
    """What a lease has."""

    known_nano: int
    unknown_nano: int
    """What its process does not know of, and therefore does not spend."""


async def _held(connection: AsyncConnection, account: Account, known_nano: int) -> Held | None:
    """Lock a lease, and return what it has; None if there is no such lease. `known_nano` is what
    its process knows of.
    """
    lease = budget_leases.c
    query = sa.select(lease.granted_nano, lease.spent_nano + lease.unpriced_nano)
    query = query.where(lease.id == account.lease_id).with_for_update()
    row = (await connection.execute(query)).first()
    if row is None:
        return None
    granted, charged = map(int, row)
    # What was charged is granted too, also if the process does not know yet that it is written.
    unknown = max(0, granted - max(known_nano, charged))
    return Held(granted - unknown, unknown)


async def _give_back(
    connection: AsyncConnection, account: Account, known_nano: int, answered: int
) -> int:
    held = await _held(connection, account, known_nano)
    if held is None:
        return known_nano
    lease = budget_leases.c
    await connection.execute(
        sa.update(budget_leases)
        .where(lease.id == account.lease_id)
        .values(
            granted_nano=lease.granted_nano - held.unknown_nano,
            answered=sa.case((lease.answered < answered, answered), else_=lease.answered),
        )
    )
    of_budget, limit_nano = _of_budget(account), account.rule.limit_nano
    if held.unknown_nano:
        await _add_to_budget(connection, of_budget, {"granted_nano": -held.unknown_nano})
    other = sa.and_(of_budget, budgets.c.limit_nano != limit_nano)
    await connection.execute(sa.update(budgets).where(other).values(limit_nano=limit_nano))
    return held.known_nano


async def release_dead(connection: AsyncConnection, key: str, period_start_s: int) -> int:
    """Give what dead processes have left unaccounted back to a budget. Returns how much."""
    lease, budget = budget_leases.c, budgets.c
    dead = sa.select(budget_workers.c.id).where(budget_workers.c.dead_s.is_not(None))
    query = sa.select(lease.id, unspent()).where(
        lease.key == key, lease.period_start_s == period_start_s, lease.worker.in_(dead)
    )
    released = 0
    for lease_id, left in (await connection.execute(query.with_for_update())).all():
        await _grant(connection, lease_id, -left)
        released += left
    where = sa.and_(budget.key == key, budget.period_start_s == period_start_s)
    await _add_to_budget(connection, where, {"granted_nano": -released})
    return released


async def _open(connection: AsyncConnection, account: Account) -> None:
    """Insert the rows of a lease and of its budget, unless they exist."""
    for into, row in ((_OPEN_BUDGET, _budget_row(account)), (_OPEN_LEASE, _lease_row(account))):
        await connection.execute(sa.text(into.named_sql), dict(zip(into.columns, row, strict=True)))


async def _make_current(connection: AsyncConnection, account: Account, now_s: float) -> None:
    """Let no other period of a budget contain the time, so that reports and administrators find
    this one: the rule had periods of another length before. Those may have begun at the same time,
    and so have the same row.
    """
    budget, start_s, end_s = budgets.c, account.span.start_s, account.span.end_s
    others = sa.and_(
        budget.key == account.key,
        budget.period_start_s != start_s,
        budget.period_start_s <= int(now_s),
        sa.or_(budget.period_end_s.is_(None), budget.period_end_s > int(now_s)),
    )
    for where, value in ((others, int(now_s)), (_of_budget(account), end_s)):
        await connection.execute(sa.update(budgets).where(where).values(period_end_s=value))


async def _grant(connection: AsyncConnection, lease_id: str, amount_nano: int) -> None:
    lease = budget_leases.c
    await connection.execute(
        sa.update(budget_leases)
        .where(lease.id == lease_id)
        .values(granted_nano=lease.granted_nano + amount_nano)
    )


async def _close_all(connection: AsyncConnection, accounts: Sequence[Account]) -> None:
    for account in accounts:
        await _close(connection, account)


async def _close(connection: AsyncConnection, account: Account) -> None:
    lease = budget_leases.c
    query = (
        sa.delete(budget_leases)
        .where(lease.id == account.lease_id)
        .returning(lease.granted_nano, lease.spent_nano, lease.unpriced_nano, lease.over_nano)
    )
    row = (await connection.execute(query)).first()
    if row is None:
        return  # closed before: the answer to that was lost
    granted_nano, charged = row[0], Charged(*row[1:])
    changes = charged._asdict() | {"granted_nano": charged.total_nano - granted_nano}
    await _add_to_budget(connection, _of_budget(account), changes)


async def _add_to_budget(
    connection: AsyncConnection, where: sa.ColumnElement[bool], amounts: Mapping[str, int]
) -> None:
    values = {name: _sum_of(budgets.c[name], amount) for name, amount in amounts.items()}
    await connection.execute(sa.update(budgets).where(where).values(values))


def _sum_of(column: sa.Column[int], amount: int) -> sa.ColumnElement[int]:
    """Return the expression for a sum of a budget with an amount more, up to MAX_SUM_NANO."""
    if amount <= 0:
        return column + amount
    return sa.case((column > MAX_SUM_NANO - amount, MAX_SUM_NANO), else_=column + amount)


async def read_state(connection: AsyncConnection, account: Account, now_s: float) -> BudgetState:
    """Return the state of a budget without the lease of `account`."""
    budget, lease = budgets.c, budget_leases.c
    query = sa.select(
        budget.extra_nano, budget.spent_nano, budget.unpriced_nano, budget.over_nano
    ).where(_of_budget(account))
    extra, *closed = (await connection.execute(query)).first() or (0, 0, 0, 0)
    dead = is_dead(now_s)
    is_other = sa.and_(~dead, lease.worker != account.worker)
    query = (
        _sum(
            lease.spent_nano,
            lease.unpriced_nano,
            lease.over_nano,
            sa.case((is_other, unspent()), else_=0),
            sa.case((dead, unspent()), else_=0),
        )
        .join_from(budget_leases, budget_workers, budget_workers.c.id == lease.worker, isouter=True)
        .where(
            lease.key == account.key,
            lease.period_start_s == account.span.start_s,
            lease.id != account.lease_id,
        )
    )
    *charged, others, unaccounted = map(int, (await connection.execute(query)).one())
    limit_nano = account.rule.limit_nano + extra
    return BudgetState(limit_nano, Charged(*closed).plus(Charged(*charged)), others, unaccounted)


def _sum(*columns: Any) -> sa.Select[Any]:
    return sa.select(*(sa.func.coalesce(sa.func.sum(column), 0) for column in columns))


def _has_lease() -> sa.ColumnElement[bool]:
    return sa.exists().where(budget_leases.c.worker == budget_workers.c.id)


def unspent() -> sa.ColumnElement[Any]:
    """Return the expression for what is left of a lease."""
    lease = budget_leases.c
    return lease.granted_nano - lease.spent_nano - lease.unpriced_nano


def is_dead(now_s: float) -> sa.ColumnElement[bool]:
    """Return the condition for a worker that is dead, in a query that joins the workers."""
    worker = budget_workers.c
    return sa.or_(
        worker.id.is_(None), worker.dead_s.is_not(None), worker.heartbeat_s < int(now_s) - DEAD_S
    )


def _of_budget(account: Account) -> sa.ColumnElement[bool]:
    return sa.and_(budgets.c.key == account.key, budgets.c.period_start_s == account.span.start_s)


def _same_budget() -> sa.ColumnElement[bool]:
    lease = budget_leases.c
    return sa.and_(budgets.c.key == lease.key, budgets.c.period_start_s == lease.period_start_s)
