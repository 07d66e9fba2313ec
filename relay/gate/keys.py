"""Find the client of a key: the keys of gateway.yaml and of the database, by their SHA-256.

Owns the keys in memory, and how old their copy of the database may be. access_updates.py reads the
database. A key is never compared with another text, so a near miss takes no longer than any other:
it is looked up by a hash of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from hashlib import sha256

from relay import log
from relay.core.access import Client, ClientKey, Rights, StoredKey
from relay.core.errors import KeysUnavailable
from relay.core.memo import BoundedMemo
from relay.gate.access import Origins
from relay.gate.wrong_tries import WrongTries
from relay.registry.clients import BadRecord, Clients, rights_of

MAX_AGE_S = 5.0
"""How old the copy of the database's keys may be: then calls with such keys get 503."""
_MAX_RECORDS = 256
_MAX_HEADERS, _MAX_HEADER_CHARACTERS = 4096, 512
_NO_RIGHTS = Rights(providers=frozenset({""}))
"""The rights of a client whose record cannot be read: it may call no provider."""


class ClientKeys:
    """The clients and keys in force. One per process. `configure` applies gateway.yaml; the other
    methods that change something, the changes of the database.
    """

    __slots__ = (
        "_by_header", "_clients", "_clock", "_configured", "_fresh_until_s", "_records", "_stored",
        "changes", "has_store", "management", "origins", "wrong_tries",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._configured = Clients()
        self._clients: dict[str, Client | str] = {}
        """Those of the database: the record as it is stored, until the client calls."""
        self._records: BoundedMemo[str, str] = BoundedMemo(str, _MAX_RECORDS)
        """Equal records that are loaded one after another are one text."""
        self._stored: dict[bytes, StoredKey] = {}
        self._by_header: dict[str, ClientKey] = {}
        """The keys that have called since the last change, by the header that carried them. Most
        calls are recognized so, which costs half as much as to read all places of keys."""
        self._fresh_until_s = -math.inf
        self.has_store = False
        """True if there is a database, which may have keys."""
        self.management: frozenset[bytes] = frozenset()
        """The SHA-256 of the tokens of management, which are no keys of clients."""
        self.changes = 0
        """Number of changes so far: while it stays the same, no key was added or removed."""
        self.origins = OriginUnion()
        self.wrong_tries = WrongTries(clock)

    @property
    def anonymous(self) -> Client | None:
        """The client of calls without a key; None if there is none."""
        return self._configured.anonymous

    def configure(self, clients: Clients) -> None:
        """Apply the clients of gateway.yaml."""
        self._configured = clients
        self._note_change()
        for client in clients.by_name.values():
            self.origins.add(client.rights.origins)

    def put_client(self, name: str, record: str) -> None:
        """Add a client of the database, or replace its record."""
        # Read when the client calls: until then it is a text, and often the same one for many.
        self._clients[name] = self._records[record]
        self._note_change()
        if '"origins"' in record and (client := self.client(name)) is not None:
            self.origins.add(client.rights.origins)

    def remove_client(self, name: str) -> None:
        """Remove a client of the database."""
        self._clients.pop(name, None)
        self._note_change()

    def put_key(self, digest: bytes, key: StoredKey) -> None:
        """Add or replace a key of the database."""
        self._stored[digest] = key
        self._note_change()

    def remove_key(self, digest: bytes) -> None:
        """Remove a key of the database: it was revoked."""
        self._stored.pop(digest, None)
        self._note_change()

    def _note_change(self) -> None:
        self.changes += 1
        self._by_header.clear()

    def stored_clients(self) -> set[str]:
        """Return the names of the clients of the database."""
        return set(self._clients)

    def stored_keys(self) -> set[bytes]:
        """Return the SHA-256 of the keys of the database."""
        return set(self._stored)

    def note_read(self, at_s: float) -> None:
        """Note that the copy is as the database was at `at_s` by the clock."""
        self._fresh_until_s = at_s + MAX_AGE_S

    @property
    def knows_any(self) -> bool:
        """True if there is a secret of the relay that may have any form."""
        return bool(self._configured.keys or self._stored or self.management)

    def __len__(self) -> int:
        return len(self._configured.keys) + len(self._stored)

    def client(self, name: str) -> Client | None:
        """Return the client of this name; one of gateway.yaml wins. None if there is none."""
        if (configured := self._configured.by_name.get(name)) is not None:
            return configured
        stored = self._clients.get(name)
        if type(stored) is str:
            self._clients[name] = stored = Client(name, _rights(name, stored))
        return stored  # type: ignore[return-value]

    def find(self, secret: str) -> ClientKey | None:
        """Return the key that is this text; None if it is not known."""
        if not self._stored and not self._configured.keys:
            return None
        return self.by_digest(digest_of(secret))

    def in_header(self, value: str) -> ClientKey | None:
        """Return the key that this value of a header carried since the last change; None if `find`
        has to look.
        """
        return self._by_header.get(value)

    def note_header(self, value: str, key: ClientKey) -> None:
        """Note that this value of a header carries `key`, and no known key before it."""
        if len(value) <= _MAX_HEADER_CHARACTERS:
            if len(self._by_header) >= _MAX_HEADERS:
                self._by_header.clear()
            self._by_header[value] = key

    def by_digest(self, digest: bytes) -> ClientKey | None:
        """Return the key with this SHA-256; one of gateway.yaml wins. None if it is not known, or
        its client is not.
        """
        if (configured := self._configured.keys.get(digest)) is not None:
            return configured
        stored = self._stored.get(digest)
        client = self.client(stored.client) if stored is not None else None
        if stored is None or client is None:
            return None
        return ClientKey(stored.id, digest, client, stored.expires_s, stored=True)

    def is_valid(self, key: ClientKey, now_s: float) -> bool:
        """True unless the key was revoked since it was found, belongs to another client now, or has
        expired at the Unix time `now_s`.
        """
        now = self.by_digest(key.digest)
        return (
            now is not None
            and now.client.name == key.client.name
            and (now.expires_s is None or now.expires_s > now_s)
        )

    @property
    def is_fresh(self) -> bool:
        """True if the copy of the database's keys is less than MAX_AGE_S old, or there is none."""
        return not self.has_store or self._clock() <= self._fresh_until_s

    def is_management(self, secret: str) -> bool:
        """True for a token of management. It opens no call, and never goes to a provider."""
        return bool(self.management) and digest_of(secret) in self.management

    def is_ours(self, secret: str) -> bool:
        """True for a key of a client or a token of management: no provider may get it."""
        return self.knows_any and self._knows(digest_of(secret))

    def _knows(self, digest: bytes) -> bool:
        return digest in self.management or self.by_digest(digest) is not None

    def require_fresh(self) -> None:
        """Raise KeysUnavailable if the database could not be read for MAX_AGE_S: a key may have
        been revoked since.
        """
        # As `is_fresh`, which nearly every call with a key would read.
        if self.has_store and self._clock() > self._fresh_until_s:
            raise KeysUnavailable

    def __repr__(self) -> str:
        return f"<ClientKeys {len(self)}>"


def digest_of(secret: str) -> bytes:
    """Return the SHA-256 of a secret, by which it is known."""
    return sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _rights(name: str, record: str) -> Rights:
    try:
        return rights_of(record)
    except BadRecord as error:
        log.warn("access.bad_record", client=name, cause=str(error))
        return _NO_RIGHTS


class OriginUnion:
    """The origins of all clients, for CORS preflights, which carry no key. It only grows: the call
    itself is checked against its own client's origins.
    """

    __slots__ = ("_allowed", "_known")

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._allowed: Origins | None = Origins(())
        """None until it is made of what is known: 100,000 clients are added one after another."""

    def add(self, origins: tuple[str, ...]) -> None:
        """Add the origins of a client."""
        if not self._known.issuperset(origins):
            self._known.update(origins)
            self._allowed = None

    @property
    def listed(self) -> bool:
        """True if there are any."""
        return bool(self._known)

    def allow(self, origin: str) -> bool:
        """True if pages of `origin` may call as some client."""
        if self._allowed is None:
            self._allowed = Origins(self._known)
        return self._allowed.allow(origin)
