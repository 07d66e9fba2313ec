"""Change clients and keys: the rules of these changes, for the API and for the command line.

Owns the making of a key, and what may be changed: the clients of gateway.yaml are changed there
alone, though keys of the database may be made for them. storage/access.py stores each change with
its audit. A key is returned once, and never stored.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relay import log
from relay.core.access import KEY_PREFIX
from relay.core.errors import BadRequest, ClientConflict, ClientNotFound, KeyNotFound
from relay.gate.keys import digest_of
from relay.registry.clients import BadRecord, checked_record
from relay.registry.load import Config
from relay.registry.schema import client_name
from relay.storage.access import AccessStore
from relay.storage.access_rows import ClientRow, KeyRow, NewKey

_KEY_BYTES, _ID_BYTES = 24, 6
MAX_GRACE_S = 366 * 86400
_OPEN = (
    "Access is open: calls without a key are accepted too. Set access.mode: required in"
    " gateway.yaml when every client has a key."
)
_OWN_KEYS = "The keys of this client in gateway.yaml stay valid; replace them there."


@dataclass(frozen=True, slots=True)
class MadeKey:
    """A new key, with its row and what its maker should know."""

    secret: str
    row: KeyRow
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<MadeKey {self.row.id}>"


class Administration:
    """Changes the clients and keys of the database, by the configuration in force.

    Every method raises DatabaseUnavailable, DatabaseNewer and RowsRefused. `actor` names who makes
    a change.
    """

    def __init__(self, store: AccessStore, config: Config, now_s: Callable[[], float]) -> None:
        """`now_s` returns the Unix time."""
        self._store, self._config, self._now_s = store, config, now_s

    async def create_key(
        self, client: str, record: str | None, expires_s: int | None, actor: str
    ) -> MadeKey:
        """Make a key of a client. With a `record` (JSON) the client is new. Raises BadRequest,
        ClientNotFound, ClientConflict.
        """
        self._check_expiry(expires_s)
        if record is None:
            await self.require_client(client)
        else:
            record = self._checked(client, record)
            if await self._stored_client(client) is not None:
                raise ClientConflict(client, "exists already: its record is changed by PUT")
        secret, key = make_key(expires_s)
        row = await self._store.create_key(client, record, key, actor)
        return self._made("key.create", secret, row, ())

    async def rotate(self, client: str, grace_s: int, expires_s: int | None, actor: str) -> MadeKey:
        """Make a new key of a client, whose other keys of the database stay valid for `grace_s` at
        most. Raises BadRequest, ClientNotFound.
        """
        self._check_expiry(expires_s)
        await self.require_client(client)
        secret, key = make_key(expires_s)
        row = await self._store.rotate(client, key, int(self._now_s()) + grace_s, actor)
        own = self._config.settings.clients.get(client)
        has_own = own is not None and (own.key or own.key_sha256)
        return self._made("key.rotate", secret, row, (_OWN_KEYS,) if has_own else ())

    async def revoke_key(self, id: str, actor: str) -> KeyRow:
        """Revoke a key of the database; again changes nothing. Raises KeyNotFound."""
        row = await self._store.revoke_key(id, actor)
        if row is None:
            raise KeyNotFound(id)
        log.event("access.changed", action="key.revoke", target=row.id, client=row.client)
        return row

    async def put_client(self, name: str, record: str, actor: str) -> ClientRow:
        """Create a client of the database, or replace its record (JSON). Raises BadRequest,
        ClientConflict.
        """
        row = await self._store.put_client(name, self._checked(name, record), actor)
        log.event("access.changed", action="client.put", target=name, client=name)
        return row

    async def delete_client(self, name: str, actor: str) -> int:
        """Delete a client of the database and revoke its keys; returns how many these were. Raises
        ClientNotFound, ClientConflict.
        """
        self._require_not_of_file(name)
        if await self._stored_client(name) is None:
            raise ClientNotFound(name)
        revoked = await self._store.revoke_client(name, actor)
        log.event("access.changed", action="client.revoke", target=name, client=name)
        return revoked

    async def require_client(self, name: str) -> ClientRow | None:
        """Return the client of the database; None for one of gateway.yaml. Raises
        ClientNotFound.
        """
        if name in self._config.clients.by_name:
            return None
        row = await self._stored_client(name)
        if row is None:
            raise ClientNotFound(name)
        return row

    async def list_clients(self, after: str, limit: int) -> Sequence[ClientRow | str]:
        """Return clients by name, beginning after the name `after`: rows of the database, and the
        names of those of gateway.yaml, which win.
        """
        own = self._config.clients.by_name
        found: dict[str, ClientRow | str] = {name: name for name in own if name > after}
        # A row whose name gateway.yaml has too leaves a gap: so many more are read.
        for row in await self._store.clients(after, limit + len(found)):
            found.setdefault(row.name, row)
        return [found[name] for name in sorted(found)[:limit]]

    async def _stored_client(self, name: str) -> ClientRow | None:
        row = await self._store.client(name)
        return row if row is not None and row.deleted_s is None else None

    def _checked(self, client: str, record: str) -> str:
        """Return a record as it is stored. Raises BadRequest, ClientConflict."""
        try:
            client_name(client)
        except ValueError as error:
            raise BadRequest(f"the name of a client {error}") from error
        self._require_not_of_file(client)
        try:
            return checked_record(record, self._config.settings, self._config.registry.providers)
        except BadRecord as error:
            raise BadRequest(f"the record is invalid: {error}") from error

    def _require_not_of_file(self, client: str) -> None:
        if client in self._config.clients.by_name:
            raise ClientConflict(client, "is in gateway.yaml, and is changed there alone")

    def _check_expiry(self, expires_s: int | None) -> None:
        if expires_s is not None and expires_s <= self._now_s():
            raise BadRequest("the expiry is in the past")

    def _made(self, action: str, secret: str, row: KeyRow, warnings: tuple[str, ...]) -> MadeKey:
        log.event("access.changed", action=action, target=row.id, client=row.client)
        if self._config.settings.access.mode == "open":
            warnings = (_OPEN, *warnings)
            log.warn("access.still_open", client=row.client, key=row.id)
        return MadeKey(secret, row, warnings)


def make_key(expires_s: int | None) -> tuple[str, NewKey]:
    """Make a key: the secret, and what of it is stored."""
    secret = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    return secret, NewKey(secrets.token_hex(_ID_BYTES), digest_of(secret), expires_s)
