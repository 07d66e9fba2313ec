"""Limits: how often a caller may call, how much it may use, and how much runs at once.

Owns: which rules a call falls under, and that all of a step are tested before one counts. A call
takes three steps, each as early as it can be: `admit` before its body is read, `check` when its
model is known, `reserve` when it is really sent. A refusal gives back what the steps before it
counted. What runs at once is counted here, in this process; what began, in windows.py.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn

from relay.core.errors import (
    ModelUnknown,
    Overloaded,
    RateLimited,
    TooManySessions,
    UpstreamTlsFailed,
    UpstreamUnreachable,
)
from relay.core.exchange import Exchange
from relay.core.limits import Admission, Place, Rule, counted_as
from relay.core.metadata import Metadata, as_text, metadata
from relay.core.peek import model_is_plain
from relay.core.usage import estimate
from relay.gate.windows import Windows

Later = Callable[[Coroutine[Any, Any, None]], None]
_OF_CALLS = frozenset({"requests", "calls_at_once"})
_OF_SOCKETS = frozenset({"handshakes", "sessions_at_once"})
_UNSENT = (UpstreamUnreachable, UpstreamTlsFailed)


class Limits:
    """The rules in force. An Exchange keeps the ones that it began with."""

    __slots__ = (
        "_asks_model", "_early", "_late", "_later", "_running", "_says",
        "_sockets", "_tokens", "_windows",
    )  # fmt: skip

    def __init__(self, rules: Sequence[Rule], windows: Windows, later: Later) -> None:
        calls = [rule for rule in rules if rule.counts in _OF_CALLS]
        self._early = [rule for rule in calls if not rule.needs_model]
        self._late = [rule for rule in calls if rule.needs_model]
        self._tokens = [rule for rule in rules if rule.counts == "tokens"]
        self._sockets = [
            rule for rule in rules if rule.counts in ("handshakes", "sessions_at_once")
        ]
        self._asks_model = any(rule.needs_model for rule in (*self._late, *self._tokens))
        self._says = any(part.startswith("metadata.") for rule in rules for part in rule.per)
        self._windows, self._later = windows, later
        self._running: dict[Place, int] = {}

    def __bool__(self) -> bool:
        return bool(self._early or self._late or self._tokens or self._sockets)

    async def admit(self, exchange: Exchange, said: str | None) -> None:
        """Count a call, or a session whose model is known, before anything else is done for it.
        `said` is its cf-aig-metadata.

        Raises RateLimited, TooManySessions, Overloaded.
        """
        exchange.admission = held = Admission(metadata(said) if self._says else {})
        exchange.at_end += (lambda: self._close(exchange, held),)
        await self._take(
            exchange, held, self._sockets if exchange.surface == "websocket" else self._early
        )

    async def check(self, exchange: Exchange, body: bytes | None, content_type: str) -> None:
        """Count a call under the rules that ask for its model. `body` is None if it streams.

        Raises ModelUnknown besides what `admit` raises.
        """
        if not self._asks_model:
            return
        if body is None or not model_is_plain(body, content_type, exchange.model):
            raise ModelUnknown
        assert exchange.admission is not None
        await self._take(exchange, exchange.admission, self._late)

    async def reserve(self, exchange: Exchange, body: bytes) -> bool:
        """Set aside the tokens that a call may use; what it did not use comes back when it ends.
        False if no rule counts them. Raises RateLimited.
        """
        held = exchange.admission
        if held is None or not self._tokens:
            return False
        held.estimate = estimate(body)
        before = len(held.windows)
        await self._take(exchange, held, self._tokens)
        return len(held.windows) > before

    async def _take(self, exchange: Exchange, held: Admission, rules: Sequence[Rule]) -> None:
        """Test all `rules` that apply, then count under each; or give back, and raise."""
        windows = self._windows
        places = [
            place for place in self._places(exchange, held, rules) if not self._ran(held, place)
        ]
        for rule, value in places:
            if not await windows.test(rule, _key(rule, value), _amount(rule, held)):
                await self._refuse(exchange, held, rule, value)
        for rule, value in places:
            if not await windows.hit(rule, _key(rule, value), _amount(rule, held)):
                # Somebody else took the last one. A fixed window counted this all the same.
                if not rule.sliding:
                    held.windows.append((rule, value))
                await self._refuse(exchange, held, rule, value)
            held.windows.append((rule, value))
        for rule, value in places:
            exchange.standings += (await windows.standing(rule, _key(rule, value)),)

    def _places(self, exchange: Exchange, held: Admission, rules: Sequence[Rule]) -> list[Place]:
        route, name = exchange.route, exchange.provider
        assert route is not None
        # Cloudflare counts what goes through it, if that is its job; what runs here is ours.
        others = route.target.via == "cloudflare" and route.provider.jobs.limits != "relay"
        return [
            (rule, counted_as([_value(part, exchange, held.said) for part in rule.per]))
            for rule in rules
            if (not rule.providers or name in rule.providers)
            and (not rule.models or exchange.model in rule.models)
            and (rule.at_once or not others)
        ]

    def _ran(self, held: Admission, place: Place) -> bool:
        """Count what runs at once: False for a rule that counts something else. It is given back
        when the call is over, refused or not.
        """
        rule = place[0]
        if not rule.at_once:
            return False
        if self._running.get(place, 0) >= rule.amount:
            raise _too_many(rule)
        self._running[place] = self._running.get(place, 0) + 1
        held.running.append(place)
        return True

    async def _refuse(
        self, exchange: Exchange, held: Admission, rule: Rule, value: str
    ) -> NoReturn:
        """A refused call uses nothing up: what was counted for it is given back."""
        given_back, held.windows = held.windows, []
        for other, its in given_back:
            await self._windows.book(other, _key(other, its), -_amount(other, held))
        standing = await self._windows.standing(rule, _key(rule, value))
        exchange.standings = (standing,)
        raise RateLimited(rule.text, standing.reset_s)

    def _close(self, exchange: Exchange, held: Admission) -> None:
        """The call is over: what ran runs no more, and tokens are settled."""
        for place in held.running:
            left = self._running[place] - 1
            if left:
                self._running[place] = left
            else:
                del self._running[place]
        for rule, value in held.windows:
            if rule.counts == "tokens":
                reserved = _amount(rule, held)
                if difference := _used(exchange, reserved) - reserved:
                    self._later(self._windows.book(rule, _key(rule, value), difference))


def _amount(rule: Rule, held: Admission) -> int:
    """What a call counts for. One that may use more than is allowed at all waits for a window that
    is empty.
    """
    if rule.counts != "tokens":
        return 1
    return min(held.estimate.tokens(rule.answer_tokens), rule.amount)


def _used(exchange: Exchange, reserved: int) -> int:
    """What a call used: as its answer said; what was set aside, where it was not told; nothing,
    where no provider did anything.
    """
    if exchange.meter is not None and exchange.meter.usage is not None:
        return exchange.meter.usage.tokens
    unsent = not exchange.sent_s or isinstance(exchange.error, _UNSENT)
    return 0 if unsent or exchange.status >= 400 else reserved


def _value(part: str, exchange: Exchange, said: Metadata) -> str:
    if part in ("client", "address"):
        # One and the same until clients have keys.
        return exchange.client
    if part == "provider":
        return exchange.provider
    if part == "model":
        return exchange.model or ""
    return as_text(said.get(part.removeprefix("metadata."), ""))


def _key(rule: Rule, value: str) -> str:
    return f"{rule.name}:{value}"


def _too_many(rule: Rule) -> Overloaded | RateLimited | TooManySessions:
    if not rule.of_caller:
        return Overloaded(rule.text)
    return (TooManySessions if rule.counts == "sessions_at_once" else RateLimited)(rule.text)
