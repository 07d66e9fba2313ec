"""Describe clients and their keys as JSON, for the API and for `relay keys`. No key is in it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import msgspec

from relay.core.access import ClientKey
from relay.gate.administration import Administration
from relay.ledger.queries import iso
from relay.registry.load import Config
from relay.storage.access_rows import ClientRow, KeyRow


def describe_client(client: ClientRow | str, config: Config) -> dict[str, Any]:
    """Describe a client of the database, or the one of gateway.yaml of this name."""
    if isinstance(client, str):
        entry = config.settings.clients[client]
        record = entry.model_dump(mode="json", exclude_defaults=True, exclude={"key", "key_sha256"})
        return {"name": client, "source": "gateway.yaml", "record": record}
    return {
        "name": client.name,
        "source": "database",
        "record": msgspec.Raw(client.record.encode()),
        "created_at": iso(client.created_s),
        "created_by": client.created_by,
    }


async def describe_keys(
    keys: Sequence[KeyRow | ClientKey], administration: Administration
) -> list[dict[str, Any]]:
    """Describe keys of the database and of gateway.yaml. Raises what the database raises."""
    clients = await administration.existing_clients(keys)
    return [describe_key(key, clients, administration.now_s()) for key in keys]


def describe_key(key: KeyRow | ClientKey, clients: Container[str], now_s: float) -> dict[str, Any]:
    """Describe a key. `clients` has the name of its client, unless the client is gone."""
    stored = key if isinstance(key, KeyRow) else None
    client = key.client if isinstance(key, KeyRow) else key.client.name
    if stored is not None and stored.revoked_s is not None:
        state = "revoked"
    elif key.expires_s is not None and key.expires_s <= now_s:
        state = "expired"
    else:
        state = "valid" if client in clients else "no client"
    return {
        "id": key.id,
        "client": client,
        "source": "gateway.yaml" if stored is None else "database",
        "state": state,
        "created_at": None if stored is None else iso(stored.created_s),
        "created_by": None if stored is None else stored.created_by,
        "expires_at": _iso(key.expires_s),
        "revoked_at": None if stored is None else _iso(stored.revoked_s),
    }


def _iso(at_s: int | None) -> str | None:
    return None if at_s is None else iso(at_s)
