"""Follow what running streams and sessions spend, reserve more for them in time, and end those for
which a budget has no more money.

Owns when each of them is checked: by the sweep of periodic.py, and before messages that cost
something (sessions/spending.py). A chunk or message never waits for a check. A Spender knows what a
call has spent and how much it needs beyond that; budgets.py reserves; the ledger settles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from relay import log
from relay.core.budgets import BudgetRule, BudgetUse
from relay.core.deadline_queue import DeadlineQueue
from relay.core.errors import PriceUnknown, RelayError
from relay.core.exchange import Exchange
from relay.gate.budgets import Budgets
from relay.gate.keys import ClientKeys

CHECK_S = 0.5
"""How often a call is checked that has spent half of what it has reserved."""
AT_EASE_S = 2.0
"""How often other calls are checked."""
_ASK_AGAIN_S = 1.0
"""How long after a budget had too little money it is asked again."""
_AT_ONCE = 20


class Spender(Protocol):
    """A running stream or session that has reserved money."""

    exchange: Exchange

    def spent_nano(self) -> int:
        """Return what it has cost so far."""

    def ahead_nano(self) -> int:
        """Return how much must be reserved beyond that while it runs."""

    def step_nano(self) -> int:
        """Return how much it takes at once, at least."""

    def end(self, error: RelayError) -> None:
        """End it: the money is gone."""


@dataclass(slots=True, eq=False)
class _Followed:
    """A Spender, while it runs."""

    spender: Spender
    refusal: RelayError | None = None
    """Why the last attempt to reserve more failed; None since there was enough."""
    refused_s: float = 0.0
    task: asyncio.Task[None] | None = None
    """Reserves more, if that needs the database."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Spending:
    """The streams and sessions of a process that have budgets. `clock` is the gateway's."""

    def __init__(
        self,
        budgets: Callable[[], Budgets | None],
        keys: ClientKeys,
        clock: Callable[[], float],
    ) -> None:
        self._budgets, self._keys, self._clock = budgets, keys, clock
        self._queue: DeadlineQueue[_Followed] = DeadlineQueue()
        self._of: dict[Exchange, _Followed] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, spender: Spender) -> None:
        """Check a call from now on, until it ends."""
        exchange = spender.exchange
        self._of[exchange] = followed = _Followed(spender)
        exchange.at_end += (lambda: self.forget(exchange),)
        self._queue.add(followed, self._clock() + CHECK_S)

    def forget(self, exchange: Exchange) -> None:
        """Check a call no longer: it has ended."""
        if self._of and (followed := self._of.pop(exchange, None)) is not None:
            self._queue.discard(followed)

    async def sweep(self, now_s: float) -> None:
        """Check the calls that are due."""
        for number, followed in enumerate(self._queue.take_due(now_s)):
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)  # thousands may be due at once: do not block the loop
            if followed in self._queue:
                self._check_again_later(followed, now_s)

    def check(self, exchange: Exchange) -> None:
        """Check a call now: it has spent something."""
        if (followed := self._of.get(exchange)) is not None:
            self._check_again_later(followed, self._clock())

    def make_all_due(self) -> None:
        """Check all calls with the next sweep: a reload may have changed their budgets."""
        self._queue.make_all_due()

    def _check_again_later(self, followed: _Followed, now_s: float) -> None:
        after_s = self._check(followed, now_s)
        if followed in self._queue:
            self._queue.add(followed, now_s + after_s)

    def _end(self, spender: Spender, error: RelayError) -> None:
        """End a call, once: a second cancellation would cut off how it ends."""
        self.forget(spender.exchange)
        spender.end(error)

    def _check(self, followed: _Followed, now_s: float) -> float:
        """Check a call without waiting, and return in how many seconds to check it again."""
        spender = followed.spender
        try:
            missing_nano, spent_nano = self._missing_nano(spender, 0)
            use, budgets = spender.exchange.budget, self._budgets()
            if use is None or budgets is None:
                return AT_EASE_S
            if self._has_enough(followed, budgets, use, missing_nano):
                return AT_EASE_S if 2 * spent_nano < use.reserved_nano else CHECK_S
            is_gone = spent_nano >= use.reserved_nano
            was_refused = self._was_refused(followed, now_s)
            if is_gone and was_refused and followed.refusal is not None:
                self._end(spender, followed.refusal)
            elif followed.task is not None and not followed.task.done():
                return CHECK_S
            elif is_gone or not was_refused:
                followed.task = task = asyncio.create_task(self._extend_or_end(followed))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except PriceUnknown as error:
            self._end(spender, error)
        except Exception as error:
            # Any exception: it is logged, and the call goes on with what it has reserved.
            log.bug("budgets.check_failed", error, id=spender.exchange.id)
        return CHECK_S

    async def _extend_or_end(self, followed: _Followed) -> None:
        """Reserve more for a call, and end it if there is no more and it has spent everything."""
        spender = followed.spender
        try:
            await self._provide(followed, 0)
        except RelayError as error:
            use = spender.exchange.budget
            if use is None or spender.exchange not in self._of:
                return  # it has ended in the meantime
            if isinstance(error, PriceUnknown) or spender.spent_nano() >= use.reserved_nano:
                self._end(spender, error)
        except Exception as error:
            # Any exception: it is logged, and the call goes on with what it has reserved.
            log.bug("budgets.check_failed", error, id=spender.exchange.id)

    def provide_at_once(self, exchange: Exchange, needed_nano: int) -> bool:
        """Reserve what a call needs beyond what it has spent, and `needed_nano` for what it is
        about to do, of money that is leased already. False if `provide` is needed. Raises
        PriceUnknown.
        """
        followed, budgets = self._of.get(exchange), self._budgets()
        if followed is None or budgets is None or exchange.budget is None:
            return True
        missing_nano, _ = self._missing_nano(followed.spender, needed_nano)
        return self._has_enough(followed, budgets, exchange.budget, missing_nano)

    @staticmethod
    def _has_enough(
        followed: _Followed, budgets: Budgets, use: BudgetUse, missing_nano: int
    ) -> bool:
        """True if nothing is missing, or could be reserved of money that is leased already."""
        step_nano = max(missing_nano, followed.spender.step_nano())
        has_enough = missing_nano <= 0 or budgets.extend_at_once(use, step_nano)
        if has_enough:
            followed.refusal = None
        return has_enough

    def was_refused(self, exchange: Exchange) -> bool:
        """True if a budget had too little money for a call a moment ago."""
        followed = self._of.get(exchange)
        return followed is not None and self._was_refused(followed, self._clock())

    @staticmethod
    def _was_refused(followed: _Followed, now_s: float) -> bool:
        return followed.refusal is not None and now_s - followed.refused_s < _ASK_AGAIN_S

    async def provide(self, exchange: Exchange, needed_nano: int) -> None:
        """Do the same as `provide_at_once`, and lease money for that. Raises PriceUnknown,
        BudgetExhausted, BudgetBusy, StoreUnavailable.
        """
        if (followed := self._of.get(exchange)) is not None:
            await self._provide(followed, needed_nano)

    async def _provide(self, followed: _Followed, needed_nano: int) -> None:
        spender = followed.spender
        async with followed.lock:
            missing_nano, _ = self._missing_nano(spender, needed_nano)
            use, budgets = spender.exchange.budget, self._budgets()
            if use is None or budgets is None:
                return
            if self._has_enough(followed, budgets, use, missing_nano):
                return
            ahead_nano = use.reserved_nano - use.running_nano + missing_nano
            rules = self._rules_of(spender.exchange, budgets)
            try:
                await budgets.extend(use, rules, missing_nano, ahead_nano)
            except RelayError as error:
                followed.refusal, followed.refused_s = error, self._clock()
                raise
            followed.refusal = None

    def _missing_nano(self, spender: Spender, needed_nano: int) -> tuple[int, int]:
        """Return how much more must be reserved, and what was spent."""
        use = spender.exchange.budget
        if use is None:
            return 0, 0
        spent_nano = spender.spent_nano()
        use.note_running(min(spent_nano, use.reserved_nano))
        use.note_known(spent_nano)
        return spent_nano + spender.ahead_nano() + needed_nano - use.reserved_nano, spent_nano

    def _rules_of(self, exchange: Exchange, budgets: Budgets) -> Sequence[BudgetRule]:
        """Return the rules that apply to a call now."""
        caller = exchange.request.caller
        record = caller.record
        if record is not None:
            record = self._keys.client(record.name) or record
        return budgets.rules_of(record, caller.client)

    async def stop(self) -> None:
        """Cancel what still waits for money: no call runs any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
