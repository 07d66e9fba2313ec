"""Decide which responses are cached, for how long, and for whom.

Owns the cache key of a call, the client's cache headers, and the decision by a response's head
whether it is cacheable. Whether its body is complete is decided in completeness.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Literal, NamedTuple

from relay.core.headers import (
    OLD_CACHE_HEADERS,
    Pairs,
    headers_for_provider,
    normal,
    without_named,
)
from relay.core.numbers import header_number

Scope = Literal["client", "shared"]
Header = Callable[[str], str | None]

CUSTOM_KEY_TTL_S = 300
"""Lifetime of a response whose client sends a cache key but no lifetime, as at Cloudflare."""
MAX_TTL_S = 30 * 86400

CACHE_HEADERS = ("cf-aig-cache-ttl", "cf-aig-skip-cache", "cf-aig-cache-key", *OLD_CACHE_HEADERS)
"""Forwarded only to Cloudflare, and only if it caches instead of the relay."""

CACHED_KINDS = frozenset(
    {
        "chat", "completion", "responses", "messages", "count_tokens", "embeddings", "speech",
        "transcription", "image", "generate", "models",
    }
)  # fmt: skip
"""Kinds of calls that may be repeated from the cache by configuration alone. Calls of other kinds
are cached only if the client asks for it: an upload or a job must not get an older response.
"""

# Request headers that do not affect the response. All others are part of the cache key: an unknown
# header may affect the response, and could poison the cache for other clients.
_IGNORED = frozenset(
    {
        "user-agent", "x-request-id", "request-id", "x-client-request-id", "traceparent",
        "tracestate", "baggage", "idempotency-key", "cache-control", "pragma", "priority", "dnt",
        "x-goog-api-client", "sentry-trace", "save-data", "date",
    }
)  # fmt: skip
_IGNORED_PREFIXES = ("x-stainless-", "sec-")

# Response headers that describe one particular call.
_NOT_STORED = frozenset(
    {
        "x-request-id", "request-id", "server-timing", "retry-after", "openai-processing-ms", "age",
        "cf-ray", "cf-cache-status", "ratelimit", "ratelimit-policy",
        "x-envoy-upstream-service-time",
    }
)  # fmt: skip
_NOT_STORED_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-", "x-cloudflare-aig-")

_CACHEABLE_TYPES = re.compile(r"(?:application/(?:[\w.-]+\+)?json|audio/|image/|text/(?!html))")
_ENDS_ITSELF = re.compile(r"application/|text/event-stream")
"""Types whose body shows whether it is complete. For other types only HTTP framing does."""
_MAX_NAMES = 1024


@dataclass(frozen=True, slots=True)
class CacheRules:
    """How a provider's responses are cached."""

    ttl_s: int | None = None
    """None: only if a call asks for it."""
    scope: Scope = "client"
    coalesce: bool = False


class CachePlan(NamedTuple):
    """How the cache handles one call."""

    provider: str
    key: str
    ttl_s: int
    """0: the response is not stored."""
    reads: bool
    """False: the client wants a fresh response."""
    shares: bool
    """True: the call may share the response of an identical call in flight."""
    model: str | None = None
    """The model that replaces the one of the body, by an alias or prefix; None: it stays."""


def requested_ttl_s(header: Header, rules: CacheRules, kind: str) -> int | None:
    """Return how long the response to a call of `kind` is cached; None if the cache is off for it.

    Raises BadRequest.
    """
    given = header("cf-aig-cache-ttl") or header("cf-cache-ttl")
    if (ttl_s := header_number("cf-aig-cache-ttl", given, 0, MAX_TTL_S)) is not None:
        return ttl_s
    if rules.ttl_s is not None and kind in CACHED_KINDS:
        return rules.ttl_s
    if header("cf-aig-cache-key") is not None:
        return CUSTOM_KEY_TTL_S
    return 0 if rules.coalesce and kind in CACHED_KINDS else None


def skips(header: Header) -> bool:
    """True if the client wants a fresh response."""
    given = header("cf-aig-skip-cache") or header("cf-skip-cache") or ""
    return given.strip().lower() in ("true", "1")


def key_of(whose: tuple[str, ...], what: tuple[str, ...], affecting: Pairs, body: bytes) -> str:
    """Return the cache key of a call: `whose` are the credentials and scope that may read it,
    `what` is the method and URL, `affecting` the headers that affect the response.
    """
    # repr() of a tuple is unambiguous: no text can move from one part into another.
    digest = sha256(repr((whose, what, affecting)).encode())
    digest.update(body)
    return digest.hexdigest()


def own_key_of(whose: tuple[str, ...], own: str, affecting: Pairs) -> str:
    """Return the cache key of a call whose client sent its `own` key. Accept-Encoding is included,
    so that the response has a coding that the client accepts.
    """
    codings = [value for name, value in affecting if name == "accept-encoding"]
    return sha256(repr((whose, own, codings)).encode()).hexdigest()


def affecting_headers(pairs: Pairs, connection: str | None) -> list[tuple[str, str]]:
    """Return the headers that may affect the response, sorted, with lower-case names."""
    found = [(name, value) for given, value in pairs if (name := _affecting(given))]
    found = found if connection is None else without_named(found, connection)
    return sorted(found)


@lru_cache(maxsize=_MAX_NAMES)
def _affecting(name: str) -> str:
    """The lower-case name of a header that may affect the response; empty for others."""
    lower = normal(name)
    harmless = lower in _IGNORED or lower.startswith(_IGNORED_PREFIXES)
    return "" if harmless or not headers_for_provider([(name, "")], None) else lower


def stored_headers(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the response headers that are valid for every replay of the response."""
    return [
        (f"{name}", value)  # a plain str: msgspec cannot encode multidict's subclass
        for name, value in pairs
        if (lower := name.lower()) not in _NOT_STORED and not lower.startswith(_NOT_STORED_PREFIXES)
    ]


def is_cacheable(status: int, header: Header) -> bool:
    """True if the head of a response allows caching: status 200 and a cacheable media type. A body
    that ends with its connection may be truncated, so it is not cacheable unless its type shows its
    end. `private` is allowed, because the cache key contains the credential.
    """
    media = (header("Content-Type") or "").lower()
    return (
        status == 200
        and _CACHEABLE_TYPES.match(media) is not None
        and (
            _ENDS_ITSELF.match(media) is not None
            or header("Content-Length") is not None
            or header("Transfer-Encoding") is not None
        )
        and "no-store" not in (header("Cache-Control") or "").lower()
        and (header("Vary") or "").strip() != "*"
    )
