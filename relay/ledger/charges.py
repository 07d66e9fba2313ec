"""Settle the budgets of a finished call, and write what was charged with the rows of the calls.

Owns the charges that wait without a row: those of calls whose rows were dropped. A lease in the
database is charged in the transaction that has the rows, so the ledger and the budgets agree after
any crash.

A call that makes an object of which the provider reports the usage later (a response in background)
is charged provisionally: what it had reserved. The call that reads the usage is charged the cost,
and the provisional charge is given back to the budgets that are charged the cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from relay.core.budgets import NOTHING, Account, BudgetUse, Charged
from relay.core.errors import (
    UpstreamDisconnected,
    UpstreamErrorInAnswer,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamTlsFailed,
    UpstreamUnreachable,
)
from relay.core.exchange import Exchange
from relay.core.formats import counting_of
from relay.core.meters.answer_meter import AnswerMeter
from relay.core.text import MAX_CHARACTERS
from relay.ledger.rows import Entry
from relay.storage.provisional_charges import ChargedObject, ProvisionalCharge

_WITHOUT_ANSWER = (
    UpstreamUnreachable, UpstreamTlsFailed, UpstreamDisconnected, UpstreamProtocolError,
    UpstreamTimeout,
)  # fmt: skip


def unknown_cost(exchange: Exchange) -> int | None:
    """Return what a call is charged of which no cost is known; None: what it has reserved, or the
    part of its cost that is known if that is more.
    """
    return 0 if is_unbilled(exchange) or _is_unused(exchange) else None


def is_unbilled(exchange: Exchange) -> bool:
    """True if a call of which no usage is known was most likely not billed: the provider was not
    reached, failed, or refused it. A client cannot bring that about: a call that the client left,
    or that ran into the client's own time limit, may well be billed.
    """
    if not exchange.routing.sent_s or exchange.response.status >= 400:
        return True
    if exchange.request.transport == "websocket" and exchange.response.status != 101:
        return True  # the handshake was refused, or its client has left
    error = exchange.outcome.error
    if isinstance(error, UpstreamErrorInAnswer):
        return exchange.usage.used is None
    if exchange.response.first_byte_s or exchange.waiting.first_byte_limit_s is not None:
        return False
    return isinstance(error, _WITHOUT_ANSWER)


def _is_unused(exchange: Exchange) -> bool:
    """True for a session in which nothing was used, or nothing that is not counted elsewhere."""
    usage = exchange.usage
    is_session = exchange.request.transport == "websocket"
    return is_session and usage.meter is not None and not usage.parts


def note_object(entry: Entry, use: BudgetUse, exchange: Exchange) -> None:
    """Add to the rows of a call that is charged the object that it has made and whose usage is
    reported later, or that it has read.
    """
    meter, route = exchange.usage.meter, exchange.routing.route
    if route is None or not isinstance(meter, AnswerMeter):
        return
    provider, counting = route.provider.name, counting_of(exchange.request.method, route.endpoint)
    if counting == "stored":
        if object_id := _charged_id(exchange, use, meter):
            keys = tuple([account.key for account in use.accounts])
            # Of the two charges for a usage that is not known as a whole, the higher one stays.
            most_nano = use.unpriced_nano or None
            entry.charged_object = ChargedObject(provider, object_id, keys, most_nano)
    elif use.unpriced_nano and meter.is_reported_later:
        if len(meter.object_id) <= MAX_CHARACTERS:
            object_id, now_s = meter.object_id, int(time.time())
            entry.provisional = tuple(
                ProvisionalCharge(
                    provider,
                    object_id,
                    account.key,
                    account.span.start_s,
                    use.unpriced_nano,
                    now_s,
                )
                for account in use.accounts
            )


def _charged_id(exchange: Exchange, use: BudgetUse, meter: AnswerMeter) -> str:
    """Return the id of a stored object that a call has read, if its usage was charged to the call,
    or if it has failed without usage; else an empty string.
    """
    if exchange.response.status >= 300 or exchange.outcome.error is not None:
        return ""
    if meter.used_nothing:
        return meter.object_id
    ids = {part.object_id for part in exchange.usage.parts}
    is_charged = exchange.usage.cost_nano_usd is not None or use.unpriced_nano > 0
    return ids.pop() if is_charged and len(ids) == 1 else ""


class Charges:
    """What the leases of this process were charged, as the next transaction writes it."""

    def __init__(self) -> None:
        self._kept: dict[Account, Charged] = {}
        self._writing: dict[Account, Charged] = {}
        """The part of `_kept` that the current transaction writes."""

    @property
    def waiting(self) -> bool:
        """True if charges wait whose calls have no row."""
        return bool(self._kept)

    def keep(self, use: BudgetUse | None) -> None:
        """Keep the charge of a call whose row is dropped: it is written nevertheless."""
        if use is not None:
            _add(self._kept, use.accounts, use.charged)

    def begin(self, entries: Sequence[Entry]) -> Mapping[Account, Charged]:
        """Return the sums that the transaction of these rows writes: of each lease all that it was
        charged so far, so that a repeated write changes nothing.
        """
        self._writing, changed = self._kept, dict(self._kept)
        self._kept = {}
        # Many calls have the same budgets, so their charges are added up first.
        sums: dict[tuple[Account, ...], list[int]] = {}
        for entry in entries:
            if (use := entry.budget) is not None:
                sum_ = sums.get(use.accounts)
                if sum_ is None:
                    sums[use.accounts] = sum_ = [0, 0, 0]
                sum_[0] += use.charged_nano - use.unpriced_nano
                if use.unpriced_nano or use.over_nano:
                    sum_[1] += use.unpriced_nano
                    sum_[2] += use.over_nano
        for accounts, sum_ in sums.items():
            _add(changed, accounts, Charged(*sum_))
        return {each: each.written.plus(more).capped() for each, more in changed.items()}

    @property
    def leases(self) -> Sequence[Account]:
        """The leases of which charges wait without a row."""
        return list(self._kept)

    def begin_alone(self, account: Account) -> Mapping[Account, Charged]:
        """Do the same as `begin` for the charges of one lease that wait without a row."""
        self._writing = {account: self._kept.pop(account)}
        return {account: account.written.plus(self._writing[account]).capped()}

    def set_aside(self) -> None:
        """Do not write again the charges that the database has just refused. Their lease stays
        open: when this process has ended, the money is unaccounted.
        """
        self._writing = {}

    def written(self, sums: Mapping[Account, Charged]) -> None:
        """Note that the transaction is committed."""
        self._writing = {}
        for account, charged in sums.items():
            account.written, account.is_stored = charged, True
            account.granted_nano = max(account.granted_nano, charged.total_nano)

    def failed(self) -> None:
        """Note that the transaction failed, or may have failed: everything is written again."""
        again, self._writing = self._writing, {}
        for account, charged in again.items():
            _add(self._kept, (account,), charged)


def _add(to: dict[Account, Charged], accounts: Iterable[Account], charged: Charged) -> None:
    if charged != NOTHING:
        for account in accounts:
            to[account] = to.get(account, NOTHING).plus(charged)
