"""Keep the clients and keys of the database up to date in this process, and end the calls and
sessions of keys that cease to be valid.

Owns the poll of the version that every change raises, twice a second in each process, and the
loading of what has changed. An order of the supervisor makes all workers poll at once. What a poll
finds out is as old as its begin: calls with keys of the database are refused once that is
gate/keys.MAX_AGE_S ago. The poll has a database connection of its own, and the end of calls does
not wait for the poll.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

from aiohttp import web

from relay import log
from relay.core.access import StoredKey
from relay.core.addresses import address_of
from relay.core.errors import AccessRevoked
from relay.core.exchange import Exchange
from relay.gateway import GATEWAY, Gateway
from relay.sessions.session import Ending
from relay.storage.access import AccessStore
from relay.storage.access_rows import ClientRow, KeyRow
from relay.storage.database import DatabaseNewer, DatabaseUnavailable

T = TypeVar("T")
POLL_S = 0.5
CHECK_S = 2.0
"""How often all running calls are checked although no key has changed: a key may have expired."""
_ROWS_AT_ONCE, _CALLS_AT_ONCE = 100, 500
"""How many are handled before other tasks of the event loop have their turn."""


async def run_access_updates(app: web.Application):  # type: ignore[no-untyped-def]
    """Follow the database while the application runs (a cleanup context of aiohttp). The keys are
    loaded before the application serves, unless the database is unavailable.
    """
    gateway = app[GATEWAY]
    updates = AccessUpdates(gateway, gateway.access_store, time.time)
    gateway.refresh_access = updates.refresh
    await updates.refresh()
    updates.warn_of_unknown_clients()
    tasks = [asyncio.create_task(_repeat(job)) for job in (updates.load, updates.end_invalid)]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _repeat(job: Callable[[], Awaitable[None]]) -> None:
    failure = ""
    while True:
        await asyncio.sleep(POLL_S)
        try:
            await job()
            failure = ""
        except Exception as error:
            # One failure must not end the loop, without which no key would be revoked. It is logged
            # once, and if it lasts, keys of the database are refused.
            if failure != repr(error):
                log.bug("access.update_failed", error)
            failure = repr(error)


async def _in_turns(items: Iterable[T], at_once: int) -> AsyncIterator[T]:
    """Yield items, and let other tasks of the event loop have their turn after each `at_once`."""
    for number, item in enumerate(items, 1):
        yield item
        if number % at_once == 0:
            await asyncio.sleep(0)


class AccessUpdates:
    """Applies the changes of the database to the keys of this process."""

    def __init__(
        self, gateway: Gateway, store: AccessStore | None, now_s: Callable[[], float]
    ) -> None:
        """`now_s` returns the Unix time."""
        self._gateway, self._store, self._now_s = gateway, store, now_s
        self._version = 0
        self._is_complete = False
        """False until everything was loaded: at first, and again after the database was
        unavailable, since it may be another one then: restored from a backup, or a replica.
        """
        self._is_available = True
        self._loading = asyncio.Lock()
        self._checked: tuple[int, float] = (-1, 0.0)
        """The changes of the keys, and the time, up to which running calls were checked."""
        gateway.keys.has_store = store is not None

    async def refresh(self) -> None:
        """Load what has changed, and end what is not allowed any more. Another process may also ask
        for the money of a budget, for which gate/leases.py polls by itself.
        """
        await self.load()
        if (leases := self._gateway.leases) is not None:
            await leases.answer_recalls()
        await self.end_invalid()

    def warn_of_unknown_clients(self) -> None:
        """Warn of budgets for clients that neither gateway.yaml nor the database has. A client may
        be made later, and one without a key is named by its address.
        """
        if not self._is_complete:
            return
        for rule in self._gateway.config.budgets.rules:
            for name in sorted(rule.clients):
                if address_of(name) is None and self._gateway.keys.client(name) is None:
                    log.warn("budgets.client_unknown", budget=rule.name, client=name)

    async def load(self) -> None:
        """Load what has changed in the database. While it is unavailable, that is logged once."""
        if self._store is None:
            return
        async with self._loading:
            began_s = self._gateway.clock()
            try:
                await self._load(self._store)
            except (DatabaseUnavailable, DatabaseNewer) as error:
                if self._is_available:
                    log.warn("access.database_unavailable", cause=str(error))
                self._is_available = self._is_complete = False
                return
            if not self._is_available:
                log.event("access.database_recovered")
            self._is_available = True
            self._gateway.keys.note_read(began_s)
            # The first process writes the secret: a full disk must not make keys unusable.
            with contextlib.suppress(DatabaseUnavailable, DatabaseNewer):
                await self._gateway.tickets.load_secret()

    async def _load(self, store: AccessStore) -> None:
        version = await store.version()
        if version < self._version:  # the database was restored from a backup
            self._is_complete = False
        if not self._is_complete:
            self._gateway.tickets.forget_secret()
            await self._load_everything(store)
        elif version != self._version:
            async for changes in store.changes(self._version):
                await self._apply(changes.clients, changes.keys)
                self._version = changes.version

    async def _load_everything(self, store: AccessStore) -> None:
        """Load all clients and keys, then remove those that were not among them. Those that are
        unchanged stay valid throughout.
        """
        keys, version = self._gateway.keys, 0
        gone_clients, gone_keys = keys.stored_clients(), keys.stored_keys()
        async for changes in store.changes(0):
            await self._apply(changes.clients, changes.keys)
            gone_clients.difference_update(client.name for client in changes.clients)
            gone_keys.difference_update(key.sha256 for key in changes.keys)
            version = changes.version
        for name in gone_clients:
            keys.remove_client(name)
        for digest in gone_keys:
            keys.remove_key(digest)
        self._version, self._is_complete = version, True

    async def _apply(self, clients: Iterable[ClientRow], rows: Iterable[KeyRow]) -> None:
        keys = self._gateway.keys
        async for client in _in_turns(clients, _ROWS_AT_ONCE):
            if client.deleted_s is not None:
                keys.remove_client(client.name)
            else:
                keys.put_client(client.name, client.record)
        async for key in _in_turns(rows, _ROWS_AT_ONCE):
            if key.revoked_s is not None:
                keys.remove_key(key.sha256)
            else:
                keys.put_key(key.sha256, StoredKey(key.id, key.client, key.expires_s))

    async def end_invalid(self) -> None:
        """End the calls and sessions whose key was revoked or has expired. Does nothing if no key
        was changed and the last check was less than CHECK_S ago.
        """
        gateway = self._gateway
        changes, clock_s = gateway.keys.changes, gateway.clock()
        if changes == self._checked[0] and clock_s - self._checked[1] < CHECK_S:
            return
        self._checked = (changes, clock_s)
        now_s = self._now_s()
        async for exchange in _in_turns(list(gateway.calls), _CALLS_AT_ONCE):
            # A call that clients share goes on for the others; its first client is a call too.
            if not exchange.is_shared and (error := self._refusal(exchange, now_s)) is not None:
                exchange.expire(error)
        async for session in _in_turns(list(gateway.sessions), _CALLS_AT_ONCE):
            if (error := self._refusal(session.exchange, now_s)) is not None:
                session.end(Ending(error.close_code, error.message, "relay", error))

    def _refusal(self, exchange: Exchange, now_s: float) -> AccessRevoked | None:
        """Return why the key of a call is not valid any more; None if it is, or there is none."""
        key, keys = exchange.request.caller.key, self._gateway.keys
        if key is None or keys.is_valid(key, now_s):
            return None
        return AccessRevoked("has expired" if keys.by_digest(key.digest) else "was revoked")
