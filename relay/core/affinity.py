"""Tie the calls of a session to one key of a pool, so that prompt caches, encrypted reasoning and
stored responses stay with the key that made them.

Owns what ties a call to a key, the order of a pool's keys for a session (weighted rendezvous
hashing), and the memory of the keys that are known to be right. All of it is digests: no key and no
id of a client is kept. upstream/health.py chooses among the keys that are available.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

from relay.core.agents import agent_session

_MAX_KNOWN = 32_768
"""Sessions and responses whose key is remembered: about 5 MB."""
_DIGEST_BYTES = 16
_RESPONSE_IN_PATH = re.compile(r"(?:^|/)responses/(resp_[\w-]{1,250})(?:/|$)")
_RESPONSE_IN_BODY = re.compile(rb'"id"\s{0,16}:\s{0,16}"(resp_[\w-]{1,250})"')
"""Quotes in the text of a response are escaped, so that no such text matches."""


class Affinity(NamedTuple):
    """What ties a call to a key. `session` and `response` are digests, empty if there is none."""

    client: str
    session: bytes = b""
    """Of the agent's session, else of `prompt_cache_key`."""
    response: bytes = b""
    """Of the response that the call continues or reads."""
    names_response: bool = False
    """True if the path names `response`, so that a 404 means that the key does not know it."""


def affinity_of(
    client: str, header: Callable[[str], str | None], endpoint: str,
    prompt_cache_key: str | None = None, previous_response_id: str | None = None,
) -> Affinity:  # fmt: skip
    """Return what ties a call of `client` to a key."""
    named = _RESPONSE_IN_PATH.search(endpoint)
    response = named[1] if named is not None else previous_response_id
    agent = agent_session(header)
    session = agent.id if agent is not None else prompt_cache_key
    return Affinity(
        client,
        digest_of(client, "session", session) if session else b"",
        digest_of(client, "response", response) if response else b"",
        named is not None,
    )


def digest_of(client: str, kind: str, text: str) -> bytes:
    """Return the digest of a session or response of `client`."""
    whole = f"{kind} {len(client)} {client} {text}".encode("utf-8", "surrogatepass")
    return blake2b(whole, digest_size=_DIGEST_BYTES).digest()


def key_id(secret: str) -> bytes:
    """Return the identity of a provider's key: the same in every process, and after a restart."""
    whole = secret.encode("utf-8", "surrogatepass")
    return blake2b(whole, digest_size=_DIGEST_BYTES, person=b"relay key").digest()


def rank(session: bytes, ids: Sequence[bytes], weights: Sequence[float]) -> list[int]:
    """Return the indices of keys in the order in which a session uses them: by weighted rendezvous
    hashing. If a key is added or removed, only the sessions that use it move. Without `weights` all
    are equal.
    """
    drawn = [blake2b(session + each, digest_size=8).digest() for each in ids]
    if not weights:  # the same order as with equal weights
        return sorted(range(len(ids)), key=drawn.__getitem__, reverse=True)
    scores = [weight / -math.log(_share(each)) for each, weight in zip(drawn, weights, strict=True)]
    return sorted(range(len(ids)), key=scores.__getitem__, reverse=True)


def _share(drawn: bytes) -> float:
    """Return a number between 0 and 1, neither of them included."""
    return ((int.from_bytes(drawn, "big") >> 12) + 0.5) / (1 << 52)


def made_response(start: bytes) -> str | None:
    """Return the id of the response in the beginning of an answer, whole or streamed."""
    found = _RESPONSE_IN_BODY.search(start)
    return found[1].decode() if found is not None else None


class KnownKeys:
    """The keys that made a response, or that knew the encrypted content of a session when another
    key did not. The least recently used ones are forgotten.
    """

    __slots__ = ("_known", "_max_entries")

    def __init__(self, max_entries: int = _MAX_KNOWN) -> None:
        self._known: dict[bytes, bytes] = {}
        self._max_entries = max_entries

    def __len__(self) -> int:
        return len(self._known)

    def find(self, digest: bytes) -> bytes | None:
        """Return the key of a session or response; None if it is not known."""
        key = self._known.pop(digest, None)
        if key is not None:
            self._known[digest] = key
        return key

    def remember(self, digest: bytes, key: bytes) -> None:
        """Note that `key` is the right one."""
        self._known.pop(digest, None)
        self._known[digest] = key
        if len(self._known) > self._max_entries:
            del self._known[next(iter(self._known))]
