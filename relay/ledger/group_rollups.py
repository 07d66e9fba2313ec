"""Keep sums by user, team, agent session and configured names of metadata, for reports such as
spend by team.

Owns which value of a name a call has, how many values of a name have sums of their own, and one
writer's sums by value. Calls without a value have no sums here: usage.py computes them as the
difference to all calls, so that the rows of every report add up to the total.
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

USER, AGENT_SESSION, METADATA = "user", "agent_session", "metadata."
TEAM = "metadata.team"
OTHER, NONE = "(other)", "(none)"
"""The row of all values beyond MAX_VALUES, and that of calls without a value."""
MAX_VALUES = 1000
"""How many values of a name have sums of their own, per day, over all writers of the database."""
SPANS_S = (3600, 86400)
_DAY_S = 86400
_MAX_UNDECIDED = 5000
_DECIDING = 7_201_454
"""The advisory lock of PostgreSQL under which one writer at a time chooses values."""
K = TypeVar("K")


class Grouping(NamedTuple):
    """The names by which calls are summed, and for how long the sums are kept."""

    names: tuple[str, ...] = (USER, TEAM, AGENT_SESSION)
    """`user`, `agent_session`, and any number of `metadata.NAME`."""
    retention_s: float = 60 * _DAY_S


def grouping(rules: Ledger) -> Grouping:
    """Return the Grouping of a configuration: by user, team and agent session, and by the names in
    `ledger.group_by`.
    """
    names = dict.fromkeys(
        (USER, TEAM, AGENT_SESSION, *(METADATA + name for name in rules.group_by))
    )
    return Grouping(tuple(names), rules.group_retention_days * _DAY_S)


class Key(NamedTuple):
    """The dimensions of these sums."""

    name: str
    value: str
    provider: str
    model: str


def by_group(records: Sequence[Record], names: Sequence[str]) -> dict[Key, Sums]:
    """Sum calls by each of `names` for which they have a value."""
    by_value: dict[Key, list[Record]] = {}
    for record in records:
        if record.metadata is None and record.user is None and record.agent_session is None:
            continue
        for name in names:
            value = _value(record, name)
            if value and value != NONE:
                by_value.setdefault(Key(name, value, *answered_by(record)), []).append(record)
    return {key: Sums(group) for key, group in by_value.items()}


def _value(record: Record, name: str) -> str | None:
    if name == USER:
        return record.user
    if name == AGENT_SESSION:
        return record.agent_session
    given = (record.metadata or {}).get(name.removeprefix(METADATA))
    return None if given is None else clean(as_text(given))


class GroupRollups(Rollups):
    """The rollups of one writer by group. Sums of a value that is new today wait until `decide` has
    asked the database, which all writers share, whether the value has sums of its own.
    """

    def __init__(self, database: Database, new_id: Callable[[], str]) -> None:
        super().__init__(new_id, SPANS_S)
        self._database = database
        self._chosen: dict[tuple[int, str], set[str]] = {}
        """The values that are known to have sums of their own, by day and name."""
        self._undecided: dict[tuple[int, Key], Sums] = {}
        """The sums that wait for `decide`, by hour and key."""

    def take(self, batch: Mapping[Key, Sums], unix_s: float) -> None:
        """Add the sums of some calls at the time `unix_s`."""
        hour_s = int(unix_s // 3600) * 3600
        decided: dict[Key, Sums] = {}
        for key, sums in batch.items():
            row_key = self._row_key(key, hour_s)
            if row_key is None and len(self._undecided) >= _MAX_UNDECIDED:
                row_key = key._replace(value=OTHER)
            if row_key is not None:
                _add(decided, row_key, sums)
            else:
                _add(self._undecided, (hour_s, key), sums)
        super().take(decided, unix_s)

    def _row_key(self, key: Key, hour_s: int) -> Key | None:
        """Return the key of the row that sums a key's calls; None if it is not decided yet."""
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
        candidates: dict[tuple[int, str], dict[str, None]] = {}
        for hour_s, key in waiting:
            candidates.setdefault((_day_s(hour_s), key.name), {})[key.value] = None
        for (day_s, name), values in candidates.items():
            self._chosen[day_s, name] = await self._choose(day_s, name, list(values))
        for hour_s, key in waiting:
            row_key = self._row_key(key, hour_s) or key._replace(value=OTHER)
            super().take({row_key: self._undecided.pop((hour_s, key))}, hour_s)

    async def _choose(self, day_s: int, name: str, candidates: Sequence[str]) -> set[str]:
        """Return the chosen values of a name on a day: those that the database has, and as many of
        `candidates` as there is room for, which are added to it.
        """
        chosen_before = sa.select(group_values.c.value).where(
            group_values.c.at_s == day_s, group_values.c.name == name
        )
        async with self._database.writing() as connection:
            if not self._database.is_sqlite:
                await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_DECIDING)))
            chosen = set((await connection.execute(chosen_before)).scalars())
            new = [value for value in candidates if value not in chosen]
            new = new[: max(0, MAX_VALUES - len(chosen))]
            if new:
                rows = [{"at_s": day_s, "name": name, "value": value} for value in new]
                await connection.execute(sa.insert(group_values), rows)
        return chosen | set(new)

    def written(self, unix_s: float) -> None:
        """See Rollups. Forgets the chosen values of past days too."""
        super().written(unix_s)
        today_s = _day_s(unix_s)
        if any(day_s < today_s for day_s, _ in self._chosen):
            self._chosen = {k: values for k, values in self._chosen.items() if k[0] >= today_s}

    def drop(self, unix_s: float) -> None:
        """See Rollups."""
        self._undecided.clear()
        super().drop(unix_s)


def _day_s(unix_s: float) -> int:
    return int(unix_s // _DAY_S) * _DAY_S


def _add(to: dict[K, Sums], key: K, sums: Sums) -> None:
    whole = to.get(key)
    if whole is None:
        whole = to[key] = Sums()
    whole.add(sums)
