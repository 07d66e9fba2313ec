"""Decide who may call while access is open, and who may manage the relay.

Owns the rules for Host, Origin and Sec-Fetch-Site: callers must use a loopback name or a listed
host, and web pages need an allowed origin. Without these rules any web page could spend the keys of
a developer's relay: by DNS rebinding; by a simple POST or a WebSocket, for which browsers need no
CORS preflight; by an image, a script, a link or a no-cors call, which have no Origin. Owns too who
may manage the relay and read its ledger: while there are no client keys, only local callers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from relay.core.addresses import host_name, is_loopback
from relay.core.errors import (
    CrossSiteRequest,
    HostNotAllowed,
    ManagementNotLocal,
    OriginNotAllowed,
)
from relay.core.headers import is_of_network
from relay.core.memo import BoundedMemo

_MAX_HOSTS = 256
_MAX_ORIGIN_CHARS = 300
"""No browser sends more: a host name has at most 253 characters."""
_SHOWN_CHARS = 40
_OWN_SITES = frozenset({"same-origin", "none"})


class Origins:
    """The origins of `cors.origins`: exact ones, `https://*.example.com` for any subdomain, and `*`
    for all.
    """

    __slots__ = ("_any", "_exact", "_wildcards", "listed")

    def __init__(self, patterns: Iterable[str]) -> None:
        listed = [pattern.lower().rstrip("/") for pattern in patterns]
        self._any = "*" in listed
        self._exact = frozenset(pattern for pattern in listed if "*" not in pattern)
        # "https://*.example.com" -> "https://.example.com"
        self._wildcards = frozenset(
            pattern.replace("*", "", 1) for pattern in listed if "*" in pattern and pattern != "*"
        )
        self.listed = bool(listed)
        """True if there are any: responses then vary by Origin."""

    def allow(self, origin: str) -> bool:
        """True if pages of `origin`, as a browser writes it, may call. The origin `null` is allowed
        only by `*`.
        """
        origin = origin.lower()
        if self._any or origin in self._exact:
            return True
        if not self._wildcards or len(origin) > _MAX_ORIGIN_CHARS:
            return False
        # One lookup for each dot, however many wildcards there are.
        scheme, _, host = origin.partition("://")
        if "/" in host:
            return False
        dots = (at for at, char in enumerate(host) if char == "." and at)
        return any(f"{scheme}://{host[at:]}" in self._wildcards for at in dots)


class OpenAccess:
    """The access rules for calls without a client key."""

    __slots__ = ("_any_host", "_hosts", "_is_allowed", "is_required", "origins")

    def __init__(self, hosts: Iterable[str], origins: Origins, mode: str = "open") -> None:
        self.is_required = mode == "required"
        """True if every call needs a client key or a ticket."""
        self._hosts = frozenset(host.lower() for host in hosts if host)
        self._any_host = "*" in self._hosts
        self._is_allowed = BoundedMemo(self._allow_host, _MAX_HOSTS)
        self.origins = origins

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise HostNotAllowed, OriginNotAllowed or CrossSiteRequest unless the sender of these
        headers may call.
        """
        self.check_host(headers)
        self.check_page(headers)

    def check_host(self, headers: Mapping[str, str]) -> None:
        """Raise HostNotAllowed unless Host is a loopback name or a listed one."""
        if not self._is_allowed[host := headers.get("Host", "")]:
            raise HostNotAllowed(host_name(host) or host)

    def check_page(self, headers: Mapping[str, str]) -> None:
        """Raise OriginNotAllowed or CrossSiteRequest for a web page whose origin is neither the
        relay's own nor listed.
        """
        if not is_own_page(headers) and not self.origins.allow(origin := headers["Origin"]):
            raise OriginNotAllowed(origin)

    def _allow_host(self, host: str) -> bool:
        name = host_name(host)
        return self._any_host or is_loopback(name) or name in self._hosts


def is_own_page(headers: Mapping[str, str]) -> bool:
    """True if a request was sent by no web page, or by a page of the relay's own origin; False if
    its Origin is another. Raises CrossSiteRequest if a page of another origin sent it without an
    Origin header.

    An Origin is the relay's own if its host equals Host, with any scheme, since a proxy may end
    TLS. Without Origin the browser's Sec-Fetch-Site decides; programs send neither.
    """
    origin = headers.get("Origin")
    if origin is not None:
        own = headers.get("Host")
        return own is not None and origin.partition("://")[2].lower() == own.lower()
    site = headers.get("Sec-Fetch-Site")
    if site is not None and site.lower() not in _OWN_SITES:
        raise CrossSiteRequest(site)
    return True


def require_local(peer: str | None, headers: Mapping[str, str]) -> None:
    """Raise ManagementNotLocal, OriginNotAllowed or CrossSiteRequest unless a request with these
    headers came from this machine, without a proxy, and not from a page of another origin. `peer`
    is the address of the connection, None if unknown.
    """
    if not is_loopback(peer or ""):
        raise ManagementNotLocal("this request came from another machine")
    if not is_loopback(host_name(headers.get("Host", ""))):
        raise ManagementNotLocal("this request's Host is not a loopback name")
    if (name := next(filter(is_of_network, headers), None)) is not None:
        shown = name[:_SHOWN_CHARS]
        raise ManagementNotLocal(f"the header '{shown}' shows that a proxy sent this request")
    if not is_own_page(headers):
        raise OriginNotAllowed(headers["Origin"])
