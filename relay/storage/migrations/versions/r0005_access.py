"""Add the tables of clients, their keys, tickets, and the audit of changes."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables, empty. The row of `access_state` is written with its first use."""
    op.create_table(
        "access_state",
        sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("version", _BIG, nullable=False),
        sa.Column("ticket_secret", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "clients",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("record", sa.Text, nullable=False),
        sa.Column("created_s", _BIG, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("deleted_s", _BIG),
        sa.Column("version", _BIG, nullable=False),
    )
    op.create_index("clients_version", "clients", ["version", "name"])
    op.create_table(
        "client_keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("sha256", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("created_s", _BIG, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("expires_s", _BIG),
        sa.Column("revoked_s", _BIG),
        sa.Column("version", _BIG, nullable=False),
    )
    op.create_index("client_keys_version", "client_keys", ["version", "id"])
    op.create_index("client_keys_client", "client_keys", ["client", "id"])
    op.create_table(
        "tickets",
        sa.Column("sha256", sa.LargeBinary, primary_key=True),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("terms", sa.Text, nullable=False),
        sa.Column("expires_s", _BIG, nullable=False),
        sa.Column("used_s", _BIG),
        sa.Column("exchange_id", sa.Text),
        sa.Column("refusal", sa.Text),
    )
    op.create_index("tickets_expires", "tickets", ["expires_s"])
    op.create_table(
        "audit",
        sa.Column("seq", _BIG, primary_key=True, autoincrement=True),
        sa.Column("at_s", _BIG, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )


def downgrade() -> None:
    """Drop the tables: all clients and keys that are not in gateway.yaml are lost."""
    for table in ("audit", "tickets", "client_keys", "clients", "access_state"):
        op.drop_table(table)
