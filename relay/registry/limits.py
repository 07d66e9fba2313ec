"""Build the Rules of core/limits.py from `limits` in gateway.yaml.

Owns their names and checks, such as that several workers do not multiply a limit, and the rule for
`websocket.max_sessions_per_client`.
"""

from __future__ import annotations

from collections.abc import Collection

from relay.core.limits import Counted, Rule
from relay.registry.problems import Document, Where, hint_at_nearest
from relay.registry.schema import GatewayFile, Limit

_COUNTS: tuple[Counted, ...] = (
    "requests", "tokens", "handshakes", "calls_at_once", "sessions_at_once",
)  # fmt: skip


def limit_rules(
    settings: GatewayFile, providers: Collection[str], document: Document
) -> tuple[Rule, ...]:
    """Return the rules in the order of the file. Problems go into `document`."""
    rules: list[Rule] = []
    for at, limit in enumerate(settings.limits):
        given = [name for name in _COUNTS if getattr(limit, name) is not None]
        if len(given) != 1:
            document.add_problem(("limits", at), f"should have exactly one of {', '.join(_COUNTS)}")
            continue
        for number, name in enumerate(limit.providers):
            if name not in providers:
                hint = hint_at_nearest(name, providers, 0.5)
                document.add_problem(
                    ("limits", at, "providers", number), f"there is no such provider{hint}"
                )
        taken = {rule.name for rule in rules}
        rules.append(_rule(limit, given[0], taken))
        if limit.name in taken:
            document.add_problem(("limits", at, "name"), "another rule has this name")
        _check(rules[-1], settings, ("limits", at), document)
    if most := settings.websocket.max_sessions_per_client:
        name = "websocket.max_sessions_per_client"
        rules.append(Rule(name=name, counts="sessions_at_once", amount=most, per=("client",)))
        _check(rules[-1], settings, ("websocket", "max_sessions_per_client"), document)
    return tuple(rules)


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


def _rule(limit: Limit, counts: Counted, taken: Collection[str]) -> Rule:
    per = tuple(part for part in limit.per if part != "all")
    windowed = not counts.endswith("_at_once")
    name = "-".join([counts, *(["per", *per] if per else []), *limit.providers, *limit.models])
    if windowed:
        name += f"-{limit.window_s}s"
    unique = name[:80].replace('"', "")
    number = 2
    while unique in taken:
        unique, number = f"{name[:80]}-{number}", number + 1
    amount = getattr(limit, counts)
    return Rule(
        name=limit.name or unique,
        counts=counts,
        amount=amount,
        window_s=limit.window_s if windowed else 0,
        answer_tokens=limit.answer_tokens,
        sliding=limit.technique == "sliding",
        per=per,
        providers=frozenset(limit.providers),
        models=frozenset(limit.models),
    )
