"""Make the database rows of a call: the call itself, its metadata entries, its bodies.

Owns which fields of a Record are columns; the whole record is stored beside them as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from relay.core.budgets import BudgetUse
from relay.core.metadata import Metadata, as_text, team_of
from relay.core.record import Bodies, Record
from relay.storage.inserts import Batch, Insert, Rows
from relay.storage.provisional_charges import ChargedObject, ProvisionalCharge
from relay.storage.tables import KEYS, SUMS, bodies, exchanges, group_rollups, rollups, tags

_ALWAYS = (
    "id", "transport", "surface", "provider", "model", "client", "status", "outcome",
    "duration_ms", "input_tokens", "output_tokens", "cost_nano_usd", "record", "user_agent",
)  # fmt: skip
_KEYED = (*_ALWAYS, "key_id")
_TAGGED = (*_KEYED, "team", "metadata")
_NAMED = (*_TAGGED, "cache", "event_id", "end_user")
_OF_AGENT = (*_NAMED, "agent_session", "agent_parent")
ROWS = {
    len(names): Insert(exchanges, names) for names in (_ALWAYS, _KEYED, _TAGGED, _NAMED, _OF_AGENT)
}
"""The inserts of a call by their number of columns. Most calls have no value in the last columns,
and each column of an insert costs a row a twentieth of its time.
"""
TAG = Insert(tags, ("name", "id", "value"))
GROUP_SUM = Insert(
    group_rollups,
    ("span_s", "at_s", "name", "value", "provider", "model", "writer", *SUMS, "spread"),
    replace=(*SUMS, "spread"),
)
BODY = Insert(bodies, [column.name for column in bodies.columns])
SUM = Insert(
    rollups, ("span_s", "at_s", *KEYS, "writer", *SUMS, "spread"), replace=(*SUMS, "spread")
)
_encode = msgspec.json.Encoder(enc_hook=str).encode


@dataclass(slots=True)
class Entry:
    """The rows of one call."""

    row: tuple[Any, ...]
    tags: tuple[tuple[Any, ...], ...] = ()
    body: tuple[Any, ...] | None = None
    body_bytes: int = 0
    row_bytes: int = 0
    """Size of the record, which is most of the row."""
    budget: BudgetUse | None = None
    """The budgets of the call, and what each was charged."""
    provisional: tuple[ProvisionalCharge, ...] = ()
    """The part of it whose cost is reported later."""
    charged_object: ChargedObject | None = None
    """The object whose usage the call was charged."""


def tags_of(metadata: Metadata) -> list[tuple[str, str]]:
    """Return the metadata entries of a call as they are stored."""
    return [(name, as_text(value)) for name, value in metadata.items()]


def entry_of(record: Record, line: bytes | None, stored: Bodies | None) -> Entry:
    """Make the rows of a call. `line` is the encoded record, if there is one already."""
    line = line or _encode(record)
    entry = Entry(row(record, line), row_bytes=len(line))
    if record.metadata:
        entry.tags = tuple((name, record.id, value) for name, value in tags_of(record.metadata))
    if stored is not None:
        complete = int(stored.request_complete), int(stored.response_complete)
        entry.body = (record.id, stored.request, complete[0], stored.response, complete[1])
        entry.body_bytes = len(stored.request) + len(stored.response)
    return entry


def row(record: Record, line: bytes) -> tuple[Any, ...]:
    """Make a call's row, in the order of the columns of one of ROWS: that with the fewest columns
    which has all values of the call. `line` is the encoded record.
    """
    usage, tags = record.usage, record.metadata
    model = record.model_answered or record.model
    always = (
        record.id, record.transport, record.surface, record.answered_by or record.provider,
        model or "", record.client, record.status, record.outcome,
        record.duration_ms,
        usage.input_tokens if usage is not None else 0,
        usage.output_tokens if usage is not None else 0,
        record.cost_nano_usd, line.decode(), record.user_agent,
    )  # fmt: skip
    is_named = record.cache or record.event_id or record.user or record.agent_session
    if not (tags or is_named):
        return (*always, record.key_id) if record.key_id else always
    team = team_of(tags) if tags else None
    tagged = (*always, record.key_id, team, _encode(tags).decode() if tags else None)
    if not is_named:
        return tagged
    named = (*tagged, record.cache, record.event_id, record.user)
    if not record.agent_session:
        return named
    return (*named, record.agent_session, record.agent_parent)


def inserts(entries: Sequence[Entry], sums: Rows, group_sums: Rows) -> Batch:
    """Make the batch that writes some calls. `sums` and `group_sums` are rows of Rollups."""
    rows = [entry.row for entry in entries]
    return (
        *((insert, [row for row in rows if len(row) == count]) for count, insert in ROWS.items()),
        (TAG, [tag for entry in entries for tag in entry.tags]),
        (BODY, [entry.body for entry in entries if entry.body]),
        (SUM, sums),
        (GROUP_SUM, group_sums),
    )
