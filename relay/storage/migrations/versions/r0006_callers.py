"""Add columns for who made a call: the key, the team, the program, and the session of an agent.

They have no index: a page of calls looks at a bounded number of rows, and each index would cost
every row more than its columns do.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_COLUMNS = ("key_id", "team", "user_agent", "agent_session", "agent_parent")


def upgrade() -> None:
    """Add the columns; no row is rewritten. Calls from before have them empty."""
    for name in _COLUMNS:
        op.add_column("exchanges", sa.Column(name, sa.Text))


def downgrade() -> None:
    """Drop the columns."""
    for name in reversed(_COLUMNS):
        op.drop_column("exchanges", name)
