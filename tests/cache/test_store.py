"""The stores of the cache: eviction, expiry, purging, and what Redis returns."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
import redis.asyncio

from relay.cache.store import Entry, MemoryStore, Purge, RedisStore, _pack
from relay.storage.redis import RedisConnection
from tests.redis import RedisServer


def entry(body: bytes = b"x", provider: str = "openai", kind: str = "application/json", stored_unix_s: float = 0.0) -> Entry:
    return Entry(provider, "OK", (("Content-Type", kind),), (body,), False, stored_unix_s)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_least_recently_used_entry_is_evicted_first(clock: Clock) -> None:
    store = MemoryStore(3 * 1512, clock)
    for key in "abc":
        store.put(key, entry(b"x" * 1000), 60)
    assert store.get("a") is not None
    store.put("d", entry(b"x" * 1000), 60)
    assert [key for key in "abcd" if store.get(key)] == ["a", "c", "d"]
    assert store.bytes == 3 * 1512


def test_an_entry_larger_than_the_store_is_not_stored_and_evicts_nothing(clock: Clock) -> None:
    store = MemoryStore(2000, clock)
    store.put("a", entry(b"x" * 100), 60)
    store.put("b", entry(b"x" * 5000), 60)
    assert store.get("a") and not store.get("b") and store.bytes == 612


def test_an_entry_expires_and_reports_its_age(clock: Clock) -> None:
    store = MemoryStore(10_000, clock)
    store.put("a", entry(), 60)
    clock.now += 59
    hit = store.get("a")
    assert hit is not None and hit.age_s == 59
    clock.now += 2
    assert store.get("a") is None and (len(store), store.bytes) == (0, 0)


@pytest.mark.parametrize(
    ("which", "remaining"),
    [
        (Purge(), []),
        (Purge(key="new"), ["old", "other"]),
        (Purge(provider="openai"), ["other"]),
        (Purge(older_than_s=10), ["new"]),
        (Purge(provider="openai", older_than_s=10), ["new", "other"]),
        (Purge(provider="fal", key="new"), ["new", "old", "other"]),
    ],
)
async def test_a_purge_removes_the_entries_that_match_all_conditions(which: Purge, remaining: list[str], clock: Clock, redis_server: RedisServer) -> None:
    memory = MemoryStore(10_000, clock)
    async with _redis(redis_server) as shared:
        now = time.time()
        for key, provider, age_s in (("old", "openai", 20), ("other", "fal", 20), ("new", "openai", 0)):
            clock.now = 100.0 - age_s
            memory.put(key, entry(provider=provider), 60)
            await shared.put(key, entry(provider=provider, stored_unix_s=now - age_s), 60)
        clock.now = 100.0
        assert memory.purge(which) == await shared.purge(which) == 3 - len(remaining)
        assert sorted(memory._entries) == remaining
        assert [key for provider, key in (("openai", "new"), ("openai", "old"), ("fal", "other")) if await shared.get(provider, key)] == remaining


class _redis:
    """A RedisStore whose connections are closed at the end."""

    def __init__(self, server: RedisServer) -> None:
        self._shared = RedisConnection(server.url, 5.0, time.monotonic, lambda *_: None)

    async def __aenter__(self) -> RedisStore:
        return RedisStore(self._shared, time.time)

    async def __aexit__(self, *_: Any) -> None:
        await self._shared.close()


@pytest.mark.parametrize(("kind", "compressed"), [("application/json", True), ("text/event-stream; charset=utf-8", True), ("audio/mpeg", False)])
@pytest.mark.parametrize("size", [1000, 300_000])
async def test_redis_returns_entries_unchanged_and_holds_texts_compressed(kind: str, compressed: bool, size: int, redis_server: RedisServer) -> None:
    async with _redis(redis_server) as store, redis.asyncio.Redis(port=redis_server.port) as client:
        stored = entry(b"abc " * (size // 4), kind=kind, stored_unix_s=time.time() - 7)
        await store.put("k", stored, 60)
        hit = await store.get("openai", "k")
        assert hit is not None and hit.entry == stored and 7 <= hit.age_s < 60
        (name,) = await client.keys()
        assert name == b"relay:cache:openai:k" and 0 < await client.ttl(name) <= 60
        assert (await client.strlen(name) < size / 2) is compressed


async def test_redis_returns_header_bytes_that_are_not_utf8(redis_server: RedisServer) -> None:
    async with _redis(redis_server) as store:
        not_utf8 = b"Zo\xeb \xe6\x97\xa5".decode("utf-8", "surrogateescape")
        stored = msgspec.structs.replace(entry(b"abc"), headers=(("x-name", not_utf8), ("x-plain", "a")))
        await store.put("k", stored, 60)
        hit = await store.get("openai", "k")
        assert hit is not None and hit.entry == stored


async def test_a_value_of_another_version_is_a_miss(redis_server: RedisServer) -> None:
    async with _redis(redis_server) as store, redis.asyncio.Redis(port=redis_server.port) as client:
        for rubbish in (b"", b"-\xc1", b"zrubbish", b"l\xc1"):
            await client.set("relay:cache:openai:k", rubbish)
            assert await store.get("openai", "k") is None
            assert await store.purge(Purge(older_than_s=0)) == 0


FOREIGN = {
    "nothing": b"",
    "a text": b"hello",
    "an invalid coding": b"z" + b"hello",
    "no chunks": _pack(Entry("openai", "OK", (), (), False, 0.0)),
    "no time": _pack(Entry("openai", "OK", (), (b"x",), False, float("-inf"))),
    "a header with a line break": _pack(Entry("openai", "OK", (("a", "b\r\nc: d"),), (b"x",), False, 0.0)),
    "a reason with a line break": _pack(Entry("openai", "OK\r\nc: d", (), (b"x",), False, 0.0)),
    "invalid text": b"-" + msgspec.msgpack.encode({"provider": "\ud800".encode("utf-8", "surrogatepass")}),
}


@pytest.mark.parametrize("name", FOREIGN)
async def test_a_foreign_value_is_not_served(name: str, redis_server: RedisServer) -> None:
    events: list[str] = []
    shared = RedisConnection(redis_server.url, 5.0, time.monotonic, lambda event, _: events.append(event))
    store = RedisStore(shared, time.time)
    await shared.client.set("relay:cache:openai:k", FOREIGN[name])
    assert await store.get("openai", "k") is None
    assert (shared.foreign_values, shared.state, events) == (1, "ok", ["redis.foreign_value"])
    await shared.close()


async def test_a_key_of_another_redis_type_is_a_miss_and_is_replaced(redis_server: RedisServer) -> None:
    shared = RedisConnection(redis_server.url, 5.0, time.monotonic, lambda *_: None)
    store = RedisStore(shared, time.time)
    await shared.client.rpush("relay:cache:openai:k", "x")  # type: ignore[misc]
    assert await store.get("openai", "k") is None
    assert (shared.foreign_values, shared.failures, shared.state) == (1, 0, "ok")
    await store.put("k", entry(), 60)
    assert await store.get("openai", "k") is not None
    await shared.close()
