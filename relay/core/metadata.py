"""Parse `cf-aig-metadata`, a flat JSON object in which a client describes its call, for limits and
the ledger.

The rules are Cloudflare's: the first five entries count, values are strings, numbers or booleans,
a value of another type invalidates the whole header, and nothing is an error. Names that begin with
`cf.` are reserved.
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
    """Return the entries of a header; empty if it is unreadable."""
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


def metadata_of(header: str | None, own: Metadata) -> Metadata:
    """Return the metadata of a call: the entries of its header, replaced and completed by its
    client's `own`, which are counted apart from the five.
    """
    if not own:
        return parse_metadata(header)
    return {**parse_metadata(header), **own}


def bound_entries(entries: Metadata) -> Metadata:
    """Return the entries with names and strings truncated and cleaned."""
    return {
        clean(name): clean(value) if isinstance(value, str) else value
        for name, value in entries.items()
    }


def user_of(metadata: Metadata, named: str | None) -> str:
    """Return the end user of a call: `user` of its metadata, else the one that its body `named`;
    empty if neither says who it is.
    """
    return as_text(metadata.get("user", "")) or named or ""


def team_of(metadata: Metadata) -> str | None:
    """Return the team of a call: `team` of its metadata; None without one."""
    team = metadata.get("team")
    return None if team is None else as_text(team) or None


def as_text(value: str | float | bool) -> str:
    """Return a value as limits count it: `true`, not `True`."""
    return str(value).lower() if isinstance(value, bool) else str(value)
