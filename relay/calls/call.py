"""What a surface makes of a request: the provider's name, the raw endpoint and query, and its
credentials.

Owns: that reading, for both lines. Whatever URL form a client used, from here on there is only
this.
"""

from __future__ import annotations

from typing import NamedTuple

from aiohttp import web

from relay.core.credentials import brought
from relay.core.errors import TargetNotAllowed
from relay.core.paths import check_target, collapse_slashes
from relay.core.policy import request_timeout_s, wishes
from relay.core.provider import Route
from relay.core.rewriting import endpoint_of
from relay.core.subprotocols import Offer
from relay.gateway import Gateway
from relay.upstream.attempts import Asked


class Call(NamedTuple):
    """`endpoint` and `query` are raw, as they came; `query` may hold a client's credential."""

    provider: str
    endpoint: str
    query: str
    root: str
    """The raw path under which providers are found: `/api/v1/ai-gateway/providers/`."""


def asked(
    request: web.Request, call: Call, route: Route, gateway: Gateway, offer: Offer | None = None
) -> Asked:
    """What attempts need to know of a call. Raises BadRequest, and ProviderNotConfigured where
    nobody could be asked.
    """
    header, here = request.headers.get, route.keeps_wishes
    brings = None
    if route.provider.clients_may_bring_keys:
        secrets = offer.credentials if offer else ()
        own = route.provider.credential_headers
        brings = brought(header, call.query, route.provider, secrets, own)
    made = Asked(
        request.method,
        brought=brings,
        rules=wishes(header, route.provider.retries) if here else None,
        first_byte_s=request_timeout_s(header) if here else None,
    )
    if not route.target.pool:
        gateway.attempts.check(route, made)
    return made


def aimed(request: web.Request, call: Call, gateway: Gateway) -> Call:
    """The call that is meant: at `proxy`, fal's SDK names the URL it wants in a header.

    Raises TargetNotAllowed unless that URL lies on one of the provider's own hosts; only its path
    and query are used then.
    """
    if call.endpoint != "proxy":
        return call
    provider = gateway.registry.providers.get(call.provider)
    if provider is None or provider.target_header is None:
        return call
    wanted = request.headers.get(provider.target_header, "")
    found = endpoint_of(wanted, provider.homes)
    if found is None:
        raise TargetNotAllowed(provider.name, provider.target_header)
    endpoint, query = found
    check_target(f"/{endpoint}?{query}" if query else f"/{endpoint}")
    return call._replace(endpoint=collapse_slashes(endpoint), query=query)
