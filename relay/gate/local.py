"""Who may manage the relay and read its ledger: callers on this machine alone.

There are no keys yet, so a caller counts as an administrator by where it is: a loopback peer, a
loopback Host, no header that a proxy adds, no page of another origin.
"""

from __future__ import annotations

from collections.abc import Mapping

from relay.core.errors import ManagementNotLocal, OriginNotAllowed
from relay.core.headers import is_of_network
from relay.core.hosts import host_name, is_loopback
from relay.gate.origins import is_own_page

_SHOWN_CHARS = 40


def require_local(peer: str | None, headers: Mapping[str, str]) -> None:
    """Raise ManagementNotLocal, OriginNotAllowed or CrossSiteRequest unless a caller on this
    machine sent a request with these headers itself. `peer` is the address that connected,
    None if unknown.
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
