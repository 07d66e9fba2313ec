"""Make, rotate and revoke the client keys of the database, for the command line and the API.

Owns the form of a made key, its id and its expiry, and which names keys may be made for. The store
keeps the SHA-256 of a key, never the key; a running relay reads the store twice a second.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import msgspec

from relay.core.access import KEY_PREFIX
from relay.core.addresses import address_of
from relay.core.numbers import LATEST_S, duration_s, unix_time_s
from relay.core.text import quoted
from relay.registry.clients import BadRecord, checked_record
from relay.registry.load import Config
from relay.storage.access import AccessStore
from relay.storage.access_rows import ClientRow, KeyRow, NewKey, is_client_name, is_key_id

_KEY_BYTES = 24
_ID_BYTES = 6
_OPEN = (
    "access.mode is open, so calls without a key are still allowed; `access: {mode: required}` in"
    " gateway.yaml refuses them"
)


class KeyRefused(ValueError):
    """A key cannot be made or changed like this; the text names the field, and says why."""


class KeyConflict(KeyRefused):
    """The client exists, and not as it was given."""


class KeyUnknown(LookupError):
    """There is no key or client of this id or name; the text says so."""


@dataclass(frozen=True, slots=True)
class MadeKey:
    """A new key. `secret` is the key itself, which is known only here and now."""

    row: KeyRow
    secret: str = field(repr=False)
    warnings: tuple[str, ...] = ()
    """What its maker should know, such as that calls without a key are allowed still."""


@dataclass(frozen=True, slots=True)
class Revoked:
    """What was revoked: the client, and the id of the key or of none, if it was all of them."""

    client: str
    key_id: str | None
    keys: int
    """How many keys are revoked now that were not before."""
    configured: tuple[str, ...] = ()
    """Keys of the client that go on, since they are in gateway.yaml."""


def new_secret() -> str:
    """Return a new key: `rk_` and 192 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def new_key(secret: str, expires_s: int | None) -> NewKey:
    """Return what is stored of a key."""
    return NewKey(secrets.token_hex(_ID_BYTES), sha256(secret.encode()).digest(), expires_s)


def expiry_s(text: str, now_s: float) -> int:
    """Parse when a key expires: `30d` from now, or a date or time, which is later than now. Raises
    KeyRefused.
    """
    after_s = duration_s(text)
    at_s = now_s + after_s if after_s is not None else unix_time_s(text, now_s)
    if at_s is None or at_s > LATEST_S:
        raise KeyRefused(
            f"expires: '{quoted(text)}' is not a time such as 30d, 2027-01-31 or"
            " 2027-01-31T12:00:00Z"
        )
    if at_s <= now_s:
        raise KeyRefused(f"expires: {quoted(text)} is in the past")
    return int(at_s)


def check_new_name(name: str) -> None:
    """Raise KeyRefused unless a client of the database may have this name."""
    if not is_client_name(name) or not name[0].isalnum() or address_of(name) is not None:
        raise KeyRefused(
            f"name: '{quoted(name)}' is not a name of 1 to 64 of the characters A-Z a-z 0-9 _ . -"
            " that begins with a letter or digit and is no address"
        )
    if is_key_id(name):
        raise KeyRefused(f"name: '{name}' has the form of a key's id")


@dataclass(frozen=True, slots=True)
class KeyMaker:
    """Changes keys of a database, of which `config` is the configuration. `actor` goes into the
    audit.

    Every method raises KeyRefused, KeyUnknown, and what AccessStore raises.
    """

    store: AccessStore
    config: Config
    actor: str
    now_s: float
    """The Unix time."""

    async def create(
        self, name: str, record: Mapping[str, Any] | None = None, expires: str | None = None
    ) -> MadeKey:
        """Make a key of a client. `record` has the fields of a client in gateway.yaml; without one,
        a client that does not exist yet may do everything. Raises KeyConflict for a record of a
        client that exists with another one.
        """
        expires_s = expiry_s(expires, self.now_s) if expires is not None else None
        warnings: list[str] = []
        stored = await self._record(name, record, warnings)
        if await self._is_first_key_while_open():
            warnings.append(_OPEN)
        secret = new_secret()
        row = await self.store.create_key(name, stored, new_key(secret, expires_s), self.actor)
        return MadeKey(row, secret, tuple(warnings))

    async def _record(
        self, name: str, record: Mapping[str, Any] | None, warnings: list[str]
    ) -> str | None:
        """Return the record to be stored with a new key; None if the client has one already."""
        if name in self.config.clients.by_name:
            if record:
                raise KeyConflict(
                    f"{', '.join(record)}: the client '{name}' is in gateway.yaml, where its record"
                    " is changed; make its key without these"
                )
            return None
        check_new_name(name)
        existing = await self.store.client(name)
        if existing is not None and not record:
            if existing.deleted_s is None:
                return None
            # Without its restrictions a revoked client would come back with more rights.
            warnings.append(f"the client '{name}' was revoked; its record is again the one it had")
            return existing.record
        try:
            given = msgspec.json.encode(record or {}).decode()
            text = checked_record(given, self.config.settings, self.config.registry.providers)
        except (BadRecord, TypeError, ValueError) as error:
            raise KeyRefused(str(error)) from None
        if existing is None or existing.deleted_s is not None:
            return text
        if msgspec.json.decode(existing.record) != msgspec.json.decode(text):
            raise KeyConflict(
                f"the client '{name}' exists with another record; make its key without"
                f" {', '.join(record or ())}, or change the record of the client"
            )
        return None

    async def _is_first_key_while_open(self) -> bool:
        if self.config.settings.access.mode != "open" or self.config.clients.keys:
            return False
        return not await self.store.keys(limit=1)

    async def rotate(self, name: str, grace: str, expires: str | None = None) -> MadeKey:
        """Make a new key of a client that exists, and let its older keys of the database expire
        after `grace`, such as `24h`.
        """
        expires_s = expiry_s(expires, self.now_s) if expires is not None else None
        grace_s = 0 if grace == "0" else duration_s(grace)
        if grace_s is None:
            raise KeyRefused(f"grace: '{quoted(grace)}' is not a time such as 24h, 90m or 0")
        if name not in self.config.clients.by_name and not await self._stored_client(name):
            raise KeyUnknown(f"there is no client '{quoted(name)}'")
        secret = new_secret()
        key, old_expires_s = new_key(secret, expires_s), int(self.now_s) + grace_s
        return MadeKey(await self.store.rotate(name, key, old_expires_s, self.actor), secret)

    async def revoke(self, target: str) -> Revoked:
        """Revoke the key of an id, or all keys of the client of a name, which is deleted if it is
        one of the database. To revoke a key again changes nothing.
        """
        if is_key_id(target) and (before := await self.store.key(target)) is not None:
            row = await self.store.revoke_key(target, self.actor)
            assert row is not None
            return Revoked(row.client, target, int(before.revoked_s is None))
        configured = tuple(
            key.id
            for key in self.config.clients.keys.values()
            if target in (key.id, key.client.name)
        )
        if target in configured:
            raise KeyConflict(f"the key {target} is in gateway.yaml: remove it there, and reload")
        if not configured and target not in self.config.clients.by_name:
            if not is_client_name(target) or await self.store.client(target) is None:
                raise KeyUnknown(f"there is no key and no client '{quoted(target)}'")
        return Revoked(target, None, await self.store.revoke_client(target, self.actor), configured)

    async def _stored_client(self, name: str) -> ClientRow | None:
        """Return the client of the database that is not deleted; None if there is none."""
        row = await self.store.client(name) if is_client_name(name) else None
        return row if row is not None and row.deleted_s is None else None
