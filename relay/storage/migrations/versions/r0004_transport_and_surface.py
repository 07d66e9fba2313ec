"""Rename the column `surface` (rest, websocket) to `transport`, and add a column `surface` for the
form of the URL, in the sums too.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_LATER = ("web_searches", "pages")
_SUMS = (
    "requests", "errors", "cache_hits", "unpriced", "estimated", "cost_nano_usd", "saved_nano_usd",
    "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens",
    "cache_write_1h_tokens", "reasoning_tokens", "input_audio_tokens", "output_audio_tokens",
    "cache_audio_read_tokens", "input_image_tokens", "output_image_tokens",
    "cache_image_read_tokens", "characters", "audio_ms", "units_milli", "images", *_LATER,
)  # fmt: skip
_OLD_KEYS = ("span_s", "at_s", "client", "provider", "model", "surface", "outcome", "writer")
_KEYS = (*_OLD_KEYS[:5], "transport", "surface", *_OLD_KEYS[6:])


def upgrade() -> None:
    """Rename the one column and add the other. No row of `exchanges` is rewritten: a constant
    default needs no write, and records keep their old names, which core/record.py maps.
    """
    op.alter_column("exchanges", "surface", new_column_name="transport")
    op.add_column("exchanges", _surface())
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("rollups", "surface", new_column_name="transport")
        op.add_column("rollups", _surface())
        op.drop_constraint("rollups_pkey", "rollups")
        op.create_primary_key("rollups_pkey", "rollups", list(_KEYS))
        op.alter_column("rollups", "surface", server_default=None)
        return
    _rebuild(_KEYS, (*_OLD_KEYS[:5], "surface", "'native'", *_OLD_KEYS[6:]))


def downgrade() -> None:
    """Undo the migration. Raises if there are sums of several surfaces, which the old key cannot
    distinguish.
    """
    op.drop_column("exchanges", "surface")
    op.alter_column("exchanges", "transport", new_column_name="surface")
    if op.get_bind().dialect.name == "postgresql":
        op.drop_constraint("rollups_pkey", "rollups")
        op.drop_column("rollups", "surface")
        op.alter_column("rollups", "transport", new_column_name="surface")
        op.create_primary_key("rollups_pkey", "rollups", list(_OLD_KEYS))
        return
    _rebuild(_OLD_KEYS, (*_OLD_KEYS[:5], "transport", *_OLD_KEYS[6:]))


def _surface() -> sa.Column[Any]:
    return sa.Column("surface", sa.Text, nullable=False, server_default="native")


def _rebuild(keys: tuple[str, ...], source: tuple[str, ...]) -> None:
    """Copy the table into one with the primary key `keys`, since SQLite cannot change a key. The
    order of rows stays, so that they are appended. `source` are the old columns of the key.
    """
    op.rename_table("rollups", "old_rollups")
    _rollups(keys)
    sums = ", ".join((*_SUMS, "spread"))
    into, columns = ", ".join(keys), ", ".join(source)
    op.execute(f"INSERT INTO rollups ({into}, {sums}) SELECT {columns}, {sums} FROM old_rollups")  # noqa: S608
    op.drop_table("old_rollups")


def _rollups(keys: tuple[str, ...]) -> None:
    types: dict[str, Any] = {"span_s": sa.Integer(), "at_s": _BIG, "writer": sa.String(36)}
    op.create_table(
        "rollups",
        *(sa.Column(key, types.get(key, sa.Text()), primary_key=True) for key in keys),
        *(
            sa.Column(each, _BIG, nullable=False, server_default="0" if each in _LATER else None)
            for each in _SUMS
        ),
        sa.Column("spread", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
