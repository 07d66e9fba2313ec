"""Find the credentials that a client sends, and choose those that go to the provider.

Owns the places where SDKs and web pages put credentials, which are those of the relay's keys and
tickets too. By default a client's credentials are dropped. A provider with `client_credentials:
allow` gets Authorization and its own header unchanged; a credential from any other place moves to
the place and scheme of the registry.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from multidict import MultiMapping

from relay.core import paths
from relay.core.access import is_relay_secret
from relay.core.credential_headers import CREDENTIAL_HEADERS
from relay.core.errors import ProviderNotConfigured
from relay.core.provider import AuthRule, Credential, Keys, Provider, Route

_GATEWAY_HEADER = "cf-aig-authorization"
PROVIDER_HEADERS = tuple(
    name for name in CREDENTIAL_HEADERS if name not in ("x-relay-key", _GATEWAY_HEADER)
)
"""Headers in which a client sends a key of the provider, in the order of precedence."""
_SCHEMES = frozenset({"bearer", "key", "token", "basic"})
_MAX_PARAMETERS = 200


@dataclass(frozen=True, slots=True)
class ClientCredential:
    """The credentials that a client sent; empty if it sent none."""

    provider: str = field(default="", repr=False)
    """The first secret for the provider, without its scheme."""
    gateway: str = field(default="", repr=False)
    """The secret for Cloudflare AI Gateway, without its scheme."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """The credential headers, unchanged: lower-case name, value."""

    @property
    def identity(self) -> tuple[str, ...]:
        """Everything that distinguishes the calls of this client from those of others."""
        return (self.provider, self.gateway, *(value for _, value in self.headers))


def presented(
    headers: MultiMapping[str], raw_query: str, names: Collection[str],
    own_headers: Sequence[str], subprotocols: Sequence[tuple[str, str]],
) -> list[str]:  # fmt: skip
    """Return what a client sends in the places of keys, without schemes, in the order in which its
    key is looked for: the headers of CREDENTIAL_HEADERS, `own_headers` of the provider, the query
    parameters with one of `names` or with a value in the form of the relay's secrets, the
    subprotocols.
    """
    found: list[str] = []
    for name in CREDENTIAL_HEADERS:
        if name in headers:
            for value in headers.getall(name):
                found += secrets_in(value)
    for name in own_headers:
        if name not in CREDENTIAL_HEADERS:
            for value in headers.getall(name, ()):
                found += secrets_in(value)
    if raw_query:
        for segment in raw_query.split("&")[:_MAX_PARAMETERS]:
            value = paths.segment_text(segment)
            if value and (is_relay_secret(value) or paths.query_name(segment) in names):
                found.append(value)
    found += [secret for _, secret in subprotocols]
    return found


def first_header(headers: MultiMapping[str]) -> str | None:
    """Return the first value of the first header in which `presented` looks; None without one."""
    for name in CREDENTIAL_HEADERS:
        value = headers.get(name)
        if value is not None:
            return value
    return None


def may_present_secret(headers: MultiMapping[str], raw_query: str) -> bool:
    """False if it is certain that neither headers nor query hold a text in the form of the relay's
    secrets. Many calls hold none, and this is a tenth of the work of `presented`.
    """
    text = "\n".join(headers.values()).lower()
    if "rk_" in text or "rt_" in text or "basic " in text:
        return True
    return "rk_" in raw_query or "rt_" in raw_query or "%" in raw_query


def secrets_in(value: str) -> tuple[str, ...]:
    """Return the secrets in the value of a header: `Bearer x`, `x`, or the password and the user
    name of Basic.
    """
    value = value.strip()
    scheme, _, rest = value.partition(" ")
    if not rest:
        return (value,) if value and value.lower() not in _SCHEMES else ()
    rest, scheme = rest.strip(), scheme.lower()
    if scheme == "basic":
        return _secrets_of_basic(rest)
    return (rest if scheme in _SCHEMES or is_relay_secret(rest) else value,)


def _secrets_of_basic(encoded: str) -> tuple[str, ...]:
    try:
        decoded = base64.b64decode(encoded, validate=True).decode(errors="replace")
    except (binascii.Error, ValueError):
        return (encoded,)  # not base64: perhaps the key itself
    user, _, password = decoded.partition(":")
    return tuple(filter(None, (password, user)))


def client_credential(
    header: Callable[[str], str | None], raw_query: str, provider: Provider,
    subprotocols: Sequence[tuple[str, str]] = (), relay_secrets: Collection[str] = (),
) -> ClientCredential:  # fmt: skip
    """Find the client's credentials in headers, query parameters and subprotocols. The first one
    wins: headers in the order of PROVIDER_HEADERS, then those of the provider's own, then the
    query, then the subprotocols in the order sent. Keys and tickets of the relay are none:
    `relay_secrets`, and whatever has their form.
    """

    def is_ours(secret: str) -> bool:
        return secret in relay_secrets or is_relay_secret(secret)

    def found(name: str) -> str:
        value = header(name) or ""
        return "" if any(map(is_ours, secrets_in(value))) else value

    gateway = bare(found(_GATEWAY_HEADER))
    names = dict.fromkeys((*PROVIDER_HEADERS, *provider.credential_headers))
    headers = tuple((name, value) for name in names if bare(value := found(name)))
    own = bare(headers[0][1]) if headers else ""
    if raw_query:
        values = [
            (paths.query_name(segment), value)
            for segment in raw_query.split("&")
            if (value := paths.segment_value(segment)) and not is_ours(value)
        ]
        parameters = provider.query_credentials - {_GATEWAY_HEADER}
        gateway = gateway or next((v for name, v in values if name == _GATEWAY_HEADER), "")
        own = own or next((v for name, v in values if name in parameters), "")
    for prefix, secret in subprotocols:
        if is_ours(secret):
            continue
        if prefix.lower() == f"{_GATEWAY_HEADER}.":
            gateway = gateway or secret
        else:
            own = own or secret
    return ClientCredential(own, gateway, headers)


def bare(value: str) -> str:
    """`Bearer sk-1` -> `sk-1`: the secret without its scheme; a scheme alone gives ""."""
    scheme, _, secret = value.strip().partition(" ")
    return secret.strip() if scheme.lower() in _SCHEMES else value


def choose(route: Route, sent: ClientCredential, pick: Callable[[], Keys]) -> Keys:
    """Choose the credentials of a call whose client may use its own; otherwise those of `pick`.

    Raises ProviderNotConfigured if there is no credential to send.
    """
    target, token = route.target, None
    if sent.gateway and target.via == "cloudflare":
        token = Credential("header", _GATEWAY_HEADER, f"Bearer {sent.gateway}", "client")
    own = _unchanged(sent, target.auth)
    if own is None and sent.provider and target.auth is not None:
        own = target.auth.credential(sent.provider, "client")
    if own is not None:
        return Keys(own, token or target.gateway_credential)
    if token is not None and target.auth is None:
        return Keys(None, token)
    if not target.pool:
        raise ProviderNotConfigured(route.provider.name, target.missing)
    keys = pick()
    return Keys(keys.provider, token) if token else keys


def _unchanged(sent: ClientCredential, rule: AuthRule | None) -> Credential | None:
    """The client's Authorization and the provider's own header, which must not be exchanged for
    each other: a bearer token is not an API key.
    """
    places = {"authorization": "Authorization"}
    if rule is not None and rule.place == "header":
        places[rule.name.lower()] = rule.name
    found = [(places[name], value) for name, value in sent.headers if name in places]
    if not found:
        return None
    (name, value), *others = found
    return Credential("header", name, value, "client", tuple(others))


def first_of(route: Route) -> Keys:
    """Return the first credentials of the pool. Raises ProviderNotConfigured if it is empty."""
    if not route.target.pool:
        raise ProviderNotConfigured(route.provider.name, route.target.missing)
    return route.target.pool[0]
