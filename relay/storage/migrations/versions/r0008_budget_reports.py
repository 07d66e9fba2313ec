"""Add what of a budget was spent before its last reset, and what of a lease calls have reserved."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_COLUMNS = (("budgets", "reset_nano"), ("budget_leases", "reserved_nano"))


def upgrade() -> None:
    """Add the columns: no budget was reset yet."""
    for table, name in _COLUMNS:
        op.add_column(table, sa.Column(name, _BIG, nullable=False, server_default="0"))


def downgrade() -> None:
    """Drop the columns. A reset of the current period stays in force, in `extra_nano`."""
    for table, name in _COLUMNS:
        op.drop_column(table, name)
