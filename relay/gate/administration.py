"""Change clients and their keys: the rules, for the API and for the command line.

Owns the form of a made key, its id and its expiry, and what may be changed: the clients of
gateway.yaml are changed there alone, though keys of the database may be made for them.
storage/access.py stores each change with its audit. A key is returned once, and never stored.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from relay.core.access import KEY_PREFIX, ClientKey
from relay.core.errors import BadRequest, ClientConflict, ClientNotFound, KeyNotFound
from relay.core.numbers import LATEST_S, duration_s, unix_time_s
from relay.core.text import quoted
from relay.gate.keys import digest_of
from relay.registry.clients import BadRecord, checked_record
from relay.registry.load import Config
from relay.registry.schema import client_name
from relay.storage.access import AccessStore
from relay.storage.access_rows import ClientRow, KeyRow, NewKey, is_client_name, is_key_id

_KEY_BYTES, _ID_BYTES = 24, 6
MAX_GRACE_S = 366 * 86400
OPEN = (
    "access.mode is open, so calls without a key are still allowed; set access.mode: required in"
    " gateway.yaml when every client has a key"
)
_NO_FIELDS = "{}"


@dataclass(frozen=True, slots=True)
class MadeKey:
    """A new key. `secret` is the key itself, which is known only here and now."""

    row: KeyRow
    secret: str = field(repr=False)
    warnings: tuple[str, ...] = ()
    """What its maker should know, such as that calls without a key are still allowed."""


def new_secret() -> str:
    """Return a new key: `rk_` and 192 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def expiry_s(text: str, now_s: float) -> int:
    """Parse when a key expires: `30d` from now, or a date or time, which is later than now. Raises
    BadRequest.
    """
    after_s = duration_s(text)
    at_s = now_s + after_s if after_s is not None else unix_time_s(text, now_s)
    if at_s is None or at_s > LATEST_S:
        raise BadRequest(
            f"expires: '{quoted(text)}' is not a time such as 30d, 2027-01-31 or"
            " 2027-01-31T12:00:00Z"
        )
    if at_s <= now_s:
        raise BadRequest(f"expires: {quoted(text)} is in the past")
    return int(at_s)


def check_new_name(name: str) -> None:
    """Raise BadRequest unless a client of the database may have this name. One in the form of a
    key's id would make `revoke` ambiguous.
    """
    try:
        client_name(name)
    except ValueError as error:
        raise BadRequest(f"name: '{quoted(name)}' {error}") from error
    if is_key_id(name):
        raise BadRequest(f"name: '{name}' has the form of a key's id")


@dataclass(frozen=True, slots=True)
class Administration:
    """Changes the clients and keys of a database, of which `config` is the configuration. `actor`
    goes into the audit.

    Every method that asks the database raises DatabaseUnavailable, DatabaseNewer, RowsRefused and
    QueryRefused.
    """

    store: AccessStore
    config: Config
    actor: str
    now_s: Callable[[], float]
    """Returns the Unix time."""

    async def create_key(
        self, client: str, record: str | None = None, expires: str | None = None
    ) -> MadeKey:
        """Make a key of a client, which is created with the `record` (JSON) unless it exists.

        A client that was revoked gets the record back that it had, unless `record` has fields. One
        that exists keeps its record. Raises BadRequest; ClientNotFound without a record for a new
        client; ClientConflict for a client that exists with another record.
        """
        expires_s = self._expiry_s(expires)
        warnings = await self._warn_of_open_access()
        checked = None if record is None else self._checked(client, record)
        if checked is None:
            await self.require_client(client)

        def new_record(row: ClientRow | None) -> str | None:
            if checked is None:
                self._require(client, row)
                return None
            return self._new_record(client, row, checked, warnings)

        secret, key = _make_key(expires_s)
        made = await self.store.create_key(client, new_record, key, self.actor)
        return MadeKey(made, secret, tuple(warnings))

    def _new_record(
        self, client: str, row: ClientRow | None, record: str, warnings: list[str]
    ) -> str | None:
        """Return the record to be stored with a new key; None if the client has it already."""
        if row is None:
            return record
        if row.deleted_s is not None:
            if record != _NO_FIELDS:
                return record
            # Without its restrictions a revoked client would come back with more rights.
            warnings.append(
                f"the client '{client}' was revoked; its record is again the one it had"
            )
            return row.record
        if msgspec.json.decode(row.record) != msgspec.json.decode(record):
            raise ClientConflict(
                client,
                "exists with another record; make its key without one, or replace its record first"
                " (PUT)",
            )
        return None

    async def rotate(self, client: str, grace_s: int, expires: str | None = None) -> MadeKey:
        """Make a new key of a client, whose other keys of the database stay valid for `grace_s` at
        most. Raises BadRequest, ClientNotFound.
        """
        expires_s = self._expiry_s(expires)
        if not 0 <= grace_s <= MAX_GRACE_S:
            raise BadRequest(f"grace_s is not from 0 to {MAX_GRACE_S}")
        await self.require_client(client)
        warnings = [*self.unchanged_keys(client), *await self._warn_of_open_access()]
        secret, key = _make_key(expires_s)
        check = partial(self._require, client)
        row = await self.store.rotate(client, key, int(self.now_s()) + grace_s, self.actor, check)
        return MadeKey(row, secret, tuple(warnings))

    async def find_key(self, id: str) -> KeyRow | None:
        """Return a key of the database, also a revoked one; None if there is none."""
        return await self.store.key(id) if is_key_id(id) else None

    async def revoke_key(self, id: str) -> KeyRow:
        """Revoke a key of the database; again changes nothing. Raises KeyNotFound."""
        row = await self.store.revoke_key(id, self.actor) if is_key_id(id) else None
        if row is None:
            raise KeyNotFound(id)
        return row

    async def put_client(self, name: str, record: str) -> ClientRow:
        """Create a client of the database, or replace its record (JSON). Raises BadRequest,
        ClientConflict.
        """
        return await self.store.put_client(name, self._checked(name, record), self.actor)

    async def delete_client(self, name: str) -> int:
        """Delete a client of the database and revoke its keys; returns how many these were. Raises
        ClientNotFound, ClientConflict.
        """
        self._require_not_of_file(name)
        return await self.revoke_client(name)

    async def revoke_client(self, name: str) -> int:
        """Revoke the keys of the database of a client, and delete the client unless it is one of
        gateway.yaml; returns how many keys these were. Raises ClientNotFound.
        """
        # Keys may be left of a client that gateway.yaml had, and would be valid if it came back.
        revoked = await self.store.revoke_client(name, self.actor) if is_client_name(name) else None
        if revoked is None and name not in self.config.clients.by_name:
            raise ClientNotFound(name)
        return revoked or 0

    async def require_client(self, name: str) -> ClientRow | str:
        """Return the client of the database; the name of one of gateway.yaml. Raises
        ClientNotFound.
        """
        is_in_file = name in self.config.clients.by_name or not is_client_name(name)
        return self._require(name, None if is_in_file else await self.store.client(name))

    def _require(self, name: str, row: ClientRow | None) -> ClientRow | str:
        """Do the same, with the row of the client."""
        if name in self.config.clients.by_name:
            return name
        if row is None or row.deleted_s is not None:
            raise ClientNotFound(name)
        return row

    async def list_clients(self, after: str, limit: int) -> Sequence[ClientRow | str]:
        """Return clients by name, beginning after the name `after`: rows of the database, and the
        names of those of gateway.yaml, which win.
        """
        own = self.config.clients.by_name
        found: dict[str, ClientRow | str] = {name: name for name in own if name > after}
        # A row whose name gateway.yaml has too leaves a gap: so many more are read.
        for row in await self.store.clients(after, limit + len(found)):
            found.setdefault(row.name, row)
        return [found[name] for name in sorted(found)[:limit]]

    def own_keys(self, client: str | None = None) -> list[ClientKey]:
        """Return the keys of gateway.yaml, of one client or of all."""
        keys = self.config.clients.keys.values()
        return [key for key in keys if client in (None, key.client.name)]

    def unchanged_keys(self, client: str) -> tuple[str, ...]:
        """Return the warning that keys of gateway.yaml stay valid; none if there are none."""
        ids = ", ".join(key.id for key in self.own_keys(client))
        return (f"{ids} in gateway.yaml stay valid: remove them there, and reload",) if ids else ()

    async def existing_clients(self, keys: Sequence[KeyRow | ClientKey]) -> set[str]:
        """Return the names of the clients of keys, without those that are gone."""
        names = {key.client if isinstance(key, KeyRow) else key.client.name for key in keys}
        own = names & self.config.clients.by_name.keys()
        return own | await self.store.existing_clients(names - own)

    async def _warn_of_open_access(self) -> list[str]:
        """Return the warning of the first key while access is open; none for any other key."""
        if self.config.settings.access.mode != "open" or self.config.clients.keys:
            return []
        return [] if await self.store.keys(limit=1) else [OPEN]

    def _checked(self, client: str, record: str) -> str:
        """Return a record as it is stored. Raises BadRequest, ClientConflict."""
        self._require_not_of_file(client)
        check_new_name(client)
        try:
            return checked_record(record, self.config.settings, self.config.registry.providers)
        except BadRecord as error:
            raise BadRequest(f"the record is invalid: {error}") from error

    def _require_not_of_file(self, client: str) -> None:
        if client in self.config.clients.by_name:
            raise ClientConflict(client, "is in gateway.yaml, and is changed there alone")

    def _expiry_s(self, text: str | None) -> int | None:
        return None if text is None else expiry_s(text, self.now_s())


def _make_key(expires_s: int | None) -> tuple[str, NewKey]:
    """Make a key: the secret, and what of it is stored."""
    secret = new_secret()
    return secret, NewKey(secrets.token_hex(_ID_BYTES), digest_of(secret), expires_s)
