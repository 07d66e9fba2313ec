"""A client's credentials: the places where SDKs and pages put them, and what becomes of them.

Owns: finding them. By default they are dropped; a provider with `client_credentials: allow` gets
them as its own, in the place and scheme that the registry says, never as they came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from relay.core import paths
from relay.core.errors import ProviderNotConfigured
from relay.core.headers import CREDENTIAL_HEADERS
from relay.core.provider import Credential, Provider, Route

_GATEWAY_HEADER = "cf-aig-authorization"
_SCHEMES = frozenset({"bearer", "key", "token", "basic"})


class Keys(NamedTuple):
    """The two credentials that go up with one call: the provider's, and Cloudflare's beside it."""

    provider: Credential | None = None
    gateway: Credential | None = None


@dataclass(frozen=True, slots=True)
class Brought:
    """The bare secrets that a client brought, or empty."""

    provider: str = field(default="", repr=False)
    gateway: str = field(default="", repr=False)


def brought(
    header: Callable[[str], str | None], raw_query: str, provider: Provider,
    subprotocols: Sequence[tuple[str, str]] = (),
) -> Brought:  # fmt: skip
    """What the client sent in a header, a query parameter or a subprotocol; the first place that
    has one wins.
    """
    gateway = bare(header(_GATEWAY_HEADER) or "")
    own = next(
        (bare(v) for name in CREDENTIAL_HEADERS - {_GATEWAY_HEADER} if (v := header(name))), ""
    )
    for prefix, secret in subprotocols:
        if prefix.lower() == f"{_GATEWAY_HEADER}.":
            gateway = gateway or secret
        else:
            own = own or secret
    for name in sorted(provider.query_credentials):
        value = paths.query_value(raw_query, name) if raw_query else None
        own = own or (value or "")
    return Brought(own, gateway)


def bare(value: str) -> str:
    """`Bearer sk-1` -> `sk-1`: the secret without its scheme."""
    scheme, space, secret = value.partition(" ")
    return secret.strip() if space and scheme.lower() in _SCHEMES else value


def choose(route: Route, came: Brought | None, pick: Callable[[], Credential | None]) -> Keys:
    """The credentials of one call. `pick` takes the next of the relay's own from the target's pool.

    `came` is None where clients may bring none. Raises ProviderNotConfigured if there is nothing to
    send.
    """
    target = route.target
    gateway = target.gateway_credential
    if came is not None:
        if came.gateway and target.via == "cloudflare":
            gateway = Credential("header", _GATEWAY_HEADER, f"Bearer {came.gateway}", "client")
        if came.provider and target.auth is not None:
            return Keys(target.auth.credential(came.provider, "client"), gateway)
    if target.missing:
        raise ProviderNotConfigured(route.provider.name, target.missing)
    return Keys(pick(), gateway)
