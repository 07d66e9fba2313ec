"""Parse host names and IP addresses, and recognize loopback ones.

Owns the parsing of a Host header and of an address. Nothing is resolved or repaired: a spelling
that a resolver may take for a loopback address (127.1, 0x7f.1, 2130706433) is an ordinary name.
"""

from __future__ import annotations

import ipaddress
import re

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

# uri-host [ ":" port ] of RFC 9110 7.2, without user names, escapes and zones, which no client
# sends.
_HOST = re.compile(r"(?:\[([0-9a-f]*:[0-9a-f:.]*)\]|([a-z0-9._-]+))(?::([0-9]{0,5}))?\Z")


def host_name(host: str) -> str:
    """Return the name in a Host header, lower-case, without port and brackets; "" if malformed."""
    found = _HOST.match(host.lower())
    return (found[1] or found[2]) if found is not None else ""


def local_url(scheme: str, host: str, port: int) -> str:
    """The URL by which this machine reaches a server that listens on `host`, a name or address."""
    address = address_of(host)
    if address is not None and address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_loopback(name: str) -> bool:
    """True for localhost, 127.0.0.0/8 and ::1, and for IPv4 loopback mapped into IPv6."""
    if name in ("localhost", "localhost."):
        return True
    address = address_of(name)
    return address is not None and address.is_loopback


def address_of(name: str) -> Address | None:
    """Parse an address; one that is mapped into IPv6 becomes IPv4. None for any other name."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
