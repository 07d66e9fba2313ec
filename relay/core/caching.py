"""Which answers are cached, for how long, and for whom: decided here, from texts alone.

Owns: the key of a call, what its client asks for, and which answers may be replayed, by
their head. Whether one is complete is completeness.py's.
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
"""Of an answer under a key of the client's own that names no time, as at Cloudflare."""
MAX_TTL_S = 30 * 86400

CACHE_HEADERS = ("cf-aig-cache-ttl", "cf-aig-skip-cache", "cf-aig-cache-key", *OLD_CACHE_HEADERS)
"""They go to whoever caches, and to nobody else."""

CACHED_KINDS = frozenset(
    {
        "chat", "completion", "responses", "messages", "count_tokens", "embeddings", "speech",
        "transcription", "image", "generate", "models",
    }
)  # fmt: skip
"""Kinds of calls of which the same request has the same answer: cached without being asked. Any
other is cached if its client asks: an upload or a job must not be answered with an older one.
"""

# Headers of a request by which its answer does not differ. All others do their part in its key:
# what is not known to be harmless could poison what others get.
_IGNORED = frozenset(
    {
        "user-agent", "x-request-id", "request-id", "x-client-request-id", "traceparent",
        "tracestate", "baggage", "idempotency-key", "cache-control", "pragma", "priority", "dnt",
        "x-goog-api-client", "sentry-trace", "save-data", "date",
    }
)  # fmt: skip
_IGNORED_PREFIXES = ("x-stainless-", "sec-")

# Of an answer's headers, those that were about that one call.
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
"""Of these the body tells whether it is whole. Of others only HTTP does."""
_MAX_NAMES = 1024


@dataclass(frozen=True, slots=True)
class CacheRules:
    """How a provider's answers are cached."""

    ttl_s: int | None = None
    """None: only where a call asks for it."""
    scope: Scope = "client"
    coalesce: bool = False


class CachePlan(NamedTuple):
    """What is to be done for one call."""

    provider: str
    key: str
    ttl_s: int
    """0: its answer is not cached."""
    reads: bool
    """False: the client wants a fresh answer."""
    shares: bool
    """It may share a running call's answer."""


def requested_ttl_s(header: Header, rules: CacheRules, kind: str) -> int | None:
    """How long the answer of a call of this `kind` is cached; None if the cache is off for it.

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
    """True if the client wants a fresh answer."""
    given = header("cf-aig-skip-cache") or header("cf-skip-cache") or ""
    return given.strip().lower() in ("true", "1")


def key_of(whose: tuple[str, ...], what: tuple[str, ...], affecting: Pairs, body: bytes) -> str:
    """The key of a call: who may have its answer, what it asks for, which headers, and its body."""
    # The text of a tuple keeps its parts apart: nobody can move text from one into another.
    digest = sha256(repr((whose, what, affecting)).encode())
    digest.update(body)
    return digest.hexdigest()


def own_key_of(whose: tuple[str, ...], own: str, affecting: Pairs) -> str:
    """The key of a call under a client's own key; its answer must be in a coding that it reads."""
    codings = [value for name, value in affecting if name == "accept-encoding"]
    return sha256(repr((whose, own, codings)).encode()).hexdigest()


def affecting_headers(pairs: Pairs, connection: str | None) -> list[tuple[str, str]]:
    """Those by which an answer may differ, in an order of their own, names lower-case."""
    found = [(name, value) for given, value in pairs if (name := _affecting(given))]
    found = found if connection is None else without_named(found, connection)
    return sorted(found)


@lru_cache(maxsize=_MAX_NAMES)
def _affecting(name: str) -> str:
    """Its lower-case form, or nothing if no answer differs by it."""
    lower = normal(name)
    harmless = lower in _IGNORED or lower.startswith(_IGNORED_PREFIXES)
    return "" if harmless or not headers_for_provider([(name, "")], None) else lower


def stored_headers(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of an answer's headers those that hold for whoever gets it again."""
    return [
        (f"{name}", value)  # a plain str: multidict has its own kind, which cannot be packed
        for name, value in pairs
        if (lower := name.lower()) not in _NOT_STORED and not lower.startswith(_NOT_STORED_PREFIXES)
    ]


def is_cacheable(status: int, header: Header) -> bool:
    """True if an answer may be cached, by its head: a whole 200 of a kind that is asked for again.
    `private` is no hindrance: the key holds whose credential it was. A body that ends with its
    connection may have been cut.
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
