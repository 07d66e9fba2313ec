"""Count wrong keys, tickets and tokens by address, and refuse further ones early.

Owns these counts and their bounds. Only a wrong secret is counted or refused: one that is known
passes from any address, so that a program with a wrong key does not lock out the others behind the
same NAT or proxy. Against guessing, secrets are long: 16 characters at least, and those that the
relay makes have 128 random bits or more.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from relay import log
from relay.core.errors import RelayError, TooManyAttempts

MAX_TRIES = 10
WINDOW_S = 60.0
_MAX_ADDRESSES = 4096
_SITE_BITS = 64
"""A host has at least so many bits of an IPv6 address to choose from: it counts as one address."""


@dataclass(slots=True)
class _Window:
    began_s: float
    count: int = 0


class WrongTries:
    """The wrong tries of the last minute. One per process."""

    __slots__ = ("_clock", "_windows")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._windows: dict[str, _Window] = {}  # in the order in which they began

    def refusal(self, address: str, error: RelayError) -> RelayError:
        """Count a wrong secret from `address`. Return the error to raise: `error`, or
        TooManyAttempts after MAX_TRIES within WINDOW_S.
        """
        now, site = self._clock(), _site(address)
        window = self._windows.get(site)
        if window is None or now - window.began_s >= WINDOW_S:
            window = self._begin(site, now)
        window.count += 1
        if window.count <= MAX_TRIES:
            return error
        if window.count == MAX_TRIES + 1:
            log.warn("access.too_many_attempts", client=address[:64], error=error.code)
        return TooManyAttempts(window.began_s + WINDOW_S - now)

    def _begin(self, site: str, now: float) -> _Window:
        self._windows.pop(site, None)
        if len(self._windows) >= _MAX_ADDRESSES:
            del self._windows[next(iter(self._windows))]
        self._windows[site] = window = _Window(now)
        return window

    def __len__(self) -> int:
        return len(self._windows)


def _site(address: str) -> str:
    """Return what counts as one address: an IPv4 address, or the network of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if parsed.version == 4:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed), _SITE_BITS), strict=False))
