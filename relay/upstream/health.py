"""Keep the circuit breakers of keys and targets, and choose the key that a call uses.

Owns the cooldowns of keys and the circuits of targets, in this process's memory, and which key of a
pool serves a session (core/affinity.py). A key is in cooldown after the provider refused it (a long
time, and logged), rate-limited it (as long as the provider says) or failed by itself (longer each
time, up to a maximum). After the cooldown one call probes it. If every key is in cooldown and no
other target can be called, the key that recovers first is used anyway. A client's mistake, or its
disconnect, changes no circuit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from relay.core.affinity import Affinity, KnownKeys, key_id, rank
from relay.core.credentials import bare
from relay.core.provider import Keys, Provider, Route, Target
from relay.core.retry_policy import AttemptResult, key_cooldown_s, target_cooldown_s

T = TypeVar("T")
_FAULTS_TO_OPEN = 5
"""Failures in a row after which the circuit of a target opens."""
COOLDOWN_KINDS = (
    ("key", "refused"),
    ("key", "limited"),
    ("key", "failed"),
    ("target", "failed"),
)
"""(scope, reason) of every cooldown, for metrics."""
Alarm = Callable[[str, str, AttemptResult, float], None]
"""(provider, label of the key, the result that refused it, cooldown in seconds)"""


@dataclass(slots=True)
class Circuit:
    """The circuit breaker of one key, or of one target."""

    cooldown_until_s: float = 0.0
    failures: int = 0
    running: int = 0
    probing: bool = False
    """Half-open: one call tests whether the key or target works again."""
    blame: Literal["", "limited", "refused"] = ""
    """Why a key is in cooldown; empty for a failure of its provider."""
    key_id: bytes = b""
    """The identity of a key (core/affinity.py)."""

    def is_usable(self, now_s: float) -> bool:
        """True if the circuit is closed, or its cooldown is over and no call is probing it."""
        return self.failures == 0 or (self.cooldown_until_s <= now_s and not self.probing)

    def mark_healthy(self) -> None:
        """Close the circuit."""
        self.failures, self.probing, self.cooldown_until_s, self.blame = 0, False, 0.0, ""


class CoolingDown(NamedTuple):
    """How many keys a provider has, and how many of its keys and targets are in cooldown."""

    keys: int
    cooling_keys: int
    cooling_targets: int


class Health:
    """The circuits of a process. They outlive a reload: their keys are secrets and origins."""

    def __init__(
        self, clock: Callable[[], float], random: Callable[[], float], alarm: Alarm
    ) -> None:
        self._clock, self._random, self._alarm = clock, random, alarm
        self._keys: dict[tuple[str, str], Circuit] = {}
        self._targets: dict[tuple[str, str], Circuit] = {}
        self._round_robin = itertools.count()
        self.cooldowns: dict[tuple[str, str, str], int] = {}
        """Number of cooldowns by provider, scope (key, target) and reason, for metrics."""
        self.known_keys = KnownKeys()

    def acquire(self, route: Route, tried: Sequence[Keys], order: Sequence[Keys] = ()) -> Keys:
        """Choose the credentials for a call to `route`: usable ones that were not `tried` yet, else
        usable ones, else those whose cooldown ends first. Among the usable ones the first of
        `order` is chosen, the order of the call's session.
        """
        keys = self._pick(route, tried, order)
        self._begin(route, keys)
        return keys

    def find_untried(self, route: Route, tried: Sequence[Keys]) -> Keys | None:
        """Find credentials for a call that only one key of the pool can serve: usable ones that
        were not `tried` yet, else those whose cooldown ends first, unless they were refused. None
        if there are none. `use` begins the call.
        """
        now, left = self._clock(), []
        for keys in route.target.pool:
            state = self.key(route, keys)
            is_usable = state.is_usable(now)
            if keys not in tried and (is_usable or state.blame != "refused"):
                left.append((not is_usable, state.cooldown_until_s, keys))
        return min(left, key=lambda item: item[:2])[2] if left else None

    def use(self, route: Route, keys: Keys) -> None:
        """Begin a call with credentials of `find_untried`."""
        state = self.key(route, keys)
        if state.failures and state.is_usable(self._clock()):
            state.probing = True
        self._begin(route, keys)

    def _begin(self, route: Route, keys: Keys) -> None:
        """Count a call that uses these credentials, and note that it probes its target."""
        target = self._target(route.target)
        if target is not None and target.failures >= _FAULTS_TO_OPEN:
            target.probing = True
        if route.target.strategy == "least_busy":
            self.key(route, keys).running += 1

    def order(self, route: Route, affinity: Affinity) -> tuple[Keys, ...]:
        """Return the keys of a pool in the order in which the session of a call uses them; the key
        that is known to be right comes first. Empty if nothing ties the call to a key.
        """
        if not (affinity.session or affinity.response):
            return ()
        pool = route.target.pool
        ids = [self.key(route, keys).key_id for keys in pool]
        at = rank(affinity.session, ids, route.target.weights) if affinity.session else []
        known = self.known_keys.find(affinity.response) or self.known_keys.find(affinity.session)
        if known in ids:
            first = ids.index(known)
            at = [first, *(each for each in at if each != first)]
        return tuple(pool[each] for each in at)

    def remember(self, route: Route, keys: Keys, digest: bytes) -> None:
        """Note that these credentials are the right ones for the session or response of `digest`,
        if they are in the target's pool.
        """
        if digest and _is_pooled(route, keys):
            self.known_keys.remember(digest, self.key(route, keys).key_id)

    def _pick(self, route: Route, tried: Sequence[Keys], order: Sequence[Keys]) -> Keys:
        pool = route.target.pool
        now = self._clock() if self._keys or len(pool) > 1 else 0.0
        if len(pool) == 1:
            only = self._keys.get(_identity(route, pool[0])) if self._keys else None
            if only is not None and only.failures and only.is_usable(now):
                only.probing = True
            return pool[0]
        healthy = [keys for keys in pool if self.key(route, keys).is_usable(now)]
        if not healthy:
            return min(pool, key=lambda keys: self.key(route, keys).cooldown_until_s)
        healthy = [keys for keys in healthy if keys not in tried] or healthy
        chosen = next((keys for keys in order if keys in healthy), None)
        if chosen is None:
            chosen = self._choose(route, healthy)
        state = self.key(route, chosen)
        state.probing = state.failures > 0
        return chosen

    def _choose(self, route: Route, healthy: list[Keys]) -> Keys:
        if route.target.strategy == "least_busy":
            turn = next(self._round_robin)
            rotated = healthy[turn % len(healthy) :] + healthy[: turn % len(healthy)]
            return min(rotated, key=lambda keys: self.key(route, keys).running)
        if route.target.strategy == "weight":
            weights = dict(zip(route.target.pool, route.target.weights, strict=True))
            return draw_weighted(healthy, [weights[keys] for keys in healthy], self._random)
        return healthy[next(self._round_robin) % len(healthy)]

    def has_another_key(self, route: Route, tried: Sequence[Keys]) -> bool:
        """True if the pool has a usable key that was not tried."""
        now = self._clock()
        pool = route.target.pool
        return len(pool) > 1 and any(
            keys not in tried and self.key(route, keys).is_usable(now) for keys in pool
        )

    def key(self, route: Route, keys: Keys) -> Circuit:
        """Return the circuit of these credentials, which are in the target's pool."""
        identity = _identity(route, keys)
        state = self._keys.get(identity)
        if state is None:
            state = self._keys[identity] = Circuit(key_id=key_id(bare(identity[1])))
        return state

    def _known_circuit(self, route: Route, keys: Keys) -> Circuit | None:
        """Return the circuit of these credentials, if there is one. None for a client's own
        credential, which has no circuit. A key of the pool that is used with a client's own token
        for Cloudflare is still a key of the pool.
        """
        state = self._keys.get(_identity(route, keys)) if self._keys else None
        return state if state is not None and _is_pooled(route, keys) else None

    def _target(self, target: Target) -> Circuit | None:
        """Return the circuit of a target; None for a target that never failed."""
        return self._targets.get((target.origin, target.prefix)) if self._targets else None

    def is_available(self, target: Target) -> bool:
        """True if this target may be called: its circuit is closed, or its cooldown is over."""
        state = self._target(target)
        return state is None or state.failures < _FAULTS_TO_OPEN or state.is_usable(self._clock())

    def has_usable_key(self, route: Route) -> bool:
        """True if this target has a key that is neither refused nor rate-limited, or whose cooldown
        for that is over and which no call is probing.
        """
        now, states = self._clock(), self._keys
        for keys in route.target.pool:
            state = states.get(_identity(route, keys)) if states else None
            if state is None or not state.blame or state.is_usable(now):
                return True
        return False

    def report_abandoned(self, route: Route, keys: Keys) -> None:
        """Note that an attempt ended without a result, since its client left: the next call may
        probe.
        """
        self.release(route, keys)
        for state in (self._target(route.target), self._known_circuit(route, keys)):
            if state is not None:
                state.probing = False

    def release(self, route: Route, keys: Keys) -> None:
        """Count one call less in progress with these credentials."""
        if route.target.strategy == "least_busy":
            state = self._known_circuit(route, keys)
            if state is not None:
                state.running = max(0, state.running - 1)

    def report(self, route: Route, keys: Keys, ended: AttemptResult) -> None:
        """Open or close the circuits of an attempt's key and target by its result."""
        if ended.is_good and not self._targets and not self._keys:
            return  # the common case: nothing has ever failed
        now, target = self._clock(), self._target(route.target)
        if cooldown_s := target_cooldown_s(
            ended, 1 if target is None else target.failures - _FAULTS_TO_OPEN + 2
        ):
            identity = (route.target.origin, route.target.prefix)
            target = self._targets.setdefault(identity, Circuit())
            target.failures += 1
            target.probing = False
            if target.failures >= _FAULTS_TO_OPEN:
                if target.cooldown_until_s <= now:
                    self._count_cooldown(route, "target", "failed")
                target.cooldown_until_s = now + cooldown_s
        elif target is not None:
            target.mark_healthy()
        self._report_key(route, keys, ended, now)

    def report_refused_key(self, route: Route, keys: Keys, code: str) -> None:
        """Note that the provider of a session refused the key after the 101, by `code`."""
        self._report_key(route, keys, AttemptResult(101, dead_key=code), self._clock())

    def _report_key(self, route: Route, keys: Keys, ended: AttemptResult, now: float) -> None:
        if keys.provider is None or not _is_pooled(route, keys):
            return  # a client's own key has no circuit
        state = self._known_circuit(route, keys)
        cooldown_s = key_cooldown_s(ended, 1 if state is None else state.failures + 1)
        if cooldown_s == 0.0:
            if state is not None and state.failures:
                state.mark_healthy()
            return
        state = self.key(route, keys)
        state.failures += 1
        state.probing = False
        former_blame, was_over = state.blame, state.cooldown_until_s <= now
        state.cooldown_until_s = now + cooldown_s
        state.blame = "limited" if ended.needs_another_key else ""
        if ended.is_key_refused:
            state.blame = "refused"
        if was_over or state.blame != former_blame:
            self._count_cooldown(route, "key", state.blame or "failed")
        if state.blame == "refused" != former_blame:
            self._alarm(route.provider.name, keys.provider.label, ended, cooldown_s)

    def _count_cooldown(self, route: Route, scope: str, reason: str) -> None:
        labels = route.provider.name, scope, reason
        self.cooldowns[labels] = self.cooldowns.get(labels, 0) + 1

    def count_cooling_down(self, provider: Provider) -> CoolingDown:
        """Count the keys and targets of a provider that are in cooldown now."""
        now = self._clock()
        targets = {(each.origin, each.prefix) for each in provider.targets}
        pools = [keys for each in provider.targets for keys in each.pool]
        values = {keys.provider.value for keys in pools if keys.provider is not None}
        keys_now = [self._keys.get((provider.name, value)) for value in values]
        targets_now = [self._targets.get(each) for each in targets]
        return CoolingDown(
            len(values),
            sum(state is not None and state.cooldown_until_s > now for state in keys_now),
            sum(state is not None and state.cooldown_until_s > now for state in targets_now),
        )

    def describe(self, provider: str, target: Target) -> dict[str, object]:
        """Describe a target and its keys for operators: names of variables, never their values."""
        keys = [
            {"key": each.provider.label}
            | self._describe_state(self._keys.get((provider, each.provider.value)))
            for each in target.pool
            if each.provider is not None
        ]
        described = self._describe_state(self._target(target))
        return {"via": target.via, **described, "keys": keys}

    def _describe_state(self, state: Circuit | None) -> dict[str, float]:
        if state is None:
            return {"failures": 0, "rests_s": 0.0}
        left = max(0.0, state.cooldown_until_s - self._clock())
        return {"failures": state.failures, "rests_s": round(left, 1)}


def _identity(route: Route, keys: Keys) -> tuple[str, str]:
    return route.provider.name, keys.provider.value if keys.provider else ""


def _is_pooled(route: Route, keys: Keys) -> bool:
    """True if the provider's credential is the relay's own."""
    return any(keys.provider is each.provider for each in route.target.pool)


def draw_weighted(items: Sequence[T], weights: Sequence[float], random: Callable[[], float]) -> T:
    """Draw one of `items` at random, by weight."""
    point = random() * sum(weights)
    for item, weight in zip(items, weights, strict=True):
        point -= weight
        if point < 0:
            return item
    return items[-1]
