"""A client's credentials: the places where SDKs and pages put them, and what becomes of them.

Owns: finding them. By default they are dropped. A provider with `client_credentials: allow` gets
Authorization and its own header as they came; what came in any other place moves to the place and
scheme that the registry says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from relay.core import paths
from relay.core.credential_headers import CREDENTIAL_HEADERS
from relay.core.errors import ProviderNotConfigured
from relay.core.provider import AuthRule, Credential, Keys, Provider, Route

_GATEWAY_HEADER = "cf-aig-authorization"
PROVIDER_HEADERS = tuple(
    name for name in CREDENTIAL_HEADERS if name not in ("x-relay-key", _GATEWAY_HEADER)
)
"""Where a client puts a key of the provider's, in the order in which it is looked for."""
_SCHEMES = frozenset({"bearer", "key", "token", "basic"})


@dataclass(frozen=True, slots=True)
class ClientCredential:
    """The bare secrets that a client brought, or empty."""

    provider: str = field(default="", repr=False)
    """The first one."""
    gateway: str = field(default="", repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Those that came in headers, as they came: lower-case name, value."""

    @property
    def identity(self) -> tuple[str, ...]:
        """All that tells this client's calls from another's."""
        return (self.provider, self.gateway, *(value for _, value in self.headers))


def client_credential(
    header: Callable[[str], str | None], raw_query: str, provider: Provider,
    subprotocols: Sequence[tuple[str, str]] = (), own_headers: Sequence[str] = (),
) -> ClientCredential:  # fmt: skip
    """What the client sent in a header, a query parameter or a subprotocol: the first place of
    these that has one wins, headers in the order of PROVIDER_HEADERS, then the provider's
    `own_headers` that are not among these, the others as they came.
    """
    gateway = bare(header(_GATEWAY_HEADER) or "")
    names = dict.fromkeys((*PROVIDER_HEADERS, *own_headers))
    headers = tuple((name, value) for name in names if bare(value := header(name) or ""))
    own = bare(headers[0][1]) if headers else ""
    if raw_query:
        gateway = gateway or paths.query_value(raw_query, _GATEWAY_HEADER)
        parameters = provider.query_credentials - {_GATEWAY_HEADER}
        own = own or paths.query_value(raw_query, *parameters)
    for prefix, secret in subprotocols:
        if prefix.lower() == f"{_GATEWAY_HEADER}.":
            gateway = gateway or secret
        else:
            own = own or secret
    return ClientCredential(own, gateway, headers)


def bare(value: str) -> str:
    """`Bearer sk-1` -> `sk-1`: the secret without its scheme; nothing of a scheme alone."""
    scheme, _, secret = value.strip().partition(" ")
    return secret.strip() if scheme.lower() in _SCHEMES else value


def choose(route: Route, came: ClientCredential, pick: Callable[[], Keys]) -> Keys:
    """The credentials of a call whose client may bring its own; else what `pick` gives.

    Raises ProviderNotConfigured if there is nothing to send.
    """
    target, token = route.target, None
    if came.gateway and target.via == "cloudflare":
        token = Credential("header", _GATEWAY_HEADER, f"Bearer {came.gateway}", "client")
    own = _as_it_came(came, target.auth)
    if own is None and came.provider and target.auth is not None:
        own = target.auth.credential(came.provider, "client")
    if own is not None:
        return Keys(own, token or target.gateway_credential)
    if token is not None and target.auth is None:
        return Keys(None, token)
    if not target.pool:
        raise ProviderNotConfigured(route.provider.name, target.missing)
    keys = pick()
    return Keys(keys.provider, token) if token else keys


def _as_it_came(came: ClientCredential, rule: AuthRule | None) -> Credential | None:
    """Authorization and the provider's own header: a bearer token is not an API key."""
    places = {"authorization": "Authorization"}
    if rule is not None and rule.place == "header":
        places[rule.name.lower()] = rule.name
    found = [(places[name], value) for name, value in came.headers if name in places]
    if not found:
        return None
    (name, value), *others = found
    return Credential("header", name, value, "client", tuple(others))


def first_of(route: Route) -> Keys:
    """The first of the relay's own credentials. Raises ProviderNotConfigured if there are none."""
    if not route.target.pool:
        raise ProviderNotConfigured(route.provider.name, route.target.missing)
    return route.target.pool[0]
