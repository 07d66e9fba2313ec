"""Replace the sums by any metadata with sums by user and by the names of `ledger.group_by`."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_LATER = ("web_searches", "pages")
_SUMS = (
    "requests", "errors", "cache_hits", "unpriced", "estimated", "cost_nano_usd", "saved_nano_usd",
    "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens",
    "cache_write_1h_tokens", "reasoning_tokens", "input_audio_tokens", "output_audio_tokens",
    "cache_audio_read_tokens", "input_image_tokens", "output_image_tokens",
    "cache_image_read_tokens", "characters", "audio_ms", "units_milli", "images", *_LATER,
)  # fmt: skip


def _rollup(name: str, *keys: sa.Column[Any]) -> None:
    op.create_table(
        name,
        *keys,
        sa.Column("writer", sa.String(36), primary_key=True),
        *(
            sa.Column(each, _BIG, nullable=False, server_default="0" if each in _LATER else None)
            for each in _SUMS
        ),
        sa.Column("spread", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )


def upgrade() -> None:
    """Replace the tables. The old sums have no provider and no model, so they are not copied."""
    op.drop_table("tag_rollups")
    _rollup(
        "group_rollups",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("span_s", sa.Integer, primary_key=True),
        sa.Column("at_s", _BIG, primary_key=True),
        sa.Column("value", sa.Text, primary_key=True),
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
    )
    op.create_table(
        "group_values",
        sa.Column("at_s", _BIG, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, primary_key=True),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    """Create the old table again, empty."""
    op.drop_table("group_values")
    op.drop_table("group_rollups")
    _rollup(
        "tag_rollups",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("at_s", _BIG, primary_key=True),
        sa.Column("value", sa.Text, primary_key=True),
    )
