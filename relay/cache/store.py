"""Store responses: in this process's memory, or in Redis for all workers and machines.

Owns eviction, expiry, compression and purging. A store that fails finds and stores nothing, and
calls continue without it. core/caching.py decides what is stored and under which key.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec

from relay.core.caching import CachePlan
from relay.core.errors import StoreUnavailable
from relay.storage.redis import PREFIX, RedisConnection

InBackground = Callable[[Coroutine[Any, Any, None]], object]
T = TypeVar("T")
R = TypeVar("R")
_OVERHEAD_BYTES = 512
_COMPRESSED = ("application/json", "text/")
_IN_THREAD_BYTES = 128 * 1024
"""Encoding or decoding more than this would block the loop."""
_SCAN_COUNT = 500


class Entry(msgspec.Struct, frozen=True):
    """A response as it was sent downstream, without the headers of that one call."""

    provider: str
    reason: str
    headers: tuple[tuple[str, str], ...]
    chunks: tuple[bytes, ...]
    streamed: bool
    stored_unix_s: float
    cost_nano_usd: int | None = None

    @property
    def body_bytes(self) -> int:
        """The size of the body."""
        return sum(map(len, self.chunks))


class Hit(NamedTuple):
    """An entry that was found, and its age."""

    entry: Entry
    age_s: float


@dataclass(frozen=True, slots=True)
class Purge:
    """Which entries to delete: all that match every condition that is not None."""

    key: str | None = None
    provider: str | None = None
    older_than_s: float | None = None


@dataclass(slots=True)
class _Stored:
    entry: Entry
    stored_s: float
    ends_s: float
    bytes: int


class MemoryStore:
    """Entries in memory, up to `limit_bytes`; the least recently used is evicted first."""

    def __init__(self, limit_bytes: int, clock: Callable[[], float]) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._clock = clock
        self._entries: OrderedDict[str, _Stored] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Hit | None:
        """Return the entry stored under `key`, unless it has expired."""
        stored = self._entries.get(key)
        if stored is None:
            return None
        now = self._clock()
        if stored.ends_s <= now:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return Hit(stored.entry, now - stored.stored_s)

    def put(self, key: str, entry: Entry, ttl_s: int) -> None:
        """Store an entry for `ttl_s` seconds, or until it is evicted."""
        now = self._clock()
        size = entry.body_bytes + _OVERHEAD_BYTES
        self._drop(key)
        if size > self.limit_bytes:
            return
        self._entries[key] = _Stored(entry, now, now + ttl_s, size)
        self.bytes += size
        while self.bytes > self.limit_bytes:
            self._drop(next(iter(self._entries)))

    def purge(self, which: Purge) -> int:
        """Delete the entries that match, and return their number."""
        now = self._clock()
        matching = [
            key
            for key, stored in self._entries.items()
            if which.key in (None, key)
            and which.provider in (None, stored.entry.provider)
            and (which.older_than_s is None or now - stored.stored_s > which.older_than_s)
        ]
        for key in matching:
            self._drop(key)
        return len(matching)

    def _drop(self, key: str) -> None:
        stored = self._entries.pop(key, None)
        if stored is not None:
            self.bytes -= stored.bytes


class RedisStore:
    """Entries in Redis as MessagePack, text bodies compressed. Redis expires them."""

    def __init__(self, shared: RedisConnection, wall: Callable[[], float]) -> None:
        self._shared, self._wall = shared, wall

    async def get(self, provider: str, key: str) -> Hit | None:
        """See MemoryStore. Finds nothing while Redis is unavailable."""
        client = self._shared.client
        name = _name(provider, key)
        packed = await self._shared.ask(lambda: client.get(name))
        entry = await _read(packed)
        if packed is not None and entry is None:
            self._shared.found_foreign(name)
        return None if entry is None else Hit(entry, self._age_s(entry))

    async def put(self, key: str, entry: Entry, ttl_s: int) -> None:
        """See MemoryStore. Stores nothing while Redis is unavailable."""

        async def work() -> None:
            packed = await _maybe_in_thread(entry.body_bytes, _pack, entry)
            await self._shared.client.set(_name(entry.provider, key), packed, ex=ttl_s)

        await self._shared.ask(work)

    def _age_s(self, entry: Entry) -> float:
        return max(0.0, self._wall() - entry.stored_unix_s)

    async def purge(self, which: Purge) -> int:
        """Delete the entries that match, and return their number. Raises StoreUnavailable: a purge
        must not fail silently.
        """
        count = 0
        try:
            names = [name async for name in self._matching(which)]
            for start in range(0, len(names), _SCAN_COUNT):
                count += await self._shared.client.unlink(*names[start : start + _SCAN_COUNT])
        except self._shared.errors as error:
            raise StoreUnavailable from error
        return count

    async def _matching(self, which: Purge) -> AsyncIterator[bytes]:
        client = self._shared.client
        pattern = _name(which.provider or "*", which.key or "*")
        async for name in client.scan_iter(match=pattern, count=_SCAN_COUNT):
            if which.older_than_s is not None:
                entry = await _read(await client.get(name))
                if entry is None or self._age_s(entry) <= which.older_than_s:
                    continue
            yield name


class Cache:
    """The cache of a process, in its memory or in Redis."""

    def __init__(
        self, memory: MemoryStore, redis: RedisStore | None, in_background: InBackground
    ) -> None:
        self.memory, self._redis, self._in_background = memory, redis, in_background
        self._redis_in_use = redis

    def configure(self, store: str, memory_bytes: int) -> None:
        """Use the `store` of a configuration: `redis` only if there is a Redis."""
        self._redis_in_use = self._redis if store == "redis" else None
        self.memory.limit_bytes = memory_bytes

    @property
    def is_shared(self) -> bool:
        """True if all workers use one store."""
        return self._redis_in_use is not None

    async def get(self, plan: CachePlan) -> Hit | None:
        """Return the entry that is stored for this call."""
        if self._redis_in_use is not None:
            return await self._redis_in_use.get(plan.provider, plan.key)
        return self.memory.get(plan.key)

    def put(self, plan: CachePlan, entry: Entry) -> None:
        """Store the response of this call; in Redis that happens in the background."""
        if self._redis_in_use is not None:
            self._in_background(self._redis_in_use.put(plan.key, entry, plan.ttl_s))
        else:
            self.memory.put(plan.key, entry, plan.ttl_s)

    async def purge(self, which: Purge) -> int:
        """Delete the entries that match, and return their number. Raises StoreUnavailable."""
        if self._redis_in_use is not None:
            return await self._redis_in_use.purge(which)
        return self.memory.purge(which)


def _name(provider: str, key: str) -> str:
    return f"{PREFIX}:cache:{provider}:{key}"


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


def _pack(entry: Entry) -> bytes:
    headers = {name.lower(): value for name, value in entry.headers}
    try:
        packed = _encode(entry)
    except UnicodeEncodeError:  # header bytes that are not UTF-8
        return b"l" + _encode(_recoded(entry, _to_latin))
    media = headers.get("content-type", "").lower()
    if media.startswith(_COMPRESSED) and "content-encoding" not in headers:
        return b"z" + zlib.compress(packed, 1)
    return b"-" + packed


def _unpack(packed: bytes) -> Entry:
    rest = packed[1:]
    if packed[:1] == b"l":
        return _recoded(_decode(rest), _from_latin)
    return _decode(zlib.decompress(rest) if packed[:1] == b"z" else rest)


def _recoded(entry: Entry, recode: Callable[[str], str]) -> Entry:
    headers = tuple((name, recode(value)) for name, value in entry.headers)
    return msgspec.structs.replace(entry, reason=recode(entry.reason), headers=headers)


def _to_latin(text: str) -> str:
    """Recode a header's value as Latin-1, byte by byte: aiohttp escapes bytes that are not UTF-8 as
    surrogates, which MessagePack cannot encode.
    """
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def _from_latin(text: str) -> str:
    return text.encode("latin-1").decode("utf-8", "surrogateescape")


async def _read(packed: Any) -> Entry | None:
    """Decode an entry. None for no value, and for a value that is not an entry of this version."""
    if packed is None:
        return None
    try:
        entry = await _maybe_in_thread(len(packed), _unpack, packed)
    except (msgspec.MsgspecError, zlib.error, UnicodeError, RecursionError):
        return None
    return entry if _is_valid(entry) else None


def _is_valid(entry: Entry) -> bool:
    """True if an entry can be sent downstream: other programs may change values in Redis."""
    texts = (entry.reason, *(text for pair in entry.headers for text in pair))
    return (
        bool(entry.chunks)
        and math.isfinite(entry.stored_unix_s)
        and not any("\r" in text or "\n" in text or "\0" in text for text in texts)
    )


async def _maybe_in_thread(size: int, act: Callable[[T], R], of: T) -> R:
    return await asyncio.to_thread(act, of) if size > _IN_THREAD_BYTES else act(of)
