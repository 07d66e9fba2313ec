"""Attempts: a call is sent, and where that fails and may be repeated, again, or elsewhere.

Owns: the loop over targets, keys and tries, and the retry budget. core/retry_policy.py decides what
may follow what; the caller puts a call on the wire. Everything here happens before the first
downstream byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

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
from relay.upstream.failures import MAPPABLE_ERRORS
from relay.upstream.health import Health, draw_weighted

T = TypeVar("T")
Move = float | Literal["next", "stop"]
"""Again after so many seconds, on to the next target, or no more."""


class Budget:
    """Tries beyond the first that may be made: a share of all calls, and some a second.

    Without it every client's call would become several, just when a provider can least take them.
    """

    def __init__(self, percent: float, per_s: float, clock: Callable[[], float]) -> None:
        self._share, self._per_s, self._clock = percent / 100, per_s, clock
        self._earned, self._given, self._at_s = 0.0, per_s, clock()

    def earn(self) -> None:
        """A call began."""
        self._earned = min(self._earned + self._share, 10.0)

    def spend(self) -> bool:
        """Take one try; False if there is none left."""
        now = self._clock()
        self._given = min(self._per_s, self._given + (now - self._at_s) * self._per_s)
        self._at_s = now
        if self._given >= 1:
            self._given -= 1
        elif self._earned >= 1:
            self._earned -= 1
        else:
            return False
        return True


@dataclass(slots=True)
class AttemptOptions:
    """What a call asks of its attempts."""

    method: str
    whole: bool = True
    """False: the body streams, and can be sent once."""
    submits: bool = False
    """It asks for a job whose result is read or delivered later."""
    credential: ClientCredential | None = None
    """The client's own credentials, where the provider takes them."""
    retries: RetryRules | None = None
    """The client's own rules, instead of the provider's."""
    first_byte_s: float | None = None
    """Its own limit for the first byte: what is slower is answered by the next target."""


class AttemptMaker(Protocol[T]):
    """Makes the attempts of one call, and judges them by their results."""

    exchange: Exchange
    options: AttemptOptions
    examines_first_event: bool
    """Something else can be tried if a stream begins with an error. Written before an attempt."""

    def attempt(self, route: Route, keys: Keys) -> Awaitable[T]:
        """Make it. Raises a RelayError, or one of failures.MAPPABLE_ERRORS."""

    def judge_head(self, result: T) -> AttemptResult | None:
        """The judgement by the head of a result; None where its body decides: see `judge_body`."""

    def judge_body(self, result: T) -> Awaitable[AttemptResult]:
        """The judgement by the beginning of its body. Where reading that fails, the result is
        dropped."""

    def drop(self, result: T) -> None:
        """Another result is better."""

    def mapped(self, error: Exception, route: Route) -> RelayError:
        """One of failures.MAPPABLE_ERRORS as the error that it is."""


@dataclass(slots=True)
class _Plan:
    """Where a call may go, and where it is."""

    routes: Sequence[tuple[int, Route]]
    """(number, route) of each target, in order."""
    options: AttemptOptions
    called: Route
    """The client's: its provider says which failures reach which fallbacks."""
    at: int = 0
    number: int = 1
    """Of the tries at this target that were paid for."""
    tried: tuple[Keys, ...] = ()
    """The credentials that this target saw."""
    executed_at: tuple[int, ...] = ()
    """The fallback numbers of the targets that may have executed the call."""

    @property
    def route(self) -> Route:
        """The target that is asked now."""
        return self.routes[self.at][1]

    @property
    def rules(self) -> RetryRules:
        """What holds for it."""
        route = self.route
        if route.target.via == "cloudflare" and route.provider.delegation.retries != "relay":
            return _ONCE
        return self.options.retries or route.provider.retries

    @property
    def generates(self) -> bool:
        """True if any provider of the same format can answer it instead."""
        return not self.options.submits and generates(self.options.method, self.called.endpoint)

    def is_repeatable(self, ended: AttemptResult) -> bool:
        """True if the provider that was asked may get the call again."""
        keyed = self.route.provider.idempotency_header is not None
        return keyed or is_repeatable(ended, self.rules, self.options.method)

    def next_target(self, ended: AttemptResult) -> int | None:
        """The place of the target that is called after this one; None if there is none."""
        places = range(self.at + 1, len(self.routes))
        return next((at for at in places if self._may_follow(self.routes[at][1], ended)), None)

    def _may_follow(self, route: Route, ended: AttemptResult) -> bool:
        if self.options.first_byte_s and isinstance(ended.failure, UpstreamTimeout):
            return True  # its client asked for this
        number = route.fallback_number
        if number in self.executed_at:
            return False
        if number == self.route.fallback_number:
            return self.is_repeatable(ended)  # another way to the same provider
        if fallback_cause(ended, self.rules) not in self.called.provider.fallback_on:
            return False
        return self.is_repeatable(ended) or self.generates

    def elsewhere(self, ended: AttemptResult) -> Move:
        """What follows where nothing more is tried at this target."""
        return "stop" if self.next_target(ended) is None else "next"

    def go_on(self, ended: AttemptResult) -> None:
        """Go to the next target."""
        at = self.next_target(ended)
        assert at is not None
        if not self.is_repeatable(ended):
            self.executed_at += (self.route.fallback_number,)
        self.at, self.number, self.tried = at, 1, ()

    def attempt(self, keys: Keys, ended: AttemptResult, move: Move, took_s: float) -> Attempt:
        """The record of an attempt at this target."""
        route, label = self.route, keys.provider.label if keys.provider else ""
        twice = move == "next" and may_be_executed(ended, self.rules, self.options.method)
        return Attempt(
            route.provider.name, route.target.via, label, ended.status, ended.error, took_s, twice
        )

    def may_fall_back(self, cause: FallbackCause) -> bool:
        """True if a fallback is called should this target fail so, executed or not."""
        if cause not in self.called.provider.fallback_on or not self.options.whole:
            return False
        gone = (self.route.fallback_number, *self.executed_at)
        for _, route in self.routes[self.at + 1 :]:
            if route.fallback_number not in gone:
                return self.generates
        return False

    def first_byte_limit_s(self, streamed: bool | None) -> float | None:
        """How long this target's first byte may take; None: as long as its provider says."""
        own = self.options.first_byte_s
        if own is not None or not self.may_fall_back("timeout"):
            return own
        after = self.called.provider.fallback_after_s
        if after is None and (streamed or streams_by_path(self.called.endpoint)):
            after = FALLBACK_AFTER_S
        return None if after is None else min(after, self.route.provider.first_byte_timeout_s)


_ONCE = RetryRules(max_attempts=1)


class Attempts:
    """One per process."""

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
        """The result of the first attempt that is good, or that nothing better can follow.

        Raises the RelayError of the last one where none brought an answer.
        """
        exchange, plan = maker.exchange, self._plan(maker)
        while True:
            keys, began = self._begin(plan, maker), self._clock()
            attempted = await self._attempt(plan.route, keys, maker)
            result, ended = attempted
            move: Move = "stop"
            if exchange.routing.attempts or result is None or not ended.is_good:
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
        """Begin an attempt at the plan's target: the credentials that it is made with."""
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
        """Make one attempt, and report to the circuits how it ended."""
        result: T | None = None
        ended: AttemptResult | None = None
        try:
            result = await maker.attempt(route, keys)
            ended = maker.judge_head(result)
            if ended is None:
                ended = await maker.judge_body(result)
        except asyncio.CancelledError:
            result, ended = None, self._cut(maker.exchange)
        except (RelayError, *MAPPABLE_ERRORS) as error:
            result, ended = None, self._failure(error, route, maker)
        finally:
            if ended is None:  # it has no result: its client left, or the relay has a bug
                self.health.report_abandoned(route, keys)
        self.health.report(route, keys, ended)
        return result, ended

    def _release_at_end(self, exchange: Exchange, route: Route, keys: Keys) -> None:
        """Count these credentials as busy until the call is over."""
        if route.target.strategy == "least_busy":
            exchange.at_end += (lambda: self.health.release(route, keys),)

    def _cut(self, exchange: Exchange) -> AttemptResult:
        """The result of an attempt that periodic.py cancelled. Any other cancellation is raised
        again, and so is the end of a drain: it is no fault of the target's, and none follows.
        """
        cut = exchange.take_expiry()
        if cut is None or isinstance(cut, Draining):
            raise asyncio.CancelledError if cut is None else Draining
        return AttemptResult(0, cut)

    def _failure(self, error: Exception, route: Route, maker: AttemptMaker[T]) -> AttemptResult:
        if not isinstance(error, RelayError):
            failure = maker.mapped(error, route)
            failure.__cause__ = error
            return AttemptResult(0, failure)
        if isinstance(error, HandshakeRefused):
            header, body = error.headers.get, error.body
            return result_of_answer(error.status, header, self._wall(), body, error)
        return AttemptResult(0, error)

    def _move(self, plan: _Plan, ended: AttemptResult, exchange: Exchange) -> Move:
        """What follows an attempt."""
        options, rules = plan.options, plan.rules
        if ended.note:
            plan.tried = plan.tried[:-1]
            return 0.0
        if not options.whole or fallback_cause(ended, rules) is None:
            return "stop"
        if ended.needs_another_key and self._has_another_key(plan):
            return 0.0
        if ended.is_key_refused or ended.final or not plan.is_repeatable(ended):
            return plan.elsewhere(ended)
        wait = wait_s(rules, plan.number, ended, self._random)
        if (
            plan.number < rules.max_attempts
            and wait is not None
            and self._clock() + wait < exchange.request.started_s + rules.deadline_s
            and self.budget.spend()
        ):
            plan.number += 1
            return wait
        return plan.elsewhere(ended)

    def _has_another_key(self, plan: _Plan) -> bool:
        """Without an entry in `tried` the key was the client's own: no other replaces it."""
        return bool(plan.tried) and self.health.has_another_key(plan.route, plan.tried)

    def _keys(self, plan: _Plan, route: Route) -> Keys:
        credential = plan.options.credential
        if credential is not None and not route.is_alternative:
            return choose(route, credential, lambda: self._pooled(plan, route))
        if not route.target.pool:
            raise ProviderNotConfigured(route.provider.name, route.target.missing)
        return self._pooled(plan, route)

    def _pooled(self, plan: _Plan, route: Route) -> Keys:
        keys = self.health.acquire(route, plan.tried)
        plan.tried += (keys,)
        return keys

    def _order(self, route: Route, options: AttemptOptions) -> Sequence[tuple[int, Route]]:
        """(number, route) of each target to be tried: configured, and neither it nor all its keys
        in cooldown while another is well.
        """
        routes = [(number, each) for number, each in enumerate((route, *route.alternatives))]
        ready = [item for item in routes if item[1].target.pool] or routes[:1]
        if route.by_weight:
            ready = self._drawn_order(ready)
        return [item for item in ready if self._may_call(item[1], options)] or ready

    def _may_call(self, route: Route, options: AttemptOptions) -> bool:
        """True if the target is open, and has a key that may be used."""
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
