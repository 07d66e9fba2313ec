"""A client's credentials: the places where SDKs and pages put them, and what becomes of them.

Owns: finding them. By default they are dropped; a provider with `client_credentials: allow` gets
them as its own, in the place and scheme that the registry says, never as they came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from relay.core import paths
from relay.core.errors import ProviderNotConfigured
from relay.core.headers import CREDENTIAL_HEADERS
from relay.core.provider import Credential, Keys, Provider, Route

_GATEWAY_HEADER = "cf-aig-authorization"
PROVIDER_HEADERS = tuple(
    name for name in CREDENTIAL_HEADERS if name not in ("x-relay-key", _GATEWAY_HEADER)
)
"""Where a client puts a key of the provider's, in the order in which it is looked for."""
_SCHEMES = frozenset({"bearer", "key", "token", "basic"})


@dataclass(frozen=True, slots=True)
class Brought:
    """The bare secrets that a client brought, or empty."""

    provider: str = field(default="", repr=False)
    gateway: str = field(default="", repr=False)


def brought(
    header: Callable[[str], str | None], raw_query: str, provider: Provider,
    subprotocols: Sequence[tuple[str, str]] = (),
) -> Brought:  # fmt: skip
    """What the client sent in a header, a query parameter or a subprotocol: the first place of
    these that has one wins, headers in the order of PROVIDER_HEADERS, the others as they came.
    """
    gateway = bare(header(_GATEWAY_HEADER) or "")
    own = next((secret for name in PROVIDER_HEADERS if (secret := bare(header(name) or ""))), "")
    if raw_query:
        gateway = gateway or paths.query_value(raw_query, _GATEWAY_HEADER) or ""
        names = provider.query_credentials - {_GATEWAY_HEADER}
        own = own or paths.first_value(raw_query, names)
    for prefix, secret in subprotocols:
        if prefix.lower() == f"{_GATEWAY_HEADER}.":
            gateway = gateway or secret
        else:
            own = own or secret
    return Brought(own, gateway)


def bare(value: str) -> str:
    """`Bearer sk-1` -> `sk-1`: the secret without its scheme; nothing of a scheme alone."""
    scheme, _, secret = value.strip().partition(" ")
    return secret.strip() if scheme.lower() in _SCHEMES else value


def choose(route: Route, came: Brought, pick: Callable[[], Keys]) -> Keys:
    """The credentials of a call whose client may bring its own; else what `pick` gives.

    Raises ProviderNotConfigured if there is nothing to send.
    """
    target, token = route.target, None
    if came.gateway and target.via == "cloudflare":
        token = Credential("header", _GATEWAY_HEADER, f"Bearer {came.gateway}", "client")
    if came.provider and target.auth is not None:
        own = target.auth.credential(came.provider, "client")
        return Keys(own, token or target.gateway_credential)
    if token is not None and target.auth is None:
        return Keys(None, token)
    if not target.pool:
        raise ProviderNotConfigured(route.provider.name, target.missing)
    keys = pick()
    return Keys(keys.provider, token) if token else keys


def first_of(route: Route) -> Keys:
    """The first of the relay's own credentials. Raises ProviderNotConfigured if there are none."""
    if not route.target.pool:
        raise ProviderNotConfigured(route.provider.name, route.target.missing)
    return route.target.pool[0]
