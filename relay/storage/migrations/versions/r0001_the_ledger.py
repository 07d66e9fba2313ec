"""Create the ledger: exchanges, their metadata and bodies, and the sums."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_SUMS = (
    "requests", "errors", "cache_hits", "unpriced", "estimated", "cost_nano_usd", "saved_nano_usd",
    "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens",
    "cache_write_1h_tokens", "reasoning_tokens", "input_audio_tokens", "output_audio_tokens",
    "cache_audio_read_tokens", "input_image_tokens", "output_image_tokens",
    "cache_image_read_tokens", "characters", "audio_ms", "units_milli", "images",
)  # fmt: skip


def _rollup(name: str, *keys: sa.Column[Any]) -> None:
    op.create_table(
        name,
        *keys,
        sa.Column("writer", sa.String(36), primary_key=True),
        *(sa.Column(each, _BIG, nullable=False) for each in _SUMS),
        sa.Column("spread", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )


def upgrade() -> None:
    """Create the tables and indexes."""
    op.create_table(
        "exchanges",
        sa.Column("seq", _BIG, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(36), nullable=False, unique=True),
        sa.Column("surface", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("status", sa.SmallInteger, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("cache", sa.Text),
        sa.Column("duration_ms", sa.Float, nullable=False),
        sa.Column("input_tokens", _BIG, nullable=False),
        sa.Column("output_tokens", _BIG, nullable=False),
        sa.Column("cost_nano_usd", _BIG),
        sa.Column("event_id", sa.Text),
        sa.Column("end_user", sa.Text),
        sa.Column("metadata", sa.Text),
        sa.Column("record", sa.Text, nullable=False),
        sa.Column("feedback", sa.SmallInteger),
        sa.Column("score", sa.Float),
        sqlite_autoincrement=True,
    )
    failed = sa.text("(status >= 400 OR outcome IN ('failed', 'refused'))")
    op.create_index(
        "exchanges_failed", "exchanges", ["id"], sqlite_where=failed, postgresql_where=failed
    )
    named = sa.text("event_id IS NOT NULL")
    op.create_index(
        "exchanges_event", "exchanges", ["event_id"], sqlite_where=named, postgresql_where=named
    )
    op.create_table(
        "tags",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )
    _rollup(
        "tag_rollups",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("at_s", _BIG, primary_key=True),
        sa.Column("value", sa.Text, primary_key=True),
    )
    op.create_table(
        "bodies",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("request", sa.LargeBinary),
        sa.Column("request_complete", sa.SmallInteger, nullable=False),
        sa.Column("response", sa.LargeBinary),
        sa.Column("response_complete", sa.SmallInteger, nullable=False),
    )
    _rollup(
        "rollups",
        sa.Column("span_s", sa.Integer, primary_key=True),
        sa.Column("at_s", _BIG, primary_key=True),
        sa.Column("client", sa.Text, primary_key=True),
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("surface", sa.Text, primary_key=True),
        sa.Column("outcome", sa.Text, primary_key=True),
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in ("rollups", "bodies", "tag_rollups", "tags", "exchanges"):
        op.drop_table(table)
