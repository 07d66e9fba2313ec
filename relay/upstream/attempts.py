"""Attempts: a call is sent, and where that fails and may be repeated, again, or elsewhere.

Owns: the loop over targets, keys and tries, and the retry budget. What may follow what is decided
in core/policy.py; how a call is put on the wire is its caller's. Everything here happens before the
first downstream byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from relay.core.credentials import Brought, choose
from relay.core.errors import HandshakeRefused, ProviderNotConfigured, RelayError
from relay.core.exchange import Attempt, Exchange
from relay.core.policy import (
    SAFE_METHODS,
    RetryRules,
    Tried,
    failed,
    repeatable,
    retry_after_s,
    timed_out,
    tried,
    wait_s,
)
from relay.core.provider import Keys, Route
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


@dataclass(slots=True)
class Acting(Generic[T]):
    """How one attempt is made, and what its result says."""

    act: Callable[[Route, Keys], Awaitable[T]]
    look: Callable[[T], Tried]
    drop: Callable[[T], None]


@dataclass(slots=True)
class _Step:
    """The tries at one target."""

    route: Route
    rules: RetryRules
    more: bool
    """Another target comes after it."""
    number: int = 1
    keys: list[Keys] = field(default_factory=list)


class Attempts:
    """One per process."""

    def __init__(
        self,
        health: Health,
        clock: Callable[[], float],
        random: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.health, self._clock, self._random, self._wall = health, clock, random, wall
        self.budget = Budget(20, 10, clock)

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
        route = exchange.route
        assert route is not None
        self.budget.earn()
        exchange.steps = len(route.alternatives) + 1
        routes = self._order(route) if route.alternatives else [(0, route)]
        for at, (number, each) in enumerate(routes):
            exchange.step, exchange.route = number, each
            self.health.enter(each.target)
            step = _Step(each, _rules(each, asked), at + 1 < len(routes))
            result = await self._step(step, exchange, asked, acting)
            if result is not None:
                return result
        raise AssertionError("the last step ends it")

    async def _step(
        self, step: _Step, exchange: Exchange, asked: Asked, acting: Acting[T]
    ) -> T | None:
        """Try one target until it is good or nothing can follow; None: on to the next."""
        while True:
            keys = self._keys(step, asked)
            step.keys.append(keys)
            outcome = await self._one(step.route, keys, exchange, acting)
            ended, result = outcome
            move: Move = "stop"
            if failed(ended, step.rules):
                move = self._move(step, ended, exchange, asked)
            if move == "stop":
                if result is None:
                    assert ended.failure is not None
                    raise ended.failure
                return result
            if result is not None:
                acting.drop(result)
            if move == "next":
                return None
            exchange.wait("nothing", self._clock())
            await asyncio.sleep(move)

    async def _one(
        self, route: Route, keys: Keys, exchange: Exchange, acting: Acting[T]
    ) -> tuple[Tried, T | None]:
        """One attempt, reported. A client that leaves reports nothing."""
        began = self._clock()
        result: T | None = None
        state = self.health.key(route, keys) if len(route.target.pool) > 1 else None
        if state is not None:
            state.running += 1
        try:
            result = await acting.act(route, keys)
            ended = acting.look(result)
        except HandshakeRefused as error:
            ended = tried(error, retry_after_s(error.headers.get, self._wall()))
        except RelayError as error:
            ended = tried(error)
        except asyncio.CancelledError:
            cut = exchange.revived()
            if cut is None:
                self.health.abandoned(route, keys)
                raise
            ended = tried(cut)
        finally:
            if state is not None:
                state.running -= 1
        self.health.report(route, keys, ended)
        label = keys.provider.label if keys.provider else ""
        code = ended.failure.code if ended.failure else ""
        took = self._clock() - began
        exchange.attempts.append(
            Attempt(route.provider.name, route.target.via, label, ended.status, code, took)
        )
        return ended, result

    def _move(self, step: _Step, ended: Tried, exchange: Exchange, asked: Asked) -> Move:
        """What follows an attempt that failed."""
        if not asked.whole:
            return "stop"
        other: Move = "next" if step.more else "stop"
        route = step.route
        safe = asked.method in SAFE_METHODS or route.provider.idempotency_header is not None
        if not safe and not repeatable(ended, step.rules, asked.method):
            return other if asked.first_byte_s and timed_out(ended) else "stop"
        if ended.status in (401, 403, 429) and self.health.has_another(route, step.keys):
            return 0.0
        if ended.refused_key:
            return other
        wait = wait_s(step.rules, step.number, ended, self._random)
        now = self._clock()
        if (
            step.number < step.rules.max_attempts
            and wait is not None
            and now + wait < exchange.started_s + step.rules.deadline_s
            and self.budget.spend()
        ):
            step.number += 1
            return wait
        return other

    def _keys(self, step: _Step, asked: Asked) -> Keys:
        route = step.route
        if not route.target.pool and (asked.brought is None or route.is_alternative):
            raise ProviderNotConfigured(route.provider.name, route.target.missing)
        if asked.brought is not None and not route.is_alternative:
            return choose(route, asked.brought, lambda: self.health.pick(route, step.keys))
        return self.health.pick(route, step.keys)

    def _order(self, route: Route) -> list[tuple[int, Route]]:
        """(number, route) of each target to be tried: configured, and not resting while another is
        well.
        """
        routes = [(number, each) for number, each in enumerate((route, *route.alternatives))]
        ready = [item for item in routes if item[1].target.pool] or routes[:1]
        if route.by_weight:
            ready = self._drawn_order(ready)
        return [item for item in ready if self.health.open(item[1].target)] or ready

    def _drawn_order(self, items: Sequence[tuple[int, Route]]) -> list[tuple[int, Route]]:
        left, ordered = list(items), []
        while left:
            chosen = drawn(left, [route.weight for _, route in left], self._random)
            left.remove(chosen)
            ordered.append(chosen)
        return ordered


def _rules(route: Route, asked: Asked) -> RetryRules:
    if route.target.via == "cloudflare" and route.provider.retries_by != "relay":
        return RetryRules(max_attempts=1)
    return asked.rules or route.provider.retries
