"""Who may call, and what: clients, their keys and rights, and the form of the relay's secrets.

Owns these records and the recognition of a secret by its form. gate/ finds the client of a request
and applies its rights; registry/clients.py makes records of gateway.yaml and of the database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from types import MappingProxyType

import msgspec

from relay.core.budgets import BudgetRule
from relay.core.limits import Rule

KEY_PREFIX = "rk_"
"""A client's key that the relay has made: `rk_` and 192 random bits."""
TICKET_PREFIX = "rt_"
OPENAI_TICKET_PREFIX = "ek_rt_"
"""The same ticket for OpenAI's browser SDKs, which insist on `ek_`."""
_PREFIXES = (KEY_PREFIX, TICKET_PREFIX, OPENAI_TICKET_PREFIX)

Network = IPv4Network | IPv6Network
_NO_METADATA: Mapping[str, str | int | float | bool] = MappingProxyType({})


def is_relay_secret(text: str) -> bool:
    """True for a text in the form of a key or ticket of the relay, known or not. It never goes to a
    provider.
    """
    return text.startswith(_PREFIXES)


def ticket_of(text: str) -> str:
    """Return the ticket in its one form, `rt_…`; empty if `text` is no ticket."""
    if text.startswith(OPENAI_TICKET_PREFIX):
        return text.removeprefix("ek_")
    return text if text.startswith(TICKET_PREFIX) else ""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Rights:
    """What a client may do. An empty field restricts nothing."""

    providers: frozenset[str] = frozenset()
    models: tuple[str, ...] = ()
    """Patterns in which `*` matches any text and `?` one character."""
    endpoints: frozenset[str] = frozenset()
    """Kinds of endpoints (core/peek.py)."""
    origins: tuple[str, ...] = ()
    """Origins of web pages, as in `cors.origins`; empty: those of `cors.origins`."""
    addresses: tuple[Network, ...] = ()
    limits: tuple[Rule, ...] = ()
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=lambda: _NO_METADATA)
    """Metadata of every call, such as `team`; it replaces entries that the caller sends."""
    budgets: tuple[BudgetRule, ...] = ()
    restricts_calls: bool = field(init=False)
    """True if models or kinds of endpoints are restricted: for most clients neither are, and their
    calls need no such check."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "restricts_calls", bool(self.models or self.endpoints))


class Client(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A client: an application or person that has keys. Many clients may share one Rights."""

    name: str
    rights: Rights


class ClientKey(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A key of a client. The key itself is not known: only its SHA-256 is kept."""

    id: str
    """12 hexadecimal digits; of gateway.yaml: the client's name and the key's place, `web/1`."""
    digest: bytes
    client: Client
    expires_s: int | None = None
    """Unix time at which it ceases to be valid; None: never."""
    stored: bool = False
    """True for a key of the database, which may have been revoked since it was read."""

    def __repr__(self) -> str:
        return f"<ClientKey {self.id} of {self.client.name}>"


class StoredKey(msgspec.Struct, frozen=True, gc=False):
    """A key of the database, as it is kept in memory: 100,000 of them take few bytes each."""

    id: str
    client: str
    expires_s: int | None


class TicketTerms(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a ticket allows: one session of its client, within these bounds."""

    provider: str
    path_prefix: str = ""
    """The beginning of the endpoint, in whole segments; empty: any endpoint."""
    models: tuple[str, ...] = ()
    """Patterns, besides those of the client; empty: no further restriction."""
    origin: str = ""
    """The origin of the page that uses the ticket; empty: any that the client's rights allow."""
    max_session_s: float | None = None
    max_messages: int | None = None
    """How many messages the page may send."""
