"""Apply the limits: requests and tokens in a window of time, and concurrent calls and sessions.

Owns which rules apply to a call, and that all rules of a step are checked before one counts. There
are three steps, each as early as possible: `admit` before the body is read, `check` when the model
and the user in the body are known, `reserve` (tokens) when the call is sent. When a call ends that
was never sent, everything that it reserved is released; otherwise its requests and the tokens that
it used stay counted. Concurrent calls are counted here, in this process; windows in windows.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from relay.core.bounds import estimate
from relay.core.errors import (
    ModelUnknown,
    Overloaded,
    RateLimited,
    TooManySessions,
    UpstreamTlsFailed,
    UpstreamUnreachable,
)
from relay.core.exchange import Exchange
from relay.core.fields import LARGE_BYTES
from relay.core.formats import counting_of
from relay.core.limits import Admission, Charge, Reservation, Rule, key_part
from relay.core.metadata import HEADER as METADATA
from relay.core.metadata import Metadata, as_text, metadata_of, user_of
from relay.core.peek import model_is_plain
from relay.core.request_fields import RequestFields
from relay.gate.windows import Taken, Windows

FindUsed = Callable[[Exchange], None]
_OF_CALLS = frozenset({"requests", "calls_at_once"})
_OF_SOCKETS = frozenset({"handshakes", "sessions_at_once"})
_UNSENT = (UpstreamUnreachable, UpstreamTlsFailed)

_YIELD_S = 0.001
_MAX_REFUSING_RULES = 1000
_OTHER = "other"
"""The name under which refusals of further rules are counted."""
_NO_METADATA: Metadata = {}


@dataclass(frozen=True, slots=True)
class LimitCounts:
    """The counts that outlive a reload of the rules. One per process."""

    running: dict[str, int] = field(default_factory=dict)
    """Number of concurrent calls and sessions, by counter key."""
    refusals: dict[str, int] = field(default_factory=dict)
    """Number of refused calls and sessions, by the name of the rule, for metrics."""


class Limits:
    """The rules of one configuration for one client: those for all clients, and its own. A call
    keeps the Limits with which it began.
    """

    __slots__ = (
        "_body_calls", "_calls", "_find_used", "_model_rules", "_needs_metadata", "_overall",
        "_refusals", "_running", "_sockets", "_tokens", "_windows", "counts_tokens", "max_calls",
        "needs_body",
    )  # fmt: skip

    def __init__(
        self, rules: Sequence[Rule], windows: Windows, counts: LimitCounts, find_used: FindUsed
    ) -> None:
        calls = [rule for rule in rules if rule.counts in _OF_CALLS]
        self._calls = [rule for rule in calls if not rule.needs_body]
        self._body_calls = [rule for rule in calls if rule.needs_body]
        self._sockets = [rule for rule in rules if rule.counts in _OF_SOCKETS]
        self._tokens = [rule for rule in rules if rule.counts == "tokens"]
        self._model_rules = [rule for rule in (*calls, *self._tokens) if rule.needs_model]
        self.needs_body = bool(self._body_calls or self._model_rules)
        """True if `check` must be called once the body is known."""
        self.counts_tokens = bool(self._tokens)
        """True if `reserve` must be called before the call is sent."""
        self._needs_metadata = any(
            name in ("team", "user") or name.startswith("metadata.")
            for rule in rules
            for name in rule.per
        )
        self._windows, self._find_used = windows, find_used
        self._running, self._refusals = counts.running, counts.refusals
        overall = [rule for rule in self._calls if rule.is_concurrent and rule.is_global]
        self._overall = min(overall, key=lambda rule: rule.amount, default=None)
        self.max_calls = self._overall.amount if self._overall else None
        """The relay's concurrency limit for REST calls; None if there is none."""

    @property
    def running(self) -> int:
        """How many REST calls run under the relay's concurrency limit; 0 without one."""
        return self._running.get(self._overall.name, 0) if self._overall else 0

    def admit(self, exchange: Exchange, headers: Mapping[str, str]) -> Awaitable[None] | None:
        """Count a call, or a session, before anything else is done for it. The caller awaits the
        result if there is one (windows in Redis).

        Raises RateLimited, TooManySessions, Overloaded.
        """
        admission = self._begin(exchange, headers)
        rules = self._sockets if exchange.request.transport == "websocket" else self._calls
        return self._take(exchange, admission, rules)

    async def check(self, exchange: Exchange, body: bytes | None, content_type: str) -> None:
        """Count a call under the rules that depend on its body. `body` is None if it streams.

        Raises ModelUnknown, and the errors that `admit` raises.
        """
        provider = exchange.request.provider
        if any(not each.providers or provider in each.providers for each in self._model_rules):
            await yield_to_others(body)
            if body is None or not model_is_plain(body, content_type, exchange.request.model):
                raise ModelUnknown
        assert exchange.admission is not None
        wait = self._take(exchange, exchange.admission, self._body_calls)
        if wait is not None:
            await wait

    async def reserve(self, exchange: Exchange, body: bytes, fields: RequestFields | None) -> None:
        """Reserve the tokens that a call may use; those that it does not use are released when it
        ends. A call that uses no tokens (token counts, files, any read) reserves none. `fields` are
        those of the body if they have been read.

        The exchange of a shared call was not admitted itself. Raises RateLimited.
        """
        request, route = exchange.request, exchange.routing.route
        assert route is not None
        if counting_of(request.method, route.endpoint) != "new":
            return
        await yield_to_others(body)
        admission = exchange.admission or self._begin(exchange, request.headers)
        admission.estimate = estimate(
            request.kind, route.format, request.input_estimate, body, fields
        )
        wait = self._take(exchange, admission, self._tokens)
        if wait is not None:
            await wait

    def _begin(self, exchange: Exchange, headers: Mapping[str, str]) -> Admission:
        """Begin the Admission of `exchange`, which is released when the exchange ends."""
        metadata = _NO_METADATA
        if self._needs_metadata:
            metadata = metadata_of(headers.get(METADATA), exchange.request.caller.metadata)
        exchange.admission = admission = Admission(metadata)
        exchange.at_end += (partial(self._end, exchange, admission),)
        return admission

    def _take(
        self, exchange: Exchange, admission: Admission, rules: Sequence[Rule]
    ) -> Awaitable[None] | None:
        """Count a call under all `rules` that apply; raise, and count nothing in a window, if one
        of them has no room.
        """
        route, charges = exchange.routing.route, []
        assert route is not None
        # `delegation.limits` may leave windows to Cloudflare; concurrent calls are counted here.
        counted_by_cloudflare = (
            route.target.via == "cloudflare" and route.provider.delegation.limits != "relay"
        )
        for rule in rules:
            if rule.providers and exchange.request.provider not in rule.providers:
                continue
            if rule.models and exchange.request.model not in rule.models:
                continue
            key = _key(rule, exchange, admission)
            if rule.is_concurrent:
                self._run(rule, key, exchange, admission)
            elif not counted_by_cloudflare:
                amount = 1
                if admission.estimate is not None:
                    # An estimate above the limit counts as the limit: it needs an empty window.
                    amount = min(admission.estimate.tokens(rule.answer_tokens), rule.amount)
                charges.append(Charge(rule, key, amount))
        if not charges:
            return None
        if self._windows.in_redis:
            return self._take_in_redis(exchange, admission, charges)
        self._note_taken(exchange, admission, self._windows.local.take(charges))
        return None

    async def _take_in_redis(
        self, exchange: Exchange, admission: Admission, charges: Sequence[Charge]
    ) -> None:
        self._note_taken(exchange, admission, await self._windows.take(charges))

    def _run(self, rule: Rule, key: str, exchange: Exchange, admission: Admission) -> None:
        """Count a concurrent call. Raises if the rule has no room."""
        count = self._running.get(key, 0)
        if count >= rule.amount:
            self._count_refusal(rule)
            raise _too_many(rule)
        self._running[key] = count + 1
        admission.concurrent_keys += (key,)

    def _note_taken(self, exchange: Exchange, admission: Admission, taken: Taken) -> None:
        """Record the reservations and limit states. Raises RateLimited if a rule has no room."""
        if taken.full is not None:
            self._count_refusal(taken.full)
            exchange.limit_states = taken.limit_states
            raise RateLimited(taken.full.text, taken.limit_states[0].reset_s)
        admission.reservations += taken.reservations
        exchange.limit_states += taken.limit_states

    def _count_refusal(self, rule: Rule) -> None:
        refusals, name = self._refusals, rule.name
        if name not in refusals and len(refusals) >= _MAX_REFUSING_RULES:
            name = _OTHER  # records of clients may name any number of rules
        refusals[name] = refusals.get(name, 0) + 1

    def _end(self, exchange: Exchange, admission: Admission) -> None:
        """Release the concurrent calls that an exchange counts as, and its reservations: all of
        them if it was never sent, else the unused tokens.
        """
        for key in admission.concurrent_keys:
            left = self._running[key] - 1
            if left:
                self._running[key] = left
            else:
                del self._running[key]
        if not admission.reservations:
            return
        if not exchange.routing.sent_s:
            self._windows.release(admission.reservations)
        elif self._tokens:
            self._settle(
                exchange, [each for each in admission.reservations if each.rule.counts == "tokens"]
            )

    def _settle(self, exchange: Exchange, reservations: Sequence[Reservation]) -> None:
        """Correct the counts of tokens to what the call used: release the unused tokens, or add
        those that were used beyond the reservation.
        """
        if not reservations:
            return
        self._find_used(exchange)
        for each in reservations:
            spare = each.amount - _used(exchange, each.amount)
            if spare > 0:
                self._windows.release((Reservation(each.rule, each.key, spare, each.window),))
            elif spare < 0:
                self._windows.add(Charge(each.rule, each.key, -spare))


async def yield_to_others(body: bytes | None) -> None:
    """Let other tasks run before a pass over a large body. `sleep(0)` would not do: in one turn of
    the loop a request that has just arrived is read, but not answered.
    """
    if body is not None and len(body) > LARGE_BYTES:
        await asyncio.sleep(_YIELD_S)


def _used(exchange: Exchange, reserved: int) -> int:
    """Return the tokens that a call used: those that its response reports; if that is unknown the
    reserved ones; 0 if the provider was not reached or refused the call.
    """
    usage = exchange.usage.used
    if usage is not None and not usage.estimated:
        return usage.tokens
    is_unused = isinstance(exchange.outcome.error, _UNSENT) or exchange.response.status >= 400
    return 0 if is_unused else reserved


def _key(rule: Rule, exchange: Exchange, admission: Admission) -> str:
    """Return the counter key of a call under `rule`."""
    key = rule.name
    for name in rule.per:
        key += f"|{key_part(_value(name, exchange, admission), exchange.request.caller.client)}"
    return key


def _value(name: str, exchange: Exchange, admission: Admission) -> str:
    """Return the value of a call for one name of `per`; empty if it has none."""
    if name == "client":
        return exchange.request.caller.client
    if name == "address":
        return exchange.request.caller.address
    if name == "provider":
        return exchange.request.provider
    if name == "model":
        return exchange.request.model or ""
    if name == "user":
        return user_of(admission.metadata, exchange.request.user)
    # `team` is short for `metadata.team`.
    return as_text(admission.metadata.get(name.removeprefix("metadata."), ""))


def _too_many(rule: Rule) -> Overloaded | RateLimited | TooManySessions:
    if not rule.is_per_caller:
        return Overloaded(rule.text)
    return (TooManySessions if rule.counts == "sessions_at_once" else RateLimited)(rule.text)
