"""Who calls: identified once, before the body is read and before anything is dialled."""

from __future__ import annotations

import msgspec


class Caller(msgspec.Struct, frozen=True):
    """One client of the relay. Made by gate/identify.py."""

    client: str
    """What `per: client` means for limits, the cache and the ledger: its address, until clients
    have keys."""
    peer: str = ""
    """The address at the other end of its connection: its own, or that of a proxy."""
    scheme: str = "http"
    """`https` where that connection is encrypted."""
