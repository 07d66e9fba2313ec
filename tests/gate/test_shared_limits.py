"""Limits that processes share: a real Redis, several relay processes, and the loss of Redis."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from relay.storage import redis as shared
from tests.conftest import StartRelay
from tests.processes import Served, serve
from tests.redis import RedisServer
from tests.relays import HANG_GUARD_S, provider
from tests.upstream.raw import RawUpstream, ok

pytestmark = pytest.mark.programs


def _document(server: RedisServer, raw: RawUpstream, *rules: dict[str, Any]) -> dict[str, Any]:
    redis = {"url": server.url, "timeout_s": HANG_GUARD_S}  # a busy machine is not a lost Redis
    return {"redis": redis, "limits": list(rules), "providers": {"openai": provider(raw.url)}}


@pytest.fixture
async def two(tmp_path: Path, redis_server: RedisServer, raw: RawUpstream):  # type: ignore[no-untyped-def]
    """`await two(rule)` starts two relay processes with one Redis."""
    served: list[Served] = []

    async def begin(*rules: dict[str, Any]) -> list[Served]:
        folders = [tmp_path / "one", tmp_path / "other"]
        for folder in folders:
            folder.mkdir()
        served.extend(await asyncio.gather(*(serve(folder, _document(redis_server, raw, *rules)) for folder in folders)))
        return served

    yield begin
    for each in served:
        await each.stop()


async def _statuses(relays: list[Served], count: int, body: bytes = b"{}") -> list[int]:
    """Send `count` concurrent calls to the relays in turn and return their statuses."""

    async def one(session: aiohttp.ClientSession, relay: Served) -> int:
        async with session.post(relay.path("openai", "x"), data=body) as answer:
            return answer.status

    async with aiohttp.ClientSession() as session:
        return await asyncio.gather(*(one(session, relays[at % len(relays)]) for at in range(count)))


@pytest.mark.parametrize("technique", ["fixed", "sliding"])
async def test_two_processes_admit_no_more_than_one_would(technique: str, two: Any, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relays = await two({"requests": 10, "window_s": 86400, "technique": technique})
    statuses = await _statuses(relays, 40)
    assert statuses.count(200) <= 10 and statuses.count(200) + statuses.count(429) == 40
    assert len(raw.arrived) == statuses.count(200)
    # Calls that refused each other were refunded: ten are admitted in all.
    for _ in range(20):
        statuses += await _statuses(relays, 1)
    assert statuses.count(200) == 10


async def test_two_processes_share_a_token_limit(two: Any, raw: RawUpstream) -> None:
    raw.plays(ok(b'{"usage": {"prompt_tokens": 100, "completion_tokens": 100}}'))
    relays = await two({"tokens": 1000, "window_s": 86400})
    statuses: list[int] = []
    for _ in range(12):
        statuses += await _statuses(relays, 2, b'{"max_tokens": 1}')
        # Give the correction time to be booked; this only decides how many calls follow.
        await asyncio.sleep(0.05)
    # Each call uses 200: five fit, and those that begin before the last one is booked.
    assert 5 <= statuses.count(200) <= 7 and statuses[-1] == 429


async def test_without_redis_each_process_counts_for_itself_until_redis_recovers(
    start: StartRelay, raw: RawUpstream, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "RETRY_AFTER_S", 0.05)
    raw.plays(ok(b"{}"))
    relay = await start(_document(redis_server, raw, {"requests": 3, "window_s": 86400}))

    async def statuses(count: int) -> list[int]:
        return [(await relay.call("GET", relay.path("openai", "x")))[0] for _ in range(count)]

    async def ready() -> dict[str, Any]:
        async with relay.client.get(f"{relay.url}/readyz") as answer:
            assert answer.status == 200
            return await answer.json()  # type: ignore[no-any-return]

    assert await statuses(4) == [200, 200, 200, 429] and (await ready())["redis"] == "ok"
    await redis_server.stop()
    assert await statuses(4) == [200, 200, 200, 429], "the process starts its own count"
    assert (await ready())["redis"] == "unavailable" and (await ready())["redis_failures"] >= 1
    (lost,) = await relay.events("redis.unavailable")
    assert lost["level"] == "warning" and "Error" in lost["cause"]
    await redis_server.start()
    async with asyncio.timeout(20):
        while (await statuses(1))[0] != 200:
            await asyncio.sleep(0.02)
    assert await statuses(3) == [200, 200, 429] and (await ready())["redis"] == "ok"
    await relay.events("redis.recovered")


async def test_a_redis_that_hangs_is_tried_once_and_calls_are_counted_in_memory(
    start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "RETRY_AFTER_S", 3600.0)
    connected = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected += 1
        try:
            await reader.read()
        finally:
            writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    raw.plays(ok(b"{}"))
    port = server.sockets[0].getsockname()[1]
    relay = await start({"redis": {"url": f"redis://127.0.0.1:{port}", "timeout_s": 0.1}, "limits": [{"requests": 3}]}, openai=provider(raw.url))
    assert [(await relay.call("GET", relay.path("openai", "x")))[0] for _ in range(4)] == [200, 200, 200, 429]
    assert connected == 1
    server.close()
