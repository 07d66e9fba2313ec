"""Make tickets, and redeem each of them once: a ticket opens one WebSocket session of a client.

Owns the form of a ticket, its lifetime, how many a client may get, and why one is refused. A ticket
ends in an authentication code, so that a forged one is refused without a query. The database
decides which of several requests redeems a ticket (storage/tickets.py); it has the SHA-256 only.
"""

from __future__ import annotations

import contextlib
import hmac
import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import msgspec

from relay.core.access import OPENAI_TICKET_PREFIX, TICKET_PREFIX, ClientKey, TicketTerms
from relay.core.errors import (
    CATALOGUE,
    RateLimited,
    RelayError,
    RepeatedRefusal,
    StoreUnavailable,
    TicketForged,
    TicketInvalid,
)
from relay.gate.keys import ClientKeys, digest_of
from relay.storage.access_rows import TicketRow
from relay.storage.database import DatabaseNewer, DatabaseUnavailable, RowsRefused
from relay.storage.tickets import TicketStore

LIFETIME_S = 60
"""How long a ticket can be redeemed."""
MOST_TICKETS, WINDOW_S = 1000, 60
"""How many tickets a client gets of one process, in a window of this length."""
_RANDOM_BYTES, _CODE_BYTES = 16, 8
_FORM = re.compile(rf"{TICKET_PREFIX}[A-Za-z0-9_-]{{32}}")
_REMEMBERED = 4096
"""How many tickets that were refused or redeemed a process remembers, so that a repeated one costs
no query."""
_NOT_ISSUED = "this relay has not issued it, or long ago"
_USED = "it was used already; fetch a new one for each connection"
_EXPIRED = f"it has expired, {LIFETIME_S} s after it was issued; fetch a new one"
_KEY_INVALID = "the client key that it was issued for was revoked or has expired"
_KINDS = {kind.code: kind for kind in CATALOGUE}
T = TypeVar("T")


class Issued(NamedTuple):
    """A new ticket."""

    ticket: str
    expires_s: int
    """Unix time until which it can be redeemed."""

    @property
    def openai_ticket(self) -> str:
        """The same ticket in the form that OpenAI's browser SDKs insist on."""
        return OPENAI_TICKET_PREFIX + self.ticket.removeprefix(TICKET_PREFIX)

    def __repr__(self) -> str:
        return "<Issued>"


class Redeemed(NamedTuple):
    """What a redeemed ticket allows."""

    key: ClientKey
    """The key that it was issued for, as it is now."""
    terms: TicketTerms


class _Stored(msgspec.Struct):
    """The terms of a ticket in the database."""

    key: str
    """The SHA-256 of the key that it was issued for, in hexadecimal digits."""
    terms: TicketTerms


class _Refusal(msgspec.Struct):
    """Why the handshake that used a ticket was refused, in the database."""

    code: str
    status: int
    message: str


class Tickets:
    """The tickets of this relay. Every method that asks the database raises StoreUnavailable."""

    __slots__ = ("_issued", "_keys", "_now_s", "_over", "_refresh_keys", "_secret", "_store")

    def __init__(
        self, store: TicketStore | None, keys: ClientKeys, now_s: Callable[[], float],
        refresh_keys: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        """`store` is None without a database, `now_s` returns the Unix time, `refresh_keys` applies
        the changes of the database to `keys`.
        """
        self._store, self._keys, self._now_s = store, keys, now_s
        self._refresh_keys = refresh_keys
        self._secret: bytes | None = None
        self._over: dict[bytes, str] = {}
        """Why a ticket is refused that was redeemed, or refused for good, by its SHA-256."""
        self._issued: dict[str, tuple[float, int]] = {}
        """Begin of the window, and number of tickets in it, by client."""

    async def load_secret(self) -> None:
        """Read the secret of tickets, unless it is known. Raises DatabaseUnavailable,
        DatabaseNewer.
        """
        if self._secret is None and self._store is not None:
            self._secret = await self._store.ticket_secret()

    def forget_secret(self) -> None:
        """Forget the secret of tickets: the database is another one."""
        self._secret = None

    async def issue(self, key: ClientKey, terms: TicketTerms) -> Issued:
        """Issue a ticket to the client of a key. Raises RateLimited, RowsRefused."""
        if self._store is None or self._secret is None:
            raise StoreUnavailable
        self._count(key.client.name)
        random = secrets.token_bytes(_RANDOM_BYTES)
        code = urlsafe_b64encode(random + _code_of(random, self._secret))
        ticket = TICKET_PREFIX + code.decode()
        expires_s = int(self._now_s()) + LIFETIME_S
        stored = msgspec.json.encode(_Stored(key.digest.hex(), terms)).decode()
        row = TicketRow(digest_of(ticket), key.client.name, key.id, stored, expires_s)
        await _ask(self._store.issue(row))
        return Issued(ticket, expires_s)

    def _count(self, client: str) -> None:
        now_s = self._now_s()
        began_s, count = self._issued.get(client, (now_s, 0))
        if not 0 <= now_s - began_s < WINDOW_S:
            began_s, count = now_s, 0
        if count >= MOST_TICKETS:
            wait_s = began_s + WINDOW_S - now_s
            raise RateLimited(f"{MOST_TICKETS} tickets in {WINDOW_S} s", wait_s)
        self._issued[client] = (began_s, count + 1)

    async def redeem(self, ticket: str, exchange_id: str) -> Redeemed:
        """Redeem a ticket, once. Raises TicketInvalid."""
        store, digest = self._genuine(ticket)
        if (reason := self._over.get(digest)) is not None:
            raise TicketInvalid(reason)
        self._remember(digest, _USED)  # of several requests at once, one asks the database
        now_s = self._now_s()
        try:
            row = await _ask(store.redeem(digest, now_s, exchange_id))
            if row is None:
                reason = _reason(await _ask(store.ticket(digest)), now_s) or _KEY_INVALID
                self._remember(digest, reason)
                raise TicketInvalid(reason)
        except StoreUnavailable:
            self._over.pop(digest, None)  # it may not have been redeemed
            raise
        redeemed = await self._allowed_by(row)
        if redeemed is None:
            self._remember(digest, _KEY_INVALID)
            error = TicketInvalid(_KEY_INVALID)
            await self.note_refusal(ticket, error)
            raise error
        return redeemed

    async def _allowed_by(self, row: TicketRow) -> Redeemed | None:
        """Return what a ticket allows; None if its key is not valid any more."""
        stored = msgspec.json.decode(row.terms, type=_Stored)
        digest = bytes.fromhex(stored.key)
        key = self._keys.by_digest(digest)
        if key is None:  # this process may not know a new key yet
            await self._refresh_keys()
            key = self._keys.by_digest(digest)
        if key is None or key.client.name != row.client:
            return None
        return Redeemed(key, stored.terms) if self._keys.is_valid(key, self._now_s()) else None

    async def note_refusal(self, ticket: str, error: RelayError) -> None:
        """Store why the handshake that used a ticket was refused, for `refusal`. Does nothing while
        the database is unavailable.
        """
        status = error.status if error.status >= 400 else 502  # a provider may answer 200 or 302
        noted = msgspec.json.encode(_Refusal(error.code, status, error.message)).decode()
        # The error of the handshake must not be replaced by one of this.
        with contextlib.suppress(StoreUnavailable, TicketInvalid, RowsRefused):
            store, digest = self._genuine(ticket)
            await _ask(store.note_refusal(digest, noted))

    async def refusal(self, ticket: str) -> RelayError | None:
        """Return why the handshake with this ticket was refused, or would be; None if the ticket
        can still be redeemed. It is not redeemed by this.
        """
        store, digest = self._genuine(ticket)
        row = await _ask(store.ticket(digest))
        if row is not None and row.refusal is not None:
            noted = msgspec.json.decode(row.refusal, type=_Refusal)
            if (kind := _KINDS.get(noted.code)) is not None:
                return RepeatedRefusal(kind, noted.status, noted.message)
        reason = _reason(row, self._now_s()) or self._over.get(digest, "")
        if not reason and row is not None and await self._allowed_by(row) is None:
            self._remember(digest, reason := _KEY_INVALID)
        return TicketInvalid(reason) if reason else None

    def _genuine(self, ticket: str) -> tuple[TicketStore, bytes]:
        """Return the store and the SHA-256 of a ticket that this relay can have made. Raises
        TicketForged for any other text.
        """
        if self._store is None or not _FORM.fullmatch(ticket):
            raise TicketForged(_NOT_ISSUED)
        if self._secret is None:
            raise StoreUnavailable
        decoded = urlsafe_b64decode(ticket.removeprefix(TICKET_PREFIX))
        random, code = decoded[:_RANDOM_BYTES], decoded[_RANDOM_BYTES:]
        if not hmac.compare_digest(code, _code_of(random, self._secret)):
            raise TicketForged(_NOT_ISSUED)
        return self._store, digest_of(ticket)

    def _remember(self, digest: bytes, reason: str) -> None:
        if len(self._over) >= _REMEMBERED:
            del self._over[next(iter(self._over))]
        self._over[digest] = reason


def _reason(row: TicketRow | None, now_s: float) -> str:
    """Return why the ticket of this row cannot be redeemed, as far as the row says; empty if not
    at all.
    """
    if row is None:
        return _NOT_ISSUED
    if row.used_s is not None:
        return _USED
    return _EXPIRED if row.expires_s <= now_s else ""


def _code_of(random: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, random, "sha256")[:_CODE_BYTES]


async def _ask(query: Awaitable[T]) -> T:
    try:
        return await query
    except (DatabaseUnavailable, DatabaseNewer) as error:
        raise StoreUnavailable from error
