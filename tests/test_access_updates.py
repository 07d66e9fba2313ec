"""Clients and keys of the database: every process follows them, and ends what is not allowed any
more.
"""

from __future__ import annotations

import asyncio
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp

from relay.storage.access import AccessStore
from relay.storage.access_rows import NewKey
from relay.storage.database import Database, database_url
from tests.conftest import StartRelay
from tests.relays import canary, provider
from tests.upstream.raw import SILENCE, SSE_HEAD, RawUpstream, chunk, ok

KEY = "rk_" + canary("stored")
NEW = NewKey("0123456789ab", sha256(KEY.encode()).digest())


async def test_a_stored_key_calls_until_it_is_revoked_and_then_its_call_and_session_end(start: StartRelay, raw: RawUpstream, vendors: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "access.db")
    raw.plays(ok())
    raw.plays(SSE_HEAD, chunk(b"data: 1\n\n"), SILENCE)
    entries = vendors.entries() | {"mine": provider(raw.url)}
    relay = await start({"access": {"mode": "required"}, "database": file, "providers": entries})
    database = Database(database_url(file))
    store = AccessStore(database)
    headers = {"Authorization": f"Bearer {KEY}"}
    url = relay.path("mine", "chat/completions")
    assert (await relay.call("POST", url, json={}, headers=headers))[0] == 401

    await store.create_key("web", '{"providers": ["mine", "openai"]}', NEW, "test")
    await relay.gateway.refresh_access()
    assert (await relay.call("POST", url, json={}, headers=headers))[0] == 200
    assert (await relay.call("POST", relay.path("anthropic", "v1/messages"), json={}, headers=headers))[1]["x-relay-error"] == "provider_not_allowed"
    stream = await relay.client.post(url, json={"stream": True}, headers=headers)
    assert await stream.content.readany() == b"data: 1\n\n"
    async with relay.client.ws_connect(relay.ws("openai"), headers=headers) as socket:
        await socket.receive()
        await store.revoke_key(NEW.id, "test")
        await relay.gateway.refresh_access()
        closed = await socket.receive()
        while closed.type is aiohttp.WSMsgType.TEXT:
            closed = await socket.receive()
        assert (closed.data, closed.extra) == (4401, "The client key was revoked.")
    try:
        await stream.content.read()
        raise AssertionError("the stream goes on")
    except aiohttp.ClientError:
        pass
    assert (await relay.call("POST", url, json={}, headers=headers))[0] == 401
    await relay.idle()
    ended = [event for event in await relay.events(count=6) if event.get("error") == "access_revoked"]
    assert {event["transport"] for event in ended} == {"rest", "websocket"} and {event["client"] for event in ended} == {"web"}
    await database.close()


async def test_a_process_polls_for_changes_by_itself(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    file = str(tmp_path / "access.db")
    raw.plays(ok())
    relay = await start({"access": {"mode": "required"}, "database": file}, mine=provider(raw.url))
    database = Database(database_url(file))
    await AccessStore(database).create_key("web", "{}", NEW, "test")
    async with asyncio.timeout(20):
        while (await relay.call("POST", relay.path("mine", "x"), headers={"x-api-key": KEY}))[0] != 200:
            await asyncio.sleep(0.05)
    await database.close()
