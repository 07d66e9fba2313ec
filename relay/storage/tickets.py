"""Store tickets, each of which opens one WebSocket session.

Owns that a ticket is used once, by whichever process comes first, and never after its expiry. The
rows hold digests of tickets, never tickets. access_rows.py has the type of the row and its bounds.
"""

from __future__ import annotations

from functools import partial

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.storage.access import write_first_state
from relay.storage.access_rows import (
    TicketRow,
    check_client,
    check_digest,
    check_time,
    checked_json,
    columns,
    read_rows,
)
from relay.storage.database import Database, DatabaseUnavailable
from relay.storage.readers import QueryRefused
from relay.storage.tables import access_state, client_keys, tickets

KEPT_S = 3600
"""How long a ticket is kept after its expiry, to say why it was refused."""
DELETED_AT_ONCE = 1000
"""How many tickets one call of `delete_expired` deletes at most."""
_TICKET = columns(TicketRow, tickets)


class TicketStore:
    """The tickets of a database. Every method raises DatabaseUnavailable and DatabaseNewer; those
    that change something also raise RowsRefused.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def ticket_secret(self) -> bytes:
        """Return 32 random bytes, the same for all processes and machines on this database."""
        if (found := await self._database.watch(_read_secret)) is not None:
            return found
        return await self._database.change_durably(_make_secret)

    async def issue(self, ticket: TicketRow) -> None:
        """Store a new ticket."""
        check_client(ticket.client)
        check_digest(ticket.sha256)
        check_time(ticket.expires_s)
        checked_json(ticket.terms)
        await self._run(sa.insert(tickets).values(msgspec.structs.asdict(ticket)))

    async def redeem(self, sha256: bytes, now_s: float, exchange_id: str) -> TicketRow | None:
        """Use a ticket, and return it; None if it is unknown, used or expired, or if the key that
        it was issued for is revoked or expired. Of any number of calls, in any number of processes,
        one gets the ticket; it stays used whatever happens to that process.
        """
        now_s = int(now_s)
        key = client_keys.c
        is_over = sa.or_(key.revoked_s.is_not(None), key.expires_s <= now_s)
        query = (
            sa.update(tickets)
            .where(
                tickets.c.sha256 == sha256,
                tickets.c.used_s.is_(None),
                tickets.c.expires_s > now_s,
                ~sa.exists().where(key.id == tickets.c.key_id, is_over),
            )
            .values(used_s=now_s, exchange_id=exchange_id)
            .returning(*_TICKET)
        )
        found = await self._database.change_durably(partial(read_rows, query, TicketRow))
        return found[0] if found else None

    async def note_refusal(self, sha256: bytes, refusal: str) -> None:
        """Store why the handshake was refused that used a ticket, as a JSON object."""
        checked_json(refusal)
        used = sa.update(tickets).where(tickets.c.sha256 == sha256, tickets.c.used_s.is_not(None))
        await self._run(used.values(refusal=refusal))

    async def ticket(self, sha256: bytes) -> TicketRow | None:
        """Return a ticket, used or expired ones too; None if there is none, or none any more."""
        query = sa.select(*_TICKET).where(tickets.c.sha256 == sha256)
        try:
            found = await self._database.read(partial(read_rows, query, TicketRow))
        except QueryRefused as error:
            raise DatabaseUnavailable(type(error).__name__) from error
        return found[0] if found else None

    async def delete_expired(self, now_s: float) -> int:
        """Delete tickets that expired an hour ago, at most DELETED_AT_ONCE. Returns how many; call
        it again while it returns that many.
        """
        old = (
            sa.select(tickets.c.sha256)
            .where(tickets.c.expires_s <= int(now_s) - KEPT_S)
            .order_by(tickets.c.expires_s)
            .limit(DELETED_AT_ONCE)
            .with_for_update(skip_locked=True)  # PostgreSQL: other machines delete at the same time
        )
        return await self._run(sa.delete(tickets).where(tickets.c.sha256.in_(old)))

    async def _run(self, statement: sa.UpdateBase) -> int:
        """Return the number of rows that a statement changed. It need not be durable: a ticket that
        a loss of power loses is unknown, so it is refused.
        """

        async def run(connection: AsyncConnection) -> int:
            return int((await connection.execute(statement)).rowcount)

        return await self._database.change(run)


async def _read_secret(connection: AsyncConnection) -> bytes | None:
    found = (await connection.execute(sa.select(access_state.c.ticket_secret))).scalar()
    return None if found is None else bytes(found)


async def _make_secret(connection: AsyncConnection) -> bytes:
    await write_first_state(connection)
    found = await _read_secret(connection)
    assert found is not None, "this transaction wrote it, or one before"
    return found
