"""Delete old data: calls, bodies, counted objects, tickets, ended budgets, and sums by minute, hour
and group.

Owns when data is deleted, and that it is deleted in batches, so that a writer never waits long.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay import log
from relay.core.exchange import min_id_at
from relay.ledger.changes import delete_on
from relay.ledger.group_rollups import SPANS_S
from relay.storage.budgets import delete_ended
from relay.storage.database import Database, DatabaseNewer, DatabaseUnavailable
from relay.storage.tables import (
    bodies,
    booked,
    exchanges,
    group_rollups,
    group_values,
    made_objects,
    provisional_charges,
    rollups,
)
from relay.storage.tickets import TicketStore

_DAY_S = 86400
_MINUTES_KEPT_S, _HOURS_KEPT_S = 2 * _DAY_S, 60 * _DAY_S
_OBJECTS_KEPT_S = 90 * _DAY_S
"""Providers keep what they store, unless it is a conversation, for 30 days."""
_BATCH = 500
_EVERY_S = 60.0
_BETWEEN_S = 0.05


class Retention(NamedTuple):
    """How long calls, bodies and sums by group are kept, in seconds."""

    rows_s: float
    bodies_s: float
    groups_s: float = 60 * _DAY_S
    """Sums by user and by names of metadata, and budgets whose period has ended."""


async def retention(database: Database, periods: Callable[[], Retention]) -> None:
    """Sweep about once a minute, for ever. Every worker does so, without harm: rows that one has
    deleted the others do not find.
    """
    while True:
        # A random time, so that the workers do not sweep together.
        await asyncio.sleep(_EVERY_S * random.uniform(0.5, 1))  # noqa: S311
        try:
            while await sweep(database, periods()) >= _BATCH:  # noqa: ASYNC110 (others write between)
                await asyncio.sleep(_BETWEEN_S)
        except (DatabaseUnavailable, DatabaseNewer):
            continue  # the ledger's writer logs it
        except Exception as error:
            # A sweep that fails must not end the task; each failure is logged.
            log.bug("retention.failed", error)


async def sweep(database: Database, periods: Retention) -> int:
    """Delete a batch of old calls, bodies, budgets and tickets, and old sums. Returns how many of
    the first four were deleted. Raises DatabaseUnavailable.
    """
    now = time.time()
    async with database.writing() as connection:
        old_calls = await _oldest(connection, exchanges, now - periods.rows_s)
        if old_calls:
            await delete_on(connection, old_calls)
    async with database.writing() as connection:
        old_bodies = await _oldest(connection, bodies, now - periods.bodies_s)
        if old_bodies:
            await connection.execute(sa.delete(bodies).where(bodies.c.id.in_(old_bodies)))
        # A sum is kept until the end of its span is too old: queries round down to whole spans.
        for span_s, retention_s in ((60, _MINUTES_KEPT_S), (3600, _HOURS_KEPT_S)):
            old = (rollups.c.span_s == span_s) & (rollups.c.at_s < now - retention_s - span_s)
            await connection.execute(sa.delete(rollups).where(old))
        await connection.execute(sa.delete(booked).where(booked.c.at_s < now - _HOURS_KEPT_S))
        made_before = made_objects.c.at_s < now - _OBJECTS_KEPT_S
        await connection.execute(sa.delete(made_objects).where(made_before))
        provisional_before = provisional_charges.c.at_s < now - _OBJECTS_KEPT_S
        await connection.execute(sa.delete(provisional_charges).where(provisional_before))
        await _delete_groups(connection, now - periods.groups_s - _DAY_S)
    async with database.writing() as connection:
        old_budgets = await delete_ended(connection, now - periods.groups_s, _BATCH)
    old_tickets = await TicketStore(database).delete_expired(now)
    return len(old_calls) + len(old_bodies) + old_budgets + old_tickets


async def _delete_groups(connection: AsyncConnection, before_s: float) -> None:
    """Delete the sums by group of one day, the oldest that began before `before_s`: there may be
    many.
    """
    oldest = await connection.execute(sa.select(sa.func.min(group_values.c.at_s)))
    day_s = oldest.scalar()
    if day_s is None or day_s >= before_s:
        return
    of_day = group_values.c.at_s == day_s
    names = await connection.execute(sa.select(group_values.c.name).where(of_day).distinct())
    for name in list(names.scalars()):
        columns = group_rollups.c  # the primary key begins with these three columns
        sums = columns.name == name, columns.span_s.in_(SPANS_S), columns.at_s < day_s + _DAY_S
        await connection.execute(sa.delete(group_rollups).where(*sums))
    await connection.execute(sa.delete(group_values).where(of_day))


async def _oldest(connection: AsyncConnection, table: sa.Table, before_s: float) -> list[str]:
    """Return the ids of the oldest calls in `table` that began before `before_s`, up to _BATCH."""
    older = sa.select(table.c.id).where(table.c.id < min_id_at(before_s))
    found = await connection.execute(older.order_by(table.c.id).limit(_BATCH))
    return list(found.scalars())
