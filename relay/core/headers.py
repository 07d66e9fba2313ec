"""Which headers cross the relay, and which do not (RFC 9110 7.6.1, and what the relay promises
besides).

Owns: the two filters, upstream and downstream. Does not own: credentials put in (upstream package)
or CORS. Names are compared lower-case with `_` read as `-`, so that no twin of a header slips
through.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from multidict import MultiMapping

from relay.core.credential_headers import RELAY_PREFIX, names_a_key
from relay.core.memo import BoundedMemo

Pairs = Collection[tuple[str, str]]
_Names = BoundedMemo[str, str | None]
"""The name under which a header passes; None if it does not."""

HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization",
        "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip

# What CDNs, load balancers and proxies add to a request: the client's address, place, TLS and
# identity, and the state of the hop. Full names, then beginnings, then endings. What a client sends
# to a provider through them stays: `x-amzn-bedrock-*`, `x-goog-user-project`, `x-ms-*`.
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
"""What Cloudflare's cf-aig-cache-ttl and cf-aig-skip-cache were called, and still are by some."""

# Host and length are made anew; the rest tells a provider about the caller's browser, or, like
# x-fal-target-url, would let a caller choose where a call goes.
_UPSTREAM_DROP = HOP_BY_HOP | {
    "host", "content-length", "origin", "referer", "expect", "x-fal-target-url",
}  # fmt: skip

# A provider's cookies, CORS answers and security policy are about its own origin, not ours;
# X-Accel-* would command the nginx in front of us, X-Relay-* pass for the relay's own.
_DOWNSTREAM_DROP = frozenset(
    {
        "set-cookie", "set-cookie2", "strict-transport-security", "alt-svc", "clear-site-data",
    }
) | HOP_BY_HOP  # fmt: skip
_DOWNSTREAM_DROP_PREFIXES = ("access-control-", "x-accel-", "sec-websocket-", RELAY_PREFIX)

_PLAIN_CONNECTION = frozenset({"", "keep-alive", "close", "upgrade", "keep-alive, upgrade"})
_MAX_NAMES = 1024


def connection_of(headers: MultiMapping[str]) -> str | None:
    """The Connection value of a message: that of all its lines, as one list."""
    first = headers.get("Connection")
    if first is None:
        return None
    lines = headers.getall("Connection")
    return first if len(lines) == 1 else ", ".join(lines)


_KEEP_ALIVE_TIMEOUT = re.compile(r"(?:^|[,;])\s*timeout\s*=\s*\"?(\d{1,9})(?!\d)", re.IGNORECASE)


def keep_alive_s(value: str | None) -> int | None:
    """For how long a Keep-Alive header says that an idle connection is kept, if it does."""
    found = _KEEP_ALIVE_TIMEOUT.search(value[:200]) if value else None
    return int(found[1]) if found else None


def upgrades(headers: MultiMapping[str]) -> bool:
    """True if Connection names Upgrade."""
    named = (connection_of(headers) or "").lower().split(",")
    return any(name.strip() == "upgrade" for name in named)


def headers_for_cloudflare(pairs: Pairs, connection: str | None) -> list[tuple[str, str]]:
    """The end-to-end headers of a request, order and duplicates kept, with the `cf-aig-*` controls.

    `connection` is the request's Connection value: headers it names are hop-by-hop too.
    """
    return _select(pairs, connection, _names_to_cloudflare)


def headers_for_provider(pairs: Pairs, connection: str | None) -> list[tuple[str, str]]:
    """The same for a provider called directly: the `cf-aig-*` controls are not for it."""
    return _select(pairs, connection, _names_to_provider)


def downstream_headers(pairs: Pairs, connection: str | None) -> list[tuple[str, str]]:
    """The end-to-end headers of a response; `cf-aig-*` come down as `x-cloudflare-aig-*`."""
    return _select(pairs, connection, _names_downstream)


def normal(name: str) -> str:
    """The form in which header names are compared."""
    return name.lower().replace("_", "-")


def _select(pairs: Pairs, connection: str | None, names: _Names) -> list[tuple[str, str]]:
    passing = [(out, value) for name, value in pairs if (out := names[name])]
    return passing if connection is None else without_named(passing, connection)


def is_of_network(name: str) -> bool:
    """True for a header that a proxy, a load balancer or a CDN in front of the relay adds."""
    lower = normal(name)
    return (
        lower in _OF_NETWORKS
        or lower.startswith(_OF_NETWORKS_START)
        or lower.endswith(_OF_NETWORKS_END)
    ) and not _is_control(lower)


def _is_control(lower: str) -> bool:
    """True for a control of Cloudflare's AI Gateway, which its networks do not add."""
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
    """True if every value is plain ASCII, as nearly always."""
    return "".join(headers.values()).isascii()


def head_bytes(first_line: str, headers: MultiMapping[str]) -> bytes:
    """The head of a message whose values are not all ASCII. Bytes that are no UTF-8, which aiohttp
    reads as lone surrogates and would leave out, go as they came. Raises ValueError.
    """
    lines = [first_line, *(f"{name}: {value}" for name, value in headers.items())]
    if any(_FORBIDDEN.search(line) for line in lines):
        raise ValueError("a header holds a control character")
    return "\r\n".join([*lines, "\r\n"]).encode("utf-8", "surrogateescape")


def without_named(pairs: list[tuple[str, str]], connection: str) -> list[tuple[str, str]]:
    """`pairs` without those that a Connection value makes hop-by-hop."""
    if connection.lower() in _PLAIN_CONNECTION:
        return pairs
    named = {normal(item.strip()) for item in connection.split(",")}
    return [pair for pair in pairs if normal(pair[0]) not in named]


# Header names repeat from call to call.
_names_to_cloudflare = _Names(_passes_to_cloudflare, _MAX_NAMES)
_names_to_provider = _Names(_passes_to_provider, _MAX_NAMES)
_names_downstream = _Names(_name_downstream, _MAX_NAMES)
