"""Where answers are kept: what goes first, what is forgotten, and what Redis gives back."""

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


def test_the_least_recently_used_goes_first(clock: Clock) -> None:
    store = MemoryStore(3 * 1512, clock)
    for key in "abc":
        store.put(key, entry(b"x" * 1000), 60)
    assert store.get("a") is not None
    store.put("d", entry(b"x" * 1000), 60)
    assert [key for key in "abcd" if store.get(key)] == ["a", "c", "d"]
    assert store.bytes == 3 * 1512


def test_what_is_larger_than_all_the_room_is_not_kept_and_puts_nobody_out(clock: Clock) -> None:
    store = MemoryStore(2000, clock)
    store.put("a", entry(b"x" * 100), 60)
    store.put("b", entry(b"x" * 5000), 60)
    assert store.get("a") and not store.get("b") and store.bytes == 612


def test_an_entry_ends_after_its_time_and_tells_its_age(clock: Clock) -> None:
    store = MemoryStore(10_000, clock)
    store.put("a", entry(), 60)
    clock.now += 59
    hit = store.get("a")
    assert hit is not None and hit.age_s == 59
    clock.now += 2
    assert store.get("a") is None and (len(store), store.bytes) == (0, 0)


@pytest.mark.parametrize(
    ("which", "left"),
    [
        (Purge(), []),
        (Purge(key="new"), ["old", "other"]),
        (Purge(provider="openai"), ["other"]),
        (Purge(older_than_s=10), ["new"]),
        (Purge(provider="openai", older_than_s=10), ["new", "other"]),
        (Purge(provider="fal", key="new"), ["new", "old", "other"]),
    ],
)
async def test_a_purge_forgets_what_fits_all_conditions(which: Purge, left: list[str], clock: Clock, redis_server: RedisServer) -> None:
    memory = MemoryStore(10_000, clock)
    async with _redis(redis_server) as there:
        now = time.time()
        for key, provider, age_s in (("old", "openai", 20), ("other", "fal", 20), ("new", "openai", 0)):
            clock.now = 100.0 - age_s
            memory.put(key, entry(provider=provider), 60)
            await there.put(key, entry(provider=provider, stored_unix_s=now - age_s), 60)
        clock.now = 100.0
        assert memory.purge(which) == await there.purge(which) == 3 - len(left)
        assert sorted(memory._entries) == left
        assert [key for provider, key in (("openai", "new"), ("openai", "old"), ("fal", "other")) if await there.get(provider, key)] == left


class _redis:
    """A RedisStore, and its connections closed."""

    def __init__(self, server: RedisServer) -> None:
        self._shared = RedisConnection(server.url, 5.0, time.monotonic, lambda *_: None)

    async def __aenter__(self) -> RedisStore:
        return RedisStore(self._shared, time.time)

    async def __aexit__(self, *_: Any) -> None:
        await self._shared.close()


@pytest.mark.parametrize(("kind", "squeezed"), [("application/json", True), ("text/event-stream; charset=utf-8", True), ("audio/mpeg", False)])
@pytest.mark.parametrize("size", [1000, 300_000])
async def test_redis_gives_back_what_it_got_and_texts_take_little_room(kind: str, squeezed: bool, size: int, redis_server: RedisServer) -> None:
    async with _redis(redis_server) as store, redis.asyncio.Redis(port=redis_server.port) as client:
        given = entry(b"abc " * (size // 4), kind=kind, stored_unix_s=time.time() - 7)
        await store.put("k", given, 60)
        hit = await store.get("openai", "k")
        assert hit is not None and hit.entry == given and 7 <= hit.age_s < 60
        (name,) = await client.keys()
        assert name == b"relay:cache:openai:k" and 0 < await client.ttl(name) <= 60
        assert (await client.strlen(name) < size / 2) is squeezed


async def test_redis_gives_back_header_bytes_that_are_no_utf8(redis_server: RedisServer) -> None:
    async with _redis(redis_server) as store:
        odd = b"Zo\xeb \xe6\x97\xa5".decode("utf-8", "surrogateescape")
        given = msgspec.structs.replace(entry(b"abc"), headers=(("x-name", odd), ("x-plain", "a")))
        await store.put("k", given, 60)
        hit = await store.get("openai", "k")
        assert hit is not None and hit.entry == given


async def test_what_another_version_kept_is_as_if_it_were_not_there(redis_server: RedisServer) -> None:
    async with _redis(redis_server) as store, redis.asyncio.Redis(port=redis_server.port) as client:
        for rubbish in (b"", b"-\xc1", b"zrubbish", b"l\xc1"):
            await client.set("relay:cache:openai:k", rubbish)
            assert await store.get("openai", "k") is None
            assert await store.purge(Purge(older_than_s=0)) == 0


FOREIGN = {
    "nothing": b"",
    "a text": b"hello",
    "no such coding": b"z" + b"hello",
    "no chunks": _pack(Entry("openai", "OK", (), (), False, 0.0)),
    "no time": _pack(Entry("openai", "OK", (), (b"x",), False, float("-inf"))),
    "a header that is two": _pack(Entry("openai", "OK", (("a", "b\r\nc: d"),), (b"x",), False, 0.0)),
    "a reason that is a header": _pack(Entry("openai", "OK\r\nc: d", (), (b"x",), False, 0.0)),
    "text that is none": b"-" + msgspec.msgpack.encode({"provider": "\ud800".encode("utf-8", "surrogatepass")}),
}


@pytest.mark.parametrize("name", FOREIGN)
async def test_what_the_relay_has_not_kept_is_not_given(name: str, redis_server: RedisServer) -> None:
    events: list[str] = []
    shared = RedisConnection(redis_server.url, 5.0, time.monotonic, lambda event, _: events.append(event))
    store = RedisStore(shared, time.time)
    await shared.client.set("relay:cache:openai:k", FOREIGN[name])
    assert await store.get("openai", "k") is None
    assert (shared.foreign_values, shared.state, events) == (1, "ok", ["redis.foreign_value"])
    await shared.close()


async def test_a_key_of_another_type_finds_nothing_and_is_kept_anew(redis_server: RedisServer) -> None:
    shared = RedisConnection(redis_server.url, 5.0, time.monotonic, lambda *_: None)
    store = RedisStore(shared, time.time)
    await shared.client.rpush("relay:cache:openai:k", "x")  # type: ignore[misc]
    assert await store.get("openai", "k") is None
    assert (shared.foreign_values, shared.failures, shared.state) == (1, 0, "ok")
    await store.put("k", entry(), 60)
    assert await store.get("openai", "k") is not None
    await shared.close()
