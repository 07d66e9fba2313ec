"""Changes that people make to the ledger: feedback, score and metadata of a call, and deletion.

Owns: those. What calls write is ledger.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.core.metadata import Metadata, bound_entries
from relay.ledger.queries import BadQuery, Filter, export
from relay.ledger.rows import tags_of
from relay.storage.database import Database
from relay.storage.tables import bodies, exchanges, tags

_BATCH = 500
KEEP: Any = object()
"""Of a change: this stays as it is."""


async def change(
    database: Database, id: str, *, feedback: Any = KEEP, score: Any = KEEP, metadata: Any = KEEP
) -> bool:
    """False if there is no call of this id. None takes a value away. Raises DatabaseUnavailable."""
    changes = {"feedback": feedback, "score": score}
    values = {name: value for name, value in changes.items() if value is not KEEP}
    if metadata is not KEEP:
        metadata = bound_entries(metadata or {})
        values["metadata"] = msgspec.json.encode(metadata).decode() if metadata else None
    async with database.writing() as connection:
        changed = sa.update(exchanges).where(exchanges.c.id == id)
        if values:
            found = (await connection.execute(changed.values(**values))).rowcount
        else:
            there = sa.select(sa.func.count()).where(exchanges.c.id == id)
            found = (await connection.execute(there)).scalar_one()
        if found and metadata is not KEEP:
            await _tag(connection, id, metadata)
        return bool(found)


async def _tag(connection: Any, id: str, metadata: Metadata) -> None:
    """Give a call other entries; what was added up by the old ones stays as it was."""
    await connection.execute(sa.delete(tags).where(tags.c.id == id))
    rows = [{"name": name, "id": id, "value": value} for name, value in tags_of(metadata)]
    if rows:
        await connection.execute(sa.insert(tags), rows)


async def delete(database: Database, which: Filter) -> int:
    """Delete the rows that fit, in batches; how many went. What they added up to stays. Raises
    BadQuery for a filter that leaves nothing out, DatabaseUnavailable.
    """
    if which == Filter():
        raise BadQuery("this would delete all: name at least one condition")
    gone = 0
    batch: list[str] = []
    async for call in export(database, which):
        batch.append(call["id"])
        if len(batch) == _BATCH:
            gone += await delete_ids(database, batch)
            batch = []
    return gone + (await delete_ids(database, batch) if batch else 0)


async def delete_ids(database: Database, ids: Sequence[str]) -> int:
    """Delete these calls, with their metadata and bodies; how many there were."""
    async with database.writing() as connection:
        return await delete_on(connection, ids)


async def delete_on(connection: AsyncConnection, ids: Sequence[str]) -> int:
    """The same within a transaction."""
    for table in (tags, bodies):
        await connection.execute(sa.delete(table).where(table.c.id.in_(ids)))
    gone = await connection.execute(sa.delete(exchanges).where(exchanges.c.id.in_(ids)))
    return int(gone.rowcount)
