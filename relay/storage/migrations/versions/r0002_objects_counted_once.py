"""Web searches and pages in the sums; the provider's objects whose usage is counted."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NEW = ("web_searches", "pages")
_TABLES = ("rollups", "tag_rollups")


def upgrade() -> None:
    """Add them. A column with a constant default is added without touching a row."""
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
    """Take them away again."""
    op.drop_table("booked")
    for table in _TABLES:
        for name in _NEW:
            op.drop_column(table, name)
