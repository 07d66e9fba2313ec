"""Change the ledger on request: set feedback, score and metadata of a call, and delete calls.

Owns these changes. writer.py writes the rows of calls, retention.py deletes old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.core.metadata import Metadata, bound_entries, team_of
from relay.ledger.queries import BadQuery, Filter, export
from relay.ledger.rows import tags_of
from relay.storage.database import Database
from relay.storage.tables import bodies, exchanges, tags

_BATCH = 500
KEEP: Any = object()
"""The value of an argument of `change` that leaves its field unchanged."""


async def change(
    database: Database, id: str, *, feedback: Any = KEEP, score: Any = KEEP, metadata: Any = KEEP
) -> bool:
    """Change a call; False if there is no call with this id. None removes a value. Raises
    DatabaseUnavailable.
    """
    changes = {"feedback": feedback, "score": score}
    values = {name: value for name, value in changes.items() if value is not KEEP}
    if metadata is not KEEP:
        metadata = bound_entries(metadata or {})
        values["metadata"] = msgspec.json.encode(metadata).decode() if metadata else None
        values["team"] = team_of(metadata)

    async def update(connection: AsyncConnection) -> bool:
        changed = sa.update(exchanges).where(exchanges.c.id == id)
        if values:
            found = (await connection.execute(changed.values(**values))).rowcount
        else:
            count = sa.select(sa.func.count()).where(exchanges.c.id == id)
            found = (await connection.execute(count)).scalar_one()
        if found and metadata is not KEEP:
            await _replace_tags(connection, id, metadata)
        return bool(found)

    return await database.change(update)


async def _replace_tags(connection: Any, id: str, metadata: Metadata) -> None:
    """Replace the metadata entries of a call; sums that count the old entries do not change."""
    await connection.execute(sa.delete(tags).where(tags.c.id == id))
    rows = [{"name": name, "id": id, "value": value} for name, value in tags_of(metadata)]
    if rows:
        await connection.execute(sa.insert(tags), rows)


async def delete(database: Database, which: Filter) -> int:
    """Delete the calls that match, in batches, and return their number. The sums do not change.
    Raises BadQuery for a filter without conditions, DatabaseUnavailable.
    """
    if which == Filter():
        raise BadQuery("this would delete every call: give at least one condition")
    deleted = 0
    batch: list[str] = []
    async for call in export(database, which):
        batch.append(call["id"])
        if len(batch) == _BATCH:
            deleted += await delete_ids(database, batch)
            batch = []
    return deleted + (await delete_ids(database, batch) if batch else 0)


async def delete_ids(database: Database, ids: Sequence[str]) -> int:
    """Delete these calls with their metadata and bodies, and return how many existed."""
    return await database.change(lambda connection: delete_on(connection, ids))


async def delete_on(connection: AsyncConnection, ids: Sequence[str]) -> int:
    """Do the same as `delete_ids` within a transaction."""
    for table in (tags, bodies):
        await connection.execute(sa.delete(table).where(table.c.id.in_(ids)))
    deleted = await connection.execute(sa.delete(exchanges).where(exchanges.c.id.in_(ids)))
    return int(deleted.rowcount)
