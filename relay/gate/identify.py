"""Identify the caller of a request: its address, whether it may call, and by which URL it reaches
the relay.

Owns the one Caller that a request has. Code that depends on the caller (limits per client, the
scope of the cache, the client in the ledger) reads the Caller and no header. Only this module reads
X-Forwarded-*, and it trusts them from trusted proxies only, since any client can send them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence

from aiohttp import web

from relay.core.exchange import Caller
from relay.core.memo import BoundedMemo
from relay.gate.access import OpenAccess

_MAX_PEERS = 256


class Callers:
    """Identifies callers by the configuration in force."""

    __slots__ = ("_proxies", "_public_url", "authorize")

    def __init__(self, proxies: Proxies, access: OpenAccess, public_url: str | None) -> None:
        self._proxies, self._public_url = proxies, public_url
        self.authorize = access.check
        """Raises the error for a caller that may not call, given the headers of its request: while
        access is open, one with a foreign Host or Origin. Not part of `identify`, since a refused
        call has a row in the ledger, which names its client."""

    def identify(self, request: web.BaseRequest) -> Caller:
        """Return the caller: the peer, or the client that a trusted proxy names. Does not raise."""
        peer = request.remote or ""
        client = peer
        if self._proxies.listed:
            forwarded_for = request.headers.getall("X-Forwarded-For", ())
            client = self._proxies.client(peer, forwarded_for)
        return Caller(client, peer, request.scheme)

    def public_url(self, caller: Caller, headers: Mapping[str, str]) -> str:
        """Return the URL by which `caller` reaches the relay: `https://host`, without a path."""
        if self._public_url:
            return self._public_url
        return self._proxies.origin(
            caller.peer,
            f"{caller.scheme}://{headers.get('Host') or 'localhost'}",
            headers.get("X-Forwarded-Proto"),
            headers.get("X-Forwarded-Host"),
        )


class Proxies:
    """The addresses and networks of `server.trusted_proxies`."""

    __slots__ = ("_is_trusted", "_networks", "listed")

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = tuple(ipaddress.ip_network(each, strict=False) for each in networks)
        self._is_trusted = BoundedMemo(self._contain, _MAX_PEERS)
        self.listed = bool(self._networks)
        """True if there are any."""

    def trust(self, address: str) -> bool:
        """True if `address` is that of a trusted proxy."""
        return self._is_trusted[address]

    def _contain(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._networks)

    def client(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """Return the client's address: the last one in X-Forwarded-For that is not a trusted
        proxy's.

        `forwarded_for` are the values of the header lines in order; the nearest proxy appends last.
        """
        if not self.trust(peer):
            return peer
        hops = [hop.strip() for value in forwarded_for for hop in value.split(",")]
        for hop in reversed(hops):
            if not self.trust(hop):
                return hop if _is_address(hop) else peer
            peer = hop
        return peer

    def origin(self, peer: str, own: str, proto: str | None, host: str | None) -> str:
        """Return `https://host` as the client sees it: from X-Forwarded-Proto and X-Forwarded-Host
        if a trusted proxy sent them, else `own`.
        """
        if not self.trust(peer):
            return own
        scheme, _, name = own.partition("://")
        proto = _last(proto).lower()
        return f"{proto if proto in ('http', 'https') else scheme}://{_last(host) or name}"


def _last(value: str | None) -> str:
    """Return the last item of a list header: the one that the nearest proxy wrote."""
    return (value or "").rpartition(",")[2].strip()


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
