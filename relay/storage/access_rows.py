"""Define the rows of access, and refuse those that are too large or of the wrong form.

Owns the types of rows and their bounds. access.py stores clients and keys, tickets.py tickets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.core.numbers import LATEST_S
from relay.core.text import clean
from relay.storage.database import RowsRefused

PAGE_ROWS = 1000
"""How many rows a page has at most."""
MAX_JSON_BYTES = 16 * 1024
"""Maximum size of a client's record, of a ticket's terms and of its refusal."""
MAX_DETAILS_BYTES = 2 * MAX_JSON_BYTES
"""Maximum size of the details of an audit row, which may hold a record."""
_CLIENT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_KEY_ID = re.compile(r"[0-9a-f]{12}")
_DIGEST_BYTES = 32


class Row(msgspec.Struct, frozen=True, gc=False):
    """A row of a table: its fields are columns of the same names."""


class ClientRow(Row, frozen=True, gc=False):
    """A client that is not in gateway.yaml. `record` is the JSON that the operator gave."""

    name: str
    record: str
    created_s: int
    created_by: str
    deleted_s: int | None
    version: int


class KeyRow(Row, frozen=True, gc=False):
    """A key of a client, which is a ClientRow or one of gateway.yaml."""

    id: str
    client: str
    sha256: bytes
    created_s: int
    created_by: str
    expires_s: int | None
    revoked_s: int | None
    version: int


class TicketRow(Row, frozen=True, gc=False):
    """A ticket: `terms` and `refusal` are JSON. A new one has the first five fields only."""

    sha256: bytes
    client: str
    key_id: str
    terms: str
    expires_s: int
    used_s: int | None = None
    exchange_id: str | None = None
    refusal: str | None = None


class AuditRow(Row, frozen=True, gc=False):
    """Who changed what. `details` is a JSON object."""

    seq: int
    at_s: int
    actor: str
    action: str
    target: str
    details: str


class NewKey(msgspec.Struct, frozen=True, gc=False):
    """A key to be stored: an id of 12 hex digits, the SHA-256 of the secret, and its expiry."""

    id: str
    sha256: bytes
    expires_s: int | None = None


class Changes(msgspec.Struct, frozen=True):
    """A page of rows that changed. `version` is the version to ask from after this page."""

    version: int
    clients: Sequence[ClientRow] = ()
    keys: Sequence[KeyRow] = ()


RowT = TypeVar("RowT", bound=Row)


def columns(kind: type[Row], table: sa.Table) -> list[sa.Column[Any]]:
    """Return the columns of a row, in the order of its fields."""
    return [table.c[name] for name in kind.__struct_fields__]


async def read_rows(
    query: sa.Executable, kind: type[RowT], connection: AsyncConnection
) -> list[RowT]:
    """Run a query for `columns(kind, …)`, and return its rows."""
    return [kind(*row) for row in await connection.execute(query)]


def is_client_name(text: str) -> bool:
    """True if `text` can be the name of a client in the tables."""
    return _CLIENT.fullmatch(text) is not None


def is_key_id(text: str) -> bool:
    """True if `text` has the form of the id of a key in the tables."""
    return _KEY_ID.fullmatch(text) is not None


def check_client(name: str) -> None:
    """Raises RowsRefused unless `name` can be the name of a client."""
    if not is_client_name(name):
        raise RowsRefused("the name of a client has 1 to 64 of A-Z a-z 0-9 _ . -")


def check_key(key: NewKey) -> None:
    """Raises RowsRefused for a key that no relay makes."""
    if not is_key_id(key.id):
        raise RowsRefused("the id of a key has 12 hex digits")
    check_digest(key.sha256)
    if key.expires_s is not None:
        check_time(key.expires_s)


def check_digest(digest: bytes) -> None:
    """Raises RowsRefused for anything but a SHA-256. A secret that is stored by mistake is one."""
    if len(digest) != _DIGEST_BYTES:
        raise RowsRefused("a SHA-256 has 32 bytes")


def check_time(at_s: int) -> None:
    """Raises RowsRefused for a time that is not a Unix time before the year 10000."""
    if not 0 <= at_s <= LATEST_S:
        raise RowsRefused("a time is in seconds since 1970, before the year 10000")


def checked_json(text: str, most_bytes: int = MAX_JSON_BYTES) -> msgspec.Raw:
    """Return the JSON of an object. Raises RowsRefused for any other text, or a longer one."""
    data = text.encode("utf-8", "surrogatepass")
    if len(data) > most_bytes:
        raise RowsRefused(f"the JSON is longer than {most_bytes} bytes")
    try:
        msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError) as error:
        raise RowsRefused("the JSON is not an object") from error
    return msgspec.Raw(data)


def details_json(details: Mapping[str, Any]) -> str:
    """Return the JSON of an audit row's details. Raises RowsRefused if it is too long."""
    encoded = msgspec.json.encode(details)
    if len(encoded) > MAX_DETAILS_BYTES:
        raise RowsRefused(f"the details are longer than {MAX_DETAILS_BYTES} bytes")
    return encoded.decode()


def audit_values(
    at_s: int, actor: str, action: str, target: str, details: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values of a new row of the audit."""
    return {
        "at_s": at_s,
        "actor": clean(actor),
        "action": clean(action),
        "target": clean(target),
        "details": details_json(details),
    }
