"""W3C trace context: whose part of a trace a call is.

Owns: reading and writing the header `traceparent` (https://www.w3.org/TR/trace-context/).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

HEADER = "traceparent"
_GIVEN = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?\Z")
_SAMPLED = 1


class Trace(NamedTuple):
    """A call's own span."""

    trace_id: int
    span_id: int
    parent_id: int
    """0 if it is the first of its trace."""
    sampled: bool

    @property
    def header(self) -> str:
        """For whoever is called."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.sampled):02x}"


def trace(
    given: str | None, random_bits: Callable[[int], int], sampled: Callable[[], bool]
) -> Trace:
    """The span of a call with this header; without one it begins a trace, sampled by `sampled`."""
    found = _GIVEN.match(given or "")
    if found is not None and int(found[1], 16) and int(found[2], 16):
        is_sampled = bool(int(found[3], 16) & _SAMPLED)
        return Trace(int(found[1], 16), random_bits(64) or 1, int(found[2], 16), is_sampled)
    return Trace(random_bits(128) or 1, random_bits(64) or 1, 0, sampled())
