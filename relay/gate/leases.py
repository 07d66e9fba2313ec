"""Lease money of budgets from the database, and give back what is not needed.

Owns the accounts of this process, its heartbeat, and the recall of leases that other processes do
not need. A call on an account with enough money makes no statement. storage/budgets.py has the
transactions, core/budgets.py the arithmetic.

What the database has granted to a lease is never less than what the account knows of: the account
is reduced before money is given back, and increased after money was granted. A statement whose
result is unknown is safe, for the next one returns what the account does not know of.

Every transaction runs in a task of its own, which holds the lock of the account until it has ended:
a client that leaves interrupts neither the transaction nor the use of its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from relay import log
from relay.core.budgets import PERIODS, Account, BudgetCounts, BudgetRule, span_of
from relay.core.pricing import usd_text
from relay.storage.budgets import DEAD_S, BudgetState, BudgetStore
from relay.storage.database import DatabaseNewer, DatabaseUnavailable, RowsRefused

STORE_ERRORS = (DatabaseUnavailable, DatabaseNewer, RowsRefused)
BEAT_S = 10.0
_SPEND_S = DEAD_S - BEAT_S
"""How long after its last heartbeat a process may spend what it has leased. Clocks of machines may
differ by the rest."""
RECALL_S = 1.0
"""How long a call waits for other processes to give back money."""
_POLL_S = 0.5
_ASK_AGAIN_S = 0.05
_TIDY_S = 10.0
_IDLE_S = 60.0
"""A lease that no call has used for so long is given back."""
_STOP_S = 5.0
_REPORTED_AT_ONCE = 100
"""Few enough that the heartbeat between them is in time."""


@dataclass(slots=True, eq=False)
class _Request:
    """A call that waits for more money in an account."""

    needed_nano: int
    is_answered: bool = False
    shortage: BudgetState | None = None
    error: Exception | None = None


async def _nothing() -> None:
    pass


class Leases:
    """The leases of a process. `clock` is the time of day, which other machines share."""

    def __init__(
        self,
        store: BudgetStore,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        recall_others: Callable[[], Awaitable[None]],
    ) -> None:
        self.store, self.clock = store, clock
        self._new_id, self._recall_others = new_id, recall_others
        self._worker, self._is_begun = new_id(), False
        self._beaten_s = self._tidied_s = 0.0
        self._numbers = itertools.count(1)
        self._accounts: dict[str, Account] = {}
        self._by_lease: dict[str, Account] = {}
        self._retired: set[Account] = set()
        """Accounts that no further call uses, until their leases are closed."""
        self._to_report: set[Account] = set()
        """Accounts of which the database does not have the limit yet, or what is free again."""
        self.generation = 0
        """While it stays the same, `account` returns the same accounts, until their periods end."""
        self._beating: asyncio.Task[None] | None = None
        self._changes: set[asyncio.Task[None]] = set()
        """Changes in the database that run, also those whose callers were cancelled."""
        self._requests: dict[Account, list[_Request]] = {}
        self._recalls: dict[Account, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._is_available = True
        self.counts = BudgetCounts()
        self.watch: Callable[[], Awaitable[None]] = _nothing
        """Called every few seconds: looks for budgets that warn (budget_warnings.py)."""

    @property
    def worker(self) -> str:
        """The id of this process in the database."""
        return self._worker

    @property
    def accounts(self) -> Sequence[Account]:
        """The accounts of this process, also those that no further call uses."""
        return list(self._by_lease.values())

    def account(self, rule: BudgetRule, key: str, subject: str, now_s: float) -> Account:
        """Return the account of a budget in the current period."""
        account = self._accounts.get(key)
        if account is not None:
            end_s = account.span.end_s
            if account.rule is rule and (end_s is None or now_s < end_s):
                return account
            if account.span == span_of(rule.period, now_s):
                self._apply(account, rule)
                return account
            self._retire(account)
        span = span_of(rule.period, now_s)
        lease_id = f"{self._worker}/{next(self._numbers)}"
        account = Account(rule, key, subject, span, self._worker, lease_id, used_s=now_s)
        self._accounts[key] = self._by_lease[lease_id] = account
        return account

    def usable_until(self, now_s: float) -> float:
        """Return until when `may_spend` stays true if it is true at `now_s`."""
        return self._beaten_s + _SPEND_S if self.may_spend(now_s) else 0.0

    def renew(self, account: Account, rule: BudgetRule) -> None:
        """Apply a rule that a reload has changed to the account of a running call. The call stays
        in its period: of a rule with longer periods now, a lower limit holds for it.
        """
        before = account.rule
        if span_of(rule.period, account.span.start_s) == account.span:
            self._apply(account, rule)
        elif rule.limit_nano < before.limit_nano:
            # What a longer period does not allow, a part of it does not allow either.
            if PERIODS.index(rule.period) > PERIODS.index(before.period):
                self._apply(account, replace(before, limit_nano=rule.limit_nano))

    def renew_all(self, rules: Iterable[BudgetRule]) -> None:
        """Apply the rules of a reload to all accounts."""
        by_name = {rule.name: rule for rule in rules}
        for account in self._by_lease.values():
            if (rule := by_name.get(account.rule.name)) is not None:
                self.renew(account, rule)

    def _apply(self, account: Account, rule: BudgetRule) -> None:
        before = account.rule
        account.apply(rule)
        if rule.limit_nano != before.limit_nano:
            self._to_report.add(account)
        if rule.limit_nano < before.limit_nano or (rule.is_hard and not before.is_hard):
            # It was leased under the old limit.
            _forget_free(account)
            self._to_report.add(account)

    def may_spend(self, now_s: float) -> bool:
        """True if no other process can take this one for dead."""
        return 0 <= now_s - self._beaten_s < _SPEND_S

    def owns(self, account: Account) -> bool:
        """False if the account is that of a process that was taken for dead, which this one was."""
        return account.worker == self._worker

    def forget_released(self, account: Account) -> None:
        """Let the next statement find out what is free in an account that is not owned: what calls
        of such a lease give back may have been released by an administrator before.
        """
        if not self.owns(account):
            _forget_free(account)

    async def keep_alive(self) -> None:
        """Write the heartbeat, unless another call has just done so. A process that counts as dead
        begins again, with new leases. Raises STORE_ERRORS.
        """
        if not self.may_spend(self.clock()):
            await self._beat()

    async def _beat(self) -> None:
        """Write the heartbeat; calls that need it at once share one attempt."""
        task = self._beating
        if task is None:
            task = self._beating = self._start(self._write_heartbeat())
            task.add_done_callback(self._note_beaten)
        await asyncio.shield(task)

    def _note_beaten(self, _: asyncio.Task[None]) -> None:
        self._beating = None

    async def _write_heartbeat(self) -> None:
        now_s = self.clock()
        if self._is_begun and not await self.store.beat(self._worker, now_s):
            self._begin_again()
        while not self._is_begun:
            self._is_begun = await self.store.begin_worker(self._worker, now_s)
            if not self._is_begun:
                self._begin_again()
        self._beaten_s = now_s

    def _begin_again(self) -> None:
        """Become another process: this one counts as dead."""
        log.warn("budgets.declared_dead", worker=self._worker)
        for account in self._by_lease.values():
            # An administrator may have released what is free, also that of running calls.
            _forget_free(account)
        for account in list(self._accounts.values()):
            self._retire(account)
        self._worker, self._is_begun, self._beaten_s = self._new_id(), False, 0.0

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return task

    async def _change(
        self, accounts: Sequence[Account], work: Callable[[], Awaitable[None]]
    ) -> None:
        """Change leases in the database, one change of a lease after another. It ends by itself if
        the caller is cancelled.
        """
        for account in accounts:
            account.changes += 1
        await asyncio.shield(self._start(_locked(accounts, work)))

    async def provide(self, account: Account, needed_nano: int) -> BudgetState | None:
        """Lease more, so that `needed_nano` is free. Returns the state of a budget that has too
        little left. Raises STORE_ERRORS.
        """
        request = _Request(needed_nano)
        waiting = self._requests.setdefault(account, [])
        waiting.append(request)
        try:
            await self._change((account,), partial(self._answer_request, account, request))
        finally:
            if request in waiting:
                waiting.remove(request)
        if request.error is not None:
            raise request.error
        return request.shortage

    async def _answer_request(self, account: Account, request: _Request) -> None:
        if request.is_answered:
            return
        # One statement for all calls that wait by now.
        waiting = self._requests[account]
        batch, waiting[:] = waiting[:], []
        shortage = failure = None
        try:
            shortage = await self._lease(account, batch)
        except STORE_ERRORS as error:
            failure = error
            # Those that came in the meantime would wait as long for the same error.
            batch, waiting[:] = [*batch, *waiting], []
        for each in batch:
            each.is_answered, each.shortage, each.error = True, shortage, failure

    async def _lease(self, account: Account, batch: Sequence[_Request]) -> BudgetState | None:
        free_nano, missing_nano = account.free_nano, []
        for request in batch:
            if request.needed_nano > free_nano:
                missing_nano.append(request.needed_nano - free_nano)
            free_nano = max(0, free_nano - request.needed_nano)
        if not missing_nano:
            return None
        account.may_be_stored, before = True, (account.rule, self._worker)
        leased = await self.store.lease(account, missing_nano, self.clock())
        account.is_stored = True
        self._note_granted(account, leased.granted_nano, before)
        account.note_others(leased.others_nano, leased.raised_nano)
        return leased.shortage

    def _note_granted(
        self, account: Account, granted_nano: int, before: tuple[BudgetRule, str]
    ) -> None:
        """Note what a lease has. `before` is what was true when the statement began."""
        account.granted_nano = granted_nano
        if before != (account.rule, self._worker):
            _forget_free(account)  # as what has changed in the meantime has done

    async def recall(self, account: Account) -> None:
        """Ask other processes for what they do not need, and wait until all have answered, for a
        second at most. Calls that need it at once share one recall. Raises STORE_ERRORS.
        """
        task = self._recalls.get(account)
        if task is None:
            if 0 <= self.clock() - account.recalled_s < RECALL_S:
                return  # nothing came back a moment ago
            task = self._recalls[account] = asyncio.create_task(self._recall(account))
            task.add_done_callback(lambda _: self._recalls.pop(account, None))
        await asyncio.shield(task)

    async def _recall(self, account: Account) -> None:
        try:
            async with asyncio.timeout(RECALL_S):
                await self.store.recall(account)
                await self._recall_others()
                # The answers of other machines come through the database, which sends no event.
                while not await self.store.is_answered(account, self.clock()):  # noqa: ASYNC110
                    await asyncio.sleep(_ASK_AGAIN_S)
        except TimeoutError:
            log.warn("budgets.recall_timed_out", budget=account.rule.name)
        finally:
            account.recalled_s = self.clock()

    async def answer_recalls(self) -> None:
        """Give back what other processes have recalled and no call here has reserved. A failure is
        logged, and the recall is answered with the next poll.
        """
        if self._is_begun:
            await self._logged(self._answer())

    async def _answer(self) -> None:
        for lease_id, number in await self.store.recalls(self._worker):
            if (account := self._by_lease.get(lease_id)) is not None:
                await self._give_back(account, number)

    async def _give_back(self, account: Account, number: int) -> None:
        await self._change((account,), partial(self._return_free, account, number))

    async def _return_free(self, account: Account, number: int) -> None:
        if account.lease_id not in self._by_lease or not _may_be_stored(account):
            return  # closed in the meantime, or not opened yet
        _forget_free(account)
        before = account.rule, self._worker
        granted_nano = await self.store.give_back(account, number)
        self._note_granted(account, granted_nano, before)

    def _retire(self, account: Account) -> None:
        if self._accounts.get(account.key) is account:
            del self._accounts[account.key]
            self.generation += 1
        self._retired.add(account)

    async def tidy(self) -> None:
        """Close the leases that no call uses, and find the processes that are dead."""
        await self.watch()
        now_s = self.clock()
        for account in list(self._accounts.values()):
            if account.is_settled and now_s - account.used_s >= _IDLE_S:
                self._retire(account)
        await self._close(self._retired)
        for worker, unaccounted_nano in await self.store.bury(now_s):
            self.counts.unaccounted_nano += unaccounted_nano
            log.warn(
                "budgets.worker_dead", worker=worker, unaccounted_usd=usd_text(unaccounted_nano)
            )

    async def _close(self, accounts: Iterable[Account]) -> None:
        settled = [each for each in accounts if each.is_settled and not each.changes]
        await self._change(settled, partial(self._close_settled, settled))

    async def _close_settled(self, settled: Sequence[Account]) -> None:
        await self.store.close([each for each in settled if _may_be_stored(each)])
        for account in settled:
            self._retired.discard(account)
            self._to_report.discard(account)
            self._by_lease.pop(account.lease_id, None)
            self._requests.pop(account, None)

    def start(self) -> None:
        """Start the task that keeps the leases."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Give everything back, within ten seconds: no call runs any more, and the ledger has
        written what they cost.
        """
        self._stopping.set()
        recalls, own = [*self._recalls.values()], [self._task] if self._task is not None else []
        for task in recalls:
            task.cancel()
        # Not cancelled within their work: a warning that is stored must be logged too, and what was
        # leased must be known.
        if running := {*own, *self._changes}:
            await asyncio.wait(running, timeout=_STOP_S)
        for task in own:
            task.cancel()
        await asyncio.gather(*recalls, *own, return_exceptions=True)
        if self._has_rows:
            await self._logged(self._end())

    @property
    def _has_rows(self) -> bool:
        """True if the database may have rows of this process."""
        return self._is_begun or bool(self._by_lease)

    async def _end(self) -> None:
        for account in list(self._accounts.values()):
            self._retire(account)
        async with asyncio.timeout(_STOP_S):
            await self.watch()
            await self._close(self._retired)
            await self.store.end_worker(self._worker)
        if self._retired:
            log.warn("budgets.leases_left", leases=len(self._retired))

    async def _run(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _POLL_S)
                return
            if self._is_begun:
                await self._logged(self._work())

    async def _work(self) -> None:
        await self._answer()
        now_s = self.clock()
        if not 0 <= now_s - self._beaten_s < BEAT_S:
            await self._beat()
        for account in list(self._to_report)[:_REPORTED_AT_ONCE]:
            await self._give_back(account, 0)
            self._to_report.discard(account)
        if not 0 <= now_s - self._tidied_s < _TIDY_S:
            self._tidied_s = now_s
            await self.tidy()

    async def _logged(self, work: Awaitable[None]) -> None:
        """Run `work`, and log an unavailable database, once. No exception may end the task."""
        try:
            await work
        except (*STORE_ERRORS, TimeoutError) as error:
            if self._is_available:
                log.warn("budgets.database_unavailable", cause=str(error))
            self._is_available = False
        except Exception as error:
            # Any exception: it is logged, and the leases are kept.
            log.bug("budgets.failed", error)
        else:
            if not self._is_available:
                log.event("budgets.database_recovered")
            self._is_available = True


async def _locked(accounts: Sequence[Account], work: Callable[[], Awaitable[None]]) -> None:
    """Run a change of leases whose `changes` count it."""
    try:
        async with contextlib.AsyncExitStack() as held:
            for account in accounts:
                await held.enter_async_context(account.lock)
            await work()
    finally:
        for account in accounts:
            account.changes -= 1


def _may_be_stored(account: Account) -> bool:
    return account.is_stored or account.may_be_stored


def _forget_free(account: Account) -> None:
    """Let no call spend what is free: the next statement returns it to the budget."""
    account.granted_nano -= max(0, account.free_nano)
