"""The nouns of routing: Provider, Target, Credential, Route. Frozen records; the registry builds
them.
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
    """A secret and where it goes. `label` names its variable; its value is never shown."""

    place: Place
    name: str
    value: str = field(repr=False)
    label: str = ""
    beside: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """More headers of a client's own that go up with it."""


class Keys(NamedTuple):
    """The two credentials that go up with one call: the provider's, and Cloudflare's beside it."""

    provider: Credential | None = None
    gateway: Credential | None = None


@dataclass(frozen=True, slots=True)
class AuthRule:
    """Where a provider takes its credential; `scheme` precedes the secret, such as `Bearer `."""

    place: Place
    name: str
    scheme: str = ""

    def credential(self, secret: str, label: str) -> Credential:
        """The credential that `secret` becomes under this rule."""
        return Credential(self.place, self.name, self.scheme + secret, label)


@dataclass(frozen=True, slots=True)
class Proxy:
    """A forward proxy, through which a target is reached."""

    url: str = field(repr=False)
    """With the user and password, if it has any."""
    shown: str
    """Without them: `http://proxy.example:3128`."""
    variable: str
    """Which names it: `HTTPS_PROXY`."""

    def __str__(self) -> str:
        return f"{self.shown} ({self.variable})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One way to reach a provider. `origin` has no path; `prefix` has no slash at its end."""

    via: Via
    origin: str
    host: str
    port: int
    prefix: str
    auth: AuthRule | None
    strategy: Strategy = "round_robin"
    """How the next of the pool is chosen."""
    weights: tuple[float, ...] = ()
    """One for each of the pool, with that strategy."""
    pool: tuple[Keys, ...] = (Keys(),)
    """One of them goes with each call. Empty while variables are missing."""
    gateway_credential: Credential | None = None
    """Cloudflare's own, beside the provider's."""
    missing: tuple[str, ...] = ()
    """Variables that must be set before this target can be used."""
    proxy: Proxy | None = None
    """None: it is called directly."""


@dataclass(frozen=True, slots=True)
class WebSocketRules:
    """How a provider's WebSockets are opened. Times in seconds; None means no limit."""

    default_path: str
    paths: tuple[str, ...]
    """Patterns of the paths that have sockets (`*` is anything); empty: all have."""
    default_query: Mapping[str, str]
    """Of the default path alone."""
    header_queries: Mapping[str, str]
    """Headers and the query parameters that mean the same: one of the two goes up."""
    subprotocols: Mapping[str, SubprotocolUse]
    max_message_bytes: int
    idle_timeout_s: float | None
    max_session_s: float | None


@dataclass(frozen=True, slots=True)
class PathRule:
    """Endpoints that begin with `prefix` go to `target` instead of the base."""

    prefix: str
    target: Target


@dataclass(frozen=True, slots=True)
class Fallback:
    """What is called when a provider's own targets fail."""

    provider: str
    model: str | None = None
    """Instead of the one that the call names."""
    endpoint: str | None = None
    """Instead of the one that was called."""
    weight: float = 1.0


Who = Literal["relay", "cloudflare", "off"]


@dataclass(frozen=True, slots=True)
class Delegation:
    """Who does what, of what goes through Cloudflare; `off`: neither does."""

    retries: Who = "relay"
    limits: Who = "relay"
    cache: Who = "relay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """An AI provider as the registry knows it."""

    name: str
    format: str
    """The wire format that it speaks: how usage is read, and the shape of the relay's own errors
    (core/formats.py)."""
    formats: tuple[PathFormat, ...]
    """Those of some of its paths."""
    base_path: str
    """The path of the direct base URL, such as `/v1`."""
    versions: tuple[paths.VersionRule, ...]
    """The versions of endpoints that a client names without one."""
    rest: Target
    websocket: Target
    websocket_rules: WebSocketRules | None
    websocket_root_path: str | None
    """Through Cloudflare: what the default path becomes there. None: it is sent as it is."""
    paths: tuple[PathRule, ...]
    headers: tuple[tuple[str, str], ...]
    """Sent when the client sends none of that name."""
    rest_after: Target | None
    """Where REST goes when `rest` fails: direct after Cloudflare, if the file says so."""
    websocket_after: Target | None
    fallbacks: tuple[Fallback, ...]
    fallback_on: frozenset[FallbackCause]
    """Which failures reach them."""
    fallback_after_s: float | None
    """How long the first byte may take while a fallback can still answer; None: as long as
    core/retry_policy.py says for a streamed call, and the provider's own limit for any other."""
    by_weight: bool
    """Targets are drawn by weight, not taken in order."""
    weight: float
    retries: RetryRules
    delegation: Delegation
    cache: CacheRules
    pricing: tuple[PriceRule, ...]
    """The first that holds for a call is what it costs."""
    priced_as: str | None
    """What the public list of prices calls it; None: by its own name."""
    drain_s: float | None
    """How long a stream whose client left is read on, to learn its usage; None: not at all."""
    inject_usage: bool | None
    """Streams of completions are asked for their usage (core/injection.py); None: only where it is
    a fallback of a provider whose streams are."""
    idempotency_header: str | None
    """Carries one key over all attempts of a call, which makes repeating it safe."""
    own_origins: tuple[ProviderOrigin, ...]
    """Its own hosts, the most particular first."""
    rewrites: Rewrites | None
    """What of its answers is rewritten; None: nothing."""
    check: str | None
    """Endpoint of a GET that costs nothing."""
    target_header: str | None
    """The header that names the URL of a call to the endpoint `proxy`."""
    query_credentials: frozenset[str]
    """Lower-case query names that carry a credential of this provider's."""
    accepts_client_keys: bool
    connect_timeout_s: float
    first_byte_timeout_s: float
    idle_timeout_s: float

    def endpoint(self, named: str) -> str:
        """The endpoint that a client named, with the version that its base URL may or may not
        have: the one that `base_path` ends in is dropped, the one that `versions` asks for is put
        in.
        """
        return paths.put_version(paths.drop_version(named, self.base_path), self.versions)

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every target, but those of `paths`."""
        targets = (self.rest, self.websocket, self.rest_after, self.websocket_after)
        return tuple(target for target in targets if target is not None)

    @property
    def credential_headers(self) -> tuple[str, ...]:
        """Lower-case names of the headers in which its targets take a credential."""
        auths = [target.auth for target in self.targets if target.auth]
        return tuple({auth.name.lower(): 1 for auth in auths if auth.place == "header"})

    @property
    def missing(self) -> tuple[str, ...]:
        """Variables that are not set, for REST or for WebSockets."""
        return tuple(dict.fromkeys((*self.rest.missing, *self.websocket.missing)))


@dataclass(frozen=True, slots=True)
class Route:
    """Where a call goes: a provider, one of its targets, the raw path under its prefix."""

    provider: Provider
    target: Target
    endpoint: str
    """As the client named it, but for the version (see `Provider.endpoint`): what logs and
    `relay explain` show."""
    path: str
    """Raw, with its leading slash, or empty: appended to the target's prefix."""

    format: str
    """The wire format of this path."""
    kind: str = "other"
    """What kind of call the endpoint is: `chat`, `embeddings`, … (core/peek.py)."""
    model: str | None = None
    """The model, where the path names it."""
    alternatives: tuple[Route, ...] = ()
    """Where the call goes when this fails, in order."""
    fallback_number: int = 0
    """0 at the provider that was called, n at its nth fallback, whichever way that is reached."""
    replaced_model: str | None = None
    """Replaces the client's, wherever the call names it (core/models.py)."""
    weight: float = 1.0
    by_weight: bool = False
    default_query: Mapping[str, str] = field(default_factory=dict)
    """Added where the client names nothing of the kind."""
    injects_usage: bool = False
    """Its streams are asked for their usage."""

    @property
    def takes_sockets(self) -> bool:
        """True if there is a WebSocket at this endpoint, as far as the registry knows."""
        rules = self.provider.websocket_rules
        if rules is None:
            return False
        return not rules.paths or any(fnmatchcase(self.endpoint, path) for path in rules.paths)

    @property
    def is_alternative(self) -> bool:
        """True of a fallback: a client's own credential is not for it."""
        return self.fallback_number > 0

    @property
    def relay_retries(self) -> bool:
        """True if the relay retries, and not Cloudflare: a client's headers for that are for it."""
        return self.target.via == "direct" or self.provider.delegation.retries != "cloudflare"

    def url(self, raw_query: str) -> str:
        """The whole upstream URL, raw. Nothing in it is encoded or decoded again."""
        target = self.target
        query = f"?{raw_query}" if raw_query else ""
        return f"{target.origin}{target.prefix}{self.path}{query}"


def rest_route(provider: Provider, endpoint: str, target: Target | None = None) -> Route:
    """The route of a REST call to the raw `endpoint` (no leading slash)."""
    return _route(provider, target or provider.rest, endpoint)


def websocket_route(provider: Provider, endpoint: str, target: Target | None = None) -> Route:
    """The route of a WebSocket; without an endpoint the default path, with its default query."""
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
    return Route(
        provider, target, named, path, format_, peek.kind_of(named), peek.model_in_path(named),
        weight=provider.weight, by_weight=provider.by_weight,
        injects_usage=provider.inject_usage is True and can_be_asked(named, format_),
    )  # fmt: skip


def _place(provider: Provider, base: Target, endpoint: str) -> tuple[Target, str, str]:
    """Where an endpoint goes, what it is called there, and the path that is sent for it."""
    for rule in provider.paths:
        if endpoint.startswith(rule.prefix):
            return rule.target, endpoint, endpoint[len(rule.prefix) :].removeprefix("/")
    # Through Cloudflare it is the same endpoint: its paths are the provider's, less base_path.
    named = provider.endpoint(endpoint)
    return base, named, named
