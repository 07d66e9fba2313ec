"""The records of routing: Provider, Target, Credential, Route.

Owns these frozen records, and the route of an endpoint at a provider. registry/build.py makes the
providers, and registry/registry.py finds the provider of a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from relay.core import paths, peek
from relay.core.caching import CacheRules
from relay.core.formats import PathFormat, format_of
from relay.core.injection import can_be_asked
from relay.core.pricing import PriceRule
from relay.core.retry_policy import FallbackCause, RetryRules
from relay.core.rewriting import ProviderOrigin, Rewrites
from relay.core.subprotocols import SubprotocolUse

Via = Literal["direct", "cloudflare"]
Strategy = Literal["round_robin", "least_busy", "weight"]
Place = Literal["header", "query", "subprotocol"]


@dataclass(frozen=True, slots=True)
class Credential:
    """A secret and where it goes. `label` is the name of its variable; the value is never shown."""

    place: Place
    name: str
    value: str = field(repr=False)
    label: str = ""
    beside: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """More credential headers of the client, which are sent with this one."""


class Keys(NamedTuple):
    """The credentials of an attempt: the provider's, and Cloudflare's."""

    provider: Credential | None = None
    gateway: Credential | None = None


@dataclass(frozen=True, slots=True)
class AuthRule:
    """Where a provider's credential goes. `scheme` precedes the secret, such as `Bearer `."""

    place: Place
    name: str
    scheme: str = ""

    def credential(self, secret: str, label: str) -> Credential:
        """Return `secret` as a credential in this place."""
        return Credential(self.place, self.name, self.scheme + secret, label)


@dataclass(frozen=True, slots=True)
class Proxy:
    """A forward proxy for the connections to a target."""

    url: str = field(repr=False)
    """The URL, with its user and password if it has them."""
    shown: str
    """The URL without user and password: `http://proxy.example:3128`."""
    variable: str
    """The environment variable that it comes from: `HTTPS_PROXY`."""

    def __str__(self) -> str:
        return f"{self.shown} ({self.variable})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One way to reach a provider. `origin` has no path; `prefix` does not end in a slash."""

    via: Via
    origin: str
    host: str
    port: int
    prefix: str
    auth: AuthRule | None
    strategy: Strategy = "round_robin"
    """How the next keys of the pool are selected."""
    weights: tuple[float, ...] = ()
    """A weight for each item of the pool, with the strategy `weight`."""
    affinity: bool = True
    """Calls of one session use one key of the pool (core/affinity.py)."""
    pool: tuple[Keys, ...] = (Keys(),)
    """Each attempt uses one item. Empty while variables are missing."""
    gateway_credential: Credential | None = None
    """The credential for Cloudflare AI Gateway."""
    missing: tuple[str, ...] = ()
    """Variables that must be set before this target can be used."""
    proxy: Proxy | None = None
    """None: no proxy."""


@dataclass(frozen=True, slots=True)
class WebSocketRules:
    """How a provider's WebSockets are opened. Times are in seconds; None: no limit."""

    default_path: str
    paths: tuple[str, ...]
    """Patterns of the paths that accept sockets (`*` matches anything); empty: all paths."""
    default_query: Mapping[str, str]
    """Query of the default path only."""
    header_queries: Mapping[str, str]
    """Header to the equivalent query parameter: only one of the two is sent."""
    subprotocols: Mapping[str, SubprotocolUse]
    max_message_bytes: int
    idle_timeout_s: float | None
    max_session_s: float | None


@dataclass(frozen=True, slots=True)
class PathRule:
    """Endpoints that begin with `prefix` go to `target` instead of the base URL."""

    prefix: str
    target: Target


@dataclass(frozen=True, slots=True)
class Fallback:
    """A provider that is called after the provider's own targets have failed."""

    provider: str
    model: str | None = None
    """Replaces the model of the call; None: the same model."""
    endpoint: str | None = None
    """Replaces the endpoint of the call; None: the same endpoint."""
    weight: float = 1.0


Who = Literal["relay", "cloudflare", "off"]


@dataclass(frozen=True, slots=True)
class Delegation:
    """Who retries, limits and caches the calls through Cloudflare; `off`: neither does."""

    retries: Who = "relay"
    limits: Who = "relay"
    cache: Who = "relay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A provider of gateway.yaml."""

    name: str
    format: str
    """The wire format, for reading usage and for the relay's own errors (core/formats.py)."""
    formats: tuple[PathFormat, ...]
    """Wire formats of some paths."""
    base_path: str
    """The path of the direct base URL, such as `/v1`."""
    versions: tuple[paths.VersionRule, ...]
    """The versions that are added to endpoints without one."""
    rest: Target
    websocket: Target
    websocket_rules: WebSocketRules | None
    websocket_root_path: str | None
    """Path that replaces the default path at Cloudflare; None: the default path itself."""
    paths: tuple[PathRule, ...]
    headers: tuple[tuple[str, str], ...]
    """Headers that are added if the client does not send them."""
    rest_after: Target | None
    """The target of REST calls if `rest` fails: direct, after Cloudflare; None: there is none."""
    websocket_after: Target | None
    fallbacks: tuple[Fallback, ...]
    fallback_on: frozenset[FallbackCause]
    """Failures that trigger a fallback."""
    fallback_after_s: float | None
    """Timeout of the first byte while a fallback remains; None: that of core/retry_policy.py for a
    streamed call, and first_byte_timeout_s for any other."""
    by_weight: bool
    """Targets are chosen at random by weight, not in order."""
    weight: float
    retries: RetryRules
    delegation: Delegation
    cache: CacheRules
    pricing: tuple[PriceRule, ...]
    """The first rule that applies to a call prices it."""
    priced_as: str | None
    """The provider's name in the public price list; None: its own name."""
    drain_s: float | None
    """How long a stream is read after its client left, to get its usage; None: it is cancelled."""
    inject_usage: bool | None
    """Usage of streamed completions is requested (core/injection.py); None: only as a fallback of a
    provider with True."""
    idempotency_header: str | None
    """Header that carries one key for all attempts of a call, which makes repeating it safe."""
    own_origins: tuple[ProviderOrigin, ...]
    """The provider's own hosts, the longest path first."""
    rewrites: Rewrites | None
    """What is rewritten in responses; None: nothing."""
    check: str | None
    """Endpoint of a GET without cost."""
    target_header: str | None
    """The header with the target URL of a call to the endpoint `proxy`."""
    speaks: Mapping[str, str]
    """Its endpoints of the unified surface (core/unified.py)."""
    query_credentials: frozenset[str]
    """Lower-case names of query parameters that carry a credential of this provider."""
    accepts_client_keys: bool
    connect_timeout_s: float
    first_byte_timeout_s: float
    idle_timeout_s: float
    keepalive_s: float | None
    """Silence of a stream after which its client gets a keepalive; None: it gets none."""
    credential_headers: tuple[str, ...] = field(init=False)
    """Lower-case names of the headers that carry the credentials of its targets."""

    def __post_init__(self) -> None:
        auths = [target.auth for target in self.targets if target.auth]
        names = {auth.name.lower(): 1 for auth in auths if auth.place == "header"}
        object.__setattr__(self, "credential_headers", tuple(names))

    @property
    def subprotocols(self) -> Mapping[str, SubprotocolUse]:
        """What becomes of the subprotocols that clients of its sockets offer."""
        return self.websocket_rules.subprotocols if self.websocket_rules is not None else {}

    def endpoint(self, named: str) -> str:
        """Normalize the version of a client's endpoint, so that base URLs work with and without
        it: the version at the end of `base_path` is removed, that of `versions` is added.
        """
        return paths.put_version(paths.drop_version(named, self.base_path), self.versions)

    @property
    def targets(self) -> tuple[Target, ...]:
        """All targets without those of `paths`."""
        targets = (self.rest, self.websocket, self.rest_after, self.websocket_after)
        return tuple(target for target in targets if target is not None)

    @property
    def missing(self) -> tuple[str, ...]:
        """Variables that are not set, for REST or for WebSockets."""
        return tuple(dict.fromkeys((*self.rest.missing, *self.websocket.missing)))


@dataclass(frozen=True, slots=True)
class Route:
    """Where a call goes: a provider, one of its targets, and the raw path under its prefix."""

    provider: Provider
    target: Target
    endpoint: str
    """The client's endpoint, normalized by `Provider.endpoint` and without needless escapes: what
    the kind and the model are read from."""
    path: str
    """The raw path after the target's prefix, with its leading slash, or empty."""

    format: str
    """The wire format of this path."""
    kind: str = "other"
    """The kind of the call: `chat`, `embeddings`, … (core/peek.py)."""
    model: str | None = None
    """The model in the path, if there is one."""
    alternatives: tuple[Route, ...] = ()
    """Where the call goes if this route fails, in order."""
    fallback_number: int = 0
    """0 at the provider that was called, n at its nth fallback, by either way."""
    replaced_model: str | None = None
    """Replaces the client's model (core/models.py); None: no replacement."""
    weight: float = 1.0
    by_weight: bool = False
    default_query: Mapping[str, str] = field(default_factory=dict)
    """Query parameters that are added if the client sends no equivalent ones."""
    injects_usage: bool = False
    """The usage of its streams is requested."""

    @property
    def takes_sockets(self) -> bool:
        """True if this endpoint accepts WebSockets, by the registry."""
        rules = self.provider.websocket_rules
        if rules is None:
            return False
        return not rules.paths or any(fnmatchcase(self.endpoint, path) for path in rules.paths)

    @property
    def is_alternative(self) -> bool:
        """True for a fallback, which never gets the client's own credential."""
        return self.fallback_number > 0

    @property
    def has_affinity(self) -> bool:
        """True if its target has several keys, and calls of one session use one of them."""
        return len(self.target.pool) > 1 and self.target.affinity

    @property
    def relay_retries(self) -> bool:
        """True if the relay retries, not Cloudflare: then it obeys the client's retry headers."""
        return self.target.via == "direct" or self.provider.delegation.retries != "cloudflare"

    def url(self, raw_query: str) -> str:
        """Return the upstream URL, raw: nothing in it is encoded or decoded again."""
        target = self.target
        query = f"?{raw_query}" if raw_query else ""
        return f"{target.origin}{target.prefix}{self.path}{query}"


def rest_route(provider: Provider, endpoint: str, target: Target | None = None) -> Route:
    """Return the route of a REST call to the raw `endpoint`, without a leading slash."""
    return _route(provider, target or provider.rest, endpoint)


def websocket_route(provider: Provider, endpoint: str, target: Target | None = None) -> Route:
    """Return the route of a WebSocket; without an endpoint, that of the default path."""
    rules, base = provider.websocket_rules, target or provider.websocket
    default = rules.default_path if rules else ""
    route = _route(provider, base, endpoint or default)
    if rules is None or route.endpoint != _place(provider, base, default)[1]:
        return replace(route, kind="realtime")
    root = provider.websocket_root_path if target is None else None
    path = route.path if root is None else f"/{root}" if root else ""
    return replace(route, kind="realtime", path=path, default_query=rules.default_query)


def _route(provider: Provider, base: Target, endpoint: str) -> Route:
    target, named, sent = _place(provider, base, endpoint)
    path = f"/{sent}" if sent else ""
    format_ = format_of(named, provider.format, provider.formats)
    kind, model = peek.kind_of(named.rstrip("/")), peek.model_in_path(named, provider.base_path)
    if "%" in named:
        split = paths.with_slashes(named).rstrip("/")
        kind = peek.kind_of(split) if kind == "other" else kind
        model = model or peek.model_in_path(split)
    return Route(
        provider, target, named, path, format_, kind, model,
        weight=provider.weight, by_weight=provider.by_weight,
        injects_usage=provider.inject_usage is True and can_be_asked(named, format_),
    )  # fmt: skip


def _place(provider: Provider, base: Target, endpoint: str) -> tuple[Target, str, str]:
    """Return the target of an endpoint, its name without the version and without needless escapes,
    and the raw path to send.
    """
    for rule in provider.paths:
        if endpoint.startswith(rule.prefix):
            sent = endpoint[len(rule.prefix) :].removeprefix("/")
            return rule.target, paths.readable(endpoint), sent
    # The endpoint is the same at Cloudflare, whose paths are the provider's without base_path.
    sent = provider.endpoint(endpoint)
    return base, paths.readable(sent), sent
