"""W3C trace context: the span of a call, and its parent.

Owns reading and writing the header `traceparent` (https://www.w3.org/TR/trace-context/).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

HEADER = "traceparent"
_GIVEN = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?\Z")
_SAMPLED = 1


class Trace(NamedTuple):
    """The span of a call."""

    trace_id: int
    span_id: int
    parent_id: int
    """0 if the call starts the trace."""
    sampled: bool

    @property
    def header(self) -> str:
        """The `traceparent` for the provider."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.sampled):02x}"


def trace(
    given: str | None, random_bits: Callable[[int], int], sampled: Callable[[], bool]
) -> Trace:
    """Return the span of a call with the `traceparent` `given`. Without a valid one, the call
    starts a trace, and `sampled()` decides whether it is sampled.
    """
    found = _GIVEN.match(given or "")
    if found is not None and int(found[1], 16) and int(found[2], 16):
        is_sampled = bool(int(found[3], 16) & _SAMPLED)
        return Trace(int(found[1], 16), random_bits(64) or 1, int(found[2], 16), is_sampled)
    return Trace(random_bits(128) or 1, random_bits(64) or 1, 0, sampled())
