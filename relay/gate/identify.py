"""Identify the caller of a request: who it is, whether it may call, and by which URL it reaches the
relay.

Owns the one Caller that a request has. Whatever depends on who calls (limits per client, the scope
of the cache, the client in the ledger) reads it, and asks no header of the request again.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from relay.core.exchange import Caller
from relay.gate.origins import OpenAccess
from relay.gate.proxies import Proxies


class Callers:
    """The rules in force by which callers are identified."""

    __slots__ = ("_proxies", "_public_url", "authorize")

    def __init__(self, proxies: Proxies, access: OpenAccess, public_url: str | None) -> None:
        self._proxies, self._public_url = proxies, public_url
        self.authorize = access.check
        """Refuse a caller that may not call, by the headers of its request: while access is open,
        one with a foreign Host or Origin. Not part of `identify`: a refused call has a row in the
        ledger, which names its client."""

    def identify(self, request: web.BaseRequest) -> Caller:
        """Whose request this is: the peer's, or whom a trusted proxy names. Does not raise."""
        peer = request.remote or ""
        client = peer
        if self._proxies.listed:
            forwarded_for = request.headers.getall("X-Forwarded-For", ())
            client = self._proxies.client(peer, forwarded_for)
        return Caller(client, peer, request.scheme)

    def public_url(self, caller: Caller, headers: Mapping[str, str]) -> str:
        """`https://host` by which `caller` reaches the relay, without a path of the relay's."""
        if self._public_url:
            return self._public_url
        return self._proxies.origin(
            caller.peer,
            f"{caller.scheme}://{headers.get('Host') or 'localhost'}",
            headers.get("X-Forwarded-Proto"),
            headers.get("X-Forwarded-Host"),
        )
