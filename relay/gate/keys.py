"""Find the client of a key: the keys of gateway.yaml and of the database, by their SHA-256.

Owns the keys in memory and how old their copy of the database may be. access_updates.py reads the
database; a key is never compared with another text, so a near miss takes no longer than any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256

from relay.core.access import Client, ClientKey
from relay.core.errors import StoreUnavailable
from relay.gate.access import Origins
from relay.registry.clients import Clients

MAX_AGE_S = 5.0
"""How old the copy of the database's keys may be: then calls with such keys get 503."""


class ClientKeys:
    """The keys in force. One per process; `configure` applies gateway.yaml, `put` and `remove` the
    changes of the database.
    """

    __slots__ = (
        "_clock", "_configured", "_read_s", "_stored", "anonymous", "has_store", "origins",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._configured: Mapping[bytes, ClientKey] = {}
        self._stored: dict[bytes, ClientKey] = {}
        self._read_s: float | None = None
        self.has_store = False
        """True if there is a database, which may have keys."""
        self.anonymous: Client | None = None
        self.origins = OriginUnion()

    def configure(self, clients: Clients) -> None:
        """Apply the clients of gateway.yaml."""
        self._configured, self.anonymous = clients.keys, clients.anonymous
        for client in clients.by_name.values():
            self.origins.add(client.rights.origins)

    def put(self, digest: bytes, key: ClientKey) -> None:
        """Add or replace a key of the database."""
        self._stored[digest] = key
        self.origins.add(key.client.rights.origins)

    def remove(self, digest: bytes) -> None:
        """Remove a key of the database: it was revoked."""
        self._stored.pop(digest, None)

    def note_read(self) -> None:
        """Note that the copy was compared with the database just now."""
        self._read_s = self._clock()

    def __len__(self) -> int:
        return len(self._configured) + len(self._stored)

    def find(self, secret: str) -> ClientKey | None:
        """Return the key; None if it is not known. A key of gateway.yaml wins."""
        if not self._configured and not self._stored:
            return None
        digest = sha256(secret.encode("utf-8", "surrogateescape")).digest()
        return self._configured.get(digest) or self._stored.get(digest)

    def require_fresh(self) -> None:
        """Raise StoreUnavailable if the database could not be read for MAX_AGE_S: a key may have
        been revoked since.
        """
        read_s = self._read_s
        if self.has_store and (read_s is None or self._clock() - read_s > MAX_AGE_S):
            raise StoreUnavailable

    def __repr__(self) -> str:
        return f"<ClientKeys {len(self)}>"


class OriginUnion:
    """The origins of all clients, for CORS preflights, which carry no key. It only grows: the call
    itself is checked against its own client's origins.
    """

    __slots__ = ("_allowed", "_known")

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._allowed = Origins(())

    def add(self, origins: tuple[str, ...]) -> None:
        """Add the origins of a client."""
        if not self._known.issuperset(origins):
            self._known.update(origins)
            self._allowed = Origins(self._known)

    @property
    def listed(self) -> bool:
        """True if there are any."""
        return self._allowed.listed

    def allow(self, origin: str) -> bool:
        """True if pages of `origin` may call as some client."""
        return self._allowed.allow(origin)
