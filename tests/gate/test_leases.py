"""Leases of budgets: whatever crashes, fails or is recalled, no money is spent twice or lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.core.budgets import (
    MAX_NANO_USD,
    MAX_SUM_NANO,
    Account,
    BudgetRule,
    BudgetRules,
    BudgetUse,
    Charged,
    Period,
    lease_nano,
    span_of,
)
from relay.core.errors import BudgetBusy, BudgetExhausted, StoreUnavailable
from relay.gate.budgets import BudgetPlan, Budgets
from relay.gate.leases import STORE_ERRORS, Leases
from relay.ledger.charges import Charges
from relay.storage.budget_reports import BudgetChange, BudgetFilter, BudgetReports
from relay.storage.budgets import (
    DEAD_S,
    BudgetState,
    BudgetStore,
    charge_batch,
    delete_ended,
    read_state,
    release_dead,
)
from relay.storage.database import Database, DatabaseUnavailable, database_url, try_out
from relay.storage.inserts import Batch
from relay.storage.readers import set_pragmas
from relay.storage.tables import budget_leases, budget_workers, budgets

T = TypeVar("T")
LIMIT = 1000
NOON = 1_700_000_000


class Unreliable(Database):
    """A database whose next transaction fails: before its commit, or after it."""

    fails: str = ""
    ends: asyncio.Event | None = None
    """Set when a transaction may end; None: at once."""

    @contextlib.asynccontextmanager
    async def _transaction(self, engine: Any) -> AsyncIterator[AsyncConnection]:
        fails, self.fails = self.fails, ""
        async with super()._transaction(engine) as connection:
            yield connection
            if self.ends is not None:
                await self.ends.wait()
            if fails == "before":
                raise sa.exc.OperationalError("", {}, OSError())
        if fails == "after":
            raise DatabaseUnavailable("the answer was lost")

    async def write(self, batch: Batch) -> None:
        fails, self.fails = self.fails, ""
        if fails == "before":
            raise DatabaseUnavailable("not reached")
        await super().write(batch)
        if fails == "after":
            raise DatabaseUnavailable("the answer was lost")


async def nothing() -> None:
    pass


@dataclass
class Worker:
    """A process: its leases, the calls that it runs, and the charges that it has not written."""

    leases: Leases
    rule: BudgetRule
    key: str
    calls: list[BudgetUse] = field(default_factory=list)
    charges: Charges = field(default_factory=Charges)
    ids: list[str] = field(default_factory=list)
    """Those under which the database knows it, one after another."""

    def __post_init__(self) -> None:
        self.budgets = Budgets(BudgetRules((self.rule,)), self.leases, nothing)
        self.plan = BudgetPlan(((self.rule, self.key, "all"),), is_hard=True)

    def account(self) -> Account:
        return self.leases.account(self.rule, self.key, "all", self.leases.clock())

    async def begin_call(self, nano: int) -> BudgetUse:
        exchange: Any = SimpleNamespace(budget=None)
        await self.budgets.reserve_amount(exchange, self.plan, nano)
        self.calls.append(exchange.budget)
        return self.calls[-1]

    def settle(self, number: int, cost: int | None) -> Charged:
        use = self.calls.pop(number % len(self.calls))
        use.settle(cost)
        self.charges.keep(use)
        return use.charged

    async def write(self, database: Database) -> None:
        """Write the charges, as the ledger does in the transaction of its rows."""
        sums = self.charges.begin([])
        try:
            await database.write(charge_batch(sums))
        except BaseException:
            self.charges.failed()
            raise
        self.charges.written(sums)


async def state_of(database: Database, account: Account, now_s: float) -> BudgetState:
    """The state of a budget without the lease of `account`."""
    return await database.change(partial(read_state, account=account, now_s=now_s))


async def release(database: Database, key: str) -> int:
    """Give back what dead workers have left of a budget in total, as an administrator does."""
    return await database.change_durably(partial(release_dead, key=key, period_start_s=0))


_numbers = itertools.count()


def worker(database: Database, clock: Callable[[], float], key: str, recall_others: Callable[[], Awaitable[None]] = nothing, **of_rule: Any) -> Worker:
    rule = BudgetRule(**{"name": "mine", "limit_nano": LIMIT, "period": "total"} | of_rule)
    ids: list[str] = []

    def new_id() -> str:
        ids.append(f"worker-{next(_numbers)}")
        return ids[-1]

    return Worker(Leases(BudgetStore(database), clock, new_id, recall_others), rule, key, ids=ids)


@dataclass
class Stored:
    """The rows of one budget."""

    granted: int
    closed: Charged
    leases: dict[str, tuple[int, Charged]]

    @property
    def charged(self) -> Charged:
        whole = self.closed
        for _, charged in self.leases.values():
            whole = whole.plus(charged)
        return whole


def stored(database: Database, key: str) -> Stored:
    """Read the rows of a budget in an SQLite file."""
    names = "granted_nano, spent_nano, unpriced_nano, over_nano"
    with contextlib.closing(sqlite3.connect(database._path)) as connection:
        row = connection.execute(f"SELECT {names} FROM budgets WHERE key = ?", (key,)).fetchone() or (0, 0, 0, 0)
        leases = connection.execute(f"SELECT id, {names} FROM budget_leases WHERE key = ?", (key,)).fetchall()
    return Stored(row[0], Charged(*row[1:]), {each[0]: (each[1], Charged(*each[2:])) for each in leases})


class Money(RuleBasedStateMachine):
    """Two workers on one budget, with crashes, lost answers, recalls, an administrator, and clients
    that leave.
    """

    loop: asyncio.AbstractEventLoop
    database: Unreliable

    @initialize()
    def begin(self) -> None:
        self.now = [float(NOON)]
        self.key = f"mine|{next(_numbers)}"
        self.workers = [self.new_worker() for _ in range(2)]
        self.costs = Charged()  # of all settled calls, also those whose worker crashed
        self.lost = Charged()  # the part that was never written
        self.released = 0
        self.crashed: set[str] = set()  # ids of workers

    def new_worker(self) -> Worker:
        return worker(self.database, self.clock, self.key, self.answer)

    async def answer(self) -> None:
        for each in self.workers:
            if each.leases._is_begun:
                await each.leases._answer()

    def clock(self) -> float:
        return self.now[0]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def attempt(self, work: Coroutine[Any, Any, Any], fails: str = "") -> None:
        self.database.fails = fails
        with contextlib.suppress(*STORE_ERRORS, BudgetBusy, BudgetExhausted, StoreUnavailable):
            self.run(work)
        self.database.fails = ""

    @rule(number=st.integers(0, 1), nano=st.integers(1, 400), fails=st.sampled_from(["", "", "before", "after"]))
    def begin_call(self, number: int, nano: int, fails: str) -> None:
        self.attempt(self.workers[number].begin_call(nano), fails)

    @rule(number=st.integers(0, 1), nano=st.integers(1, 400), steps=st.integers(0, 12))
    def leave(self, number: int, nano: int, steps: int) -> None:
        """Begin a call whose client leaves while the call waits for the database."""
        self.attempt(self.left(self.workers[number], nano, steps))

    async def left(self, each: Worker, nano: int, steps: int) -> None:
        call = asyncio.create_task(each.begin_call(nano))
        for _ in range(steps):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await asyncio.gather(*each.leases._changes, return_exceptions=True)

    @precondition(lambda self: any(each.calls for each in self.workers))
    @rule(number=st.integers(0, 1), call=st.integers(0, 9), cost=st.one_of(st.none(), st.integers(0, 500)))
    def end_call(self, number: int, call: int, cost: int | None) -> None:
        if self.workers[number].calls:
            self.costs = self.costs.plus(self.workers[number].settle(call, cost))

    @rule(number=st.integers(0, 1), fails=st.sampled_from(["", "", "before", "after"]))
    def write(self, number: int, fails: str) -> None:
        if self.workers[number].charges.waiting:
            self.attempt(self.workers[number].write(self.database), fails)

    @rule(number=st.integers(0, 1), fails=st.sampled_from(["", "before", "after"]))
    def recall(self, number: int, fails: str) -> None:
        self.attempt(self.workers[number].leases.store.recall(self.workers[number].account()))
        self.attempt(self.workers[1 - number].leases._answer(), fails)

    @rule(number=st.integers(0, 1), fails=st.sampled_from(["", "before", "after"]))
    def tidy(self, number: int, fails: str) -> None:
        self.attempt(self.workers[number].leases.tidy(), fails)

    @rule(seconds=st.sampled_from([5, 40, DEAD_S + 1]))
    def wait(self, seconds: int) -> None:
        self.now[0] += seconds

    @rule(number=st.integers(0, 1))
    def crash(self, number: int) -> None:
        """Kill a worker: what it knows is gone."""
        found = stored(self.database, self.key)
        mine = {each.lease_id: each for each in self.workers[number].leases._by_lease.values()}
        for lease_id, account in mine.items():
            written = found.leases.get(lease_id, (0, account.written))[1]
            self.lost = self.lost.plus(Charged(*(a - b for a, b in zip(account.charged, written, strict=True))))
        self.crashed |= {*self.workers[number].ids}
        self.workers[number] = self.new_worker()

    @rule()
    def release(self) -> None:
        self.released += self.run(release(self.database, self.key))

    @invariant()
    def the_rows_agree(self) -> None:
        found = stored(self.database, self.key)
        assert found.granted == found.closed.total_nano + sum(granted for granted, _ in found.leases.values())
        assert found.granted <= LIMIT + found.charged.over_nano + self.released
        for granted, charged in found.leases.values():
            assert granted >= charged.total_nano

    @invariant()
    def no_worker_believes_in_more_than_it_was_granted(self) -> None:
        found = stored(self.database, self.key)
        for each in self.workers:
            for account in each.leases._accounts.values():
                if account.lease_id in found.leases and each.leases.may_spend(self.now[0]):
                    unwritten = account.charged.total_nano - found.leases[account.lease_id][1].total_nano
                    assert account.granted_nano <= found.leases[account.lease_id][0] + max(0, unwritten)

    @invariant()
    def no_more_is_spent_than_the_limit_except_what_was_billed_above_the_bounds(self) -> None:
        reserved = sum(call.reserved_nano for one in self.workers for call in one.calls)
        assert self.costs.total_nano + reserved <= LIMIT + self.costs.over_nano + self.released

    def teardown(self) -> None:
        """Stop both workers: what is not charged is left, or was lost in a crash."""
        if not hasattr(self, "workers"):
            return
        for each in self.workers:
            while each.calls:
                self.costs = self.costs.plus(each.settle(0, 0))
            if each.charges.waiting:
                self.run(each.write(self.database))
            self.run(each.leases.stop())
        found = stored(self.database, self.key)
        written = tuple(a - b for a, b in zip(self.costs, self.lost, strict=True))
        assert found.charged == written
        assert {each.partition("/")[0] for each in found.leases} <= self.crashed


def _set_up_for_speed(connection: Any, _record: Any) -> None:
    set_pragmas(connection, "journal_mode = WAL", "synchronous = OFF")


def test_no_sequence_of_calls_crashes_and_lost_answers_spends_money_twice_or_loses_it(migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.gate.leases.RECALL_S", 0.01)  # for workers that have crashed
    # Not the disk is tested: without its waits there are ten times as many sequences in a second.
    monkeypatch.setattr("relay.storage.database._set_up_durable", _set_up_for_speed)
    monkeypatch.setattr("relay.storage.database._set_up", _set_up_for_speed)
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as folder:
        if not migrated_sqlite.exists():
            loop.run_until_complete(try_out(str(migrated_sqlite)))
        Money.loop = loop
        Money.database = Unreliable(database_url(str(shutil.copy(migrated_sqlite, folder))))
        try:
            run_state_machine_as_test(Money, settings=settings(max_examples=10, stateful_step_count=25, deadline=None))  # type: ignore[no-untyped-call]
        finally:
            loop.run_until_complete(Money.database.close())
            loop.close()


async def both(database: Database, clock: Callable[[], float], **of_rule: Any) -> tuple[Worker, Worker]:
    """Two workers, each of which asks the other for what it does not need."""
    workers: list[Worker] = []

    async def answer() -> None:
        for each in workers:
            await each.leases.answer_recalls()

    workers += [worker(database, clock, "mine", answer, **of_rule) for _ in range(2)]
    return workers[0], workers[1]


async def test_the_lease_of_a_dead_worker_is_charged_once_minus_its_rows_and_blocks_nothing_after_60_s(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.gate.leases.RECALL_S", 0.01)  # the dead worker does not answer
    now = [float(NOON)]
    dead, alive = await both(database, lambda: now[0])
    await dead.begin_call(100)
    dead.settle(0, 40)
    await dead.write(database)
    await dead.begin_call(50)
    dead.leases._by_lease.clear()  # it dies here: it has leased 100, of which 40 are in rows
    with pytest.raises(BudgetBusy):
        await alive.begin_call(901)
    now[0] += DEAD_S + 1
    with pytest.raises(BudgetExhausted):
        await alive.begin_call(901)
    await alive.begin_call(900)
    store = alive.leases.store
    assert [each.unaccounted_nano for each in await store.bury(now[0])] == [60]
    assert await store.bury(now[0]) == []
    assert [await release(database, "mine") for _ in range(2)] == [60, 0]
    await alive.begin_call(60)
    with pytest.raises(BudgetBusy):
        await alive.begin_call(1)


async def test_a_worker_that_was_taken_for_dead_begins_again_and_its_late_rows_count(database: Database) -> None:
    now = [float(NOON)]
    slow, other = await both(database, lambda: now[0])
    await slow.begin_call(100)
    await other.begin_call(1)
    before = slow.account()
    now[0] += DEAD_S + 1
    await other.leases.keep_alive()
    await other.leases.tidy()
    assert not slow.leases.may_spend(now[0])
    await slow.begin_call(10)
    assert slow.account() is not before and slow.account().worker != before.worker
    slow.settle(0, 70)
    await slow.write(database)
    state = await state_of(database, other.account(), now[0])
    assert (state.charged.spent_nano, state.unaccounted_nano) == (70, 30)
    assert await release(database, "mine") == 30


async def test_a_call_that_ends_after_its_lease_was_released_is_charged_all_the_same(database: Database) -> None:
    now = [float(NOON)]
    slow, other = await both(database, lambda: now[0])
    await slow.begin_call(100)
    await other.begin_call(1)
    now[0] += DEAD_S + 1
    await other.leases.keep_alive()
    await other.leases.tidy()
    assert await release(database, "mine") == 100
    slow.settle(0, 70)
    await slow.write(database)
    with pytest.raises(BudgetBusy):
        await other.begin_call(930)
    await other.begin_call(929)


async def test_a_running_call_of_yesterday_spends_nothing_from_memory_after_its_worker_was_taken_for_dead(database: Database) -> None:
    """What is free of yesterday's lease may have been released, and spent by another."""
    now = [float(NOON)]
    slow, other = await both(database, lambda: now[0], period="day")
    use = await slow.begin_call(200)
    await slow.begin_call(200)
    slow.settle(1, 0)
    (yesterday,) = use.accounts
    assert yesterday.free_nano == 200
    now[0] = float(yesterday.span.end_s or 0)
    await slow.leases.keep_alive()
    assert slow.account() is not yesterday
    await other.leases.keep_alive()
    now[0] += DEAD_S + 1
    await other.leases.keep_alive()
    await other.leases.tidy()
    await slow.leases.keep_alive()
    assert yesterday.free_nano == 0


async def test_a_running_call_of_a_worker_that_was_taken_for_dead_takes_more_only_from_the_database(database: Database) -> None:
    """What its worker had leased and not reserved may have been released, and spent by another."""
    now = [float(NOON)]
    slow, other = await both(database, lambda: now[0])
    use = await slow.begin_call(10)
    await other.begin_call(1)
    assert slow.account().free_nano == 10
    now[0] += DEAD_S + 1
    await other.leases.keep_alive()
    await other.leases.tidy()
    assert await release(database, "mine") == 20
    await slow.budgets.extend(use, [slow.rule], 10, 10)
    assert use.reserved_nano == 20
    with pytest.raises(BudgetExhausted):
        await other.begin_call(LIMIT - 1 - 19)
    slow.settle(0, 20)
    await slow.write(database)
    await release(database, "mine")
    await other.begin_call(LIMIT - 1 - 20)


async def test_what_a_call_of_a_worker_that_was_taken_for_dead_gives_back_is_not_spent_from_memory(database: Database) -> None:
    now = [float(NOON)]
    slow, other = await both(database, lambda: now[0])
    await slow.begin_call(300)
    use = await slow.begin_call(10)
    await other.begin_call(1)
    now[0] += DEAD_S + 1
    await other.leases.keep_alive()
    await other.leases.tidy()
    await release(database, "mine")
    await other.begin_call(980)
    await slow.leases.keep_alive()
    slow.settle(0, 0)
    assert not slow.budgets.extend_at_once(use, 100)
    with pytest.raises(BudgetBusy):
        await slow.budgets.extend(use, [slow.rule], 100, 100)


async def test_a_call_that_one_budget_refuses_takes_nothing_of_the_others(database: Database) -> None:
    one, _ = await both(database, lambda: float(NOON))
    small = worker(database, lambda: float(NOON), "small", name="small", limit_nano=15)
    plan = BudgetPlan(one.plan.budgets + small.plan.budgets, is_hard=True)
    exchange: Any = SimpleNamespace(budget=None)
    small.leases = one.leases
    for nano in (10, 5):  # the second call needs no lease of the first budget any more
        await one.budgets.reserve_amount(exchange, plan, nano)
    for _ in range(2):
        with pytest.raises(BudgetBusy):
            await one.budgets.reserve_amount(exchange, plan, 1)
    assert [(account.reserved_nano, account.calls) for account in plan.accounts] == [(15, 2), (15, 2)]


async def test_a_call_takes_more_under_all_of_its_budgets_or_under_none(database: Database) -> None:
    one, _ = await both(database, lambda: float(NOON))
    use = await one.begin_call(10)
    small = worker(database, lambda: float(NOON), "small", name="small", limit_nano=15)
    small.leases = one.leases
    await small.begin_call(10)
    use.accounts += small.calls[0].accounts
    with pytest.raises(BudgetExhausted):
        await one.budgets.extend(use, [one.rule, small.rule], 10, 20)
    assert [account.reserved_nano for account in use.accounts] == [use.reserved_nano] * 2 == [10, 10]
    await one.budgets.extend(use, [one.rule, small.rule], 5, 15)
    assert [account.reserved_nano for account in use.accounts] == [use.reserved_nano] * 2 == [15, 15]


async def test_a_worker_without_a_heartbeat_for_50_s_spends_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [float(NOON)]
    one, _ = await both(database, lambda: now[0])
    await one.begin_call(10)
    one.settle(0, 0)
    assert one.account().free_nano == 20
    now[0] += 51

    async def unavailable(*_arguments: Any) -> Any:
        raise DatabaseUnavailable("gone")

    monkeypatch.setattr(one.leases.store, "beat", unavailable)
    with pytest.raises(StoreUnavailable):
        await one.begin_call(10)


async def test_a_recall_brings_back_what_is_free_and_leaves_what_is_reserved(database: Database) -> None:
    one, other = await both(database, lambda: NOON)
    await one.begin_call(600)
    await one.begin_call(100)
    one.settle(0, 100)  # 500 of its lease are free
    with pytest.raises(BudgetBusy):
        await other.begin_call(801)
    assert one.account().free_nano == 0 and one.account().reserved_nano == 100
    await other.begin_call(800)


async def test_a_lease_whose_return_is_not_confirmed_is_not_spent(unreliable: Unreliable) -> None:
    one, other = await both(unreliable, lambda: NOON)
    await one.begin_call(600)
    one.settle(0, 0)
    await other.begin_call(100)
    await other.leases.store.recall(other.account())
    recalls = await one.leases.store.recalls(one.account().worker)
    unreliable.fails = "after"
    with pytest.raises(DatabaseUnavailable):
        await one.leases._give_back(one.account(), recalls[0].number)
    assert one.account().free_nano == 0
    await other.begin_call(900)
    with pytest.raises(BudgetBusy):
        await one.begin_call(1)


@pytest.fixture
async def unreliable(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[Unreliable]:
    if not migrated_sqlite.exists():
        await try_out(str(migrated_sqlite))
    database = Unreliable(database_url(str(shutil.copy(migrated_sqlite, tmp_path))))
    yield database
    await database.close()


@pytest.mark.parametrize("fails", ["before", "after"])
async def test_charges_whose_write_is_not_confirmed_are_written_once(unreliable: Unreliable, fails: str) -> None:
    one, _ = await both(unreliable, lambda: NOON)
    for cost in (30, 40):
        await one.begin_call(50)
        one.settle(0, cost)
        unreliable.fails = fails
        with pytest.raises(DatabaseUnavailable):
            await one.write(unreliable)
        if cost == 40:
            await one.begin_call(10)
            one.settle(0, None)
        await one.write(unreliable)
    assert stored(unreliable, "mine").charged == Charged(70, 10)
    assert one.account().charged == one.account().written == Charged(70, 10)


async def test_what_a_provider_bills_above_the_bound_is_missing_to_every_worker(unreliable: Unreliable) -> None:
    one, other = await both(unreliable, lambda: NOON)
    await one.begin_call(100)
    one.settle(0, 400)
    await one.write(unreliable)
    found = stored(unreliable, "mine")
    assert (found.granted, found.charged) == (400, Charged(400, 0, 300))
    with pytest.raises(BudgetExhausted):
        await other.begin_call(601)
    await other.begin_call(600)


@pytest.mark.parametrize("calls", [1, 12])
async def test_the_sums_of_a_budget_that_only_warns_stay_within_64_bits(database: Database, calls: int) -> None:
    for _ in range(8):
        one = worker(database, lambda: NOON, "mine", is_hard=False)
        for _ in range(calls):
            await one.begin_call(MAX_NANO_USD)
            one.settle(0, None)
            await one.write(database)
        await one.leases.stop()
    state = await state_of(database, worker(database, lambda: NOON, "mine").account(), NOON)
    assert MAX_SUM_NANO <= state.charged.unpriced_nano <= 8 * MAX_NANO_USD
    await worker(database, lambda: NOON, "mine", is_hard=False).begin_call(1)
    with pytest.raises(BudgetExhausted):
        await worker(database, lambda: NOON, "mine").begin_call(1)


async def test_a_call_that_reserved_nothing_is_charged_however_long_it_runs(database: Database) -> None:
    now = [float(NOON)]
    one, _ = await both(database, lambda: now[0])
    await one.begin_call(10)
    one.settle(0, 10)
    await one.write(database)
    await one.begin_call(0)
    for _ in range(5):
        now[0] += 40
        await one.leases.keep_alive()
        await one.leases.tidy()
    one.settle(0, 5)
    await one.write(database)
    assert (await state_of(database, worker(database, lambda: now[0], "mine").account(), now[0])).charged.spent_nano == 15


async def test_a_lease_that_is_idle_for_a_minute_returns(database: Database) -> None:
    now = [float(NOON)]
    one, other = await both(database, lambda: now[0])
    await one.begin_call(600)
    one.settle(0, 100)
    await one.write(database)
    now[0] += 30
    await one.leases.keep_alive()
    await one.leases.tidy()
    assert one.account().granted_nano == 600
    now[0] += 30
    await one.leases.tidy()
    await other.begin_call(900)
    state = await state_of(database, other.account(), now[0])
    assert state.charged == Charged(spent_nano=100) and state.others_nano == 0


@pytest.mark.parametrize("fails", ["before", "after"])
async def test_a_worker_whose_first_heartbeat_is_not_confirmed_begins_with_the_next_call(unreliable: Unreliable, fails: str) -> None:
    one, _ = await both(unreliable, lambda: NOON)
    unreliable.fails = fails
    with pytest.raises(StoreUnavailable):
        await one.begin_call(10)
    await one.begin_call(10)
    assert await unreliable.rows(sa.select(budget_workers.c.id)) == [(one.leases.worker,)]


async def test_a_worker_that_was_marked_dead_is_not_revived(database: Database) -> None:
    one, _ = await both(database, lambda: NOON)
    await one.begin_call(10)
    store = one.leases.store
    assert await store.begin_worker(one.leases.worker, NOON)
    await store.bury(NOON + DEAD_S + 1)
    assert not await store.begin_worker(one.leases.worker, NOON + DEAD_S + 1)
    assert not await store.beat(one.leases.worker, NOON + DEAD_S + 1)


async def leave_within_a_transaction(one: Worker, nano: int, database: Unreliable) -> None:
    """Begin a call whose client leaves before its transaction ends."""
    database.ends = asyncio.Event()
    call = asyncio.create_task(one.begin_call(nano))
    while not database._changes:
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    database.ends.set()
    database.ends = None
    await asyncio.gather(*one.leases._changes)


async def test_a_client_that_leaves_during_the_first_heartbeat_does_not_stop_the_next(unreliable: Unreliable) -> None:
    one, _ = await both(unreliable, lambda: NOON)
    await leave_within_a_transaction(one, 10, unreliable)
    assert one.leases.may_spend(NOON)
    await one.begin_call(10)


async def test_money_that_was_leased_for_a_client_that_has_left_is_free_for_the_next(unreliable: Unreliable) -> None:
    one, _ = await both(unreliable, lambda: NOON)
    await one.leases.keep_alive()
    await leave_within_a_transaction(one, 600, unreliable)
    assert one.account().free_nano == 600 == stored(unreliable, "mine").granted
    await one.leases.stop()
    assert stored(unreliable, "mine").granted == 0


async def test_a_lease_whose_answer_was_lost_is_closed(unreliable: Unreliable) -> None:
    one, _ = await both(unreliable, lambda: NOON)
    await one.leases.keep_alive()
    unreliable.fails = "after"
    with pytest.raises(StoreUnavailable):
        await one.begin_call(600)
    assert stored(unreliable, "mine").granted == 600
    await one.leases.stop()
    assert stored(unreliable, "mine") == Stored(0, Charged(), {})


@pytest.mark.parametrize("statement", ["lease", "recall"])
async def test_the_next_statement_returns_what_a_lost_answer_has_granted(unreliable: Unreliable, statement: str) -> None:
    one, other = await both(unreliable, lambda: NOON)
    await one.leases.keep_alive()
    unreliable.fails = "after"
    with pytest.raises(StoreUnavailable):
        await one.begin_call(600)
    if statement == "lease":
        await one.begin_call(900)
    else:
        await other.begin_call(1000)


@pytest.mark.parametrize("statement", ["begin_worker", "lease"])
async def test_a_failing_statement_answers_all_calls_that_wait_for_it(database: Database, monkeypatch: pytest.MonkeyPatch, statement: str) -> None:
    one, _ = await both(database, lambda: NOON)
    if statement == "lease":
        await one.leases.keep_alive()
    attempts, fails = 0, asyncio.Event()

    async def unavailable(*_arguments: Any) -> Any:
        nonlocal attempts
        attempts += 1
        await fails.wait()
        raise DatabaseUnavailable("gone")

    monkeypatch.setattr(one.leases.store, statement, unavailable)
    calls = [asyncio.create_task(one.begin_call(10))]
    while not attempts:
        await asyncio.sleep(0)
    calls += [asyncio.create_task(one.begin_call(10)) for _ in range(5)]
    for _ in range(10):
        await asyncio.sleep(0)
    fails.set()
    assert {type(each) for each in await asyncio.gather(*calls, return_exceptions=True)} == {StoreUnavailable}
    assert attempts == 1


async def test_a_lease_waits_for_the_end_of_a_return_whose_recall_has_timed_out(unreliable: Unreliable) -> None:
    one, other = await both(unreliable, lambda: NOON)
    await one.begin_call(500)
    one.settle(0, 0)
    await other.begin_call(10)
    await other.leases.store.recall(other.account())
    (recall,) = await one.leases.store.recalls(one.account().worker)
    unreliable.ends = asyncio.Event()
    answer = asyncio.create_task(one.leases._give_back(one.account(), recall.number))
    while not unreliable._changes:
        await asyncio.sleep(0)
    answer.cancel()
    await asyncio.gather(answer, return_exceptions=True)
    call = asyncio.create_task(one.begin_call(5))
    unreliable.ends.set()
    unreliable.ends = None
    await call
    assert stored(unreliable, "mine").leases[one.account().lease_id][0] == one.account().granted_nano
    assert one.account().granted_nano < 500


def limited(one: Worker, limit_nano: int, **changed: Any) -> BudgetRule:
    """The rule of a worker with another limit, as a reload has it."""
    return replace(one.rule, limit_nano=limit_nano, **changed)


async def test_free_money_of_a_lease_is_not_spent_above_a_lowered_limit(database: Database) -> None:
    one, other = await both(database, lambda: NOON)
    for each in (one, other):
        await each.begin_call(400)
        each.settle(0, 100)
        await each.write(database)
        each.leases.renew_all([limited(one, 250)])
        each.plan = BudgetPlan(((limited(one, 250), "mine", "all"),), is_hard=True)
    with pytest.raises(BudgetExhausted):
        await one.begin_call(51)
    await other.begin_call(50)


async def test_a_running_call_takes_no_free_money_above_a_lowered_limit(database: Database) -> None:
    one, _ = await both(database, lambda: NOON)
    use = await one.begin_call(10)
    await one.begin_call(500)
    one.settle(1, 0)
    assert one.account().free_nano == 500
    rule = limited(one, 15)
    one.leases.renew_all([rule])
    assert not one.budgets.extend_at_once(use, 6)
    with pytest.raises(BudgetExhausted):
        await one.budgets.extend(use, [rule], 6, 16)
    await one.budgets.extend(use, [rule], 5, 15)


async def test_money_leased_under_a_rule_that_only_warned_is_not_spent_when_it_becomes_hard(database: Database) -> None:
    one = worker(database, lambda: NOON, "mine", is_hard=False)
    await one.begin_call(3 * LIMIT)
    one.settle(0, 0)
    assert one.account().free_nano == 3 * LIMIT
    rule = limited(one, LIMIT, is_hard=True)
    one.plan = BudgetPlan(((rule, "mine", "all"),), is_hard=True)
    with pytest.raises(BudgetExhausted):
        await one.begin_call(LIMIT + 1)
    await one.begin_call(LIMIT)


async def test_a_limit_that_is_lowered_while_money_is_leased_holds_for_that_money(unreliable: Unreliable) -> None:
    one, _ = await both(unreliable, lambda: NOON)
    await one.leases.keep_alive()
    unreliable.ends = asyncio.Event()
    call = asyncio.create_task(one.begin_call(500))
    while not unreliable._changes:
        await asyncio.sleep(0)
    one.leases.renew_all([limited(one, 100)])
    unreliable.ends.set()
    unreliable.ends = None
    with pytest.raises(BudgetExhausted):
        await call


async def test_what_was_leased_above_a_lowered_limit_returns_and_the_row_has_the_new_limit(database: Database) -> None:
    one, _ = await both(database, lambda: NOON)
    await one.begin_call(500)
    one.settle(0, 100)
    await one.write(database)
    one.leases.renew_all([limited(one, 250)])
    await one.leases._work()
    columns = sa.select(budgets.c.limit_nano, budgets.c.granted_nano)
    assert await database.rows(columns) == [(250, 100)]


async def test_a_call_that_is_refused_under_a_lowered_limit_writes_the_limit(database: Database) -> None:
    one, _ = await both(database, lambda: NOON)
    await one.begin_call(500)
    one.settle(0, 500)
    await one.write(database)
    await one.leases.stop()
    other = worker(database, lambda: NOON, "mine", limit_nano=300)
    with pytest.raises(BudgetExhausted):
        await other.begin_call(1)
    assert await database.rows(sa.select(budgets.c.limit_nano)) == [(300,)]


async def test_calls_that_wait_at_once_share_a_statement(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = await both(database, lambda: NOON)
    await one.leases.keep_alive()
    leases, lease = [], one.leases.store.lease

    async def counting(account: Account, missing: Any, now_s: float) -> Any:
        leases.append(list(missing))
        return await lease(account, missing, now_s)

    monkeypatch.setattr(one.leases.store, "lease", counting)
    results = await asyncio.gather(*(one.begin_call(200) for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(each, BudgetUse) for each in results) == 5
    assert len(leases) <= 4 and one.account().granted_nano == LIMIT


@pytest.mark.parametrize(
    ("left", "missing", "leased"),
    [
        (1000, [1], 20), (1000, [21], 21), (1000, [5, 6], 20), (1000, [1000], 1000), (1000, [1001], 0), (999, [500, 600, 400], 900),
        (500, [1], 10), (50, [1], 1), (49, [1], 1), (49, [30, 30], 30), (0, [1], 0), (-5, [1], 0),
    ],
)  # fmt: skip
def test_a_lease_is_2_percent_of_what_is_left_and_exact_below_5_percent(left: int, missing: list[int], leased: int) -> None:
    rule = BudgetRule(name="mine", limit_nano=1000, period="total")
    assert lease_nano(left, rule, missing) == leased


FIRST = 1_698_796_800
"""The first of a month, at 00:00."""
DAY_S = 24 * 3600


async def spend(database: Database, clock: Callable[[], float], period: Period, nano: int) -> Worker:
    """Spend so much with a new worker, whose rule has such periods."""
    one = worker(database, clock, "mine", period=period)
    await one.begin_call(nano)
    one.settle(0, nano)
    await one.write(database)
    return one


async def current(database: Database, now_s: float) -> list[tuple[int, int | None, int]]:
    """Start, end and charges of the budgets that contain a time."""
    found = await BudgetReports(database).page(BudgetFilter(at_s=int(now_s)), ("", -1), 10, now_s)
    return [(each.period_start_s, each.period_end_s, each.spent_nano) for each in found]


@pytest.mark.parametrize(("before", "after"), [("day", "month"), ("month", "day"), ("day", "total"), ("total", "week")])
async def test_a_budget_whose_period_was_changed_has_one_current_period(database: Database, before: Period, after: Period) -> None:
    await spend(database, lambda: NOON, before, 10)
    await spend(database, lambda: NOON, after, 20)
    assert await current(database, NOON) == [(*span_of(after, NOON), 20)]
    await spend(database, lambda: NOON, before, 30)
    assert await current(database, NOON) == [(*span_of(before, NOON), 40)]


async def test_a_raise_after_a_change_of_the_period_is_added_to_the_new_period(database: Database) -> None:
    await spend(database, lambda: NOON, "day", 10)
    one = await spend(database, lambda: NOON, "month", 1000)
    with pytest.raises(BudgetExhausted):
        await one.begin_call(50)
    await BudgetReports(database).raise_limit(BudgetChange("mine", "me", NOON), 50)
    await one.begin_call(50)


@pytest.mark.parametrize(("before", "after"), [("day", "month"), ("month", "day")])
async def test_two_periods_that_begin_at_once_are_one_budget_with_the_end_of_the_new_one(database: Database, before: Period, after: Period) -> None:
    await spend(database, lambda: FIRST + 1, before, 10)
    await spend(database, lambda: FIRST + 2, after, 20)
    assert await current(database, FIRST + 2) == [(*span_of(after, FIRST), 30)]


async def test_retention_keeps_a_month_whose_rule_had_days_when_it_began(database: Database) -> None:
    await (await spend(database, lambda: FIRST, "day", 10)).leases.stop()
    await (await spend(database, lambda: FIRST, "month", 20)).leases.stop()
    async with database.writing() as connection:
        assert await delete_ended(connection, FIRST + 3 * DAY_S, 500) == 0


async def test_a_process_with_an_older_period_does_not_end_the_new_one_for_longer_than_until_the_next_lease(database: Database) -> None:
    new = await spend(database, lambda: NOON, "month", 20)
    await spend(database, lambda: NOON, "day", 10)
    assert await current(database, NOON) == [(*span_of("day", NOON), 10)]
    await new.begin_call(100)
    assert await current(database, NOON) == [(*span_of("month", NOON), 20)]


async def test_a_new_day_leaves_the_end_of_the_day_before(database: Database) -> None:
    for day in range(2):
        await spend(database, lambda day=day: FIRST + day * DAY_S, "day", 10)  # type: ignore[misc]
    ends = sa.select(budgets.c.period_end_s).order_by(budgets.c.period_start_s)
    assert await database.rows(ends) == [(FIRST + DAY_S,), (FIRST + 2 * DAY_S,)]


async def test_ended_budgets_are_deleted_with_the_leases_of_dead_workers_and_others_are_kept(database: Database) -> None:
    now = [float(NOON)]
    daily = worker(database, lambda: now[0], "daily", name="daily", period="day")
    await daily.begin_call(10)
    now[0] += 24 * 3600
    total = worker(database, lambda: now[0], "total", name="total", period="total")
    today = worker(database, lambda: now[0], "today", name="today", period="day")
    for each in (total, today):
        await each.begin_call(10)
    await total.leases.store.bury(now[0])
    async with database.writing() as connection:
        assert await delete_ended(connection, daily.account().span.start_s, 500) == 0, "the day has ended at that time, not before"
    async with database.writing() as connection:
        assert await delete_ended(connection, daily.account().span.start_s + 1, 500) == 1
    kept = await database.rows(sa.select(budgets.c.key).order_by(budgets.c.key))
    leases = await database.rows(sa.select(budget_leases.c.key).order_by(budget_leases.c.key))
    workers = await database.rows(sa.select(budget_workers.c.id))
    assert [*kept] == [*leases] == [("today",), ("total",)]
    assert {id for (id,) in workers} == {total.leases.worker, today.leases.worker}
