"""The record of a call, for its log line and its row in the ledger.

Owns Record, which ledger/records.py makes and encodes once, when an Exchange has ended; and Bodies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from relay.core.exchange import Attempt
from relay.core.metadata import Metadata
from relay.core.meters.turns import Turn
from relay.core.usage import Usage


class Record(msgspec.Struct, omit_defaults=True):
    """Fields that do not apply to a call are omitted. `_ms` are milliseconds with two decimals."""

    id: str
    """UUIDv7 of the start of the call."""
    transport: str
    """`rest` or `websocket`."""
    surface: str
    """The form of the URL that the client called: `native`."""
    method: str
    provider: str
    """The provider that the client called."""
    endpoint: str
    status: int
    outcome: str
    duration_ms: float
    bytes_up: int
    bytes_down: int
    client: str
    overhead_ms: float = 0.0
    """Time that the relay added, until the head of the response went downstream."""
    kind: str = "other"
    model: str | None = None
    first_byte_ms: float | None = None
    via: str | None = None
    answered_by: str | None = None
    """The provider that answered, if it is another one."""
    model_answered: str | None = None
    stream: bool | None = None
    attempts: tuple[Attempt, ...] | None = None
    cache: str | None = None
    usage: Usage | None = None
    cost_nano_usd: int | None = None
    """Billionths of a US dollar; None if unknown."""
    saved_nano_usd: int | None = None
    """Original cost of a response from the cache."""
    key_id: str | None = None
    """The id of the client's key."""
    user_agent: str | None = None
    error: str | None = None
    cause: str | None = None
    request_id: str | None = None
    event_id: str | None = None
    cloudflare_log_id: str | None = None
    user: str | None = None
    """The end user: of the metadata, else as the body names it."""
    agent_session: str | None = None
    """The session of a coding agent (core/agents.py)."""
    agent_parent: str | None = None
    metadata: Metadata | None = None
    messages_up: int | None = None
    messages_down: int | None = None
    close_code: int | None = None
    closed_by: str | None = None
    turns: tuple[Turn, ...] | None = None
    """The first turns of a spoken session."""
    interruptions: int | None = None
    trace_id: str | None = None
    span_id: str | None = None
    """Hexadecimal, as in `traceparent`; only if traces are exported."""
    parent_id: str | None = None
    sampled: bool = False
    event: str = ""
    level: str = ""
    timestamp: str = ""
    """The end of the call, ISO 8601 in UTC."""


def with_current_names(stored: dict[str, Any]) -> dict[str, Any]:
    """Rename the fields of a record that an older version stored."""
    if "transport" in stored:
        return stored
    named = {"transport": "", "surface": "native"} | _renamed(stored)
    if turns := named.get("turns"):
        named["turns"] = [_renamed(turn) for turn in turns]
    return named


def _renamed(stored: dict[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(name, name): value for name, value in stored.items()}


_RENAMED = {"surface": "transport", "own_ms": "overhead_ms"}
_FAILED = frozenset({"failed", "refused"})


def is_failure(status: int, outcome: str) -> bool:
    """True if the call failed or was refused."""
    return status >= 400 or outcome in _FAILED


class Bodies(NamedTuple):
    """The stored bodies of a call, each complete or truncated (`_complete` false)."""

    request: bytes
    request_complete: bool
    response: bytes
    response_complete: bool
