"""What a surface makes of a request: the provider's name, the raw endpoint and query, and its
credentials.

Owns: that reading, for both lines. Whatever URL form a client used, from here on there is only
this.
"""

from __future__ import annotations

from typing import NamedTuple

from aiohttp import web

from relay.core.credentials import brought, choose, pooled
from relay.core.provider import Keys, Route
from relay.core.subprotocols import Offer
from relay.gateway import Gateway


class Call(NamedTuple):
    """`endpoint` and `query` are raw, as they came; `query` may hold a client's credential."""

    provider: str
    endpoint: str
    query: str


def keys_for(
    request: web.Request, call: Call, route: Route, gateway: Gateway, offer: Offer | None = None
) -> Keys:
    """The credentials that go up with this call. Raises ProviderNotConfigured."""
    turn = next(gateway.turns)
    if not route.provider.clients_may_bring_keys:
        return pooled(route, turn)
    secrets = offer.credentials if offer else ()
    return choose(route, brought(request.headers.get, call.query, route.provider, secrets), turn)
