"""Make clients, with their rights and keys, of `clients` in gateway.yaml and of stored records.

Owns the checks of a client, and that the records of gateway.yaml and of the database mean the same.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from pydantic import ValidationError

from relay.core.access import Client, ClientKey, Rights
from relay.core.numbers import unix_time_s
from relay.registry.budgets import budgets_of_client, check_client_budgets
from relay.registry.limits import check_client_limits, rules_of_client
from relay.registry.problems import Document, Where, check_provider, hint_at_nearest
from relay.registry.schema import ClientRecord, GatewayFile
from relay.registry.validation import describe_error

MAX_RECORD_BYTES = 16 * 1024
_in_use: WeakValueDictionary[bytes, Rights] = WeakValueDictionary()
"""The rights of stored records, by the SHA-256 of the record."""


class BadRecord(ValueError):
    """A record is invalid; the text says which field, and why."""


@dataclass(frozen=True, slots=True)
class Clients:
    """The clients of a configuration."""

    by_name: Mapping[str, Client] = field(default_factory=dict)
    keys: Mapping[bytes, ClientKey] = field(default_factory=dict, repr=False)
    """By the SHA-256 of the key."""
    anonymous: Client | None = None
    """The client whose record holds for calls without a key."""


def build_clients(settings: GatewayFile, providers: Collection[str], document: Document) -> Clients:
    """Build the clients of gateway.yaml. Problems go into `document`."""
    clients: dict[str, Client] = {}
    keys: dict[bytes, ClientKey] = {}
    for name, entry in settings.clients.items():
        where: Where = ("clients", name)
        _check(entry, settings, providers, where, document)
        clients[name] = client = Client(name, _rights(entry))
        expires_s = unix_time_s(entry.expires, 0) if entry.expires is not None else None
        digests = [
            *(sha256(key.encode()).digest() for key in entry.key),
            *(bytes.fromhex(digest) for digest in entry.key_sha256),
        ]
        for number, digest in enumerate(digests, 1):
            if digest in keys:
                other = keys[digest].client.name
                document.add_problem(where, f"a key of the client '{other}' is the same")
            expires = int(expires_s) if expires_s is not None else None
            keys[digest] = ClientKey(f"{name}/{number}", digest, client, expires)
    _check_tokens(settings, keys, document)
    anonymous = settings.access.anonymous
    if anonymous is not None and anonymous not in clients:
        hint = hint_at_nearest(anonymous, clients)
        document.add_problem(("access", "anonymous"), f"there is no client '{anonymous}'{hint}")
    if settings.access.mode == "required" and not (keys or anonymous or settings.database):
        document.add_problem(
            ("access", "mode"),
            "no call is possible: `clients` has no key, and there is no database",
        )
    return Clients(clients, keys, clients.get(anonymous or ""))


def _check_tokens(
    settings: GatewayFile, keys: Mapping[bytes, ClientKey], document: Document
) -> None:
    """Add a problem for a token of management that is a client's key, or both tokens."""
    tokens = {name: getattr(settings.access, name) for name in ("admin_token", "read_token")}
    for name, token in tokens.items():
        if token and (key := keys.get(sha256(token.encode()).digest())) is not None:
            text = f"is a key of the client '{key.client.name}': management has tokens of its own"
            document.add_problem(("access", name), text)
    if tokens["admin_token"] and tokens["admin_token"] == tokens["read_token"]:
        document.add_problem(("access", "read_token"), "should differ from admin_token")


def _check(
    record: ClientRecord, settings: GatewayFile, providers: Collection[str], where: Where,
    document: Document,
) -> None:  # fmt: skip
    for number, name in enumerate(record.providers):
        check_provider(name, providers, (*where, "providers", number), document)
    check_client_limits(record.limits, settings, providers, (*where, "limits"), document)
    check_client_budgets(record.budgets, settings, (*where, "budgets"), document)


def checked_record(text: str, settings: GatewayFile, providers: Collection[str]) -> str:
    """Return a record as it is stored: JSON of the fields that are set. Raises BadRecord."""
    record = _parse(text)
    document = Document("")
    _check(record, settings, providers, (), document)
    if document.problems:
        raise BadRecord("; ".join(problem.text for problem in document.problems))
    stored = record.model_dump_json(exclude_defaults=True)
    if len(stored.encode()) > MAX_RECORD_BYTES:
        raise BadRecord(f"the record is larger than {MAX_RECORD_BYTES} bytes")
    return stored


def rights_of(text: str) -> Rights:
    """Return the rights of a stored record; the same object for the same text, as long as a client
    has it. Raises BadRecord.

    A provider that is not configured any more stays in the record, and matches nothing.
    """
    digest = sha256(text.encode("utf-8", "surrogatepass")).digest()
    if (rights := _in_use.get(digest)) is None:
        _in_use[digest] = rights = _rights(_parse(text))
    return rights


def _parse(text: str) -> ClientRecord:
    try:
        return ClientRecord.model_validate(msgspec.json.decode(text))
    except msgspec.DecodeError as error:
        raise BadRecord(f"the record is not JSON: {error}") from None
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        raise BadRecord("; ".join(_problem(detail) for detail in details[:10])) from None


def _problem(detail: Any) -> str:
    where = ".".join(str(part)[:40] for part in detail["loc"])
    return f"{where or 'the record'}: {describe_error(detail, detail['loc'], ClientRecord)}"


def _rights(record: ClientRecord) -> Rights:
    return Rights(
        frozenset(record.providers),
        tuple(record.models),
        frozenset(record.endpoints),
        tuple(record.origins),
        tuple(ipaddress.ip_network(each, strict=False) for each in record.addresses),
        rules_of_client(record.limits),
        dict(record.metadata),
        budgets_of_client(record.budgets),
    )
