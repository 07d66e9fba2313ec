"""Whom to believe about a request's origin: proxies in front of the relay, by address.

Owns: the reading of X-Forwarded-*. From anybody else these headers are just text: a client could
write them itself.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from relay.core.memo import BoundedMemo

_MAX_PEERS = 256


class Proxies:
    """The addresses and networks of `server.trusted_proxies`."""

    __slots__ = ("_is_trusted", "_networks", "listed")

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = tuple(ipaddress.ip_network(given, strict=False) for given in networks)
        self._is_trusted = BoundedMemo(self._contain, _MAX_PEERS)
        self.listed = bool(self._networks)
        """True if there are any."""

    def trust(self, address: str) -> bool:
        """True if `address` is one of them."""
        return self._is_trusted[address]

    def _contain(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._networks)

    def client(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """The client's address: the last of X-Forwarded-For that no trusted proxy of ours is.

        `forwarded_for` are the header's values in order; the nearest proxy writes last.
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
        """`https://host` as the client sees it: X-Forwarded-Proto and -Host if a trusted proxy
        says so, else `own`.
        """
        if not self.trust(peer):
            return own
        scheme, _, name = own.partition("://")
        proto = _last(proto).lower()
        return f"{proto if proto in ('http', 'https') else scheme}://{_last(host) or name}"


def _last(value: str | None) -> str:
    """What the nearest proxy wrote."""
    return (value or "").rpartition(",")[2].strip()


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
