"""Define the tables of the ledger, of access and of budgets, for SQLite and PostgreSQL.

Owns the tables and columns of the newest schema. migrations/ has the steps that lead to it; a test
compares the two.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from relay.core.usage import COUNTS

metadata = sa.MetaData()
_Big = sa.BigInteger().with_variant(sa.Integer, "sqlite")

SUMS = (
    "requests", "errors", "cache_hits", "unpriced", "estimated", "cost_nano_usd", "saved_nano_usd",
    *COUNTS,
)  # fmt: skip
"""The columns of every table of sums."""
KEYS = ("client", "provider", "model", "transport", "surface", "outcome")
"""The dimensions of usage, besides time."""

exchanges = sa.Table(
    "exchanges",
    metadata,
    # `seq` is in the order of writing; `id`, a UUIDv7, in the order in which calls began.
    sa.Column("seq", _Big, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(36), nullable=False, unique=True),
    sa.Column("transport", sa.Text, nullable=False),
    sa.Column("surface", sa.Text, nullable=False, server_default="native"),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("client", sa.Text, nullable=False),
    sa.Column("status", sa.SmallInteger, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("cache", sa.Text),
    sa.Column("duration_ms", sa.Float, nullable=False),
    sa.Column("input_tokens", _Big, nullable=False),
    sa.Column("output_tokens", _Big, nullable=False),
    sa.Column("cost_nano_usd", _Big),
    sa.Column("event_id", sa.Text),
    sa.Column("end_user", sa.Text),
    sa.Column("metadata", sa.Text),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("feedback", sa.SmallInteger),
    sa.Column("score", sa.Float),
    sa.Column("key_id", sa.Text),
    sa.Column("team", sa.Text),
    sa.Column("user_agent", sa.Text),
    sa.Column("agent_session", sa.Text),
    sa.Column("agent_parent", sa.Text),
    sqlite_autoincrement=True,
)  # fmt: skip
WENT_WRONG = "(status >= 400 OR outcome IN ('failed', 'refused'))"
"""True for a call that failed or was refused. The index matches only this exact text."""
_FAILED = sa.text(WENT_WRONG)
sa.Index("exchanges_failed", exchanges.c.id, sqlite_where=_FAILED, postgresql_where=_FAILED)
_NAMED = sa.text("event_id IS NOT NULL")
sa.Index("exchanges_event", exchanges.c.event_id, sqlite_where=_NAMED, postgresql_where=_NAMED)

tags = sa.Table(
    "tags",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sqlite_with_rowid=False,
)
"""One row for each entry of a call's metadata."""


_ADDED_LATER = ("web_searches", "pages")
"""Columns that are 0 in rows from before they were added."""


def _key(*names: str, kind: Any = sa.Text) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, primary_key=True) for name in names]


def _rollup(name: str, *keys: sa.Column[Any]) -> sa.Table:
    """Define a table of sums by key. Each writer has rows of its own, which it replaces as a
    whole.
    """
    defaults = dict.fromkeys(_ADDED_LATER, "0")
    return sa.Table(
        name,
        metadata,
        *keys,
        sa.Column("writer", sa.String(36), primary_key=True),
        *(sa.Column(n, _Big, nullable=False, server_default=defaults.get(n)) for n in SUMS),
        sa.Column("spread", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )


group_rollups = _rollup(
    "group_rollups",
    *_key("name"),
    *_key("span_s", kind=sa.Integer),
    *_key("at_s", kind=_Big),
    *_key("value", "provider", "model"),
)
"""Sums by hour and day of the calls that have a value for `name`: `user`, or a `metadata.NAME` of
`ledger.group_by`. The calls without a value are the difference to `rollups`."""

group_values = sa.Table(
    "group_values",
    metadata,
    *_key("at_s", kind=_Big),
    *_key("name", "value"),
    sqlite_with_rowid=False,
)
"""The values of each name that have sums of their own on the day that begins at `at_s`."""

bodies = sa.Table(
    "bodies",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("request", sa.LargeBinary),
    sa.Column("request_complete", sa.SmallInteger, nullable=False),
    sa.Column("response", sa.LargeBinary),
    sa.Column("response_complete", sa.SmallInteger, nullable=False),
)

booked = sa.Table(
    "booked",
    metadata,
    *_key("provider", "object_id"),
    sa.Column("at_s", _Big, nullable=False),
    sqlite_with_rowid=False,
)
"""The providers' objects, such as responses, whose usage is counted: reading one again adds
nothing."""
sa.Index("booked_at", booked.c.at_s)

made_objects = sa.Table(
    "made_objects",
    metadata,
    *_key("client", "object_id"),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("at_s", _Big, nullable=False),
    sqlite_with_rowid=False,
)
"""The objects that clients have made through the unified surface, and where."""
sa.Index("made_objects_at", made_objects.c.at_s)

rollups = _rollup(
    "rollups", *_key("span_s", kind=sa.Integer), *_key("at_s", kind=_Big), *_key(*KEYS)
)

access_state = sa.Table(
    "access_state",
    metadata,
    sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("version", _Big, nullable=False),
    sa.Column("ticket_secret", sa.LargeBinary, nullable=False),
)
"""One row, with id 1, written with its first use. Every change of clients and keys raises
`version`."""

clients = sa.Table(
    "clients",
    metadata,
    *_key("name"),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("created_s", _Big, nullable=False),
    sa.Column("created_by", sa.Text, nullable=False),
    sa.Column("deleted_s", _Big),
    sa.Column("version", _Big, nullable=False),
)
sa.Index("clients_version", clients.c.version, clients.c.name)

client_keys = sa.Table(
    "client_keys",
    metadata,
    *_key("id"),
    sa.Column("client", sa.Text, nullable=False),
    sa.Column("sha256", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("created_s", _Big, nullable=False),
    sa.Column("created_by", sa.Text, nullable=False),
    sa.Column("expires_s", _Big),
    sa.Column("revoked_s", _Big),
    sa.Column("version", _Big, nullable=False),
)
"""Keys of clients, which are in `clients` or in gateway.yaml. A row is never deleted: the ledger
names keys by id."""
sa.Index("client_keys_version", client_keys.c.version, client_keys.c.id)
sa.Index("client_keys_client", client_keys.c.client, client_keys.c.id)

tickets = sa.Table(
    "tickets",
    metadata,
    *_key("sha256", kind=sa.LargeBinary),
    sa.Column("client", sa.Text, nullable=False),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("terms", sa.Text, nullable=False),
    sa.Column("expires_s", _Big, nullable=False),
    sa.Column("used_s", _Big),
    sa.Column("exchange_id", sa.Text),
    sa.Column("refusal", sa.Text),
)
sa.Index("tickets_expires", tickets.c.expires_s)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("seq", _Big, primary_key=True, autoincrement=True),
    sa.Column("at_s", _Big, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("details", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)
"""Who changed what, in the order of the changes."""


def _money(*names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, _Big, nullable=False, server_default="0") for name in names]


budgets = sa.Table(
    "budgets",
    metadata,
    *_key("key"),
    *_key("period_start_s", kind=_Big),
    sa.Column("period_end_s", _Big),
    sa.Column("rule", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    *_money("limit_nano", "extra_nano", "granted_nano", "spent_nano", "unpriced_nano", "over_nano"),
    *_money("recalls", "warned", "reset_nano"),
)
"""One row for each budget and period. `granted_nano` is all that was spent or is leased: that of
every row in `budget_leases`, and what the leases that were closed had spent, which `spent_nano`,
`unpriced_nano` and `over_nano` have. `limit_nano` is that of the rule when it was last applied,
`period_end_s` is earlier than the end of the period if the rule has periods of another length since
then. `extra_nano` was added by an administrator, by raising the limit, or as `reset_nano`, which is
what was spent when the budget was last reset. `recalls` counts how often all leases were recalled;
`warned` is the highest level of which was warned."""

sa.Index("budgets_period_end", budgets.c.period_end_s)

budget_leases = sa.Table(
    "budget_leases",
    metadata,
    *_key("id"),
    sa.Column("worker", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("period_start_s", _Big, nullable=False),
    *_money("granted_nano", "spent_nano", "unpriced_nano", "over_nano", "answered"),
    *_money("reserved_nano"),
)
"""The money of a budget that a process may spend, and what it has spent of it. The other columns
than `granted_nano` are written by that process alone, with the rows of the calls; `reserved_nano`,
which calls in flight have reserved, every few seconds, for reports."""
sa.Index("budget_leases_budget", budget_leases.c.key, budget_leases.c.period_start_s)
sa.Index("budget_leases_worker", budget_leases.c.worker)

budget_workers = sa.Table(
    "budget_workers",
    metadata,
    *_key("id"),
    sa.Column("heartbeat_s", _Big, nullable=False),
    sa.Column("dead_s", _Big),
)
"""The processes that have leases. One that is dead never spends again; what is left of its leases
is charged."""

provisional_charges = sa.Table(
    "provisional_charges",
    metadata,
    *_key("provider", "object_id", "key"),
    sa.Column("period_start_s", _Big, nullable=False),
    *_money("nano_usd"),
    sa.Column("at_s", _Big, nullable=False),
    sqlite_with_rowid=False,
)
"""What a budget was charged for an object of which the provider reports the usage later. It is a
part of `unpriced_nano`, and given back once the usage is charged."""
sa.Index("provisional_charges_at", provisional_charges.c.at_s)
