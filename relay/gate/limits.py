"""Limits on calls at once: they keep one hanging provider, or one client, from taking all.

Owns: the counting, in this process. All rules of a call are tested before one counts it; a call is
counted until it is over. Streams count as long as they run, WebSocket sessions do not (they have
websocket.max_sessions_per_client).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from relay.core.errors import Overloaded, RateLimited

Per = Literal["all", "provider", "address"]


@dataclass(frozen=True, slots=True)
class AtOnce:
    """One rule: so many calls at once, counted for each value of `per`."""

    calls: int
    per: Per
    providers: frozenset[str] = frozenset()
    """Of these providers only; empty: of all."""


Counted = tuple[tuple[int, str], ...]
"""What a call counts for: rule and value."""


class Limits:
    """The rules in force, and what runs under them."""

    __slots__ = ("_rules", "_running")

    def __init__(self, rules: Sequence[AtOnce]) -> None:
        self._rules = tuple(rules)
        self._running: dict[tuple[int, str], int] = {}

    def __bool__(self) -> bool:
        return bool(self._rules)

    def admit(self, provider: str, address: str) -> Counted:
        """Count a call; give the result to `leave`. Raises Overloaded, or RateLimited where it is
        the client that has too many.
        """
        values = {"all": "", "provider": provider, "address": address}
        counted = []
        for number, rule in enumerate(self._rules):
            if rule.providers and provider not in rule.providers:
                continue
            place = (number, values[rule.per])
            if self._running.get(place, 0) >= rule.calls:
                raise RateLimited(rule.calls) if rule.per == "address" else Overloaded(rule.calls)
            counted.append(place)
        for place in counted:
            self._running[place] = self._running.get(place, 0) + 1
        return tuple(counted)

    def leave(self, counted: Counted) -> None:
        """The call is over."""
        for place in counted:
            left = self._running[place] - 1
            if left:
                self._running[place] = left
            else:
                del self._running[place]
