"""Sums by user and by chosen names of metadata, for reports such as spend by team.

Owns: which value of a name a call has, how many values of a name have sums of their own, and the
writer's sums by value. Calls without a value have no sums here: a report takes them for the rest of
all calls (usage.py), so that every report adds up to the total.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import sqlalchemy as sa

from relay.core.metadata import as_text
from relay.core.record import Record
from relay.core.text import clean
from relay.ledger.rollups import Rollups, Sums, answered_by
from relay.registry.schema import Ledger
from relay.storage.database import Database
from relay.storage.tables import group_values

USER, METADATA = "user", "metadata."
OTHER, NONE = "(other)", "(none)"
"""The values past MAX_VALUES, together; and the calls that have no value."""
MAX_VALUES = 1000
"""Values of a name that have sums of their own, a day, of all writers of the database together."""
SPANS_S = (3600, 86400)
_DAY_S = 86400
_MAX_UNDECIDED = 5000
_DECIDING = 7_201_454
"""The advisory lock that PostgreSQL's writers decide under, one after the other."""
K = TypeVar("K")


class Grouping(NamedTuple):
    """What calls are added up by, and for how long the sums are kept."""

    names: tuple[str, ...] = (USER,)
    """`user`, and `metadata.NAME`."""
    retention_s: float = 60 * _DAY_S


def grouping(rules: Ledger) -> Grouping:
    """By user, and by the names of metadata that `ledger.group_by` lists."""
    names = (USER, *(METADATA + name for name in rules.group_by))
    return Grouping(names, rules.group_retention_days * _DAY_S)


class Key(NamedTuple):
    """What these sums are told apart by."""

    name: str
    value: str
    provider: str
    model: str


def by_group(records: Sequence[Record], names: Sequence[str]) -> dict[Key, Sums]:
    """What calls came to, by each of the names that they have a value of."""
    alike: dict[Key, list[Record]] = {}
    for record in records:
        if record.metadata is None and record.user is None:
            continue
        for name in names:
            value = _value(record, name)
            if value and value != NONE:
                alike.setdefault(Key(name, value, *answered_by(record)), []).append(record)
    return {key: Sums(group) for key, group in alike.items()}


def _value(record: Record, name: str) -> str | None:
    if name == USER:
        return record.user
    given = (record.metadata or {}).get(name.removeprefix(METADATA))
    return None if given is None else clean(as_text(given))


class GroupRollups(Rollups):
    """The rollups of one writer by group. Sums of a value that is new today wait until the database
    has decided, for all writers together, whether it has sums of its own.
    """

    def __init__(self, database: Database, new_id: Callable[[], str]) -> None:
        super().__init__(new_id, SPANS_S)
        self._database = database
        self._chosen: dict[tuple[int, str], set[str]] = {}
        """By day and name: the values that are known to have sums of their own."""
        self._undecided: dict[tuple[int, Key], Sums] = {}
        """By hour."""

    def take(self, batch: Mapping[Key, Sums], unix_s: float) -> None:
        """What came together since the last time, put to now."""
        hour_s = int(unix_s // 3600) * 3600
        decided: dict[Key, Sums] = {}
        for key, sums in batch.items():
            place = self._place(key, hour_s)
            if place is None and len(self._undecided) >= _MAX_UNDECIDED:
                place = key._replace(value=OTHER)
            if place is not None:
                _add(decided, place, sums)
            else:
                _add(self._undecided, (hour_s, key), sums)
        super().take(decided, unix_s)

    def _place(self, key: Key, hour_s: int) -> Key | None:
        """Where a key's calls are added up; None if that is not decided yet."""
        chosen = self._chosen.get((_day_s(hour_s), key.name), ())
        if key.value in chosen:
            return key
        return key._replace(value=OTHER) if len(chosen) >= MAX_VALUES else None

    @property
    def undecided(self) -> bool:
        """True while some sums wait for `decide`."""
        return bool(self._undecided)

    async def decide(self) -> None:
        """Choose the values that have sums of their own. Raises what the database raises."""
        waiting = list(self._undecided)
        wanted: dict[tuple[int, str], dict[str, None]] = {}
        for hour_s, key in waiting:
            wanted.setdefault((_day_s(hour_s), key.name), {})[key.value] = None
        for (day_s, name), values in wanted.items():
            self._chosen[day_s, name] = await self._choose(day_s, name, list(values))
        for hour_s, key in waiting:
            place = self._place(key, hour_s) or key._replace(value=OTHER)
            super().take({place: self._undecided.pop((hour_s, key))}, hour_s)

    async def _choose(self, day_s: int, name: str, wanted: Sequence[str]) -> set[str]:
        """The values of a name on a day: those that are there, then the wanted as far as there is
        room.
        """
        there = sa.select(group_values.c.value).where(
            group_values.c.at_s == day_s, group_values.c.name == name
        )
        async with self._database.writing() as connection:
            if not self._database.is_sqlite:
                await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_DECIDING)))
            chosen = set((await connection.execute(there)).scalars())
            new = [value for value in wanted if value not in chosen]
            new = new[: max(0, MAX_VALUES - len(chosen))]
            if new:
                rows = [{"at_s": day_s, "name": name, "value": value} for value in new]
                await connection.execute(sa.insert(group_values), rows)
        return chosen | set(new)

    def written(self, unix_s: float) -> None:
        """As Rollups; and days that are past are forgotten."""
        super().written(unix_s)
        today_s = _day_s(unix_s)
        if any(day_s < today_s for day_s, _ in self._chosen):
            self._chosen = {k: values for k, values in self._chosen.items() if k[0] >= today_s}

    def drop(self, unix_s: float) -> None:
        """As Rollups."""
        self._undecided.clear()
        super().drop(unix_s)


def _day_s(unix_s: float) -> int:
    return int(unix_s // _DAY_S) * _DAY_S


def _add(to: dict[K, Sums], key: K, sums: Sums) -> None:
    whole = to.get(key)
    if whole is None:
        whole = to[key] = Sums()
    whole.add(sums)
