"""A call: all that a client asks for, whatever URL form it used.

Owns what a surface makes of a request. Below the two request paths nothing reads the request but
the code that moves bytes, so that one call can be sent to several providers, and can outlive the
client that made it first.
"""

from __future__ import annotations

import msgspec
from multidict import CIMultiDictProxy

from relay.core.credentials import client_credential
from relay.core.errors import ProviderNotConfigured, TargetNotAllowed
from relay.core.exchange import Caller
from relay.core.paths import check_target, collapse_slashes
from relay.core.provider import Route
from relay.core.retry_policy import request_timeout_s, requested_rules
from relay.core.rewriting import endpoint_of
from relay.core.subprotocols import Offer, sort
from relay.registry.registry import Registry
from relay.upstream.attempts import AttemptOptions


class Call(msgspec.Struct, frozen=True):
    """`endpoint` and `query` are raw, as they came; `query`, `headers` and `subprotocols` may hold
    a client's credential.
    """

    method: str
    provider: str
    endpoint: str
    query: str
    headers: CIMultiDictProxy[str]
    root: str
    """The raw path under which providers are found: `/api/v1/ai-gateway/providers/`."""
    caller: Caller
    subprotocols: tuple[str, ...] = ()
    """What a WebSocket client offers, in its order."""
    error_format: str | None = None
    """The wire format of the relay's own errors; None: that of the provider."""

    def offer(self, route: Route) -> Offer:
        """The subprotocols, sorted as the provider of `route` wants them."""
        rules = route.provider.websocket_rules
        assert rules is not None
        return sort(self.subprotocols, rules.subprotocols)

    def __repr__(self) -> str:
        return f"<Call {self.method} {self.provider}/{self.endpoint}>"


def attempt_options(call: Call, route: Route, offer: Offer | None = None) -> AttemptOptions:
    """What a call asks of its attempts. Raises BadRequest, and ProviderNotConfigured where no
    target could be called.
    """
    header, credential = call.headers.get, None
    if route.provider.accepts_client_keys:
        secrets = offer.credentials if offer else ()
        own = route.provider.credential_headers
        credential = client_credential(header, call.query, route.provider, secrets, own)
    options = AttemptOptions(call.method, credential=credential)
    if route.relay_retries:
        options.retries = requested_rules(header, route.provider.retries)
        options.first_byte_s = request_timeout_s(header)
    if not route.target.pool and not any(each.target.pool for each in route.alternatives):
        if credential is None or not (credential.provider or credential.gateway):
            raise ProviderNotConfigured(route.provider.name, route.target.missing)
    return options


def resolve_target_header(call: Call, registry: Registry) -> Call:
    """The call that is meant: at `proxy`, fal's SDK names the URL it wants in a header.

    Raises TargetNotAllowed unless that URL lies on one of the provider's own hosts; only its path
    and query are used then.
    """
    if call.endpoint != "proxy":
        return call
    provider = registry.providers.get(call.provider)
    if provider is None or provider.target_header is None:
        return call
    wanted = call.headers.get(provider.target_header, "")
    found = endpoint_of(wanted, provider.own_origins)
    if found is None:
        raise TargetNotAllowed(provider.name, provider.target_header)
    endpoint, query = found
    check_target(f"/{endpoint}?{query}" if query else f"/{endpoint}")
    return msgspec.structs.replace(call, endpoint=collapse_slashes(endpoint), query=query)
