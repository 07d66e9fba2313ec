"""Several workers: one address, one reload, and restarts without a failed call."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.processes import Served, serve
from tests.relays import HANG_GUARD_S, provider
from tests.upstream.raw import LAST_CHUNK, SSE_HEAD, Pause, RawUpstream, chunk, ok

pytestmark = pytest.mark.programs

EVENT = b"data: 1\n\n"


@pytest.fixture
async def pair(tmp_path: Path, raw: RawUpstream) -> AsyncIterator[Served]:
    """A relay with two workers, the provider `raw` and the demo."""
    relay = await serve(tmp_path, {"demo": {"enabled": True}, "server": {"drain_timeout_s": 10}, "providers": {"up": provider(raw.url)}}, "--workers", "2")
    await _workers(relay, 2)
    yield relay
    await relay.stop()


async def _workers(relay: Served, count: int) -> dict[int, int]:
    """Wait for `count` `worker.ready` events. Returns the process ids by worker number."""
    async with asyncio.timeout(HANG_GUARD_S):
        while True:
            ready = [json.loads(line) for line in relay.lines if "worker.ready" in line]
            if len(ready) >= count:
                return {event["worker"]: event["pid"] for event in ready}
            await asyncio.sleep(0.02)


async def test_both_workers_serve_and_share_one_demo(pair: Served, raw: RawUpstream) -> None:
    raw.plays(ok())
    async with aiohttp.ClientSession() as session:
        async with session.post(pair.path("demo", "embeddings"), json={"model": "m", "input": "x"}) as answer:
            assert answer.status == 200
    assert len(await _workers(pair, 2)) == 2


async def test_a_killed_worker_is_started_again(pair: Served, raw: RawUpstream) -> None:
    raw.plays(ok())
    first = await _workers(pair, 2)
    os.kill(first[0], signal.SIGKILL)
    await pair.until("worker.died")
    assert (await _workers(pair, 3))[0] != first[0]
    async with aiohttp.ClientSession() as session, session.get(pair.path("up", "x")) as answer:
        assert answer.status == 200


async def test_workers_restart_in_turn_without_a_failed_call(pair: Served, raw: RawUpstream) -> None:
    """Each worker drains while its successor serves; the shared socket loses no connection."""
    raw.plays(ok(b"fine"))
    failed: list[str] = []
    done = 0
    stop = asyncio.Event()

    async def load(fresh: bool) -> None:
        nonlocal done
        headers = {"Connection": "close"} if fresh else {}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=fresh)) as session:
            while not stop.is_set():
                try:
                    async with session.get(pair.path("up", "x"), headers=headers) as answer:
                        if await answer.read() != b"fine":
                            failed.append(f"{answer.status}")
                except aiohttp.ClientError as error:
                    failed.append(repr(error))
                done += 1
                await asyncio.sleep(0.01)  # else the load takes the CPU from starting workers

    async def more_calls(count: int) -> None:
        wanted = done + count
        while done < wanted:
            await asyncio.sleep(0.01)

    loads = [asyncio.create_task(load(fresh)) for fresh in (True, False) * 4]
    pids = await _workers(pair, 2)
    async with asyncio.timeout(3 * HANG_GUARD_S):
        for at, number in enumerate((0, 1)):
            await more_calls(80)
            os.kill(pids[number], signal.SIGTERM)
            await _workers(pair, 3 + at)
        await more_calls(80)
    stop.set()
    await asyncio.gather(*loads)
    assert failed == []
    assert all("worker.died" not in line for line in pair.lines)


async def test_a_reload_reaches_every_worker_or_none(pair: Served, raw: RawUpstream) -> None:
    raw.plays(ok())
    config = pair.folder / "gateway.yaml"
    text = config.read_text()
    config.write_text(text.replace("  up:", "  moved:"))
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{pair.url}/api/v1/ai-gateway/providers/reload") as answer:
            assert answer.status == 200 and "moved" in (await answer.json())["providers"]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        for _ in range(30):
            async with session.get(pair.path("moved", "x")) as answer:
                assert answer.status == 200
        config.write_text("sever: {}")
        async with session.post(f"{pair.url}/api/v1/ai-gateway/providers/reload") as answer:
            assert answer.status == 422
        config.write_text(text)
        pair.send(signal.SIGHUP)
        async with asyncio.timeout(HANG_GUARD_S):
            while sum("reload.done" in line for line in pair.lines) < 4:
                await asyncio.sleep(0.02)
        for _ in range(30):
            async with session.get(pair.path("up", "x")) as answer:
                assert answer.status == 200


async def test_a_worker_that_dies_after_a_refused_reload_restarts_with_the_configuration_in_force(pair: Served, raw: RawUpstream) -> None:
    raw.plays(ok(b"fine"))
    config = pair.folder / "gateway.yaml"
    config.write_text(config.read_text().replace("  up:", "  moved:").replace("enabled: true", "enabled: true\nmetrics:\n  enabled: false"))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        async with session.post(f"{pair.url}/api/v1/ai-gateway/providers/reload") as answer:
            assert (await answer.json())["needs_restart"] == ["metrics.enabled"]
        config.write_text("sever: {}")
        (pair.folder / ".env").unlink()
        async with session.post(f"{pair.url}/api/v1/ai-gateway/providers/reload") as answer:
            assert answer.status == 422
        os.kill((await _workers(pair, 2))[0], signal.SIGKILL)
        await _workers(pair, 3)
        for _ in range(10):
            async with session.get(pair.path("moved", "x")) as answer:
                assert await answer.read() == b"fine"
            async with session.get(f"{pair.url}/metrics") as answer:
                assert answer.status == 200, "settings that need a restart are unchanged in every worker"
    assert sum("worker.died" in line for line in pair.lines) == 1, "it died once, not in a loop"


async def test_a_purge_reaches_the_memory_of_every_worker(tmp_path: Path, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}", "Content-Type: application/json"))
    relay = await serve(tmp_path, {"cache": {"ttl_s": 3600}, "providers": {"up": provider(raw.url)}}, "--workers", "2")
    await _workers(relay, 2)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session, asyncio.timeout(HANG_GUARD_S):
            while len(raw.arrived) < 2:  # until both workers have cached it
                async with session.get(relay.path("up", "models")) as answer:
                    assert answer.status == 200
            async with session.delete(f"{relay.url}/api/v1/ai-gateway/cache?provider=up") as answer:
                assert (answer.status, await answer.json()) == (200, {"purged": 2})
    finally:
        await relay.stop()


async def test_sigterm_drains_all_workers_and_exits_0(tmp_path: Path, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(EVENT), Pause(1.0), chunk(EVENT), LAST_CHUNK)
    relay = await serve(tmp_path, {"providers": {"up": provider(raw.url)}}, "--workers", "2")
    pids = await _workers(relay, 2)
    async with aiohttp.ClientSession() as session:
        streams = [await session.get(relay.path("up", "x")) for _ in range(20)]
        relay.send(signal.SIGTERM)
        assert [await stream.read() for stream in streams] == [EVENT * 2] * 20
    assert await relay.ended() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


async def test_workers_end_when_their_supervisor_is_killed(tmp_path: Path, raw: RawUpstream) -> None:
    relay = await serve(tmp_path, {"providers": {"up": provider(raw.url)}}, "--workers", "2")
    pids = await _workers(relay, 2)
    relay.send(signal.SIGKILL)
    assert await relay.ended() == -signal.SIGKILL
    async with asyncio.timeout(HANG_GUARD_S):
        while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids.values()):
            await asyncio.sleep(0.05)
