"""Build the frozen Provider of core/provider.py from a provider's entry in gateway.yaml.

Owns the meaning of `via`, `paths`, `cloudflare`, `fallback`, `pricing` and the other keys, and the
checks of keys against each other. Problems go into the Document of the entry, which knows file and
line.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any

from yarl import URL

from relay.core import paths
from relay.core.addresses import is_loopback
from relay.core.caching import CacheRules
from relay.core.formats import PathFormat
from relay.core.pricing import PriceRule, Rates, tariff
from relay.core.provider import (
    Credential,
    Delegation,
    Fallback,
    Keys,
    PathRule,
    Provider,
    Target,
    Via,
    WebSocketRules,
)
from relay.core.retry_policy import FALLBACK_CAUSES, RetryRules
from relay.core.rewriting import ProviderOrigin, Rewrites, field_pattern
from relay.core.unified import spoken
from relay.registry import schema
from relay.registry.auth import Auth, AuthReader
from relay.registry.credentials import Expanded
from relay.registry.entries import Pricing, ProviderEntry, ProviderWebSocket
from relay.registry.problems import Document, Where, hint_at_nearest
from relay.registry.proxies import Proxies
from relay.registry.registry import Registry
from relay.registry.urls import BadUrl, path_problem, read_url

Entry = tuple[ProviderEntry, Document, Mapping[Where, Expanded]]


_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_CREDENTIAL_QUERIES = frozenset({"cf-aig-authorization"})
_PRICE_UNITS = ("_per_mtok", "_per_million")
_RATE_NAMES = {
    "audio_per_hour": "audio_hour", "per_unit": "unit", "per_image": "image", "per_call": "call",
    "per_web_search": "web_search", "per_page": "page",
}  # fmt: skip


def build_registry(
    settings: schema.GatewayFile,
    entries: Mapping[str, Entry],
    demo_url: str,
    names: Collection[str],
    proxies: Proxies,
) -> Registry:
    """Build the registry of all `entries`, and of `demo` if it runs. Problems go into the Documents
    of the entries. `names` are the names of all providers, valid or not, that a fallback may name.
    """
    providers: dict[str, Provider] = {}
    for name, (entry, document, templates) in entries.items():
        builder = _Builder(settings, proxies, name, entry, document, templates, names)
        if (provider := builder.provider()) is not None:
            providers[name] = provider
    if demo_url and "demo" not in providers:
        entry, document = demo_entry(demo_url), Document("(built in)")
        demo = _Builder(settings, proxies, "demo", entry, document, {}).provider()
        assert demo is not None
        providers["demo"] = demo
    return Registry(providers)


@dataclass(frozen=True, slots=True)
class _Builder:
    """Builds one provider, or None after it has added a problem."""

    settings: schema.GatewayFile
    proxies: Proxies
    name: str
    entry: ProviderEntry
    document: Document
    templates: Mapping[Where, Expanded]
    names: Collection[str] = ()
    """The names of all providers."""

    def provider(self) -> Provider | None:
        entry = self.entry
        if not _NAME.match(self.name):
            self._add_problem(
                (), "a provider's name is lower-case letters, digits, dots and dashes"
            )
        base = self._base(entry.base_url, ("base_url",))
        if base is None:
            return None
        direct = target("direct", base, self.auth.own(), self.proxies)
        rest = self._through_cloudflare() if self._via("rest") == "cloudflare" else direct
        rules = self._paths(rest, direct)
        retries, cache = entry.retries or self.settings.retries, entry.cache or self.settings.cache
        return Provider(
            name=self.name,
            format=entry.format,
            formats=tuple(PathFormat(*each) for each in entry.formats.items()),
            base_path=base.raw_path.rstrip("/"),
            versions=self._versions(),
            rest=rest,
            websocket=self._websocket_target(base, direct),
            websocket_rules=self._socket_rules(),
            websocket_root_path=self._websocket_root(),
            paths=rules,
            headers=tuple(entry.headers.items()),
            rest_after=self._after("rest", direct),
            websocket_after=self._after("websocket", self._direct_websocket(base, direct)),
            fallbacks=self._fallbacks(),
            fallback_on=frozenset(entry.fallback_on or FALLBACK_CAUSES),
            fallback_after_s=entry.fallback_after_s,
            by_weight=entry.order == "weight",
            weight=entry.weight,
            retries=RetryRules(**retries.model_dump() | {"statuses": frozenset(retries.statuses)}),
            cache=CacheRules(cache.ttl_s, cache.scope, cache.coalesce),
            pricing=_price_rules(entry.pricing, entry.format),
            priced_as=entry.priced_as,
            inject_usage=self.settings.inject_usage and entry.inject_usage,
            delegation=Delegation(**self.settings.cloudflare.delegate.model_dump()),
            idempotency_header=entry.idempotency_header,
            own_origins=own_origins(direct, rules),
            rewrites=self._rewrites(),
            check=entry.check,
            target_header=entry.target_header,
            speaks=spoken(entry.format, entry.unified),
            query_credentials=self._query_credentials(),
            accepts_client_keys=entry.client_credentials == "allow",
            drain_s=entry.drain_s if entry.on_disconnect == "drain" else None,
            **self._timeouts(),
        )

    def _versions(self) -> tuple[paths.VersionRule, ...]:
        listed = self.entry.versions.items()
        return tuple(paths.VersionRule(pattern, version.strip("/")) for pattern, version in listed)

    def _timeouts(self) -> dict[str, Any]:
        """Return the entry's timeouts, or those of `upstream`."""
        defaults = self.settings.upstream.model_dump()
        return {name: getattr(self.entry, name) or time_s for name, time_s in defaults.items()}

    @property
    def auth(self) -> AuthReader:
        """A reader of this entry's `auth` sections."""
        return AuthReader(self.name, self.entry.auth, self.templates, self._add_problem)

    def _add_problem(self, where: Where, message: str) -> None:
        self.document.add_problem(("providers", self.name, *where), message)

    def _after(self, transport: str, direct: Target) -> Target | None:
        """Return the direct target if `via` lists it after Cloudflare, otherwise None."""
        ways = getattr(self.entry.via, transport) or []
        second = ways[1] if len(ways) > 1 else None
        if second == "cloudflare" or (second is not None and ways[0] == second):
            self._add_problem(("via",), "a second way can only be `direct`, after `cloudflare`")
        return direct if second == "direct" and self._via(transport) == "cloudflare" else None

    def _via(self, transport: str) -> Via:
        """Return the way of the entry; by default Cloudflare if account and slug are set."""
        chosen: Via | None = next(iter(getattr(self.entry.via, transport) or []), None)
        slug = self.entry.cloudflare
        has_slug = slug is not None and (transport == "rest" or slug.websocket is not None)
        if chosen == "cloudflare" and not has_slug:
            self._add_problem(("via",), f"needs a cloudflare slug for {transport}")
            return "direct"
        usable = has_slug and bool(self.settings.cloudflare.account_id)
        if chosen == "cloudflare" and not usable:
            self._add_problem(("via",), "needs cloudflare.account_id (CLOUDFLARE_ACCOUNT_ID)")
        return "cloudflare" if usable and chosen != "direct" else "direct"

    def _base(self, text: str, where: Where) -> URL | None:
        try:
            url = read_url(text)
        except BadUrl as error:
            self._add_problem(where, str(error))
            return None
        assert url.raw_host is not None
        secret = self.entry.auth is not None or self.entry.client_credentials == "allow"
        exposed = secret and not self.entry.allow_http and not is_loopback(url.raw_host)
        if url.scheme == "http" and exposed:
            self._add_problem(
                where,
                "would send a credential over plain http://; use https:// or allow_http: true",
            )
        return url

    def _through_cloudflare(self) -> Target:
        slug = self.entry.cloudflare
        assert slug is not None
        tail = "/".join(filter(None, (slug.slug, slug.path)))
        return self._cloudflare_target(tail, self.auth.own())

    def _cloudflare_target(self, tail: str, auth: Auth) -> Target:
        account = self.settings.cloudflare
        where = f"{account.account_id}/{account.gateway_id}/{tail}"
        base = URL(f"{account.base_url.rstrip('/')}/{where}", encoded=True)
        own = None
        if account.api_key:
            token = f"Bearer {account.api_key}"
            own = Credential("header", "cf-aig-authorization", token, "CLOUDFLARE_API_KEY")
        if self.entry.stored_at_cloudflare:
            auth = Auth(missing=() if own else ("CLOUDFLARE_API_KEY",))
        return target("cloudflare", base, auth, self.proxies, own)

    def _websocket_target(self, base: URL, direct: Target) -> Target:
        socket = self.entry.websocket
        slug = self.entry.cloudflare
        where: Where = ("websocket", "auth")
        if socket is not None and self._via("websocket") == "cloudflare":
            assert slug is not None and slug.websocket is not None
            own = slug.websocket.auth
            place: Where = ("cloudflare", "websocket", "auth")
            auth = self.auth.merged(own, place) if own else self.auth.merged(socket.auth, where)
            return self._cloudflare_target(slug.websocket.slug, auth)
        return self._direct_websocket(base, direct)

    def _direct_websocket(self, base: URL, direct: Target) -> Target:
        socket = self.entry.websocket
        if socket is None:
            return direct
        other = self._base(socket.base_url, ("websocket", "base_url")) if socket.base_url else base
        auth = self.auth.merged(socket.auth, ("websocket", "auth"))
        return target("direct", other or base, auth, self.proxies)

    def _websocket_root(self) -> str | None:
        slug = self.entry.cloudflare
        if slug is None or slug.websocket is None or self._via("websocket") != "cloudflare":
            return None
        return slug.websocket.path

    def _paths(self, rest: Target, direct: Target) -> tuple[PathRule, ...]:
        rules = []
        for prefix, to in self.entry.paths.items():
            if to.startswith("/"):
                if problem := path_problem(to):
                    self._add_problem(("paths", prefix), problem)
                    continue
                cloudflare_prefix = rest.prefix if rest.via == "cloudflare" else ""
                base, moved = rest, URL(f"{rest.origin}{cloudflare_prefix}{to}", encoded=True)
            else:
                # Cloudflare has one host per slug, so another host is always called directly.
                other = self._base(to, ("paths", prefix))
                if other is None:
                    continue
                base, moved = direct, other
            made = replace(
                base,
                origin=f"{moved.scheme}://{moved.raw_authority}",
                host=moved.raw_host or "",
                port=moved.port or 0,
                prefix=moved.raw_path.rstrip("/"),
                proxy=self.proxies.find(moved),
            )
            rules.append(PathRule(prefix, made))
        return tuple(sorted(rules, key=lambda rule: -len(rule.prefix)))

    def _rewrites(self) -> Rewrites | None:
        rewrite = self.entry.rewrite
        if rewrite is None:
            return None
        return Rewrites(
            frozenset(name.lower() for name in rewrite.headers),
            tuple((prefix, field_pattern(names)) for prefix, names in rewrite.fields.items()),
        )

    def _query_credentials(self) -> frozenset[str]:
        socket, slug = self.entry.websocket, self.entry.cloudflare
        auths = [self.entry.auth, socket.auth if socket else None]
        auths.append(slug.websocket.auth if slug and slug.websocket else None)
        own = {auth.query.lower() for auth in auths if auth and auth.query}
        return (
            frozenset(own | {name.lower() for name in self.entry.query_credentials})
            | _CREDENTIAL_QUERIES
        )

    def _fallbacks(self) -> tuple[Fallback, ...]:
        """Return the fallbacks. Unknown names, and settings without a fallback, are problems."""
        for name in ("fallback_on", "fallback_after_s"):
            if getattr(self.entry, name) is not None and not self.entry.fallback:
                self._add_problem((name,), "needs `fallback`: there is nothing to fall back to")
        for at, fallback in enumerate(self.entry.fallback):
            if fallback.provider not in self.names:
                hint = hint_at_nearest(fallback.provider, self.names)
                where = ("fallback", at, "provider")
                self._add_problem(where, f"there is no provider '{fallback.provider}'{hint}")
        return tuple(Fallback(**each.model_dump()) for each in self.entry.fallback)

    def _header_queries(self, socket: ProviderWebSocket) -> dict[str, str]:
        """Return headers and the equivalent query parameters. A pair without a default has no
        effect, which is a problem.
        """
        headers = {name.lower() for name in self.entry.headers}
        queries = {name.lower() for name in socket.default_query}
        for header, parameter in socket.header_queries.items():
            if header.lower() not in headers and parameter.lower() not in queries:
                self._add_problem(
                    ("websocket", "header_queries", header),
                    f"has no effect, because it has no default: no '{header}' in `headers`,"
                    f" no '{parameter}' in websocket.default_query",
                )
        return socket.header_queries

    def _socket_paths(self, socket: ProviderWebSocket) -> tuple[str, ...]:
        """Return the patterns of the paths that accept sockets, without a repeated version."""
        if not socket.paths:
            return ()
        base_path = URL(self.entry.base_url, encoded=True).raw_path
        named = [
            paths.drop_version(path, base_path) for path in (socket.default_path, *socket.paths)
        ]
        named[0] = paths.put_version(named[0], self._versions())
        if not any(fnmatchcase(named[0], pattern) for pattern in named[1:]):
            self._add_problem(
                ("websocket", "paths"),
                f"no pattern matches the default path '{socket.default_path}'",
            )
        return tuple(named[1:])

    def _socket_rules(self) -> WebSocketRules | None:
        """Return how the provider's sockets are opened; None if it has none."""
        socket, common = self.entry.websocket, self.settings.websocket
        if socket is None:
            return None
        return WebSocketRules(
            default_path=socket.default_path,
            paths=self._socket_paths(socket),
            default_query=socket.default_query,
            header_queries=self._header_queries(socket),
            subprotocols=socket.subprotocols,
            max_message_bytes=socket.max_message_bytes or common.max_message_bytes,
            idle_timeout_s=socket.idle_timeout_s or common.idle_timeout_s,
            max_session_s=socket.max_session_s or common.max_session_s,
        )


def target(
    via: Via, base: URL, auth: Auth, proxies: Proxies, gateway: Credential | None = None
) -> Target:
    """Return the Target at `base`."""
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
        affinity=auth.affinity,
        pool=() if auth.missing else tuple(Keys(one, gateway) for one in auth.ready or (None,)),
        gateway_credential=gateway,
        missing=auth.missing,
        proxy=proxies.find(base),
    )


def own_origins(direct: Target, rules: tuple[PathRule, ...]) -> tuple[ProviderOrigin, ...]:
    """Return the provider's own hosts, the longest path first."""
    own_origins = [ProviderOrigin(direct.origin, direct.prefix, "")]
    own_origins += [
        ProviderOrigin(rule.target.origin, rule.target.prefix, rule.prefix)
        for rule in rules
        if rule.target.via == "direct"
    ]
    return tuple(sorted(own_origins, key=lambda own_origin: -len(own_origin.path)))


_PRICE = Pricing(
    input_per_mtok=Decimal(2),
    output_per_mtok=Decimal(8),
    input_audio_per_mtok=Decimal(32),
    output_audio_per_mtok=Decimal(64),
    characters_per_million=Decimal(15),
)
"""Invented prices of the demo, so that costs show up before a real provider is configured."""


def demo_entry(url: str) -> ProviderEntry:
    """Return the entry of the demo that listens at `url`."""
    return ProviderEntry(
        base_url=url,
        inject_usage=True,
        pricing=[_PRICE],
        websocket=ProviderWebSocket(
            default_path="realtime",
            default_query={"model": "demo-realtime"},
            subprotocols={"realtime": "pass", "openai-beta.": "drop"},
        ),
    )


def _price_rules(listed: Sequence[Pricing], format_: str) -> tuple[PriceRule, ...]:
    """Return the price rules in the order of the file: the first that applies is used."""
    return tuple(
        PriceRule(
            tuple(rule.models),
            -math.inf if rule.since is None else _midnight(rule.since),
            math.inf if rule.until is None else _midnight(rule.until),
            tariff(_rates(rule), audio_is_text=format_ == "google"),
            rule.service_tier,
            rule.max_output_tokens,
        )
        for rule in listed
    )


_NO_RATES = {"models", "since", "until", "service_tier", "max_output_tokens"}


def _rates(rule: Pricing) -> Rates:
    given: dict[str, Any] = rule.model_dump(exclude=_NO_RATES)
    return Rates(**{_rate_name(key): usd for key, usd in given.items() if isinstance(usd, Decimal)})


def _rate_name(key: str) -> str:
    for ending in _PRICE_UNITS:
        key = key.removesuffix(ending)
    return _RATE_NAMES.get(key, key)


def _midnight(day: datetime.date) -> float:
    return datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()
