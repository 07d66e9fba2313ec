"""Add the tables of budgets, their leases, and the processes that have leases."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _money(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, _BIG, nullable=False, server_default="0") for name in names]


def upgrade() -> None:
    """Create the tables, empty: every budget begins with nothing spent."""
    op.create_table(
        "budgets",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("period_start_s", _BIG, primary_key=True),
        sa.Column("period_end_s", _BIG),
        sa.Column("rule", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        *_money("limit_nano", "extra_nano", "granted_nano"),
        *_money("spent_nano", "unpriced_nano", "over_nano", "recalls", "warned"),
    )
    op.create_table(
        "budget_leases",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("period_start_s", _BIG, nullable=False),
        *_money("granted_nano", "spent_nano", "unpriced_nano", "over_nano", "answered"),
    )
    op.create_index("budget_leases_budget", "budget_leases", ["key", "period_start_s"])
    op.create_index("budget_leases_worker", "budget_leases", ["worker"])
    op.create_table(
        "budget_workers",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("heartbeat_s", _BIG, nullable=False),
        sa.Column("dead_s", _BIG),
    )


def downgrade() -> None:
    """Drop the tables: what was spent of each budget is forgotten."""
    for table in ("budget_workers", "budget_leases", "budgets"):
        op.drop_table(table)
