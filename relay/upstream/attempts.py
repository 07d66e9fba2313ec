"""Attempts: a call is sent, and where that fails and may be repeated, again, or elsewhere.

Owns: the loop over targets, keys and tries, and the retry budget. What may follow what is decided
in core/policy.py; how a call is put on the wire is its caller's. Everything here happens before the
first downstream byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from relay.core.credentials import Brought, choose
from relay.core.errors import Draining, HandshakeRefused, ProviderNotConfigured, RelayError
from relay.core.exchange import Attempt, Exchange
from relay.core.policy import (
    RetryRules,
    Tried,
    answered,
    failed,
    repeatable,
    timed_out,
    wait_s,
)
from relay.core.provider import Keys, Route
from relay.upstream.failures import MAPPED
from relay.upstream.health import Health, drawn

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
class Asked:
    """What a client asked for, as far as attempts go."""

    method: str
    whole: bool = True
    """False: the body streams, and can be sent once."""
    brought: Brought | None = None
    """The client's own credentials, where the provider takes them."""
    rules: RetryRules | None = None
    """The client's own wishes, instead of the provider's rules."""
    first_byte_s: float | None = None
    """Its own limit for the first byte: what is slower is answered by the next target."""


class Acting(Protocol[T]):
    """How one attempt is made, and what its result says."""

    def attempt(self, route: Route, keys: Keys) -> Awaitable[T]:
        """Make it. Raises a RelayError, or one of failures.MAPPED."""

    def look(self, result: T) -> Tried | None:
        """What its result says; None where that stands in its body: see `examine`."""

    def examine(self, result: T) -> Awaitable[Tried]:
        """Read the beginning of its body, and tell what it says. Where that fails, the result is
        dropped."""

    def drop(self, result: T) -> None:
        """Another result is better."""

    def mapped(self, error: Exception, route: Route) -> RelayError:
        """One of failures.MAPPED as the error that it is."""


@dataclass(slots=True)
class _Plan:
    """Where a call may go, and where it is."""

    routes: Sequence[tuple[int, Route]]
    """(number, route) of each target, in order."""
    asked: Asked
    at: int = 0
    number: int = 1
    """Of the tries at this target that were paid for."""
    tried: tuple[Keys, ...] = ()
    """The credentials that this target saw."""

    @property
    def route(self) -> Route:
        """The target that is asked now."""
        return self.routes[self.at][1]

    @property
    def rules(self) -> RetryRules:
        """What holds for it."""
        route = self.route
        if route.target.via == "cloudflare" and route.provider.jobs.retries != "relay":
            return _ONCE
        return self.asked.rules or route.provider.retries

    @property
    def other(self) -> Move:
        """What follows where nothing more is tried here."""
        return "next" if self.at + 1 < len(self.routes) else "stop"


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

    def check(self, route: Route, asked: Asked) -> None:
        """Raise ProviderNotConfigured if there is nobody that could be asked."""
        if asked.brought is not None and (asked.brought.provider or asked.brought.gateway):
            return
        if not any(each.target.pool for each in (route, *route.alternatives)):
            raise ProviderNotConfigured(route.provider.name, route.target.missing)

    async def open(self, exchange: Exchange, asked: Asked, acting: Acting[T]) -> T:
        """The result of the first attempt that is good, or that nothing better can follow.

        Raises the RelayError of the last one where none brought an answer.
        """
        assert exchange.route is not None
        plan = self._plan(exchange.route, asked)
        self.budget.earn()
        exchange.steps = len(exchange.route.alternatives) + 1
        while True:
            exchange.step, route = plan.routes[plan.at]
            exchange.route = route
            keys, began = self._keys(plan, route), self._clock()
            result: T | None = None
            probing = True
            try:
                try:
                    result = await acting.attempt(route, keys)
                    ended = acting.look(result)
                    if ended is None:
                        ended = await acting.examine(result)
                except asyncio.CancelledError:
                    ended, result = self._cut(exchange), None
                except (RelayError, *MAPPED) as error:
                    ended, result = self._failure(error, route, acting), None
                if ended.status < 400 and result is not None and not exchange.attempts:
                    self.health.worked(route, keys)
                    probing = False
                    return self._until_end(exchange, route, keys, result)
                self._note(exchange, keys, ended, began)
                probing = False
            finally:
                if probing:  # it came to nothing: by the client's leaving, or by a fault of ours
                    self.health.left(route, keys)
            move = self._move(plan, ended, exchange)
            if move == "stop" and result is not None:
                return self._until_end(exchange, route, keys, result)
            self.health.done(route, keys)
            if move == "stop":
                assert ended.failure is not None
                raise ended.failure
            if result is not None:
                acting.drop(result)
            if move == "next":
                plan.at, plan.number, plan.tried = plan.at + 1, 1, ()
                continue
            exchange.wait("nothing", self._clock())
            await asyncio.sleep(move)

    def _plan(self, route: Route, asked: Asked) -> _Plan:
        routes = self._order(route, asked) if route.alternatives else ((0, route),)
        return _Plan(routes, asked)

    def _until_end(self, exchange: Exchange, route: Route, keys: Keys, result: T) -> T:
        """The result: these credentials are busy until the call is over."""
        if route.target.strategy == "least_busy":
            exchange.at_end += (lambda: self.health.done(route, keys),)
        return result

    def _cut(self, exchange: Exchange) -> Tried:
        """What a cancellation is: the janitor's, which ends an attempt, or not ours to keep.

        The end of a drain is no fault of the target's, and no other target follows.
        """
        cut = exchange.revived()
        if cut is None or isinstance(cut, Draining):
            raise asyncio.CancelledError if cut is None else Draining
        return Tried(0, cut)

    def _failure(self, error: Exception, route: Route, acting: Acting[T]) -> Tried:
        if not isinstance(error, RelayError):
            failure = acting.mapped(error, route)
            failure.__cause__ = error
            return Tried(0, failure)
        if isinstance(error, HandshakeRefused):
            header, body = error.headers.get, error.body
            return answered(error.status, header, self._wall(), body, error)
        return Tried(0, error)

    def _note(self, exchange: Exchange, keys: Keys, ended: Tried, began: float) -> None:
        """Remember an attempt, and what it says of its key and target."""
        route = exchange.route
        assert route is not None
        self.health.report(route, keys, ended)
        label = keys.provider.label if keys.provider else ""
        code = ended.failure.code if ended.failure else ended.note
        took = self._clock() - began
        exchange.attempts += (
            Attempt(route.provider.name, route.target.via, label, ended.status, code, took),
        )

    def _move(self, plan: _Plan, ended: Tried, exchange: Exchange) -> Move:
        """What follows an attempt."""
        asked, rules, route = plan.asked, plan.rules, plan.route
        if ended.note:
            plan.tried = plan.tried[:-1]
            return 0.0
        if not asked.whole or not failed(ended, rules):
            return "stop"
        keyed = route.provider.idempotency_header is not None
        if not keyed and not repeatable(ended, rules, asked.method):
            return plan.other if asked.first_byte_s and timed_out(ended) else "stop"
        # Without an entry in `tried` the key was the client's own: no other stands in for it.
        another = plan.tried and self.health.has_another(route, plan.tried)
        if another and ended.needs_another_key:
            return 0.0
        if ended.refused_key or ended.final:
            return plan.other
        wait = wait_s(rules, plan.number, ended, self._random)
        if (
            plan.number < rules.max_attempts
            and wait is not None
            and self._clock() + wait < exchange.started_s + rules.deadline_s
            and self.budget.spend()
        ):
            plan.number += 1
            return wait
        return plan.other

    def _keys(self, plan: _Plan, route: Route) -> Keys:
        brought = plan.asked.brought
        if brought is not None and not route.is_alternative:
            return choose(route, brought, lambda: self._pooled(plan, route))
        if not route.target.pool:
            raise ProviderNotConfigured(route.provider.name, route.target.missing)
        return self._pooled(plan, route)

    def _pooled(self, plan: _Plan, route: Route) -> Keys:
        keys = self.health.enter(route, plan.tried)
        plan.tried += (keys,)
        return keys

    def _order(self, route: Route, asked: Asked) -> list[tuple[int, Route]]:
        """(number, route) of each target to be tried: configured, and neither it nor all its keys
        in cooldown while another is well.
        """
        routes = [(number, each) for number, each in enumerate((route, *route.alternatives))]
        ready = [item for item in routes if item[1].target.pool] or routes[:1]
        if route.by_weight:
            ready = self._drawn_order(ready)
        return [item for item in ready if self._may_call(item[1], asked)] or ready

    def _may_call(self, route: Route, asked: Asked) -> bool:
        """True if the target is open, and has a key that may be used."""
        brings = asked.brought is not None and asked.brought.provider and not route.is_alternative
        return self.health.open(route.target) and (bool(brings) or self.health.has_key(route))

    def _drawn_order(self, items: Sequence[tuple[int, Route]]) -> list[tuple[int, Route]]:
        left, ordered = list(items), []
        while left:
            chosen = drawn(left, [route.weight for _, route in left], self._random)
            left.remove(chosen)
            ordered.append(chosen)
        return ordered
