"""Clients, keys and the audit over HTTP: …/keys, …/clients, …/audit, a part of management.

Owns the requests and responses; gate/administration.py has the rules. The body of a new key is the
only response that ever holds one, and no response here may be cached.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from relay import log
from relay.core.errors import BadRequest, KeyNotFound, StoreUnavailable
from relay.core.fields import ABSENT
from relay.core.numbers import header_number
from relay.gate.administration import OPEN, Administration, MadeKey
from relay.gateway import GATEWAY
from relay.ledger.queries import iso
from relay.storage.access_rows import AuditRow, is_client_name, is_key_id
from relay.surfaces.descriptions import describe_client, describe_key, describe_keys
from relay.surfaces.logs import client_errors
from relay.surfaces.management import (
    authorize,
    limit_of,
    parameters_of,
    private_json,
    read_json,
)

_PAGE_ROWS, _MAX_PAGE_ROWS = 50, 500
_MAX_SEQ = 1 << 53
_DEFAULT_GRACE_S = 86400


class NewKeyBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST …/keys."""

    client: str
    record: msgspec.Raw = ABSENT
    """The record of a client that may be new; none: the client exists."""
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
    administration = _administration_of(request)
    parameters = parameters_of(request, "client", "cursor", "limit")
    limit = limit_of(parameters, _PAGE_ROWS, _MAX_PAGE_ROWS)
    client, after = parameters.get("client"), parameters.get("cursor", "")
    if client is not None and not is_client_name(client):
        raise BadRequest("client is not the name of a client")
    if after and not is_key_id(after):
        raise BadRequest("the cursor is not the one of a page of keys")
    with client_errors():
        rows = await administration.store.keys(client, after, limit)
        keys = await describe_keys(rows, administration)
    cursor = rows[-1].id if len(rows) == limit else None
    return private_json({"keys": keys, "cursor": cursor})


async def create_key(request: web.Request) -> web.Response:
    """Make a key. 201 with the key, which is not shown again, and `warnings`."""
    administration = _administration_of(request)
    body = await read_json(request, NewKeyBody)
    record = bytes(body.record).decode() or None
    with client_errors():
        made = await administration.create_key(body.client, record, body.expires)
    return await _answer_made(request, "key.create", made)


async def show_key(request: web.Request) -> web.Response:
    """One key of the database, with its state."""
    administration, id = _administration_of(request), request.match_info["id"]
    with client_errors():
        row = await administration.find_key(id)
        if row is None:
            raise KeyNotFound(id)
        [key] = await describe_keys([row], administration)
    return private_json(key)


async def revoke_key(request: web.Request) -> web.Response:
    """Revoke a key of the database. 200 with the key."""
    administration = _administration_of(request)
    with client_errors():
        row = await administration.revoke_key(request.match_info["id"])
    await _announce(request, "key.revoke", row.id, row.client)
    return private_json(describe_key(row, (), time.time()))


async def list_clients(request: web.Request) -> web.Response:
    """A page of the clients of gateway.yaml and of the database by name: `{"clients": […],
    "cursor"}`.
    """
    administration = _administration_of(request)
    parameters = parameters_of(request, "cursor", "limit")
    limit, after = limit_of(parameters, _PAGE_ROWS, _MAX_PAGE_ROWS), parameters.get("cursor", "")
    if after and not is_client_name(after):
        raise BadRequest("the cursor is not the one of a page of clients")
    with client_errors():
        found = await administration.list_clients(after, limit)
    clients = [describe_client(each, administration.config) for each in found]
    cursor = clients[-1]["name"] if len(clients) == limit else None
    return private_json({"clients": clients, "cursor": cursor})


async def show_client(request: web.Request) -> web.Response:
    """One client, with its keys: those of gateway.yaml, and the first 500 of the database."""
    administration, name = _administration_of(request), request.match_info["name"]
    with client_errors():
        client = await administration.require_client(name)
        rows = await administration.store.keys(name, "", _MAX_PAGE_ROWS)
        keys = await describe_keys([*administration.own_keys(name), *rows], administration)
    return private_json(describe_client(client, administration.config) | {"keys": keys})


async def put_client(request: web.Request) -> web.Response:
    """Create a client of the database, or replace its record, which is the body. 200 with it."""
    administration = _administration_of(request)
    record = bytes(await read_json(request, msgspec.Raw)).decode()
    with client_errors():
        row = await administration.put_client(request.match_info["name"], record)
    await _announce(request, "client.put", row.name, row.name)
    return private_json(describe_client(row, administration.config))


async def delete_client(request: web.Request) -> web.Response:
    """Delete a client of the database and revoke its keys. 200 with how many these were."""
    administration, name = _administration_of(request), request.match_info["name"]
    with client_errors():
        revoked = await administration.delete_client(name)
    await _announce(request, "client.revoke", name, name)
    return private_json({"keys_revoked": revoked})


async def rotate(request: web.Request) -> web.Response:
    """Make a new key of a client, and let its older ones expire after `grace_s`. 201 as for a new
    key.
    """
    administration, name = _administration_of(request), request.match_info["name"]
    body = await read_json(request, RotateBody) if request.can_read_body else RotateBody()
    with client_errors():
        made = await administration.rotate(name, body.grace_s, body.expires)
    return await _answer_made(request, "key.rotate", made)


async def list_audit(request: web.Request) -> web.Response:
    """A page of the audit, the latest change first: `{"audit": […], "cursor"}`."""
    administration = _administration_of(request)
    parameters = parameters_of(request, "cursor", "limit")
    limit = limit_of(parameters, _PAGE_ROWS, _MAX_PAGE_ROWS)
    before = header_number("cursor", parameters.get("cursor"), 0, _MAX_SEQ)
    with client_errors():
        rows = await administration.store.audit_rows(before, limit)
    cursor = str(rows[-1].seq) if len(rows) == limit else None
    return private_json({"audit": [_audit(row) for row in rows], "cursor": cursor})


def _administration_of(request: web.Request) -> Administration:
    """Return what changes clients and keys in the name of who sent the request. Raises the errors
    of `authorize`, and StoreUnavailable where there is no database.
    """
    manager, gateway = authorize(request), request.app[GATEWAY]
    if gateway.access_store is None:
        raise StoreUnavailable
    return Administration(gateway.access_store, gateway.config, str(manager), time.time)


async def _answer_made(request: web.Request, action: str, made: MadeKey) -> web.Response:
    if OPEN in made.warnings:
        log.warn("access.still_open", client=made.row.client, key=made.row.id)
    # The new key is valid in every process before its owner has it.
    await _announce(request, action, made.row.id, made.row.client)
    key = describe_key(made.row, (made.row.client,), time.time())
    return private_json({"key": made.secret} | key | {"warnings": made.warnings}, 201)


async def _announce(request: web.Request, action: str, target: str, client: str) -> None:
    """Log a change, and let every process apply it now."""
    log.event("access.changed", action=action, target=target, client=client)
    await request.app[GATEWAY].refresh_access()


def _audit(row: AuditRow) -> dict[str, Any]:
    return {
        "seq": row.seq,
        "at": iso(row.at_s),
        "actor": row.actor,
        "action": row.action,
        "target": row.target,
        "details": msgspec.Raw(row.details.encode()),
    }
