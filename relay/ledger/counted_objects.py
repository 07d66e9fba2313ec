"""Remember the providers' objects (responses, batches, transcripts, …) whose usage is counted, so
that reading an object again, by any worker and after a restart, counts nothing.

Owns that memory: in this process, and in the database if there is one. While the database is
unavailable or slow, only this process's memory is used.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from sqlalchemy.ext.asyncio import AsyncConnection

from relay.storage.database import (
    Database,
    DatabaseNewer,
    DatabaseUnavailable,
    RowsRefused,
    insert_of,
)
from relay.storage.tables import booked

MAX_OBJECTS = 10_000
_AT_ONCE = 200
_WAIT_S = 1.0

Object = tuple[str, str]
"""(provider, id of the object)"""


class CountedObjects:
    """The counted objects of a process, up to MAX_OBJECTS; the oldest is forgotten first."""

    def __init__(self, database: Database | None) -> None:
        self._database = database
        self._known: dict[Object, int] = {}
        """The milliseconds of audio that were counted, for an object whose count grows; else 0."""

    @property
    def is_shared(self) -> bool:
        """True if other processes may have counted objects that this one has not."""
        return self._database is not None

    def claim(self, named: Object) -> bool:
        """Mark an object as counted; True if this process had not counted it before."""
        if named in self._known:
            return False
        if len(self._known) >= MAX_OBJECTS:
            self._known.pop(next(iter(self._known)))
        self._known[named] = 0
        return True

    def claim_up_to(self, named: Object, audio_ms: int) -> int:
        """Count an object up to `audio_ms`; return how much this process had counted before."""
        self.claim(named)
        before_ms = self._known[named]
        self._known[named] = max(before_ms, audio_ms)
        return before_ms

    async def counted_elsewhere(self, claimed: Collection[Object]) -> Collection[Object]:
        """Return the objects of `claimed` that the database has as counted already, and record the
        others there. Empty while the database is unavailable or slow.
        """
        if self._database is None or not claimed:
            return ()
        try:
            async with asyncio.timeout(_WAIT_S):
                return set(claimed) - await self._insert(list(claimed))
        except (DatabaseUnavailable, DatabaseNewer, RowsRefused, TimeoutError):
            return ()

    async def _insert(self, claimed: list[Object]) -> set[Object]:
        assert self._database is not None
        insert = insert_of(self._database)
        now_s = int(time.time())
        new: set[Object] = set()

        async def insert_all(connection: AsyncConnection) -> None:
            for at in range(0, len(claimed), _AT_ONCE):
                rows = [
                    {"provider": provider, "object_id": object_id, "at_s": now_s}
                    for provider, object_id in claimed[at : at + _AT_ONCE]
                ]
                statement = insert(booked).values(rows).on_conflict_do_nothing()
                found = await connection.execute(
                    statement.returning(booked.c.provider, booked.c.object_id)
                )
                new.update((provider, object_id) for provider, object_id in found)

        await self._database.change(insert_all)
        return new
