"""Clients, keys and the audit over HTTP: …/keys, …/clients, …/audit, a part of management.

Owns the requests and the shape of responses; gate/administration.py has the rules. The body of a
new key is the only response that ever holds one, and no response here may be cached.
"""

from __future__ import annotations

import re
import time
from typing import Any

import msgspec
from aiohttp import web

from relay.core.access import ClientKey
from relay.core.errors import BadRequest, KeyNotFound, StoreUnavailable
from relay.core.fields import ABSENT
from relay.core.numbers import unix_time_s
from relay.gate.administration import MAX_GRACE_S, Administration, MadeKey
from relay.gateway import GATEWAY, Gateway
from relay.ledger.queries import iso
from relay.storage.access import AccessStore
from relay.storage.access_rows import AuditRow, ClientRow, KeyRow
from relay.surfaces.logs import client_errors, whole_of
from relay.surfaces.management import authorize, read_json

_PAGE_ROWS, _MAX_PAGE_ROWS = 50, 500
_MAX_SEQ = 1 << 53
_DEFAULT_GRACE_S = 86400
_KEY_ID = re.compile(r"[0-9a-f]{12}\Z")


class NewKeyBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST …/keys."""

    client: str
    record: msgspec.Raw = ABSENT
    """The record of a new client; none: the client exists."""
    expires: str | None = None


class RotateBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST …/clients/{name}/rotate."""

    grace_s: int = _DEFAULT_GRACE_S
    """How long the older keys stay valid."""
    expires: str | None = None


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the routes under `prefix`."""
    router = app.router
    router.add_get(f"{prefix}/keys", list_keys)
    router.add_post(f"{prefix}/keys", create_key)
    router.add_get(f"{prefix}/keys/{{id}}", show_key)
    router.add_delete(f"{prefix}/keys/{{id}}", revoke_key)
    router.add_get(f"{prefix}/clients", list_clients)
    router.add_get(f"{prefix}/clients/{{name}}", show_client)
    router.add_put(f"{prefix}/clients/{{name}}", put_client)
    router.add_delete(f"{prefix}/clients/{{name}}", delete_client)
    router.add_post(f"{prefix}/clients/{{name}}/rotate", rotate)
    router.add_get(f"{prefix}/audit", list_audit)


async def list_keys(request: web.Request) -> web.Response:
    """A page of the database's keys by client and id, revoked ones too: `{"keys": […], "cursor"}`.
    `client=` selects those of one client.
    """
    authorize(request)
    store, parameters = _store_of(request), _parameters(request, "client", "cursor", "limit")
    with client_errors():
        limit = _limit_of(parameters)
        after = parameters.get("cursor", "")
        if after and not _KEY_ID.match(after):
            raise BadRequest("the cursor is not the one of a page of keys")
        rows = await store.keys(parameters.get("client"), after, limit)
    cursor = rows[-1].id if len(rows) == limit else None
    return _as_json({"keys": [_key(row) for row in rows], "cursor": cursor})


async def create_key(request: web.Request) -> web.Response:
    """Make a key. 201 with the key, which is not shown again, and `warnings`."""
    manager = authorize(request)
    administration = _administration_of(request)
    body = await read_json(request, NewKeyBody)
    record = bytes(body.record).decode() or None
    with client_errors():
        made = await administration.create_key(
            body.client, record, _expiry_s(body.expires), str(manager)
        )
    return await _answer_made(request, made)


async def show_key(request: web.Request) -> web.Response:
    """One key of the database, with its state."""
    authorize(request)
    with client_errors():
        row = await _store_of(request).key(request.match_info["id"])
    if row is None:
        raise KeyNotFound(request.match_info["id"])
    return _as_json(_key(row))


async def revoke_key(request: web.Request) -> web.Response:
    """Revoke a key of the database. 200 with the key."""
    manager = authorize(request)
    with client_errors():
        row = await _administration_of(request).revoke_key(request.match_info["id"], str(manager))
    await request.app[GATEWAY].refresh_access()
    return _as_json(_key(row))


async def list_clients(request: web.Request) -> web.Response:
    """A page of the clients of gateway.yaml and of the database by name: `{"clients": […],
    "cursor"}`.
    """
    authorize(request)
    administration = _administration_of(request)
    parameters = _parameters(request, "cursor", "limit")
    with client_errors():
        limit = _limit_of(parameters)
        found = await administration.list_clients(parameters.get("cursor", ""), limit)
    clients = [_client(request, each) for each in found]
    cursor = clients[-1]["name"] if len(clients) == limit else None
    return _as_json({"clients": clients, "cursor": cursor})


async def show_client(request: web.Request) -> web.Response:
    """One client, with its keys: those of gateway.yaml, and the first 500 of the database."""
    authorize(request)
    name, gateway = request.match_info["name"], request.app[GATEWAY]
    with client_errors():
        row = await _administration_of(request).require_client(name)
        stored = await _store_of(request).keys(name, "", _MAX_PAGE_ROWS)
    own = [key for key in gateway.config.clients.keys.values() if key.client.name == name]
    keys = [*map(_own_key, own), *map(_key, stored)]
    return _as_json(_client(request, row if row is not None else name) | {"keys": keys})


async def put_client(request: web.Request) -> web.Response:
    """Create a client of the database, or replace its record, which is the body. 200 with it."""
    manager = authorize(request)
    administration = _administration_of(request)
    record = bytes(await read_json(request, msgspec.Raw)).decode()
    with client_errors():
        row = await administration.put_client(request.match_info["name"], record, str(manager))
    await request.app[GATEWAY].refresh_access()
    return _as_json(_client(request, row))


async def delete_client(request: web.Request) -> web.Response:
    """Delete a client of the database and revoke its keys. 200 with how many these were."""
    manager = authorize(request)
    with client_errors():
        revoked = await _administration_of(request).delete_client(
            request.match_info["name"], str(manager)
        )
    await request.app[GATEWAY].refresh_access()
    return _as_json({"keys_revoked": revoked})


async def rotate(request: web.Request) -> web.Response:
    """Make a new key of a client, and let its older ones expire after `grace_s`. 201 as for a new
    key.
    """
    manager = authorize(request)
    administration = _administration_of(request)
    body = await read_json(request, RotateBody) if request.can_read_body else RotateBody()
    if not 0 <= body.grace_s <= MAX_GRACE_S:
        raise BadRequest(f"grace_s is not from 0 to {MAX_GRACE_S}")
    with client_errors():
        made = await administration.rotate(
            request.match_info["name"], body.grace_s, _expiry_s(body.expires), str(manager)
        )
    return await _answer_made(request, made)


async def list_audit(request: web.Request) -> web.Response:
    """A page of the audit, the latest change first: `{"audit": […], "cursor"}`."""
    authorize(request)
    store, parameters = _store_of(request), _parameters(request, "cursor", "limit")
    with client_errors():
        limit = _limit_of(parameters)
        before = None
        if "cursor" in parameters:
            before = whole_of("cursor", parameters["cursor"], 0, _MAX_SEQ)
        rows = await store.audit_rows(before, limit)
    cursor = str(rows[-1].seq) if len(rows) == limit else None
    return _as_json({"audit": [_audit(row) for row in rows], "cursor": cursor})


def _store_of(request: web.Request) -> AccessStore:
    """The store. Raises StoreUnavailable where there is no database."""
    store = request.app[GATEWAY].access_store
    if store is None:
        raise StoreUnavailable
    return store


def _administration_of(request: web.Request) -> Administration:
    store = _store_of(request)
    return Administration(store, request.app[GATEWAY].config, time.time)


def _parameters(request: web.Request, *known: str) -> dict[str, str]:
    parameters = dict(request.query)
    if unknown := set(parameters) - set(known):
        raise BadRequest(f"unknown parameter '{min(unknown)[:40]}'")
    return parameters


def _limit_of(parameters: dict[str, str]) -> int:
    return whole_of("limit", parameters.get("limit", str(_PAGE_ROWS)), 1, _MAX_PAGE_ROWS)


def _expiry_s(text: str | None) -> int | None:
    """The Unix time of `expires`, in ISO 8601. Raises BadRequest."""
    if text is None:
        return None
    at_s = unix_time_s(text, 0)
    if at_s is None:
        raise BadRequest("expires is not a date or time such as 2027-01-31 or 2027-01-31T12:00:00Z")
    return int(at_s)


async def _answer_made(request: web.Request, made: MadeKey) -> web.Response:
    # The new key is valid in every process before its owner has it.
    await request.app[GATEWAY].refresh_access()
    shown = {"key": made.secret} | _key(made.row) | {"warnings": made.warnings}
    return _as_json(shown, 201)


def _key(row: KeyRow) -> dict[str, Any]:
    expired = row.expires_s is not None and row.expires_s <= time.time()
    return {
        "id": row.id,
        "client": row.client,
        "source": "database",
        "state": "revoked" if row.revoked_s is not None else "expired" if expired else "valid",
        "created_at": _iso(row.created_s),
        "created_by": row.created_by,
        "expires_at": _iso(row.expires_s),
        "revoked_at": _iso(row.revoked_s),
    }


def _own_key(key: ClientKey) -> dict[str, Any]:
    expired = key.expires_s is not None and key.expires_s <= time.time()
    return {
        "id": key.id,
        "client": key.client.name,
        "source": "gateway.yaml",
        "state": "expired" if expired else "valid",
        "expires_at": _iso(key.expires_s),
    }


def _client(request: web.Request, client: ClientRow | str) -> dict[str, Any]:
    """Describe a client of the database, or the one of gateway.yaml of this name."""
    if isinstance(client, str):
        return {"name": client, "source": "gateway.yaml", "record": _own_record(request, client)}
    return {
        "name": client.name,
        "source": "database",
        "record": msgspec.Raw(client.record.encode()),
        "created_at": _iso(client.created_s),
        "created_by": client.created_by,
    }


def _own_record(request: web.Request, name: str) -> dict[str, Any]:
    gateway: Gateway = request.app[GATEWAY]
    entry = gateway.settings.clients[name]
    return entry.model_dump(mode="json", exclude_defaults=True, exclude={"key", "key_sha256"})


def _audit(row: AuditRow) -> dict[str, Any]:
    return {
        "seq": row.seq,
        "at": _iso(row.at_s),
        "actor": row.actor,
        "action": row.action,
        "target": row.target,
        "details": msgspec.Raw(row.details.encode()),
    }


def _iso(at_s: int | None) -> str | None:
    return None if at_s is None else iso(at_s)


def _as_json(content: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(content), status=status, content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )  # fmt: skip
