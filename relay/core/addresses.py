"""Host names and addresses: what a Host header names, and whether that is this machine.

Owns: just that reading. Nothing is resolved, and nothing is repaired: a spelling that a resolver
might read as an address of this machine (127.1, 0x7f.1, 2130706433) is a name like any other.
"""

from __future__ import annotations

import ipaddress
import re

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

# uri-host [ ":" port ] of RFC 9110 7.2, without what no client sends: user names, escapes, zones.
_HOST = re.compile(r"(?:\[([0-9a-f]*:[0-9a-f:.]*)\]|([a-z0-9._-]+))(?::([0-9]{0,5}))?\Z")


def host_name(host: str) -> str:
    """The name in a Host header, lower-case, without port and brackets; empty if malformed."""
    found = _HOST.match(host.lower())
    return (found[1] or found[2]) if found is not None else ""


def is_loopback(name: str) -> bool:
    """True for localhost, 127.0.0.0/8 and ::1, also as IPv4 mapped into IPv6."""
    if name in ("localhost", "localhost."):
        return True
    address = address_of(name)
    return address is not None and address.is_loopback


def address_of(name: str) -> Address | None:
    """An address as such, one mapped into IPv6 as IPv4; None of any other name."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
