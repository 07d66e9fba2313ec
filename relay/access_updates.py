"""Keep the clients and keys of the database up to date in this process, and end the calls and
sessions of keys that cease to be valid.

Owns the poll of the version that every change raises, twice a second in each process, and the
loading of what has changed. An order of the supervisor makes all workers poll at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from aiohttp import web

from relay import log
from relay.core.access import Rights, StoredKey
from relay.core.errors import AccessRevoked
from relay.gateway import GATEWAY, Gateway
from relay.registry.clients import BadRecord, rights_of
from relay.sessions.session import Ending
from relay.storage.access import AccessStore
from relay.storage.access_rows import Changes
from relay.storage.database import DatabaseNewer, DatabaseUnavailable

POLL_S = 0.5
_NO_RIGHTS = Rights(providers=frozenset({""}))
"""The rights of a client whose record cannot be read: it may call no provider."""
_AT_ONCE = 500


async def run_access_updates(app: web.Application):  # type: ignore[no-untyped-def]
    """Follow the database while the application runs (a cleanup context of aiohttp). The keys are
    loaded before the application serves, unless the database is unavailable.
    """
    gateway = app[GATEWAY]
    updates = AccessUpdates(gateway, gateway.access_store)
    gateway.refresh_access = updates.refresh
    await updates.refresh()
    task = asyncio.create_task(_poll(updates))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _poll(updates: AccessUpdates) -> None:
    while True:
        await asyncio.sleep(POLL_S)
        try:
            await updates.refresh()
        except Exception as error:
            # One failure must not end the loop, without which no key would be revoked; it is
            # logged, and after five seconds stored keys are refused.
            log.bug("access.update_failed", error)


class AccessUpdates:
    """Applies the changes of the database to the keys of this process."""

    def __init__(self, gateway: Gateway, store: AccessStore | None) -> None:
        self._gateway, self._store = gateway, store
        self._version = -1
        self._is_available = True
        self._refreshing = asyncio.Lock()
        gateway.keys.has_store = store is not None

    async def refresh(self) -> None:
        """Load what has changed, and end what is not allowed any more. An unavailable database is
        logged once.
        """
        async with self._refreshing:
            if self._store is not None:
                await self._load(self._store)
                # The first process writes the secret: a full disk must not make keys unusable.
                with contextlib.suppress(DatabaseUnavailable, DatabaseNewer):
                    await self._gateway.tickets.load_secret()
            await self._end_invalid()

    async def _load(self, store: AccessStore) -> None:
        keys = self._gateway.keys
        try:
            version = await store.version()
            if version < self._version:  # the database was restored from a backup
                keys.forget_stored()
                self._gateway.tickets.forget_secret()
                self._version = -1
            if version != self._version:
                async for changes in store.changes(max(self._version, 0)):
                    self._apply(changes)
                    self._version = changes.version
        except (DatabaseUnavailable, DatabaseNewer) as error:
            if self._is_available:
                log.warn("access.database_unavailable", cause=str(error))
            self._is_available = False
            return
        if not self._is_available:
            log.event("access.database_recovered")
        self._is_available = True
        keys.note_read()

    def _apply(self, changes: Changes) -> None:
        keys = self._gateway.keys
        for client in changes.clients:
            if client.deleted_s is not None:
                keys.remove_client(client.name)
            else:
                keys.put_client(client.name, _rights(client.name, client.record))
        for key in changes.keys:
            if key.revoked_s is not None:
                keys.remove_key(key.sha256)
            else:
                keys.put_key(key.sha256, StoredKey(key.id, key.client, key.expires_s))

    async def _end_invalid(self) -> None:
        """End the calls and sessions whose key was revoked or has expired."""
        gateway, now_s = self._gateway, time.time()
        for number, exchange in enumerate(list(gateway.calls)):
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
            key = exchange.request.caller.key
            if key is not None and not gateway.keys.is_valid(key, now_s):
                exchange.expire(AccessRevoked())
        for number, session in enumerate(list(gateway.sessions)):
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
            key = session.exchange.request.caller.key
            if key is not None and not gateway.keys.is_valid(key, now_s):
                error = AccessRevoked()
                session.end(Ending(error.close_code, error.message, "relay", error))


def _rights(name: str, record: str) -> Rights:
    try:
        return rights_of(record)
    except BadRecord as error:
        log.warn("access.bad_record", client=name, cause=str(error))
        return _NO_RIGHTS
