"""Settle the budgets of a finished call, and write what was charged with the rows of the calls.

Owns the charges that wait without a row: those of calls whose rows were dropped. A lease in the
database is charged in the transaction that has the rows, so the ledger and the budgets agree after
any crash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from relay.core.budgets import NOTHING, Account, Charge, Charged
from relay.core.errors import (
    UpstreamDisconnected,
    UpstreamErrorInAnswer,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamTlsFailed,
    UpstreamUnreachable,
)
from relay.core.exchange import Exchange
from relay.ledger.rows import Entry

_WITHOUT_ANSWER = (
    UpstreamUnreachable, UpstreamTlsFailed, UpstreamDisconnected, UpstreamProtocolError,
    UpstreamTimeout,
)  # fmt: skip


def settle_budgets(exchange: Exchange) -> tuple[Charge, ...]:
    """Settle the budgets of a call whose cost is known as far as it will be."""
    use, exchange.budget = exchange.budget, None
    if use is None:
        return ()
    cost_nano = exchange.usage.cost_nano_usd
    if cost_nano is None and (is_unbilled(exchange) or _is_unused(exchange)):
        cost_nano = 0
    return use.settle(cost_nano)


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

    def keep(self, charges: Sequence[Charge]) -> None:
        """Keep the charges of a call whose row is dropped: they are written nevertheless."""
        _add(self._kept, charges)

    def begin(self, entries: Sequence[Entry]) -> Mapping[Account, Charged]:
        """Return the sums that the transaction of these rows writes: of each lease all that it was
        charged so far, so that a repeated write changes nothing.
        """
        self._writing, changed = self._kept, dict(self._kept)
        self._kept = {}
        for entry in entries:
            _add(changed, entry.charges)
        return {account: account.written.plus(more) for account, more in changed.items()}

    def written(self, sums: Mapping[Account, Charged]) -> None:
        """Note that the transaction is committed."""
        self._writing = {}
        for account, charged in sums.items():
            account.written, account.is_stored = charged, True
            account.granted_nano = max(account.granted_nano, charged.total_nano)

    def failed(self) -> None:
        """Note that the transaction failed, or may have failed: everything is written again."""
        again, self._writing = self._writing, {}
        _add(self._kept, [Charge(*each) for each in again.items()])


def _add(to: dict[Account, Charged], charges: Sequence[Charge]) -> None:
    for account, charged in charges:
        to[account] = to.get(account, NOTHING).plus(charged)
