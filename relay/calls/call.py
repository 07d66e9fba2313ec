"""Represent a call: all that a client asks for, in one form for every surface and URL form.

Owns the Call, and the options that it sets for its attempts. Below the two request paths only code
that moves bytes reads aiohttp's request: so a call can be sent to several providers, and a shared
call can outlive the client that made it first.
"""

from __future__ import annotations

import msgspec
from multidict import CIMultiDictProxy

from relay.core.access import is_relay_secret
from relay.core.credentials import client_credential
from relay.core.errors import ProviderNotConfigured, TargetNotAllowed
from relay.core.exchange import Caller, Surface
from relay.core.paths import check_target, collapse_slashes, cut_values
from relay.core.provider import Route
from relay.core.retry_policy import request_timeout_s, requested_rules
from relay.core.rewriting import endpoint_of
from relay.core.subprotocols import Offer, sort
from relay.registry.registry import Registry
from relay.upstream.attempts import AttemptOptions


class Call(msgspec.Struct, frozen=True):
    """What a client asks for. `endpoint` and `query` are as received, still percent-encoded;
    `query`, `headers` and `subprotocols` may hold a client's credential.
    """

    method: str
    provider: str
    endpoint: str
    query: str
    headers: CIMultiDictProxy[str]
    root: str
    """The raw path that precedes provider names: `/api/v1/ai-gateway/providers/`."""
    caller: Caller
    subprotocols: tuple[str, ...] = ()
    """The subprotocols that a WebSocket client offers, in its order."""
    relay_secrets: frozenset[str] = frozenset()
    """The relay's keys that the client sent, which are no credentials of a provider."""
    error_format: str | None = None
    """The wire format of the relay's own errors; None for the provider's format."""
    surface: Surface = "native"
    """`unified`: the provider is chosen by the model, and `provider` is empty until then."""

    def offer(self, route: Route) -> Offer:
        """Sort the subprotocols by the rules of the provider of `route`."""
        rules = route.provider.websocket_rules
        assert rules is not None
        return sort(self.subprotocols, rules.subprotocols)

    def __repr__(self) -> str:
        return f"<Call {self.method} {self.provider}/{self.endpoint}>"


def attempt_options(call: Call, route: Route, offer: Offer | None = None) -> AttemptOptions:
    """Read a call's options for its attempts. Raises BadRequest, and ProviderNotConfigured if no
    target can be called.
    """
    header, credential = call.headers.get, None
    if route.provider.accepts_client_keys:
        secrets = offer.credentials if offer else ()
        credential = client_credential(
            header, call.query, route.provider, secrets, call.relay_secrets
        )
    options = AttemptOptions(call.method, credential=credential)
    if route.relay_retries:
        options.retries = requested_rules(header, route.provider.retries)
        options.first_byte_s = request_timeout_s(header)
    if not route.target.pool and not any(each.target.pool for each in route.alternatives):
        if credential is None or not (credential.provider or credential.gateway):
            raise ProviderNotConfigured(route.provider.name, route.target.missing)
    return options


def resolve_target_header(call: Call, registry: Registry) -> Call:
    """Return the call whose endpoint is taken from the target header: fal's SDK calls `proxy` and
    sends the URL that it wants in a header. Any other call is returned unchanged.

    Raises TargetNotAllowed unless the URL's host is one of the provider's own; only the path and
    the query of the URL are used.
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
    query = cut_values(query, is_relay_secret)
    return msgspec.structs.replace(call, endpoint=collapse_slashes(endpoint), query=query)
