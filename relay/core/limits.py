"""What a limit is, and how its state is told to clients.

Owns: the Rule, a call's standing under it, and the `ratelimit` headers
(draft-ietf-httpapi-ratelimit-headers-10). Counting is gate/limits.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import ceil
from typing import Literal, NamedTuple

from relay.core.metadata import Metadata
from relay.core.usage import Estimate

Counts = Literal["requests", "tokens", "handshakes", "calls_at_once", "sessions_at_once"]
"""What a rule counts: so many in a window of time, or so many at once."""
_OF_A_CALLER = ("client", "address", "metadata.")
_LONGEST_VALUE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: `amount` in `window_s`, or at once, counted for each value of `per`."""

    name: str
    """Unique among the rules; what clients see."""
    counts: Counts
    amount: int
    window_s: int = 0
    sliding: bool = False
    answer_tokens: int = 0
    """Set aside for an answer whose call names no bound."""
    per: tuple[str, ...] = ()
    """Of client, provider, model, address, metadata.NAME; empty: all together."""
    providers: frozenset[str] = frozenset()
    """Of these providers only; empty: of all."""
    models: frozenset[str] = frozenset()
    """Of these models only; empty: of all."""

    @property
    def at_once(self) -> bool:
        """True if what runs is counted, and not what began."""
        return self.counts.endswith("_at_once")

    @property
    def needs_model(self) -> bool:
        """True if it cannot be judged before the model is known."""
        return "model" in self.per or bool(self.models)

    @property
    def of_caller(self) -> bool:
        """True if it is a caller who has too many, and not the relay."""
        return any(part.startswith(_OF_A_CALLER) for part in self.per)

    @property
    def text(self) -> str:
        """`100 requests in 60 s`, for people."""
        what = self.counts.replace("_at_once", "").replace("_", " ")
        return f"{self.amount} {what} " + ("at once" if self.at_once else f"in {self.window_s} s")

    @property
    def policy(self) -> str:
        """Its item of `ratelimit-policy`."""
        return f'"{self.name}";q={self.amount};w={self.window_s}'


Place = tuple[Rule, str]
"""A rule, and the value that is counted under it."""


@dataclass(slots=True)
class Admission:
    """What a call has been counted for so far."""

    said: Metadata
    running: list[Place] = field(default_factory=list)
    windows: list[Place] = field(default_factory=list)
    estimate: Estimate = field(default_factory=Estimate)


class Standing(NamedTuple):
    """How a caller stands under a rule with a window."""

    rule: Rule
    remaining: int
    reset_s: float


def headers(standings: Sequence[Standing]) -> list[tuple[str, str]]:
    """`ratelimit` and `ratelimit-policy`: names, not who is counted."""
    state = ", ".join(
        f'"{rule.name}";r={remaining};t={ceil(reset_s)}' for rule, remaining, reset_s in standings
    )
    policy = ", ".join([standing.rule.policy for standing in standings])
    return [("ratelimit", state), ("ratelimit-policy", policy)]


def counted_as(values: Sequence[str]) -> str:
    """One key for the values of a rule's `per`; long ones, which callers make up, by digest."""
    return "|".join(
        [
            value
            if len(value) <= _LONGEST_VALUE and "|" not in value
            else sha256(value.encode()).hexdigest()
            for value in values
        ]
    )
