"""The providers' objects (responses, batches, transcripts, …) whose usage is counted: reading one
again, or by another worker, or after a restart, counts nothing.

Owns: that memory: of this process, and of the database where there is one. While the database is
away, or slow, this process goes by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any

from relay.storage.database import Database, DatabaseNewer, DatabaseUnavailable, RowsRefused
from relay.storage.tables import booked

MAX_OBJECTS = 10_000
_AT_ONCE = 200
_WAIT_S = 1.0

Object = tuple[str, str]
"""(provider, its id)"""


class CountedObjects:
    """One per process."""

    def __init__(self, database: Database | None) -> None:
        self._database = database
        self._known: dict[Object, int] = {}
        """With the milliseconds that were counted, of one whose count grows."""

    @property
    def is_shared(self) -> bool:
        """True if others may have counted what this process has not."""
        return self._database is not None

    def claim(self, named: Object) -> bool:
        """True if this process has not counted it yet; from now on it has."""
        if named in self._known:
            return False
        if len(self._known) >= MAX_OBJECTS:
            self._known.pop(next(iter(self._known)))
        self._known[named] = 0
        return True

    def claim_up_to(self, named: Object, audio_ms: int) -> int:
        """How much of a count that grows this process had counted before."""
        self.claim(named)
        before_ms = self._known[named]
        self._known[named] = max(before_ms, audio_ms)
        return before_ms

    async def counted_elsewhere(self, claimed: Collection[Object]) -> Collection[Object]:
        """Which of what this process claimed another one had counted before."""
        if self._database is None or not claimed:
            return ()
        try:
            async with asyncio.timeout(_WAIT_S):
                return set(claimed) - await self._insert(list(claimed))
        except (DatabaseUnavailable, DatabaseNewer, RowsRefused, TimeoutError):
            return ()

    async def _insert(self, claimed: list[Object]) -> set[Object]:
        assert self._database is not None
        insert = _inserting(self._database)
        now_s, new = int(time.time()), set()
        async with self._database.writing() as connection:
            for at in range(0, len(claimed), _AT_ONCE):
                rows = [
                    {"provider": provider, "object_id": object_id, "at_s": now_s}
                    for provider, object_id in claimed[at : at + _AT_ONCE]
                ]
                statement = insert(booked).values(rows).on_conflict_do_nothing()
                found = await connection.execute(
                    statement.returning(booked.c.provider, booked.c.object_id)
                )
                new |= {(provider, object_id) for provider, object_id in found}
        return new


def _inserting(database: Database) -> Any:
    """The `insert` of a database's dialect. Only that one is imported: each takes 50 ms."""
    if database.is_sqlite:
        from sqlalchemy.dialects.sqlite import insert as into_sqlite

        return into_sqlite
    from sqlalchemy.dialects.postgresql import insert as into_postgresql

    return into_postgresql
