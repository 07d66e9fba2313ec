"""Tickets over several processes: one of all handshakes with a ticket opens a session, also after
the process that redeemed it was killed.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.postgres import PostgresServer
from tests.processes import Served, serve
from tests.relays import canary, provider
from tests.upstream.raw import SILENCE, RawUpstream
from tests.upstream.vendors import SEEN, echo, vendor

KEY, PAGE = canary("client-key"), "https://app.example"
HANDSHAKES = 100


def _document(url: str, database: str) -> dict[str, Any]:
    entry = provider(url, websocket={"default_path": "echo"}, connect_timeout_s=60)
    return {"access": {"mode": "required"}, "clients": {"web": {"key": KEY, "origins": PAGE}}, "database": database, "providers": {"mine": entry}}


async def _ticket(session: aiohttp.ClientSession, served: Served) -> str:
    async with session.post(f"{served.url}/api/v1/ai-gateway/tickets", json={"provider": "mine"}, headers={"x-relay-key": KEY}) as answer:
        assert answer.status == 201, await answer.text()
        return str((await answer.json())["ticket"])


async def _open(session: aiohttp.ClientSession, served: Served, ticket: str) -> int:
    """Open a session; returns the status."""
    url = f"{served.url}/api/v1/ai-gateway/ws/mine"
    try:
        async with session.ws_connect(url, protocols=[f"bearer.{ticket}"], headers={"Origin": PAGE}) as socket:
            await socket.send_str("hello")
            assert (await socket.receive()).data == "hello"
            return 101
    except aiohttp.WSServerHandshakeError as refused:
        return refused.status


async def _check_one_of_many_opens(served: list[Served], aiohttp_app: Any) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        ticket = await _ticket(session, served[0])
        opened = [_open(session, served[number % len(served)], ticket) for number in range(HANDSHAKES)]
        assert sorted(await asyncio.gather(*opened)) == [101] + [401] * (HANDSHAKES - 1)
    assert len(aiohttp_app[SEEN]) == 1


async def test_two_workers_with_one_sqlite_file_open_one_session_for_a_ticket(aiohttp_server: Any, tmp_path: Path) -> None:
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    served = await serve(tmp_path, _document(str(server.make_url("")), str(tmp_path / "relay.db")), "--workers", "2")
    await _check_one_of_many_opens([served], server.app)
    await served.stop()
    lines = [json.loads(line) for line in served.lines if '"event":"exchange"' in line]
    assert len(lines) == HANDSHAKES and not any("rt_" in line for line in served.lines)


async def test_two_machines_with_one_postgresql_open_one_session_for_a_ticket(aiohttp_server: Any, tmp_path: Path, postgres: PostgresServer) -> None:
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    document = _document(str(server.make_url("")), await postgres.migrated_database())
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    served = await asyncio.gather(*(serve(folder, document) for folder in folders))
    await _check_one_of_many_opens(list(served), server.app)
    await asyncio.gather(*(each.stop() for each in served))


async def test_a_ticket_stays_used_if_its_process_is_killed_before_the_provider_answers(raw: RawUpstream, tmp_path: Path) -> None:
    raw.plays(SILENCE)
    document = _document(raw.url, str(tmp_path / "relay.db"))
    served = await serve(tmp_path, document)
    async with aiohttp.ClientSession() as session:
        ticket = await _ticket(session, served)
        opening = asyncio.create_task(_open(session, served, ticket))
        async with asyncio.timeout(20):
            while not raw.arrived:
                await asyncio.sleep(0.01)
        served.process.kill()
        with pytest.raises(aiohttp.ClientError):
            await opening
        await served.ended()
        again = await serve(tmp_path, None)
        assert await _open(session, again, ticket) == 401
        await again.stop()
    assert len(raw.arrived) == 1
