"""Store the clients and keys that the relay made, and who changed them.

Owns the transactions of these changes, and the version that each of them raises: every process
polls that version, and loads what has changed. The rows hold digests of keys, never keys.
access_rows.py has the types of rows and their bounds.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.core.text import clean
from relay.storage.access_rows import (
    PAGE_ROWS,
    AuditRow,
    Changes,
    ClientRow,
    KeyRow,
    NewKey,
    RowT,
    audit_values,
    check_client,
    check_key,
    check_time,
    checked_json,
    columns,
    read_rows,
)
from relay.storage.database import Database
from relay.storage.tables import access_state, audit, client_keys, clients

_SECRET_BYTES = 32
T = TypeVar("T")
RecordOf = Callable[[ClientRow | None], str | None]
"""Returns the record that a client gets with a new key, by its row; None leaves the client as it
is. What it raises ends the change."""
_FIRST_STATE = sa.text(
    "INSERT INTO access_state (id, version, ticket_secret) VALUES (1, 0, :secret)"
    " ON CONFLICT DO NOTHING"
).bindparams(sa.bindparam("secret", type_=sa.LargeBinary))
_CLIENT = columns(ClientRow, clients)
_KEY = columns(KeyRow, client_keys)
_AUDIT = columns(AuditRow, audit)


class AccessStore:
    """The clients, keys and audit rows of a database. Each change is one durable transaction.

    Every method raises DatabaseUnavailable and DatabaseNewer. Those that change something also
    raise RowsRefused: for a value that is too large or of the wrong form, or an id or digest that
    exists. Those that read rows, except `changes`, also raise QueryRefused. `actor` names who makes
    a change, for the audit.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def version(self) -> int:
        """Return the version of the last change; 0 before the first one. A version lower than one
        seen before means that a backup was restored: everything must be loaded again.
        """
        found = await self._database.watch(
            lambda connection: connection.execute(sa.select(access_state.c.version))
        )
        return int(found.scalar() or 0)

    async def changes(self, since: int) -> AsyncIterator[Changes]:
        """Yield what was changed after version `since`, in pages: clients, then keys, each in the
        order of their changes, revoked keys and deleted clients included. 0 yields everything.

        The last page has the new version and no rows, the pages before it still have `since`. A row
        may be newer than the version of the last page: it is yielded again next time.
        """
        # The version is read first. A row that changes while pages are read moves to the end of the
        # order, so none is missed.
        version = await self.version()
        async for changed_clients in self._pages(ClientRow, clients, since):
            yield Changes(since, clients=changed_clients)
        async for changed_keys in self._pages(KeyRow, client_keys, since):
            yield Changes(since, keys=changed_keys)
        yield Changes(version)

    async def _pages(
        self, kind: type[RowT], table: sa.Table, since: int
    ) -> AsyncIterator[Sequence[RowT]]:
        (key,) = table.primary_key.columns
        ordered = sa.select(*columns(kind, table)).order_by(table.c.version, key).limit(PAGE_ROWS)
        query = ordered.where(table.c.version > since)
        while True:
            page = await self._database.watch(partial(read_rows, query, kind))
            if page:
                yield page
            if len(page) < PAGE_ROWS:
                return
            last: Any = page[-1]
            place = sa.tuple_(sa.literal(last.version), sa.literal(getattr(last, key.name)))
            query = ordered.where(sa.tuple_(table.c.version, key) > place)

    async def put_client(self, name: str, record: str, actor: str) -> ClientRow:
        """Create a client or replace its record. A deleted client exists again; its old keys stay
        revoked.
        """
        return await self._change(actor, lambda change: change.put_client(name, record))

    async def create_key(
        self, client: str, record: str | RecordOf | None, key: NewKey, actor: str
    ) -> KeyRow:
        """Store a key of a client. With a `record` the client gets that record, and is created if
        it does not exist; without one it may be a client of gateway.yaml. A function decides on the
        record by the row of the client, which no other change can come between.
        """

        async def create(change: _Change) -> KeyRow:
            new = record(await change.client(client)) if callable(record) else record
            if new is not None:
                await change.put_client(client, new)
            row = await change.add_key(client, key)
            await change.write_audit("key.create", key.id, {"client": client})
            return row

        return await self._change(actor, create)

    async def rotate(
        self,
        client: str,
        key: NewKey,
        old_expires_s: int,
        actor: str,
        check: Callable[[ClientRow | None], object] = lambda row: None,
    ) -> KeyRow:
        """Store a new key of a client, and let its older keys expire at `old_expires_s`, unless
        they expire before. `check` gets the row of the client, as for `create_key`.
        """

        async def rotate(change: _Change) -> KeyRow:
            check(await change.client(client))
            older = await change.expire_keys(client, old_expires_s)
            row = await change.add_key(client, key)
            details = {"client": client, "older_keys": older, "older_expire_s": old_expires_s}
            await change.write_audit("key.rotate", key.id, details)
            return row

        return await self._change(actor, rotate)

    async def revoke_key(self, id: str, actor: str) -> KeyRow | None:
        """Revoke a key, and return it; None if no key has this id. To revoke it again changes
        nothing.
        """

        async def revoke(change: _Change) -> KeyRow | None:
            if await change.revoke_keys(client_keys.c.id == id):
                await change.write_audit("key.revoke", id, {})
            else:
                await change.discard()
            query = sa.select(*_KEY).where(client_keys.c.id == id)
            return next(iter(await read_rows(query, KeyRow, change.connection)), None)

        return await self._change(actor, revoke)

    async def revoke_client(self, name: str, actor: str) -> int | None:
        """Revoke all keys of a client, and delete the client if it is not one of gateway.yaml.
        Returns how many keys were revoked; None if there was nothing to delete or revoke.
        """

        async def revoke(change: _Change) -> int | None:
            revoked = await change.revoke_keys(client_keys.c.client == name)
            if await change.delete_client(name) or revoked:
                await change.write_audit("client.revoke", name, {"keys": revoked})
                return revoked
            await change.discard()
            return None

        return await self._change(actor, revoke)

    async def _change(self, actor: str, work: Callable[[_Change], Awaitable[T]]) -> T:
        """Run `work` in the transaction of one change, which raises the version."""

        async def change(connection: AsyncConnection) -> T:
            # This locks the row until the commit: changes are made one after another, and whoever
            # sees a version sees all changes up to it.
            version = await _raise_version(connection)
            return await work(_Change(connection, version, int(self._clock()), actor))

        return await self._database.change_durably(change)

    async def client(self, name: str) -> ClientRow | None:
        """Return a client, also a deleted one; None if there is none of this name."""
        return next(iter(await self._list(_client_named(name), ClientRow)), None)

    async def clients(self, after: str = "", limit: int = PAGE_ROWS) -> Sequence[ClientRow]:
        """Return the clients that are not deleted by name, beginning after the name `after`."""
        query = sa.select(*_CLIENT).where(clients.c.deleted_s.is_(None), clients.c.name > after)
        return await self._list(query.order_by(clients.c.name).limit(_bounded(limit)), ClientRow)

    async def existing_clients(self, names: Collection[str]) -> set[str]:
        """Return those of some names that clients have that are not deleted."""
        if not names:
            return set()
        query = sa.select(clients.c.name).where(
            clients.c.deleted_s.is_(None), clients.c.name.in_(names)
        )
        found = await self._database.read(lambda connection: connection.execute(query))
        return set(found.scalars())

    async def key(self, id: str) -> KeyRow | None:
        """Return a key, also a revoked one; None if there is none with this id."""
        query = sa.select(*_KEY).where(client_keys.c.id == id)
        return next(iter(await self._list(query, KeyRow)), None)

    async def key_of_digest(self, sha256: bytes) -> KeyRow | None:
        """Return the key with this SHA-256, also a revoked one; None if there is none."""
        query = sa.select(*_KEY).where(client_keys.c.sha256 == sha256)
        return next(iter(await self._list(query, KeyRow)), None)

    async def keys(
        self, client: str | None = None, after: str = "", limit: int = PAGE_ROWS
    ) -> Sequence[KeyRow]:
        """Return the keys of one client or of all by client and id, revoked ones too, beginning
        after the key with the id `after`.
        """
        key = client_keys.c
        query = sa.select(*_KEY).order_by(key.client, key.id).limit(_bounded(limit))
        if client is not None:
            query = query.where(key.client == client)
        if after:
            last = client_keys.alias()
            place = sa.select(last.c.client, last.c.id).where(last.c.id == after)
            query = query.where(sa.tuple_(key.client, key.id) > place.scalar_subquery())
        return await self._list(query, KeyRow)

    async def audit(self, actor: str, action: str, target: str, details: Mapping[str, Any]) -> None:
        """Store that `actor` did something other than the changes of this class."""

        async def write(connection: AsyncConnection) -> None:
            change = _Change(connection, 0, int(self._clock()), actor)
            await change.write_audit(action, target, details)

        await self._database.change_durably(write)

    async def audit_rows(
        self, before: int | None = None, limit: int = PAGE_ROWS
    ) -> Sequence[AuditRow]:
        """Return the audit, newest first, beginning before the row with the `seq` `before`."""
        query = sa.select(*_AUDIT).order_by(audit.c.seq.desc()).limit(_bounded(limit))
        if before is not None:
            query = query.where(audit.c.seq < before)
        return await self._list(query, AuditRow)

    async def _list(self, query: sa.Select[Any], kind: type[RowT]) -> list[RowT]:
        return await self._database.read(partial(read_rows, query, kind))


@dataclass(frozen=True, slots=True)
class _Change:
    """The open transaction of one change, and the version, time and actor of it."""

    connection: AsyncConnection
    version: int
    at_s: int
    actor: str

    async def client(self, name: str) -> ClientRow | None:
        """Return a client, also a deleted one; None if there is none of this name."""
        check_client(name)
        return next(iter(await read_rows(_client_named(name), ClientRow, self.connection)), None)

    async def put_client(self, name: str, record: str) -> ClientRow:
        """Create a client, or replace its record."""
        check_client(name)
        details = {"record": checked_json(record)}
        values = {"record": record, "deleted_s": None, "version": self.version}
        update = sa.update(clients).where(clients.c.name == name).values(values)
        found = await read_rows(update.returning(*_CLIENT), ClientRow, self.connection)
        if not found:
            values |= {"name": name, "created_s": self.at_s, "created_by": clean(self.actor)}
            insert = sa.insert(clients).values(values).returning(*_CLIENT)
            found = await read_rows(insert, ClientRow, self.connection)
        await self.write_audit("client.put", name, details)
        return found[0]

    async def delete_client(self, name: str) -> bool:
        """Mark a client as deleted; False if there is none of this name."""
        known = sa.update(clients).where(clients.c.name == name, clients.c.deleted_s.is_(None))
        values = {"deleted_s": self.at_s, "version": self.version}
        return bool((await self.connection.execute(known.values(values))).rowcount)

    async def add_key(self, client: str, key: NewKey) -> KeyRow:
        """Store a key of a client."""
        check_client(client)
        check_key(key)
        row = KeyRow(
            id=key.id,
            client=client,
            sha256=key.sha256,
            created_s=self.at_s,
            created_by=clean(self.actor),
            expires_s=key.expires_s,
            revoked_s=None,
            version=self.version,
        )
        await self.connection.execute(sa.insert(client_keys), msgspec.structs.asdict(row))
        return row

    async def expire_keys(self, client: str, at_s: int) -> int:
        """Let the keys of a client expire at `at_s` if they would be valid for longer. Returns how
        many.
        """
        check_time(at_s)
        expires_s = client_keys.c.expires_s
        valid = sa.update(client_keys).where(
            client_keys.c.client == client,
            client_keys.c.revoked_s.is_(None),
            sa.or_(expires_s.is_(None), expires_s > at_s),
        )
        values = {"expires_s": at_s, "version": self.version}
        return int((await self.connection.execute(valid.values(values))).rowcount)

    async def revoke_keys(self, which: sa.ColumnElement[bool]) -> int:
        """Revoke those of some keys that are not revoked yet. Returns how many."""
        valid = sa.update(client_keys).where(which, client_keys.c.revoked_s.is_(None))
        values = {"revoked_s": self.at_s, "version": self.version}
        return int((await self.connection.execute(valid.values(values))).rowcount)

    async def write_audit(self, action: str, target: str, details: Mapping[str, Any]) -> None:
        """Add the row of the audit."""
        values = audit_values(self.at_s, self.actor, action, target, details)
        await self.connection.execute(sa.insert(audit), values)

    async def discard(self) -> None:
        """Roll back: nothing has changed, so the version stays."""
        await self.connection.rollback()


def _client_named(name: str) -> sa.Select[Any]:
    return sa.select(*_CLIENT).where(clients.c.name == name)


async def _raise_version(connection: AsyncConnection) -> int:
    version = access_state.c.version
    raised = sa.update(access_state).values(version=version + 1).returning(version)
    found = (await connection.execute(raised)).scalar()
    if found is None:
        await write_first_state(connection)
        found = (await connection.execute(raised)).scalar_one()
    return int(found)


async def write_first_state(connection: AsyncConnection) -> None:
    """Write the row of `access_state`, with a new secret for tickets, unless it exists."""
    await connection.execute(_FIRST_STATE, {"secret": secrets.token_bytes(_SECRET_BYTES)})


def _bounded(limit: int) -> int:
    return min(max(limit, 1), PAGE_ROWS)
