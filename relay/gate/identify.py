"""Identify the caller of a request: its client, by a key or ticket, and its address; and decide
whether it may call.

Owns the one Caller that a request has. Code that depends on the caller (limits per client, the
scope of the cache, the client in the ledger) reads the Caller and no header. Only this module reads
X-Forwarded-*, and it trusts them from trusted proxies only, since any client can send them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
from aiohttp import web
from multidict import CIMultiDictProxy

from relay.core.access import Client, ClientKey, Rights, is_relay_secret, ticket_of
from relay.core.addresses import address_of
from relay.core.credentials import (
    first_header,
    may_present_secret,
    presented,
    secrets_in,
)
from relay.core.errors import (
    AddressNotAllowed,
    ClientKeyExpired,
    ClientKeyInvalid,
    ClientKeyMissing,
    ManagementForbidden,
    OriginNotAllowed,
    OriginRequired,
    ProviderNotAllowed,
    TicketInvalid,
    TicketMismatch,
)
from relay.core.exchange import Caller, Unknown
from relay.core.memo import BoundedMemo
from relay.core.paths import cut_values
from relay.core.subprotocols import SubprotocolUse, sort
from relay.gate.access import OpenAccess, Origins, is_own_page
from relay.gate.keys import ClientKeys

_MAX_PEERS = 256
_MAX_ORIGIN_LISTS = 1024
_OF_MANAGEMENT = (
    "This is a token of the relay's management, which opens no call. Use a client's key."
)
_NO_SESSION = "it opens a WebSocket session; any other request needs a client key"
_NO_SECRETS: frozenset[str] = frozenset()


class KeyPlaces(Protocol):
    """Where a client may send a credential: a Provider, or all providers together."""

    @property
    def query_credentials(self) -> frozenset[str]:
        """Lower-case names of query parameters."""
        ...

    @property
    def credential_headers(self) -> tuple[str, ...]:
        """Lower-case names of headers."""
        ...

    @property
    def subprotocols(self) -> Mapping[str, SubprotocolUse]:
        """Subprotocols, or their prefixes."""
        ...

    @property
    def accepts_client_keys(self) -> bool:
        """True if the client's own credentials may be forwarded."""
        ...


class Sent(msgspec.Struct, frozen=True, gc=False):
    """What a client sends in which a key may be."""

    headers: CIMultiDictProxy[str]
    query: str = ""
    subprotocols: tuple[str, ...] = ()


class Identified(NamedTuple):
    """The result of `identify`."""

    caller: Caller
    query: str
    """The query without keys and tickets of the relay."""
    secrets: frozenset[str]
    """The keys of the relay that the client sent, beside those in the form of a relay's secret, for
    a provider that accepts the client's own credentials."""


class Callers:
    """Identifies callers, and checks whether they may call, by the configuration in force."""

    __slots__ = (
        "_is_required", "_keys", "_now_s", "_open", "_origins_of", "_proxies", "_public_url",
    )  # fmt: skip

    def __init__(
        self, proxies: Proxies, access: OpenAccess, public_url: str | None, keys: ClientKeys,
        now_s: Callable[[], float],
    ) -> None:  # fmt: skip
        """`now_s` returns the Unix time."""
        self._proxies, self._open, self._public_url = proxies, access, public_url
        self._keys, self._now_s = keys, now_s
        self._is_required = access.is_required
        self._origins_of = BoundedMemo(_origins, _MAX_ORIGIN_LISTS)

    def locate(self, request: web.BaseRequest, key: ClientKey | None = None) -> Caller:
        """Return the caller by its key, without one by its address alone: the peer, or the client
        that a trusted proxy names. Does not raise.
        """
        peer = address = request.remote or ""
        if self._proxies.listed:
            forwarded_for = request.headers.getall("X-Forwarded-For", ())
            address = self._proxies.client(peer, forwarded_for)
        if key is None:
            return Caller(address, peer, request.scheme, address)
        return Caller(key.client.name, peer, request.scheme, address, key.client, key)

    def identify(
        self, request: web.BaseRequest, sent: Sent, places: KeyPlaces | None
    ) -> Identified:
        """Return the caller: the client of the first key or ticket that the relay knows, in the
        order of core/credentials.py. `places` are those of the provider that is called, beside
        those of every SDK. Does not raise: `authorize` refuses, once the call has a row in the
        ledger.
        """
        keys, headers = self._keys, sent.headers
        if self._is_plain(sent):
            return Identified(self.locate(request), sent.query, _NO_SECRETS)
        first = first_header(headers)
        key = keys.in_header(first) if first is not None else None
        takes_keys = places is not None and places.accepts_client_keys
        if key is not None and not sent.query and not takes_keys:
            # Nothing else in the request matters. Most calls with a key end here.
            return Identified(self.locate(request, key), "", _NO_SECRETS)
        names: frozenset[str] = frozenset()
        own: tuple[str, ...] = ()
        offered: tuple[tuple[str, str], ...] = ()
        if places is not None:
            names, own = places.query_credentials, places.credential_headers
        if sent.subprotocols:
            rules = places.subprotocols if places is not None else {}
            offered = sort(sent.subprotocols, rules).credentials
        ticket = ""
        unknown: Unknown = ""
        if key is None:
            for secret in presented(headers, sent.query, names, own, offered):
                if (key := keys.find(secret)) is not None:
                    if first is not None and secret in secrets_in(first):
                        keys.note_header(first, key)
                    break
                if not ticket:
                    ticket = ticket_of(secret)
                unknown = _unknown(secret, unknown, keys)
        query = cut_values(sent.query, self._is_ours) if sent.query else ""
        caller = self.locate(request, key)
        if key is None and ticket:
            caller = Caller(
                caller.client, caller.peer, caller.scheme, caller.address, ticket=ticket
            )
        elif key is None and (unknown or keys.anonymous is not None):
            caller = self._keyless(caller, unknown)
        secrets = _NO_SECRETS
        if takes_keys and keys.knows_any:
            all_ = presented(headers, query, names, own, offered)
            secrets = frozenset(secret for secret in all_ if keys.is_ours(secret))
        return Identified(caller, query, secrets)

    def _is_plain(self, sent: Sent) -> bool:
        """True if nothing in the request can change who its caller is."""
        return not (
            self._is_required
            or self._keys.knows_any
            or self._keys.anonymous is not None
            or sent.subprotocols
            or may_present_secret(sent.headers, sent.query)
        )

    def _is_ours(self, text: str) -> bool:
        return is_relay_secret(text) or self._keys.is_ours(text)

    def _keyless(self, caller: Caller, unknown: Unknown) -> Caller:
        """Return the caller of a request without a known key."""
        record = self._keys.anonymous
        if unknown in ("key", "management") or (unknown and self._is_required):
            record = None
        return Caller(
            record.name if record is not None else caller.client,
            caller.peer, caller.scheme, caller.address, record, unknown=unknown,
        )  # fmt: skip

    def authorize(self, caller: Caller, headers: Mapping[str, str], provider: str) -> None:
        """Raise the error for a caller that may not call `provider`, which is empty if it is chosen
        later (then `check_provider` is called for it): without a valid key where one
        is required; with a record that does not allow the provider, the address or the page; and
        while access is open, without a key and with a foreign Host or Origin.

        A ticket opens a WebSocket session and nothing else: see `authorize_session`.
        """
        key, record = caller.key, caller.record
        if key is not None:
            self._check_key(key)
        elif caller.ticket:
            raise self._keys.wrong_tries.refusal(caller.address, TicketInvalid(_NO_SESSION))
        elif caller.unknown == "management":
            raise ManagementForbidden(_OF_MANAGEMENT)
        elif caller.unknown == "key":
            self._keys.require_fresh()
            raise self._keys.wrong_tries.refusal(caller.address, ClientKeyInvalid())
        else:
            if self._is_required:
                if caller.unknown:
                    raise self._keys.wrong_tries.refusal(caller.address, ClientKeyInvalid())
                if record is None:
                    raise ClientKeyMissing
            else:
                self._open.check_host(headers)
            if record is None:
                self._open.check_page(headers)
        if record is not None:
            self.check_record(record, caller, headers)
            if provider and record.rights.providers:
                check_provider(record, provider)

    def authorize_session(self, caller: Caller, headers: Mapping[str, str], provider: str) -> None:
        """Do the same for a WebSocket handshake, which may have a ticket. Whose ticket it is, only
        the database knows; until it is redeemed, the page's origin must be one of any client.
        """
        if not caller.ticket:
            self.authorize(caller, headers, provider)
            return
        origin = headers.get("Origin")
        if origin is None:
            raise OriginRequired("", "A ticket")
        if not self.allow_origin(origin) and not is_own_page(headers):
            raise OriginNotAllowed(origin)

    def allow_origin(self, origin: str) -> bool:
        """True if pages of `origin` may call as some client: what a CORS preflight asks."""
        return self._open.origins.allow(origin) or self._keys.origins.allow(origin)

    def require_key(self, caller: Caller, headers: Mapping[str, str]) -> ClientKey:
        """Return the caller's key. Raises the error for a caller that has none, or whose key or
        record does not allow this request, whatever the mode of access.
        """
        if caller.key is None:
            if caller.ticket or caller.unknown in ("key", "management"):
                self.authorize(caller, headers, "")
            if caller.unknown:
                raise self._keys.wrong_tries.refusal(caller.address, ClientKeyInvalid())
            raise ClientKeyMissing
        self._check_key(caller.key)
        self.check_record(caller.key.client, caller, headers)
        return caller.key

    def check_holder(self, caller: Caller, headers: Mapping[str, str], provider: str) -> None:
        """Raise the error for a caller whose redeemed ticket does not open this session: by the
        client's record, as it is now, and by the origin of the ticket.
        """
        record, terms = caller.record, caller.terms
        assert record is not None and terms is not None
        if provider != terms.provider:
            raise TicketMismatch("provider", terms.provider, provider)
        if terms.origin and (origin := headers.get("Origin", "")).lower() != terms.origin:
            raise TicketMismatch("origin", terms.origin, origin)
        self.check_record(record, caller, headers)
        check_provider(record, provider)

    def check_origin(self, record: Client, origin: str, own: str) -> None:
        """Raise OriginNotAllowed unless pages of `origin` may call as this client. `own` is the
        relay's own origin, whose pages may.
        """
        if origin != own and not self._origins(record.rights).allow(origin):
            raise OriginNotAllowed(origin, record.name if record.rights.origins else "")

    def _check_key(self, key: ClientKey) -> None:
        if key.stored:
            self._keys.require_fresh()
        if key.expires_s is not None and key.expires_s <= self._now_s():
            raise ClientKeyExpired

    def _origins(self, rights: Rights) -> Origins:
        return self._origins_of[rights.origins] if rights.origins else self._open.origins

    def check_record(self, record: Client, caller: Caller, headers: Mapping[str, str]) -> None:
        """Raise AddressNotAllowed, OriginNotAllowed, OriginRequired or CrossSiteRequest unless the
        record allows the caller's address and page.
        """
        rights = record.rights
        if rights.addresses:
            address = address_of(caller.address)
            if address is None or not any(address in network for network in rights.addresses):
                raise AddressNotAllowed(record.name, caller.address)
        origin = headers.get("Origin")
        if origin is None:
            if caller.key is None and not is_own_page(headers):
                raise OriginNotAllowed("")
            if caller.key is None and rights.origins and "Sec-Fetch-Site" not in headers:
                raise OriginRequired(record.name, f"The client '{record.name}'")
            return
        if not self._origins(rights).allow(origin) and not is_own_page(headers):
            raise OriginNotAllowed(origin, record.name if rights.origins else "")

    def public_url(self, caller: Caller, headers: Mapping[str, str]) -> str:
        """Return the URL by which `caller` reaches the relay: `https://host`, without a path."""
        if self._public_url:
            return self._public_url
        return self._proxies.origin(
            caller.peer,
            f"{caller.scheme}://{headers.get('Host') or 'localhost'}",
            headers.get("X-Forwarded-Proto"),
            headers.get("X-Forwarded-Host"),
        )


def check_provider(record: Client, provider: str) -> None:
    """Raise ProviderNotAllowed unless the record allows this provider."""
    if record.rights.providers and provider not in record.rights.providers:
        raise ProviderNotAllowed(record.name, provider)


def _unknown(secret: str, before: Unknown, keys: ClientKeys) -> Unknown:
    """Return what a caller sent in the places of keys that is none: `secret`, after `before`."""
    if keys.is_management(secret):
        return "management"
    if before in ("key", "management"):
        return before
    return "key" if is_relay_secret(secret) else "other"


def _origins(patterns: tuple[str, ...]) -> Origins:
    return Origins(patterns)


class Proxies:
    """The addresses and networks of `server.trusted_proxies`."""

    __slots__ = ("_is_trusted", "_networks", "listed")

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = tuple(ipaddress.ip_network(each, strict=False) for each in networks)
        self._is_trusted = BoundedMemo(self._contain, _MAX_PEERS)
        self.listed = bool(self._networks)
        """True if there are any."""

    def trust(self, address: str) -> bool:
        """True if `address` is that of a trusted proxy."""
        return self._is_trusted[address]

    def _contain(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._networks)

    def client(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """Return the client's address: the last one in X-Forwarded-For that is not a trusted
        proxy's.

        `forwarded_for` are the values of the header lines in order; the nearest proxy appends last.
        """
        if not self.trust(peer):
            return peer
        hops = [hop.strip() for value in forwarded_for for hop in value.split(",")]
        for hop in reversed(hops):
            if not self.trust(hop):
                return hop if _is_address(hop) else peer
            peer = hop
        return peer

    def origin(self, peer: str, own: str, proto: str | None, host: str | None) -> str:
        """Return `https://host` as the client sees it: from X-Forwarded-Proto and X-Forwarded-Host
        if a trusted proxy sent them, else `own`.
        """
        if not self.trust(peer):
            return own
        scheme, _, name = own.partition("://")
        proto = _last(proto).lower()
        return f"{proto if proto in ('http', 'https') else scheme}://{_last(host) or name}"


def _last(value: str | None) -> str:
    """Return the last item of a list header: the one that the nearest proxy wrote."""
    return (value or "").rpartition(",")[2].strip()


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
