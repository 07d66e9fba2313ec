"""Build the Rules of core/limits.py from `limits` in gateway.yaml.

Owns their names and checks, such as that several workers do not multiply a limit, and the rule for
`websocket.max_sessions_per_client`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from relay.core.limits import Counted, Rule
from relay.registry.problems import Document, Where, check_provider
from relay.registry.schema import GatewayFile, Limit

_MAX_NAME = 80
_COUNTS: tuple[Counted, ...] = (
    "requests", "tokens", "handshakes", "calls_at_once", "sessions_at_once",
)  # fmt: skip


def limit_rules(
    settings: GatewayFile, providers: Collection[str], document: Document
) -> tuple[Rule, ...]:
    """Return the rules in the order of the file. Problems go into `document`."""
    rules: list[Rule] = []
    for at, limit in enumerate(settings.limits):
        where: Where = ("limits", at)
        if not _check_limit(limit, providers, where, document):
            continue
        taken = {rule.name for rule in rules}
        rules.append(_rule(limit, taken))
        if limit.name in taken:
            document.add_problem((*where, "name"), "another rule has this name")
        _check(rules[-1], settings, where, document)
    if most := settings.websocket.max_sessions_per_client:
        name = "websocket.max_sessions_per_client"
        rules.append(Rule(name=name, counts="sessions_at_once", amount=most, per=("client",)))
        _check(rules[-1], settings, ("websocket", "max_sessions_per_client"), document)
    return tuple(rules)


def _check_limit(
    limit: Limit, providers: Collection[str], where: Where, document: Document
) -> bool:
    """Check a limit by itself; False if it is no rule."""
    if len(_given(limit)) != 1:
        document.add_problem(where, f"should have exactly one of {', '.join(_COUNTS)}")
        return False
    for number, name in enumerate(limit.providers):
        check_provider(name, providers, (*where, "providers", number), document)
    return True


def _given(limit: Limit) -> list[Counted]:
    return [name for name in _COUNTS if getattr(limit, name) is not None]


def rules_of_client(limits: Sequence[Limit]) -> tuple[Rule, ...]:
    """Return the rules of a client's record, in which `per` divides the client's own calls."""
    rules: list[Rule] = []
    for limit in limits:
        if len(_given(limit)) == 1:
            per = ["client", *(name for name in limit.per if name not in ("all", "client"))]
            own = limit.model_copy(update={"per": per, "name": None})
            rule = _rule(own, {rule.name for rule in rules})
            # No rule of `limits` has a name with an apostrophe, so the counters stay apart.
            rules.append(replace(rule, name=f"client's {limit.name or rule.name}"))
    return tuple(rules)


def check_client_limits(
    limits: Sequence[Limit], settings: GatewayFile, providers: Collection[str], where: Where,
    document: Document,
) -> None:  # fmt: skip
    """Check the limits of a client's record. Problems go into `document`."""
    for at, limit in enumerate(limits):
        if _check_limit(limit, providers, (*where, at), document):
            _check(rules_of_client([limit])[0], settings, (*where, at), document)


def _check(rule: Rule, settings: GatewayFile, where: Where, document: Document) -> None:
    if (problem := find_broken_promise(rule, settings)) is not None:
        document.add_problem(where, problem)


def find_broken_promise(rule: Rule, settings: GatewayFile) -> str | None:
    """Return why several workers would multiply the limit of a rule; None if they would not."""
    if settings.server.workers == 1:
        return None
    if rule.is_concurrent and rule.is_per_caller:
        return (
            f"{rule.name} is counted in each process, so several workers would allow a multiple of"
            " the limit. Remove it, or set server.workers to 1"
        )
    if not rule.is_concurrent and settings.redis.url is None:
        return (
            f"{rule.name} is counted in each process, so several workers would allow a multiple of"
            " the limit. Set redis.url, remove it, or set server.workers to 1"
        )
    return None


def _rule(limit: Limit, taken: Collection[str]) -> Rule:
    counts = _given(limit)[0]
    per = tuple(part for part in limit.per if part != "all")
    windowed = not counts.endswith("_at_once")
    name = "-".join([counts, *(["per", *per] if per else []), *limit.providers, *limit.models])
    if windowed:
        name += f"-{limit.window_s}s"
    return Rule(
        name=limit.name or unique_name(name.replace('"', ""), taken),
        counts=counts,
        amount=getattr(limit, counts),
        window_s=limit.window_s if windowed else 0,
        answer_tokens=limit.answer_tokens,
        sliding=limit.technique == "sliding",
        per=per,
        providers=frozenset(limit.providers),
        models=frozenset(limit.models),
    )


def unique_name(name: str, taken: Collection[str]) -> str:
    """Return a name for a rule that has none: `name`, truncated, and numbered if it is taken."""
    short = name[:_MAX_NAME]
    unique, number = short, 2
    while unique in taken:
        unique, number = f"{short}-{number}", number + 1
    return unique
