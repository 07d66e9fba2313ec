"""Make the attempts of a call: retry it, change the key, or fall back to another target.

Owns the loop over targets, keys and retries, and the retry budget. core/retry_policy.py decides
which attempt may follow which result; an AttemptMaker (calls/attempt.py, sessions/attempt.py) sends
each one. The loop ends before the first downstream byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from relay.core.affinity import Affinity
from relay.core.credentials import ClientCredential, choose
from relay.core.errors import (
    Draining,
    HandshakeRefused,
    ProviderNotConfigured,
    RelayError,
    UpstreamTimeout,
)
from relay.core.exchange import Attempt, Exchange
from relay.core.peek import generates, streams_by_path
from relay.core.provider import Keys, Route
from relay.core.retry_policy import (
    FALLBACK_AFTER_S,
    AttemptResult,
    FallbackCause,
    RetryRules,
    fallback_cause,
    is_repeatable,
    may_be_executed,
    result_of_answer,
    wait_s,
)
from relay.upstream.failures import MAPPABLE_ERRORS, drop_tracebacks
from relay.upstream.health import Health, draw_weighted

T = TypeVar("T")
Move = float | Literal["next", "stop"]
"""What follows an attempt: another one after so many seconds, the next target, or nothing."""


class Budget:
    """The retry budget: a percentage of all calls, plus a number per second.

    Without it every call would become several, just when a provider is overloaded.
    """

    def __init__(self, percent: float, per_s: float, clock: Callable[[], float]) -> None:
        self._share, self._per_s, self._clock = percent / 100, per_s, clock
        self._by_calls, self._by_time, self._at_s = 0.0, per_s, clock()

    def earn(self) -> None:
        """Add the share of one call, which has begun."""
        self._by_calls = min(self._by_calls + self._share, 10.0)

    def spend(self) -> bool:
        """Spend one retry; False if none is left."""
        now = self._clock()
        self._by_time = min(self._per_s, self._by_time + (now - self._at_s) * self._per_s)
        self._at_s = now
        if self._by_time >= 1:
            self._by_time -= 1
        elif self._by_calls >= 1:
            self._by_calls -= 1
        else:
            return False
        return True


@dataclass(slots=True)
class AttemptOptions:
    """The options that a call sets for its attempts."""

    method: str
    whole: bool = True
    """False if the body is a stream, which can be sent only once."""
    submits: bool = False
    """True if the call starts a job whose result is fetched or delivered later."""
    credential: ClientCredential | None = None
    """The client's own credentials, if the provider accepts them."""
    retries: RetryRules | None = None
    """The client's own rules, which replace the provider's."""
    first_byte_s: float | None = None
    """The client's own limit for the first byte, after which the next target is called."""
    affinity: Affinity | None = None
    """What ties the call to a key; None if no target has a pool of keys."""


class AttemptMaker(Protocol[T]):
    """Makes the attempts of one call, and judges them by their results."""

    exchange: Exchange
    options: AttemptOptions
    examines_first_event: bool
    """True if another attempt can follow a stream that begins with an error. Set before each
    attempt."""

    def attempt(self, route: Route, keys: Keys) -> Awaitable[T]:
        """Make an attempt. Raises a RelayError, or one of failures.MAPPABLE_ERRORS."""

    def judge_head(self, result: T) -> AttemptResult | None:
        """Judge a result by its head; None if the body decides: see `judge_body`."""

    def judge_body(self, result: T) -> Awaitable[AttemptResult]:
        """Judge a result by the beginning of its body. It closes the result before it raises."""

    def drop(self, result: T) -> None:
        """Close a result that another attempt replaces."""

    def mapped(self, error: Exception, route: Route) -> RelayError:
        """Map one of failures.MAPPABLE_ERRORS to a RelayError."""


@dataclass(slots=True)
class _Plan:
    """The targets of a call, and the state of its attempts."""

    routes: Sequence[tuple[int, Route]]
    """(number, route) of each target, in order."""
    options: AttemptOptions
    called: Route
    """The route that the client called; its provider's `fallback_on` applies."""
    at: int = 0
    """The index in `routes` of the current target."""
    number: int = 1
    """Number of the current attempt at this target; a change of the key does not count."""
    tried: tuple[Keys, ...] = ()
    """The credentials that were used at this target."""
    executed_at: tuple[int, ...] = ()
    """The fallback numbers of the targets that may have executed the call."""
    own_key: bytes = b""
    """The identity of the key that the call's session uses at its first target with a pool."""
    breaks_affinity: bool = False
    """True if the current attempt is made with another key than that."""
    limited: Keys | None = None
    """The credentials that were rate-limited at this target."""
    seeks: bool = False
    """True after a key of this target did not know an id or encrypted content of the call."""
    sought: Keys | None = None
    """The credentials of the next attempt, which may know it."""

    @property
    def route(self) -> Route:
        """The current target."""
        return self.routes[self.at][1]

    @property
    def rules(self) -> RetryRules:
        """The retry rules for the current target."""
        route = self.route
        if route.target.via == "cloudflare" and route.provider.delegation.retries != "relay":
            return _ONCE
        return self.options.retries or route.provider.retries

    @property
    def generates(self) -> bool:
        """True if the call only generates a response, so that a fallback can answer it instead."""
        return not self.options.submits and generates(self.options.method, self.called.endpoint)

    def is_repeatable(self, ended: AttemptResult) -> bool:
        """True if the provider of the current target may get the call again."""
        has_idempotency_key = self.route.provider.idempotency_header is not None
        return has_idempotency_key or is_repeatable(ended, self.rules, self.options.method)

    def next_target(self, ended: AttemptResult) -> int | None:
        """Return the index of the target to call next; None if there is none."""
        later = range(self.at + 1, len(self.routes))
        return next((at for at in later if self._may_follow(self.routes[at][1], ended)), None)

    def _may_follow(self, route: Route, ended: AttemptResult) -> bool:
        if self.options.first_byte_s and isinstance(ended.failure, UpstreamTimeout):
            return True  # the client set this limit
        number = route.fallback_number
        if number in self.executed_at:
            return False
        if number == self.route.fallback_number:
            return self.is_repeatable(ended)  # another target of the same provider
        if fallback_cause(ended, self.rules) not in self.called.provider.fallback_on:
            return False
        return self.is_repeatable(ended) or self.generates

    def leave_target(self, ended: AttemptResult) -> Move:
        """Return what follows if no further attempt is made at the current target."""
        return "stop" if self.next_target(ended) is None else "next"

    def go_on(self, ended: AttemptResult) -> None:
        """Make the next target the current one."""
        at = self.next_target(ended)
        assert at is not None
        if not self.is_repeatable(ended):
            self.executed_at += (self.route.fallback_number,)
        self.at, self.number, self.tried = at, 1, ()
        self.limited, self.seeks, self.sought = None, False, None

    def attempt(self, keys: Keys, ended: AttemptResult, move: Move, took_s: float) -> Attempt:
        """Make the record of an attempt at the current target."""
        provider, via = self.route.provider.name, self.route.target.via
        label = keys.provider.label if keys.provider else ""
        maybe_billed = move == "next" and may_be_executed(ended, self.rules, self.options.method)
        affinity: Literal["", "broken"] = "broken" if self.breaks_affinity else ""
        return Attempt(
            provider, via, label, ended.status, ended.error, took_s, maybe_billed, affinity
        )

    def has_wrong_key(self, ended: AttemptResult) -> bool:
        """True if the key of an attempt does not know what another key of the pool may know."""
        affinity = self.options.affinity
        if affinity is None or not self.tried or not self.route.has_affinity:
            return False
        return ended.wrong_key != "" or (ended.status == 404 and affinity.names_response)

    def may_fall_back(self, cause: FallbackCause) -> bool:
        """True if a fallback would be called after a failure of this target by `cause`, even if the
        target may have executed the call.
        """
        if cause not in self.called.provider.fallback_on or not self.options.whole:
            return False
        excluded = (self.route.fallback_number, *self.executed_at)
        for _, route in self.routes[self.at + 1 :]:
            if route.fallback_number not in excluded:
                return self.generates
        return False

    def first_byte_limit_s(self, streamed: bool | None) -> float | None:
        """Return the limit for this target's first byte; None for its provider's setting."""
        client_s = self.options.first_byte_s
        if client_s is not None or not self.may_fall_back("timeout"):
            return client_s
        after_s = self.called.provider.fallback_after_s
        if after_s is None and (streamed or streams_by_path(self.called.endpoint)):
            after_s = FALLBACK_AFTER_S
        return None if after_s is None else min(after_s, self.route.provider.first_byte_timeout_s)


_ONCE = RetryRules(max_attempts=1)


class Attempts:
    """Makes the attempts of all calls of a process."""

    def __init__(
        self,
        health: Health,
        budget: Budget,
        clock: Callable[[], float],
        random: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.health, self.budget = health, budget
        self._clock, self._random, self._wall = clock, random, wall

    async def open(self, maker: AttemptMaker[T]) -> T:
        """Make attempts, and return the result of the first that is good, or of the last one.

        Raises the RelayError of the last attempt if that got no response.
        """
        exchange, plan = maker.exchange, self._plan(maker)
        while True:
            keys, began = self._begin(plan, maker), self._clock()
            attempted = await self._attempt(plan.route, keys, maker)
            result, ended = attempted
            move: Move = "stop"
            is_smooth = result is not None and ended.is_good and not plan.breaks_affinity
            if exchange.routing.attempts or not is_smooth:
                move = self._move(plan, ended, exchange)
                record = plan.attempt(keys, ended, move, self._clock() - began)
                exchange.routing.attempts += (record,)
            if move == "stop" and result is not None:
                self._release_at_end(exchange, plan.route, keys)
                return result
            self.health.release(plan.route, keys)
            if move == "stop":
                assert ended.failure is not None
                raise ended.failure
            if result is not None:
                maker.drop(result)
            if move == "next":
                plan.go_on(ended)
            else:
                exchange.wait("nothing", self._clock())
                await asyncio.sleep(move)

    def _plan(self, maker: AttemptMaker[T]) -> _Plan:
        called, options = maker.exchange.routing.route, maker.options
        assert called is not None
        routes = self._order(called, options) if called.alternatives else ((0, called),)
        self.budget.earn()
        maker.exchange.move_to("sending")
        return _Plan(routes, options, called)

    def _begin(self, plan: _Plan, maker: AttemptMaker[T]) -> Keys:
        """Begin an attempt at the plan's current target, and return the credentials to use."""
        exchange, options = maker.exchange, plan.options
        step, route = plan.routes[plan.at]
        has_alternatives = bool(plan.called.alternatives)
        exchange.routing.route, exchange.routing.step = route, step if has_alternatives else None
        keys = self._keys(plan, route)
        exchange.waiting.first_byte_limit_s = options.first_byte_s
        if has_alternatives or len(route.target.pool) > 1:
            exchange.waiting.first_byte_limit_s = plan.first_byte_limit_s(exchange.request.stream)
            maker.examines_first_event = plan.may_fall_back("first_event_error") or (
                options.whole and self._has_another_key(plan)
            )
        return keys

    async def _attempt(
        self, route: Route, keys: Keys, maker: AttemptMaker[T]
    ) -> tuple[T | None, AttemptResult]:
        """Make one attempt, and report its result to the circuit breakers."""
        result: T | None = None
        ended: AttemptResult | None = None
        try:
            result = await maker.attempt(route, keys)
            ended = maker.judge_head(result)
            if ended is None:
                ended = await maker.judge_body(result)
        except asyncio.CancelledError:
            result, ended = None, self._expiry_result(maker.exchange)
        except (RelayError, *MAPPABLE_ERRORS) as error:
            result, ended = None, self._failure_result(error, route, maker)
        finally:
            if ended is None:  # there is no result: the client left, or the relay has a bug
                self.health.report_abandoned(route, keys)
        self.health.report(route, keys, ended)
        return result, ended

    def _release_at_end(self, exchange: Exchange, route: Route, keys: Keys) -> None:
        """Count these credentials as busy until the call has ended."""
        if route.target.strategy == "least_busy":
            exchange.at_end += (lambda: self.health.release(route, keys),)

    def _expiry_result(self, exchange: Exchange) -> AttemptResult:
        """Return the result of an attempt that periodic.py cancelled by a timeout. Raises any other
        cancellation again, and Draining at the end of a drain, which is not a failure of the
        target's and is followed by no other attempt.
        """
        expiry = exchange.take_expiry()
        if expiry is None or isinstance(expiry, Draining):
            raise asyncio.CancelledError if expiry is None else Draining
        return AttemptResult(0, expiry)

    def _failure_result(
        self, error: Exception, route: Route, maker: AttemptMaker[T]
    ) -> AttemptResult:
        if not isinstance(error, RelayError):
            failure = maker.mapped(error, route)
            failure.__cause__ = error
            return AttemptResult(0, failure)
        drop_tracebacks(error)
        if isinstance(error, HandshakeRefused):
            header, body = error.headers.get, error.body
            return result_of_answer(error.status, header, self._wall(), body, error)
        return AttemptResult(0, error)

    def _move(self, plan: _Plan, ended: AttemptResult, exchange: Exchange) -> Move:
        """Decide what follows an attempt."""
        options, rules = plan.options, plan.rules
        if ended.note:
            plan.tried = plan.tried[:-1]
            return 0.0
        if plan.seeks or plan.has_wrong_key(ended):
            return self._seek(plan, ended, exchange)
        if not options.whole or fallback_cause(ended, rules) is None:
            return "stop"
        if ended.needs_another_key and self._has_another_key(plan):
            plan.limited = None if ended.is_key_refused else plan.tried[-1]
            return 0.0
        if ended.is_key_refused or ended.final or not plan.is_repeatable(ended):
            return plan.leave_target(ended)
        wait = wait_s(rules, plan.number, ended, self._random)
        if (
            plan.number < rules.max_attempts
            and wait is not None
            and self._clock() + wait < exchange.request.started_s + rules.deadline_s
            and self.budget.spend()
        ):
            plan.number += 1
            return wait
        return plan.leave_target(ended)

    def _seek(self, plan: _Plan, ended: AttemptResult, exchange: Exchange) -> Move:
        """Decide what follows while the key is sought that knows an id or encrypted content of the
        call: each other key is tried once, those that can be used now first. A key that was
        rate-limited comes last: if no other knows it, its 429 is the true answer.
        """
        affinity = plan.options.affinity
        assert affinity is not None
        if ended.is_good:
            known = affinity.response or affinity.session
            self.health.remember(plan.route, plan.tried[-1], known)
            return "stop"
        if ended.effective_status == 429 and not ended.is_key_refused:
            plan.limited = plan.tried[-1]
        has_wrong_key = plan.has_wrong_key(ended)
        in_time = self._clock() < exchange.request.started_s + plan.rules.deadline_s
        if (has_wrong_key or ended.needs_another_key) and plan.options.whole and in_time:
            plan.sought = self.health.find_untried(plan.route, plan.tried)
            if plan.sought is None and has_wrong_key:
                plan.sought, plan.limited = plan.limited, None
            if plan.sought is not None and self.budget.spend():
                plan.seeks = True
                return 0.0
            plan.sought = None
        return "stop" if fallback_cause(ended, plan.rules) is None else plan.leave_target(ended)

    def _has_another_key(self, plan: _Plan) -> bool:
        """True if the pool has another usable key. If `tried` is empty, the key was the client's
        own, which no other replaces.
        """
        return bool(plan.tried) and self.health.has_another_key(plan.route, plan.tried)

    def _keys(self, plan: _Plan, route: Route) -> Keys:
        credential = plan.options.credential
        if credential is not None and not route.is_alternative:
            return choose(route, credential, lambda: self._pooled(plan, route))
        if not route.target.pool:
            raise ProviderNotConfigured(route.provider.name, route.target.missing)
        return self._pooled(plan, route)

    def _pooled(self, plan: _Plan, route: Route) -> Keys:
        affinity = plan.options.affinity
        if affinity is None:
            keys = self.health.acquire(route, plan.tried)
        else:
            keys = self._tied(plan, route, affinity)
        plan.tried += (keys,)
        return keys

    def _tied(self, plan: _Plan, route: Route, affinity: Affinity) -> Keys:
        """Choose the credentials of a call that is tied to a key, and note if they are others."""
        sought, plan.sought = plan.sought, None
        order = self.health.order(route, affinity) if route.has_affinity else ()
        if not plan.own_key and order:
            plan.own_key = self.health.key(route, order[0]).key_id
        if sought is None:
            keys = self.health.acquire(route, plan.tried, order)
        else:
            keys = sought
            self.health.use(route, keys)
        if plan.own_key:
            plan.breaks_affinity = self.health.key(route, keys).key_id != plan.own_key
        return keys

    def _order(self, route: Route, options: AttemptOptions) -> Sequence[tuple[int, Route]]:
        """Return (number, route) of each target to call, in order: those that are configured and
        not in cooldown, neither the target nor all of its keys; if there are none, all that are
        configured.
        """
        routes = [(number, each) for number, each in enumerate((route, *route.alternatives))]
        ready = [item for item in routes if item[1].target.pool] or routes[:1]
        if route.by_weight:
            ready = self._drawn_order(ready)
        return [item for item in ready if self._may_call(item[1], options)] or ready

    def _may_call(self, route: Route, options: AttemptOptions) -> bool:
        """True if the target is available and has a key that may be used."""
        if not self.health.is_available(route.target):
            return False
        credential = None if route.is_alternative else options.credential
        has_own = credential is not None and bool(credential.provider)
        return has_own or self.health.has_usable_key(route)

    def _drawn_order(self, items: Sequence[tuple[int, Route]]) -> list[tuple[int, Route]]:
        left, ordered = list(items), []
        while left:
            chosen = draw_weighted(left, [route.weight for _, route in left], self._random)
            left.remove(chosen)
            ordered.append(chosen)
        return ordered
