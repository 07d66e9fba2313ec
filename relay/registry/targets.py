"""The smaller nouns of a provider: its Targets, its own hosts, its fallbacks, retry rules and how
its sockets are opened.

Owns: their making from what was written. Putting a Provider together is build.py's.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase

from yarl import URL

from relay.core import paths
from relay.core.provider import (
    Credential,
    Fallback,
    Keys,
    PathRule,
    Target,
    Via,
    WebSocketRules,
)
from relay.core.retry_policy import RetryRules
from relay.core.rewriting import ProviderOrigin
from relay.registry import entries
from relay.registry.auth import Auth
from relay.registry.problems import Where
from relay.registry.proxies import Proxies
from relay.registry.schema import WebSockets


def retry_rules(given: entries.Retries) -> RetryRules:
    """A section `retries` as attempts use it."""
    return RetryRules(**given.model_dump() | {"statuses": frozenset(given.statuses)})


def fallbacks(
    entry: entries.ProviderEntry, names: Collection[str], add_problem: Callable[[Where, str], None]
) -> tuple[Fallback, ...]:
    """A provider's fallbacks; one that names nobody is complained of, and so is what says when they
    are called where there are none.
    """
    for name in ("fallback_on", "fallback_after_s"):
        if getattr(entry, name) is not None and not entry.fallback:
            add_problem((name,), "needs `fallback`: there is nothing to fall back to")
    for at, fallback in enumerate(entry.fallback):
        if fallback.provider not in names:
            near = difflib.get_close_matches(fallback.provider, names, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            where = ("fallback", at, "provider")
            add_problem(where, f"there is no provider '{fallback.provider}'{hint}")
    return tuple(Fallback(**each.model_dump()) for each in entry.fallback)


def _header_queries(
    entry: entries.ProviderEntry, add_problem: Callable[[Where, str], None]
) -> dict[str, str]:
    """Headers to the query parameters that mean the same, for sockets. One that has no default to
    leave out is complained of: it is misspelt.
    """
    socket = entry.websocket
    if socket is None:
        return {}
    headers = {name.lower() for name in entry.headers}
    queries = {name.lower() for name in socket.default_query}
    for header, parameter in socket.header_queries.items():
        if header.lower() not in headers and parameter.lower() not in queries:
            add_problem(
                ("websocket", "header_queries", header),
                f"there is no default for it: no '{header}' in `headers`,"
                f" no '{parameter}' in websocket.default_query",
            )
    return socket.header_queries


def _socket_paths(
    entry: entries.ProviderEntry, add_problem: Callable[[Where, str], None]
) -> tuple[str, ...]:
    """The patterns of the paths that have sockets, in the form in which endpoints are named. One
    that leaves the default path out is complained of.
    """
    socket = entry.websocket
    if socket is None or not socket.paths:
        return ()
    base_path = URL(entry.base_url, encoded=True).raw_path
    named = [paths.drop_version(path, base_path) for path in (socket.default_path, *socket.paths)]
    if not any(fnmatchcase(named[0], pattern) for pattern in named[1:]):
        add_problem(
            ("websocket", "paths"), f"none of them matches the default path '{socket.default_path}'"
        )
    return tuple(named[1:])


def socket_rules(
    entry: entries.ProviderEntry, common: WebSockets, add_problem: Callable[[Where, str], None]
) -> WebSocketRules | None:
    """How a provider's sockets are opened; None: it has none."""
    socket = entry.websocket
    if socket is None:
        return None
    return WebSocketRules(
        default_path=socket.default_path,
        paths=_socket_paths(entry, add_problem),
        default_query=socket.default_query,
        header_queries=_header_queries(entry, add_problem),
        subprotocols=socket.subprotocols,
        max_message_bytes=socket.max_message_bytes or common.max_message_bytes,
        idle_timeout_s=socket.idle_timeout_s or common.idle_timeout_s,
        max_session_s=socket.max_session_s or common.max_session_s,
    )


def target(
    via: Via, base: URL, auth: Auth, proxies: Proxies, gateway: Credential | None = None
) -> Target:
    """The Target at `base`."""
    assert base.raw_host is not None and base.port is not None
    return Target(
        via=via,
        origin=f"{base.scheme}://{base.raw_authority}",
        host=base.raw_host,
        port=base.port,
        prefix=base.raw_path.rstrip("/"),
        auth=auth.rule,
        strategy=auth.strategy,
        weights=auth.weights,
        pool=() if auth.missing else tuple(Keys(one, gateway) for one in auth.ready or (None,)),
        gateway_credential=gateway,
        missing=auth.missing,
        proxy=proxies.find(base),
    )


def own_origins(direct: Target, rules: tuple[PathRule, ...]) -> tuple[ProviderOrigin, ...]:
    """The provider's own hosts; of two on one host the longer path first."""
    own_origins = [ProviderOrigin(direct.origin, direct.prefix, "")]
    own_origins += [
        ProviderOrigin(rule.target.origin, rule.target.prefix, rule.prefix)
        for rule in rules
        if rule.target.via == "direct"
    ]
    return tuple(sorted(own_origins, key=lambda own_origin: -len(own_origin.path)))
