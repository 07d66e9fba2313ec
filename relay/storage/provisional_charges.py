"""Store what budgets were charged for objects of which the provider reports the usage later, such
as responses in background, and give it back when that usage is charged.

Owns the rows of `provisional_charges`. They are inserted in the transaction that charges the
budget; until they are given back, the budget has lost what the call had reserved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.storage.inserts import Insert
from relay.storage.tables import budgets, provisional_charges


class ProvisionalCharge(NamedTuple):
    """What a budget was charged for an object, as a row."""

    provider: str
    object_id: str
    key: str
    period_start_s: int
    nano_usd: int
    at_s: int


INSERT = Insert(provisional_charges, ProvisionalCharge._fields)


class ChargedObject(NamedTuple):
    """An object whose usage has been charged to some budgets."""

    provider: str
    object_id: str
    keys: tuple[str, ...]
    most_nano: int | None = None
    """How much may be given back to each: what the reading was charged, if its cost is not known.
    None: all."""


async def give_back(connection: AsyncConnection, charged: Iterable[ChargedObject]) -> None:
    """Give the provisional charges of objects back to the budgets that were charged their usage, in
    the periods that were charged.
    """
    rows = sorted(((key, each) for each in charged for key in each.keys), key=lambda row: row[0])
    column, budget = provisional_charges.c, budgets.c
    for key, (provider, object_id, _, most_nano) in rows:  # in the order of others' locks
        found = await connection.execute(
            sa.delete(provisional_charges)
            .where(column.provider == provider, column.object_id == object_id, column.key == key)
            .returning(column.period_start_s, column.nano_usd)
        )
        for period_start_s, provisional_nano in found.all():
            nano_usd = provisional_nano if most_nano is None else min(provisional_nano, most_nano)
            await connection.execute(
                sa.update(budgets)
                .where(budget.key == key, budget.period_start_s == period_start_s)
                .values(
                    unpriced_nano=budget.unpriced_nano - nano_usd,
                    granted_nano=budget.granted_nano - nano_usd,
                )
            )


async def forget(connection: AsyncConnection, key: str, period_start_s: int) -> None:
    """Delete the provisional charges of a budget that begins anew."""
    column = provisional_charges.c
    await connection.execute(
        sa.delete(provisional_charges).where(
            column.key == key, column.period_start_s == period_start_s
        )
    )
