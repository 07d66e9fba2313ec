"""Add web searches and pages to the sums, and a table of objects whose usage is counted."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NEW = ("web_searches", "pages")
_TABLES = ("rollups", "tag_rollups")


def upgrade() -> None:
    """Add columns and table. A column with a constant default is added without rewriting rows."""
    for table in _TABLES:
        for name in _NEW:
            column: sa.Column[Any] = sa.Column(name, _BIG, nullable=False, server_default="0")
            op.add_column(table, column)
    op.create_table(
        "booked",
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("object_id", sa.Text, primary_key=True),
        sa.Column("at_s", _BIG, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("booked_at", "booked", ["at_s"])


def downgrade() -> None:
    """Drop the table and the columns."""
    op.drop_table("booked")
    for table in _TABLES:
        for name in _NEW:
            op.drop_column(table, name)
