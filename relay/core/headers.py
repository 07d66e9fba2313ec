"""Filter the headers of requests and responses (RFC 9110 7.6.1, and the relay's own rules).

Owns the filters upstream and downstream. It adds no credentials (upstream/send.py) and no CORS
headers (surfaces/cors.py). Names are compared in lower case with `_` as `-`, so that no variant of
a header passes a filter.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from multidict import MultiMapping

from relay.core.credential_headers import RELAY_PREFIX, names_a_key
from relay.core.memo import BoundedMemo

Pairs = Collection[tuple[str, str]]
_Names = BoundedMemo[str, str | None]
"""Header name to the name that is forwarded; None if the header is removed."""

HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization",
        "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip

# Headers that CDNs, load balancers and proxies add to a request: the client's address, location,
# TLS and identity, and the state of the hop. Full names, then prefixes, then suffixes. Headers of
# clients for providers pass: `x-amzn-bedrock-*`, `x-goog-user-project`, `x-ms-*`.
_OF_NETWORKS = frozenset(
    {
        "forwarded", "via", "proxy-connection",
        "x-scheme", "x-remote-ip", "x-remote-addr", "remote-addr", "remote-user",
        "x-originating-ip", "x-proxyuser-ip", "x-sucuri-country", "front-end-https",
        "x-real-port", "x-client-port", "x-client-cert",
        # AWS load balancers, Google Cloud, Azure App Service, Fly, Vercel, Netlify
        "x-amzn-trace-id", "x-cloud-trace-context", "disguised-host", "was-default-hostname",
        "fly-region", "fly-request-id", "x-vercel-id", "x-vercel-proxied-for",
        "x-vercel-forwarded-for",
    }
)  # fmt: skip
_OF_NETWORKS_START = (
    "x-forwarded-", "x-original-", "x-envoy-", "x-auth-request-", "x-ssl-client-", "ssl-client-",
    "tailscale-user-", "cf-", "cdn-", "fastly-", "akamai-", "x-akamai-", "cloudfront-",
    "x-amz-cf-", "x-amzn-oidc-", "x-amzn-mtls-", "x-amzn-tls-", "x-amzn-apigateway-", "x-azure-",
    "x-fd-", "x-arr-", "x-appservice-", "x-waws-", "x-ms-client-principal", "x-ms-token-",
    "x-appengine-", "x-goog-iap-", "x-goog-authenticated-user-", "fly-forwarded-", "x-vercel-ip-",
    "x-nf-",
)  # fmt: skip
_OF_NETWORKS_END = ("client-ip", "clientip", "connecting-ip", "real-ip")

OLD_CACHE_HEADERS = frozenset({"cf-cache-ttl", "cf-skip-cache"})
"""Old names of Cloudflare's cf-aig-cache-ttl and cf-aig-skip-cache, which some clients send."""

# The relay sets Host and Content-Length itself. The others describe the client's browser, or, like
# x-fal-target-url, would let a client choose the host that is called.
_UPSTREAM_DROP = HOP_BY_HOP | {
    "host", "content-length", "origin", "referer", "expect", "x-fal-target-url",
}  # fmt: skip

# A provider's cookies, CORS headers and security policy are for its own origin. X-Accel-* would
# control the nginx in front of the relay, and X-Relay-* would look like the relay's own.
_DOWNSTREAM_DROP = frozenset(
    {
        "set-cookie", "set-cookie2", "strict-transport-security", "alt-svc", "clear-site-data",
    }
) | HOP_BY_HOP  # fmt: skip
_DOWNSTREAM_DROP_PREFIXES = ("access-control-", "x-accel-", "sec-websocket-", RELAY_PREFIX)

_PLAIN_CONNECTION = frozenset({"", "keep-alive", "close", "upgrade", "keep-alive, upgrade"})
_MAX_NAMES = 1024


def connection_of(headers: MultiMapping[str]) -> str | None:
    """Return the value of Connection, with its lines joined; None if there is none."""
    first = headers.get("Connection")
    if first is None:
        return None
    lines = headers.getall("Connection")
    return first if len(lines) == 1 else ", ".join(lines)


_KEEP_ALIVE_TIMEOUT = re.compile(r"(?:^|[,;])\s*timeout\s*=\s*\"?(\d{1,9})(?!\d)", re.IGNORECASE)


def keep_alive_s(value: str | None) -> int | None:
    """Return the `timeout` of a Keep-Alive header, in seconds; None without one."""
    found = _KEEP_ALIVE_TIMEOUT.search(value[:200]) if value else None
    return int(found[1]) if found else None


def upgrades(headers: MultiMapping[str]) -> bool:
    """True if Connection contains `upgrade`."""
    named = (connection_of(headers) or "").lower().split(",")
    return any(name.strip() == "upgrade" for name in named)


def headers_for_cloudflare(pairs: Pairs, connection: str | None) -> list[tuple[str, str]]:
    """Return the end-to-end headers of a request with the `cf-aig-*` controls, in order and with
    duplicates.

    `connection` is the value of Connection: the headers in it are hop-by-hop too.
    """
    return _select(pairs, connection, _names_to_cloudflare)


def headers_for_provider(pairs: Pairs, connection: str | None) -> list[tuple[str, str]]:
    """Return the end-to-end headers of a request without the `cf-aig-*` controls, for a provider
    that is called directly.
    """
    return _select(pairs, connection, _names_to_provider)


def downstream_headers(pairs: Pairs, connection: str | None) -> list[tuple[str, str]]:
    """Return the end-to-end headers of a response; `cf-aig-*` are renamed `x-cloudflare-aig-*`."""
    return _select(pairs, connection, _names_downstream)


def normal(name: str) -> str:
    """Return the normalized name, by which headers are compared."""
    return name.lower().replace("_", "-")


def _select(pairs: Pairs, connection: str | None, names: _Names) -> list[tuple[str, str]]:
    passing = [(out, value) for name, value in pairs if (out := names[name])]
    return passing if connection is None else without_named(passing, connection)


def is_of_network(name: str) -> bool:
    """True for a header that a proxy, load balancer or CDN in front of the relay adds."""
    lower = normal(name)
    return (
        lower in _OF_NETWORKS
        or lower.startswith(_OF_NETWORKS_START)
        or lower.endswith(_OF_NETWORKS_END)
    ) and not _is_control(lower)


def _is_control(lower: str) -> bool:
    """True for a control header of Cloudflare AI Gateway, which clients send."""
    return lower.startswith("cf-aig-") or lower in OLD_CACHE_HEADERS


def _passes_to_cloudflare(name: str) -> str | None:
    lower = normal(name)
    dropped = (
        lower in _UPSTREAM_DROP
        or lower.startswith("sec-websocket-")
        or is_of_network(lower)
        or names_a_key(lower)
    )
    return None if dropped else name


def _passes_to_provider(name: str) -> str | None:
    return None if _is_control(normal(name)) else _passes_to_cloudflare(name)


def _name_downstream(name: str) -> str | None:
    lower = normal(name)
    if lower in _DOWNSTREAM_DROP or lower.startswith(_DOWNSTREAM_DROP_PREFIXES):
        return None
    if lower.startswith("cf-aig-"):
        return "x-cloudflare-aig-" + lower.removeprefix("cf-aig-")
    return name


_FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def all_ascii(headers: MultiMapping[str]) -> bool:
    """True if every value is ASCII, as nearly always."""
    return "".join(headers.values()).isascii()


def head_bytes(first_line: str, headers: MultiMapping[str]) -> bytes:
    """Encode the head of a message whose values are not all ASCII. Bytes that are no UTF-8, which
    aiohttp reads as lone surrogates and would omit, are sent unchanged. Raises ValueError for a
    control character.
    """
    lines = [first_line, *(f"{name}: {value}" for name, value in headers.items())]
    if any(_FORBIDDEN.search(line) for line in lines):
        raise ValueError("a header contains a control character")
    return "\r\n".join([*lines, "\r\n"]).encode("utf-8", "surrogateescape")


def without_named(pairs: list[tuple[str, str]], connection: str) -> list[tuple[str, str]]:
    """Return `pairs` without the headers that a Connection value lists as hop-by-hop."""
    if connection.lower() in _PLAIN_CONNECTION:
        return pairs
    named = {normal(item.strip()) for item in connection.split(",")}
    return [pair for pair in pairs if normal(pair[0]) not in named]


# Header names repeat from call to call.
_names_to_cloudflare = _Names(_passes_to_cloudflare, _MAX_NAMES)
_names_to_provider = _Names(_passes_to_provider, _MAX_NAMES)
_names_downstream = _Names(_name_downstream, _MAX_NAMES)
