"""Store which client has made an object of a provider, such as a stored response, and where.

Owns the rows of `made_objects`. gate/made_objects.py keeps the latest ones in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.storage.database import Database, insert_of
from relay.storage.tables import made_objects

_AT_ONCE = 200


class MadeObject(NamedTuple):
    """An object that a client has made."""

    client: str
    object_id: str
    provider: str


class ObjectStore:
    """The objects in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, made: Sequence[MadeObject], unix_s: float) -> None:
        """Store objects; one that is stored already stays as it is. Raises DatabaseUnavailable,
        DatabaseNewer, RowsRefused.
        """
        insert = insert_of(self._database)

        async def insert_all(connection: AsyncConnection) -> None:
            for at in range(0, len(made), _AT_ONCE):
                rows = [each._asdict() | {"at_s": int(unix_s)} for each in made[at : at + _AT_ONCE]]
                statement = insert(made_objects).values(rows).on_conflict_do_nothing()
                await connection.execute(statement)

        await self._database.change(insert_all)

    async def provider_of(self, client: str, object_id: str) -> str | None:
        """Return the provider of an object that `client` has made; None if it has made none with
        this id. Raises DatabaseUnavailable, DatabaseNewer, QueryRefused.
        """
        columns = made_objects.c
        query = sa.select(columns.provider).where(
            columns.client == client, columns.object_id == object_id
        )
        found = await self._database.rows(query)
        return str(found[0][0]) if found else None
