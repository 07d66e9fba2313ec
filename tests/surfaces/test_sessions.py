"""Open sessions over HTTP: list them and end one, with one worker and with two."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from relay.core.exchange import Caller, Exchange, Request
from relay.server.control import _LINE_BYTES, MAX_ITEMS, Answer, Reply, _encode
from relay.sessions.listing import MAX_PAGE_SESSIONS, describe_sessions
from tests.conftest import StartRelay
from tests.ledger.test_ledger import rows
from tests.processes import Served, serve
from tests.relays import HANG_GUARD_S, Relay, canary, provider
from tests.upstream.vendors import echo, vendor

API = "/api/v1/ai-gateway"
KEY, ADMIN = canary("sessions-web"), canary("sessions-admin")
UNKNOWN = "00000000-0000-7000-8000-000000000000"


async def ask(relay: Relay, method: str, path: str = "") -> tuple[int, Any]:
    status, _, body = await relay.call(method, f"{relay.url}{API}/sessions{path}")
    return status, json.loads(body)


@pytest.fixture
async def relay(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> Relay:
    """A relay with one client, in front of an echo provider."""
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    one = provider(str(server.make_url("")), websocket={"default_path": "echo"})
    return await start({"clients": {"web": {"key": KEY}}, "database": sqlite_setting}, openai=one)


async def test_an_open_session_is_listed_with_what_passed(relay: Relay) -> None:
    async with relay.client.ws_connect(relay.ws("openai") + "?model=gpt-realtime", headers={"x-relay-key": KEY}) as socket:
        await socket.send_str("hello")
        await socket.receive(HANG_GUARD_S)
        status, page = await ask(relay, "GET")
        (session,) = page["sessions"]
        assert status == 200 and page["cursor"] is None and page["missing"] == []
        assert session.pop("age_s") >= 0 and len(session.pop("id")) == 36
        assert session == {
            "client": "web", "key_id": "web/1", "address": "127.0.0.1", "provider": "openai", "endpoint": "echo", "model": "gpt-realtime",
            "messages_up": 1, "messages_down": 1, "bytes_up": 5, "bytes_down": 5,
        }  # fmt: skip
    await relay.idle()
    assert (await ask(relay, "GET"))[1]["sessions"] == []


async def test_sessions_are_listed_in_pages_the_oldest_first(relay: Relay) -> None:
    sockets = [await relay.client.ws_connect(relay.ws("openai")) for _ in range(5)]
    seen: list[str] = []
    path: str | None = "?limit=2"
    while path:
        _, page = await ask(relay, "GET", path)
        seen += [session["id"] for session in page["sessions"]]
        path = f"?limit=2&cursor={page['cursor']}" if page["cursor"] else None
    assert len(seen) == 5 and seen == sorted(set(seen))
    for socket in sockets:
        await socket.close()


async def test_the_operator_ends_a_session_with_4403_and_the_ledger_says_so(relay: Relay) -> None:
    async with relay.client.ws_connect(relay.ws("openai")) as one, relay.client.ws_connect(relay.ws("openai")) as other:
        _, page = await ask(relay, "GET")
        id = page["sessions"][0]["id"]
        assert await ask(relay, "DELETE", f"/{id}") == (200, {"ended": id})
        assert (await one.receive(HANG_GUARD_S)).data == 4403
        assert one.close_code == 4403 and not other.closed
        assert [session["id"] for session in (await ask(relay, "GET"))[1]["sessions"]] == [page["sessions"][1]["id"]]
        assert (await ask(relay, "DELETE", f"/{id}"))[0] == 404
    (event,) = await relay.events("session.ended")
    assert (event["id"], event["actor"]) == (id, "local 127.0.0.1")
    ended = {row["id"]: row.get("error") for row in await rows(relay)}
    assert ended[id] == "session_ended" and sorted(ended.values(), key=str) == [None, "session_ended"]
    assert relay.gateway.access_store is not None
    assert [(row.action, row.target) for row in await relay.gateway.access_store.audit_rows()] == [("session.end", id)]


@pytest.mark.parametrize("id", [UNKNOWN, "x", "%00", "' OR 1=1"])
async def test_a_session_that_is_not_open_is_404(relay: Relay, id: str) -> None:
    status, answer = await ask(relay, "DELETE", f"/{id}")
    assert status in (400, 404) and answer["error"]["code"] in ("session_not_found", "bad_path")


@pytest.mark.parametrize("query", ["?limit=0", f"?limit={MAX_PAGE_SESSIONS + 1}", "?limit=x", "?cursor=x", "?x=1"])
async def test_a_bad_query_is_400(relay: Relay, query: str) -> None:
    assert (await ask(relay, "GET", query))[1]["error"]["code"] == "bad_request"


def test_the_largest_page_of_a_worker_fits_into_a_line_of_the_channel() -> None:
    """Whatever a client wrote into the path, the model and the headers."""

    class Leg:
        messages, bytes = 1 << 60, 1 << 60

    class Session:
        def __init__(self, number: int) -> None:
            text = "\U0001f600\"\\" * 5000
            caller = Caller("x" * 64, address="f" * 45)
            self.exchange = Exchange(f"{number:036}", Request("websocket", "GET", caller, 0.0, provider="p" * 64, endpoint=text, model=text))
            self.downstream = self.upstream = Leg()

    class Gateway:
        sessions = [Session(number) for number in range(MAX_PAGE_SESSIONS * 2)]

        def clock(self) -> float:
            return 1e9

    assert MAX_PAGE_SESSIONS <= MAX_ITEMS
    items = describe_sessions(Gateway(), "", MAX_PAGE_SESSIONS)  # type: ignore[arg-type]
    assert len(items) == MAX_PAGE_SESSIONS
    assert len(_encode(Reply(1, Answer(items=items)))) < _LINE_BYTES


@pytest.mark.programs
async def test_sessions_of_all_workers_are_listed_and_ended_by_any(tmp_path: Any, aiohttp_server: Any) -> None:
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    document = {"access": {"admin_token": ADMIN}, "providers": {"openai": provider(str(server.make_url("")), websocket={"default_path": "echo"})}}
    relay = await serve(tmp_path, document, "--workers", "2")
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            sockets = [await session.ws_connect(f"{relay.url}{API}/ws/openai") for _ in range(8)]
            ids = {one["id"] for one in await _listed(relay, session)}
            assert len(ids) == 8
            for _ in range(6):  # whichever worker answers
                assert {one["id"] for one in await _listed(relay, session)} == ids
            for id in ids:
                async with session.delete(f"{relay.url}{API}/sessions/{id}", headers={"Authorization": f"Bearer {ADMIN}"}) as answer:
                    assert answer.status == 200
            for socket in sockets:
                assert (await socket.receive(HANG_GUARD_S)).data == 4403
            async with session.delete(f"{relay.url}{API}/sessions/{UNKNOWN}", headers={"Authorization": f"Bearer {ADMIN}"}) as answer:
                assert answer.status == 404
            async with asyncio.timeout(HANG_GUARD_S):
                while await _listed(relay, session):
                    await asyncio.sleep(0.01)
    finally:
        await relay.stop()


async def _listed(relay: Served, session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    async with session.get(f"{relay.url}{API}/sessions", headers={"Authorization": f"Bearer {ADMIN}"}) as answer:
        page = await answer.json()
        assert answer.status == 200 and page["missing"] == []
        return list(page["sessions"])
