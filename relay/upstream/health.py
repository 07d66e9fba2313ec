"""How keys and targets fare: which one is used next, and which rest.

Owns: the cooldowns of keys and the circuits of targets, in this process's memory. A key is in
cooldown after it was refused (long, and logged), limited (as long as the provider says) or met the
provider's own faults (longer each time, capped); then one call tries it out. If every key is in
cooldown, and no other target can be called, the one that recovers first is used: better a refusal
by the provider than one by the relay. What a client did wrong, or its leaving, counts for nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from relay.core.policy import Tried, fault_rest_s, rest_s
from relay.core.provider import Keys, Route, Target

T = TypeVar("T")
_GOOD = Tried(200)
_OPENS_AFTER = 5
"""Faults in a row after which a target rests."""
Alarm = Callable[[str, str, Tried, float], None]
"""(provider, key's label, how it was refused, seconds of its cooldown)"""


Blame = Literal["", "limited", "refused"]


@dataclass(slots=True)
class State:
    """One key, or one target."""

    resting_until_s: float = 0.0
    failures: int = 0
    running: int = 0
    tried_out: bool = False
    """A call is finding out whether it is well again."""
    blame: Blame = ""
    """What put it into cooldown, if that was not a fault of its provider's."""

    def usable(self, now_s: float) -> bool:
        """True if it is well, or rested and nobody tries it out yet."""
        return self.failures == 0 or (self.resting_until_s <= now_s and not self.tried_out)

    def well(self) -> None:
        """It worked."""
        self.failures, self.tried_out, self.resting_until_s = 0, False, 0.0
        self.blame = ""


class Health:
    """One per process. States outlive a reload: they belong to secrets and hosts."""

    def __init__(
        self, clock: Callable[[], float], random: Callable[[], float], alarm: Alarm
    ) -> None:
        self._clock, self._random, self._alarm = clock, random, alarm
        self._keys: dict[tuple[str, str], State] = {}
        self._targets: dict[tuple[str, str], State] = {}
        self._turns = itertools.count()

    def enter(self, route: Route, tried: Sequence[Keys]) -> Keys:
        """A call goes to `route`: the credentials that it takes. Of those that are well and not
        `tried` yet, else of those that are well, else the one that rests the shortest.
        """
        keys, target = self._pick(route, tried), self._target(route.target)
        if target is not None and target.failures >= _OPENS_AFTER:
            target.tried_out = True
        if route.target.strategy == "least_busy":
            self.key(route, keys).running += 1
        return keys

    def _pick(self, route: Route, tried: Sequence[Keys]) -> Keys:
        pool = route.target.pool
        now = self._clock() if self._keys or len(pool) > 1 else 0.0
        if len(pool) == 1:
            only = self._keys.get(_identity(route, pool[0])) if self._keys else None
            if only is not None and only.failures and only.usable(now):
                only.tried_out = True
            return pool[0]
        well = [keys for keys in pool if self.key(route, keys).usable(now)]
        if not well:
            return min(pool, key=lambda keys: self.key(route, keys).resting_until_s)
        chosen = self._chosen(route, [keys for keys in well if keys not in tried] or well)
        state = self.key(route, chosen)
        state.tried_out = state.failures > 0
        return chosen

    def _chosen(self, route: Route, well: list[Keys]) -> Keys:
        if route.target.strategy == "least_busy":
            turn = next(self._turns)
            rotated = well[turn % len(well) :] + well[: turn % len(well)]
            return min(rotated, key=lambda keys: self.key(route, keys).running)
        if route.target.strategy == "weight":
            weights = dict(zip(route.target.pool, route.target.weights, strict=True))
            return drawn(well, [weights[keys] for keys in well], self._random)
        return well[next(self._turns) % len(well)]

    def has_another(self, route: Route, tried: Sequence[Keys]) -> bool:
        """True if a key is left that is well and was not tried."""
        now = self._clock()
        pool = route.target.pool
        return len(pool) > 1 and any(
            keys not in tried and self.key(route, keys).usable(now) for keys in pool
        )

    def key(self, route: Route, keys: Keys) -> State:
        """The state of these credentials, which are of the target's pool."""
        return self._keys.setdefault(_identity(route, keys), State())

    def _known(self, route: Route, keys: Keys) -> State | None:
        """The same where there is one. None for a client's own credential: nothing is remembered of
        it. A pool's beside a client's own token for Cloudflare is still the pool's.
        """
        state = self._keys.get(_identity(route, keys)) if self._keys else None
        return state if state is not None and _is_pooled(route, keys) else None

    def _target(self, target: Target) -> State | None:
        """The state of a target; None for nearly all: they never failed."""
        return self._targets.get((target.origin, target.prefix)) if self._targets else None

    def open(self, target: Target) -> bool:
        """True if this target may be called: it is well, or rested."""
        state = self._target(target)
        return state is None or state.failures < _OPENS_AFTER or state.usable(self._clock())

    def has_key(self, route: Route) -> bool:
        """True if a key of this target's is not refused, limited, or being tried out after that."""
        now, states = self._clock(), self._keys
        for keys in route.target.pool:
            state = states.get(_identity(route, keys)) if states else None
            if state is None or not state.blame or state.usable(now):
                return True
        return False

    def left(self, route: Route, keys: Keys) -> None:
        """An attempt ended without a result, by the client's leaving: the next may try out."""
        self.done(route, keys)
        for state in (self._target(route.target), self._known(route, keys)):
            if state is not None:
                state.tried_out = False

    def worked(self, route: Route, keys: Keys) -> None:
        """An attempt was good: nothing to remember, but where something was."""
        if self._targets or self._keys:
            self.report(route, keys, _GOOD)

    def done(self, route: Route, keys: Keys) -> None:
        """These credentials are one call less busy."""
        if route.target.strategy == "least_busy":
            state = self._known(route, keys)
            if state is not None:
                state.running = max(0, state.running - 1)

    def report(self, route: Route, keys: Keys, ended: Tried) -> None:
        """What came of an attempt."""
        now, target = self._clock(), self._target(route.target)
        if rest := fault_rest_s(ended, 1 if target is None else target.failures - _OPENS_AFTER + 2):
            place = (route.target.origin, route.target.prefix)
            target = self._targets.setdefault(place, State())
            target.failures += 1
            target.tried_out = False
            if target.failures >= _OPENS_AFTER:
                target.resting_until_s = now + rest
        elif target is not None:
            target.well()
        self._report_key(route, keys, ended, now)

    def refused(self, route: Route, keys: Keys, code: str) -> None:
        """A session's provider refused the key after its 101, by `code`."""
        self._report_key(route, keys, Tried(101, dead_key=code), self._clock())

    def _report_key(self, route: Route, keys: Keys, ended: Tried, now: float) -> None:
        if keys.provider is None or not _is_pooled(route, keys):
            return  # a client's own key is the client's business
        state = self._known(route, keys)
        rest = rest_s(ended, 1 if state is None else state.failures + 1)
        if rest == 0.0:
            if state is not None and state.failures:
                state.well()
            return
        state = self.key(route, keys)
        state.failures += 1
        state.tried_out = False
        state.resting_until_s = now + rest
        known, state.blame = state.blame, _blame(ended)
        if state.blame == "refused" != known:
            self._alarm(route.provider.name, keys.provider.label, ended, rest)

    def shown(self, provider: str, target: Target) -> dict[str, object]:
        """How a target and its keys fare, for people: variables' names, never values."""
        keys = [
            {"key": each.provider.label}
            | self._told(self._keys.get((provider, each.provider.value)))
            for each in target.pool
            if each.provider is not None
        ]
        told = self._told(self._target(target))
        return {"via": target.via, **told, "keys": keys}

    def _told(self, state: State | None) -> dict[str, float]:
        if state is None:
            return {"failures": 0, "rests_s": 0.0}
        left = max(0.0, state.resting_until_s - self._clock())
        return {"failures": state.failures, "rests_s": round(left, 1)}


def _identity(route: Route, keys: Keys) -> tuple[str, str]:
    return route.provider.name, keys.provider.value if keys.provider else ""


def _blame(ended: Tried) -> Blame:
    if ended.refused_key:
        return "refused"
    return "limited" if ended.needs_another_key else ""


def _is_pooled(route: Route, keys: Keys) -> bool:
    """True if the provider's credential is the relay's own."""
    return any(keys.provider is each.provider for each in route.target.pool)


def drawn(items: Sequence[T], weights: Sequence[float], random: Callable[[], float]) -> T:
    """One of `items`, by weight."""
    point = random() * sum(weights)
    for item, weight in zip(items, weights, strict=True):
        point -= weight
        if point < 0:
            return item
    return items[-1]
