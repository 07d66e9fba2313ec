"""The record of one call: what the log line and the ledger's row say of it.

Owns: the noun Record. It is made once, when an Exchange ends (ledger/records.py), encoded once,
and never changed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from relay.core.exchange import Attempt
from relay.core.metadata import Metadata
from relay.core.meters.turns import Turn
from relay.core.usage import Usage


class Record(msgspec.Struct, omit_defaults=True):
    """What does not apply to a call is left out. `_ms` are milliseconds, to the hundredth."""

    id: str
    """UUIDv7 of when it began."""
    transport: str
    """`rest` or `websocket`."""
    surface: str
    """The form of the URL that the client called: `native`."""
    method: str
    provider: str
    """The one that was asked for."""
    endpoint: str
    status: int
    outcome: str
    duration_ms: float
    bytes_up: int
    bytes_down: int
    client: str
    overhead_ms: float = 0.0
    """The relay's own time, until the head of the answer went down."""
    kind: str = "other"
    model: str | None = None
    first_byte_ms: float | None = None
    via: str | None = None
    answered_by: str | None = None
    """The provider that answered, where it is another."""
    model_answered: str | None = None
    stream: bool | None = None
    attempts: tuple[Attempt, ...] | None = None
    cache: str | None = None
    usage: Usage | None = None
    cost_nano_usd: int | None = None
    """Billionths of a US dollar; None where no price is known."""
    saved_nano_usd: int | None = None
    """What an answer from the cache cost when it was made."""
    error: str | None = None
    cause: str | None = None
    request_id: str | None = None
    event_id: str | None = None
    cloudflare_log_id: str | None = None
    user: str | None = None
    """The end user, as the body names it."""
    metadata: Metadata | None = None
    messages_up: int | None = None
    messages_down: int | None = None
    close_code: int | None = None
    closed_by: str | None = None
    turns: tuple[Turn, ...] | None = None
    """Of a spoken session, the first of them."""
    interruptions: int | None = None
    trace_id: str | None = None
    span_id: str | None = None
    """Hexadecimal, as in `traceparent`; only where traces are exported."""
    parent_id: str | None = None
    sampled: bool = False
    event: str = ""
    level: str = ""
    timestamp: str = ""
    """When it ended, ISO 8601 in UTC."""


def with_current_names(stored: dict[str, Any]) -> dict[str, Any]:
    """A record as an older relay may have stored it, under the names of Record."""
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
    """True if the client of a call did not get what it asked for."""
    return status >= 400 or outcome in _FAILED


class Bodies(NamedTuple):
    """The request and response bodies of a call, each whole or cut (`_complete` false)."""

    request: bytes
    request_complete: bool
    response: bytes
    response_complete: bool
