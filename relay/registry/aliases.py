"""Build the aliases of `models` and the rules of `unified`.

Owns the checks of these sections: every provider that they name exists, and no alias hides the
models of a provider.
"""

from __future__ import annotations

from collections.abc import Collection

from relay.core.unified import Alias, Member, Unified
from relay.registry.problems import Document, check_provider
from relay.registry.schema import GatewayFile


def build_unified(settings: GatewayFile, names: Collection[str], main: Document) -> Unified:
    """Build the rules of the unified surface. `names` are those of all providers. Problems go into
    `main`.
    """
    aliases: dict[str, Alias] = {}
    for name, entry in settings.models.items():
        if "/" in name and name.partition("/")[0] in names:
            main.add_problem(("models", name), "begins with the name of a provider")
        for at, each in enumerate(entry.targets):
            check_provider(each.provider, names, ("models", name, "targets", at), main)
        members = tuple(Member(each.provider, each.model, each.weight) for each in entry.targets)
        aliases[name] = Alias(members, entry.order == "weight")
    for at, name in enumerate(settings.unified.order):
        check_provider(name, names, ("unified", "order", at), main)
    given = settings.unified.sockets.model_dump()
    sockets = {kind: name for kind, name in given.items() if name is not None}
    for kind, name in sockets.items():
        check_provider(name, names, ("unified", "sockets", kind), main)
    return Unified(aliases, tuple(settings.unified.order), sockets)
