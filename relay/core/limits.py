"""Limits as rules, and the `ratelimit` headers that show clients their state.

Owns the records Rule, Charge, Reservation, Admission and LimitState, and the headers
(draft-ietf-httpapi-ratelimit-headers-10). gate/limits.py counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import ceil
from typing import Literal

import msgspec

from relay.core.metadata import Metadata
from relay.core.usage import Estimate

Counted = Literal["requests", "tokens", "handshakes", "calls_at_once", "sessions_at_once"]
"""What a rule counts: an amount in a window of time, or concurrent calls."""
_OF_A_CALLER = ("client", "team", "address", "user", "metadata.")
_LONGEST_VALUE = 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rule:
    """A rule of `limits`: `amount` in `window_s`, or concurrently, for each value of `per`.

    Values that every call needs are computed once. A rule equals only itself.
    """

    name: str
    """The name that clients see; unique among the rules."""
    counts: Counted
    amount: int
    window_s: int = 0
    sliding: bool = False
    answer_tokens: int = 0
    """Tokens reserved for the response to a call that sets no maximum."""
    per: tuple[str, ...] = ()
    """Any of client, team, provider, model, address, user, metadata.NAME; empty: one counter for
    all."""
    providers: frozenset[str] = frozenset()
    """Only calls to these providers are counted; empty: calls to all."""
    models: frozenset[str] = frozenset()
    """Only calls of these models are counted; empty: of all."""
    is_concurrent: bool = field(init=False)
    """True if the rule counts calls in flight instead of calls that started in a window."""
    policy: str = field(init=False)
    """The rule's item of `ratelimit-policy`."""
    item: str = field(init=False)
    """The beginning of the rule's item of `ratelimit`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_concurrent", self.counts.endswith("_at_once"))
        policy = f'"{self.name}";q={self.amount};w={self.window_s}'
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "item", f'"{self.name}";r=')

    @property
    def needs_model(self) -> bool:
        """True if the rule cannot be applied before the model is known."""
        return "model" in self.per or bool(self.models)

    @property
    def needs_body(self) -> bool:
        """True if the rule cannot be applied before the body is read, which has model and user."""
        return self.needs_model or "user" in self.per

    @property
    def is_global(self) -> bool:
        """True if the rule has one counter, for all calls."""
        return not (self.per or self.providers or self.models)

    @property
    def is_per_caller(self) -> bool:
        """True if the rule has a counter for each client, team, address, user or value of
        metadata."""
        return any(name.startswith(_OF_A_CALLER) for name in self.per)

    @property
    def text(self) -> str:
        """The limit for error messages: `100 requests in 60 s` or `20 concurrent calls`."""
        if self.is_concurrent:
            return f"{self.amount} concurrent {self.counts.removesuffix('_at_once')}"
        return f"{self.amount} {self.counts} in {self.window_s} s"


class Charge(msgspec.Struct, frozen=True, gc=False):
    """An amount to add to the counter of `key` under a rule."""

    rule: Rule
    key: str
    amount: int


class Reservation(msgspec.Struct, frozen=True, gc=False):
    """An amount that was added to a window, and can be released from it."""

    rule: Rule
    key: str
    amount: int
    window: object
    """Opaque to the rest of the relay: only the window storage that counted reads it."""


class Admission(msgspec.Struct, eq=False, gc=False):
    """Everything that is counted for a call under the rules."""

    metadata: Metadata
    concurrent_keys: tuple[str, ...] = ()
    """Counter keys of the concurrency rules, decremented when the call ends."""
    reservations: tuple[Reservation, ...] = ()
    estimate: Estimate | None = None
    """Estimated tokens of the call, if a rule counts tokens."""


class LimitState(msgspec.Struct, frozen=True, gc=False):
    """What remains for a caller under a rule with a window."""

    rule: Rule
    remaining: int
    reset_s: float


def ratelimit_headers(
    limit_states: Sequence[LimitState],
) -> tuple[tuple[str, str], tuple[str, str]]:
    """The headers `ratelimit` and `ratelimit-policy`, which name rules but no counter keys."""
    states = policies = separator = ""
    for each in limit_states:
        states += f"{separator}{each.rule.item}{each.remaining};t={ceil(each.reset_s)}"
        policies += separator + each.rule.policy
        separator = ", "
    return ("ratelimit", states), ("ratelimit-policy", policies)


def key_part(value: str, client: str) -> str:
    """`value` as a part of a counter key, without `|`. Clients choose the value, so a long one is
    replaced by its digest. Without a value the part names the client: in a common counter, clients
    that send none would use up each other's limit.
    """
    part = value or client
    is_plain = len(part) <= _LONGEST_VALUE and part.isascii() and "|" not in part
    if not is_plain or part.startswith("="):
        part = sha256(part.encode("utf-8", "replace")).hexdigest()
    return part if value else f"={part}"
