"""Add the objects that clients have made through the unified surface."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "made_objects",
        sa.Column("client", sa.Text, primary_key=True),
        sa.Column("object_id", sa.Text, primary_key=True),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("at_s", _BIG, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("made_objects_at", "made_objects", ["at_s"])


def downgrade() -> None:
    """Drop the table: paths that name an object get 404."""
    op.drop_table("made_objects")
