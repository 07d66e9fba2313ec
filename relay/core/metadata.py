"""What a client says of its call in `cf-aig-metadata`: a flat JSON object, for rules and records.

As Cloudflare reads it: the first five entries count, values are texts, numbers or booleans, and a
value of any other kind voids the whole; none of it is an error. Names that begin with `cf.` are
reserved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from relay.core.text import clean

HEADER = "cf-aig-metadata"
MAX_ENTRIES = 5
_decoder = msgspec.json.Decoder(dict[str, Any])

Metadata = Mapping[str, str | int | float | bool]


def parse_metadata(header: str | None) -> Metadata:
    """The entries of a header; none of what cannot be read."""
    if not header:
        return {}
    try:
        given = _decoder.decode(header)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return {}
    if not all(isinstance(value, str | int | float | bool) for value in given.values()):
        return {}
    named = [(name, value) for name, value in given.items() if not name.startswith("cf.")]
    return bound_entries(dict(named[:MAX_ENTRIES]))


def bound_entries(entries: Metadata) -> Metadata:
    """The same entries, their names and texts cut and cleaned."""
    return {
        clean(name): clean(value) if isinstance(value, str) else value
        for name, value in entries.items()
    }


def as_text(value: str | float | bool) -> str:
    """A value as rules count it: `true`, not `True`."""
    return str(value).lower() if isinstance(value, bool) else str(value)
