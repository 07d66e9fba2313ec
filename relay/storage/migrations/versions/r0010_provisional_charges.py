"""Add what budgets were charged for objects whose usage is reported later, and the index by which
old budgets are found.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Add the table and the index."""
    op.create_table(
        "provisional_charges",
        sa.Column("provider", sa.Text, primary_key=True),
        sa.Column("object_id", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("period_start_s", _BIG, nullable=False),
        sa.Column("nano_usd", _BIG, nullable=False, server_default="0"),
        sa.Column("at_s", _BIG, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("provisional_charges_at", "provisional_charges", ["at_s"])
    op.create_index("budgets_period_end", "budgets", ["period_end_s"])


def downgrade() -> None:
    """Drop them: what is charged for an object stays charged."""
    op.drop_index("budgets_period_end", "budgets")
    op.drop_table("provisional_charges")
