"""Know which client has made an object of a provider, for paths of the unified surface that name an
object and no model: `responses/{id}`.

Owns that memory and its rows in the database, which the other processes read. An object goes to the
provider that made it, and only for the client that made it: to any other client it does not exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from relay import log
from relay.core.errors import ObjectNotFound, StoreUnavailable
from relay.core.text import MAX_CHARACTERS
from relay.storage.database import DatabaseNewer, DatabaseUnavailable, RowsRefused
from relay.storage.objects import MadeObject, ObjectStore
from relay.storage.readers import QueryRefused

_MAX_KNOWN = 32_768
_MAX_WAITING = 10_000
_ASK_AGAIN_S = (0.0, 0.1, 0.4)
"""Another process may write the row only now."""
_FAILED = (DatabaseUnavailable, DatabaseNewer, RowsRefused)
Later = Callable[[Coroutine[Any, Any, None]], bool]


class MadeObjects:
    """The objects that clients have made. `later` queues work of the background, and returns False
    if it cannot.
    """

    def __init__(self, store: ObjectStore | None, later: Later, now_s: Callable[[], float]) -> None:
        self._store, self._later, self._now_s = store, later, now_s
        self._known: dict[tuple[str, str], str] = {}
        self._waiting: list[MadeObject] = []
        self._is_queued = self._is_failing = False

    def note(self, client: str, object_id: str, provider: str) -> None:
        """Note that `client` has made an object at `provider`. Does not wait."""
        if len(object_id) > MAX_CHARACTERS:
            return
        self._known.pop((client, object_id), None)
        self._known[client, object_id] = provider
        if len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        if self._store is None or len(self._waiting) >= _MAX_WAITING:
            return
        self._waiting.append(MadeObject(client, object_id, provider))
        if not self._is_queued:
            self._is_queued = self._later(self._write(self._store))

    async def _write(self, store: ObjectStore) -> None:
        self._is_queued = False
        waiting, self._waiting = self._waiting, []
        try:
            await store.add(waiting, self._now_s())
        except _FAILED as error:
            self._waiting = (waiting + self._waiting)[:_MAX_WAITING]  # with the next object
            if not self._is_failing:
                log.warn("objects.not_written", objects=len(self._waiting), cause=str(error))
            self._is_failing = True
        else:
            self._is_failing = False

    async def provider_of(self, client: str, object_id: str) -> str:
        """Return the provider of an object. Raises ObjectNotFound, StoreUnavailable."""
        for wait_s in _ASK_AGAIN_S if self._store is not None else _ASK_AGAIN_S[:1]:
            if wait_s:
                await asyncio.sleep(wait_s)
            if (known := self._known.get((client, object_id))) is not None:
                return known
            if self._store is not None and len(object_id) <= MAX_CHARACTERS:
                try:
                    found = await self._store.provider_of(client, object_id)
                except (*_FAILED, QueryRefused) as error:
                    raise StoreUnavailable from error
                if found is not None:
                    return found
        raise ObjectNotFound(object_id)
