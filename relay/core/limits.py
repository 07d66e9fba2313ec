"""What a limit is, and how clients learn its state.

Owns: the Rule, the state of a limit for a caller, and the `ratelimit` headers
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

Counted = Literal["requests", "tokens", "handshakes", "calls_at_once", "sessions_at_once"]
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
    counts: Counted
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
    is_concurrent: bool = field(init=False)
    """Counts calls in progress instead of calls begun."""
    policy: str = field(init=False)
    """Its item of `ratelimit-policy`."""
    item: str = field(init=False)
    """How its item of `ratelimit` begins."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_concurrent", self.counts.endswith("_at_once"))
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
    def is_global(self) -> bool:
        """True if one counter holds for all calls."""
        return not (self.per or self.providers or self.models)

    @property
    def is_per_caller(self) -> bool:
        """True if each caller has a counter."""
        return any(name.startswith(_OF_A_CALLER) for name in self.per)

    @property
    def text(self) -> str:
        """`100 requests in 60 s`, for people."""
        what = self.counts.replace("_at_once", "").replace("_", " ")
        return f"{self.amount} {what} " + (
            "at once" if self.is_concurrent else f"in {self.window_s} s"
        )


class Charge(NamedTuple):
    """An amount to count under a key of a rule."""

    rule: Rule
    key: str
    amount: int


class Reservation(NamedTuple):
    """An amount that was counted in a window, and can be released there."""

    rule: Rule
    key: str
    amount: int
    window: object
    """Opaque here: the storage that counted it knows it."""


@dataclass(slots=True)
class Admission:
    """All that a call holds under the rules."""

    metadata: Metadata
    concurrent_keys: tuple[str, ...] = ()
    """Of the rules that count it while it runs."""
    reservations: tuple[Reservation, ...] = ()
    estimate: Estimate | None = None
    """What it may use, where a rule asks."""


class LimitState(NamedTuple):
    """What is left for a caller under a rule with a window."""

    rule: Rule
    remaining: int
    reset_s: float


def ratelimit_headers(
    limit_states: Sequence[LimitState],
) -> tuple[tuple[str, str], tuple[str, str]]:
    """`ratelimit` and `ratelimit-policy`: names, not who is counted."""
    if len(limit_states) == 1:
        rule, remaining, reset_s = limit_states[0]
        state = f"{rule.item}{remaining};t={ceil(reset_s)}"
        return ("ratelimit", state), ("ratelimit-policy", rule.policy)
    state = ", ".join([f"{rule.item}{n};t={ceil(s)}" for rule, n, s in limit_states])
    policy = ", ".join([each.rule.policy for each in limit_states])
    return ("ratelimit", state), ("ratelimit-policy", policy)


def key_part(value: str, client: str) -> str:
    """A part of a key, without `|`; long values, which callers make up, by digest. Calls that have
    no such value count for each client: in one bucket they would take each other's room.
    """
    return _short(value) if value else f"={_short(client)}"


def _short(value: str) -> str:
    plain = len(value) <= _LONGEST_VALUE and value.isascii() and "|" not in value
    if plain and not value.startswith("="):
        return value
    return sha256(value.encode("utf-8", "replace")).hexdigest()
