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
_OF_A_CALLER = ("client", "address", "user", "metadata.")
_LONGEST_VALUE = 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rule:
    """One rule: `amount` in `window_s`, or at once, counted for each value of `per`.

    What is looked at for every call is worked out once; a rule equals only itself.
    """

    name: str
    """Unique among the rules; what clients see."""
    counts: Counts
    amount: int
    window_s: int = 0
    sliding: bool = False
    answer_tokens: int = 0
    """Set aside for an answer whose call names no bound."""
    per: tuple[str, ...] = ()
    """Of client, provider, model, address, user, metadata.NAME; empty: all together."""
    providers: frozenset[str] = frozenset()
    """Of these providers only; empty: of all."""
    models: frozenset[str] = frozenset()
    """Of these models only; empty: of all."""
    at_once: bool = field(init=False)
    """What runs is counted, and not what began."""
    policy: str = field(init=False)
    """Its item of `ratelimit-policy`."""
    item: str = field(init=False)
    """How its item of `ratelimit` begins."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "at_once", self.counts.endswith("_at_once"))
        policy = f'"{self.name}";q={self.amount};w={self.window_s}'
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "item", f'"{self.name}";r=')

    @property
    def needs_model(self) -> bool:
        """True if it cannot be judged before the model is known."""
        return "model" in self.per or bool(self.models)

    @property
    def needs_body(self) -> bool:
        """True if it cannot be judged before the body is known, which may name model and user."""
        return self.needs_model or "user" in self.per

    @property
    def of_all(self) -> bool:
        """True if everything counts together."""
        return not (self.per or self.providers or self.models)

    @property
    def of_caller(self) -> bool:
        """True if it is a caller who has too many, and not the relay."""
        return any(part.startswith(_OF_A_CALLER) for part in self.per)

    @property
    def text(self) -> str:
        """`100 requests in 60 s`, for people."""
        what = self.counts.replace("_at_once", "").replace("_", " ")
        return f"{self.amount} {what} " + ("at once" if self.at_once else f"in {self.window_s} s")


class Counted(NamedTuple):
    """Under which key a call is counted by a rule, and how much it counts for."""

    rule: Rule
    key: str
    amount: int


class Charge(NamedTuple):
    """An amount that was counted, and the window that holds it."""

    rule: Rule
    key: str
    amount: int
    window: object
    """Known to whoever counted it: an amount goes back there or nowhere."""


@dataclass(slots=True)
class Admission:
    """What a call has been counted for so far."""

    metadata: Metadata
    running: tuple[str, ...] = ()
    """Keys."""
    charges: tuple[Charge, ...] = ()
    estimate: Estimate | None = None
    """What it may use, where a rule asks."""


class Standing(NamedTuple):
    """How a caller stands under a rule with a window."""

    rule: Rule
    remaining: int
    reset_s: float


def headers(standings: Sequence[Standing]) -> tuple[tuple[str, str], tuple[str, str]]:
    """`ratelimit` and `ratelimit-policy`: names, not who is counted."""
    if len(standings) == 1:
        rule, remaining, reset_s = standings[0]
        state = f"{rule.item}{remaining};t={ceil(reset_s)}"
        return ("ratelimit", state), ("ratelimit-policy", rule.policy)
    state = ", ".join([f"{rule.item}{n};t={ceil(s)}" for rule, n, s in standings])
    policy = ", ".join([standing.rule.policy for standing in standings])
    return ("ratelimit", state), ("ratelimit-policy", policy)


def part(value: str, client: str) -> str:
    """A part of a key, without `|`; long values, which callers make up, by digest. Calls that have
    no such value count for each client: in one bucket they would take each other's room.
    """
    return _short(value) if value else f"={_short(client)}"


def _short(value: str) -> str:
    plain = len(value) <= _LONGEST_VALUE and value.isascii() and "|" not in value
    if plain and not value.startswith("="):
        return value
    return sha256(value.encode("utf-8", "replace")).hexdigest()
