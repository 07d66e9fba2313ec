"""Tickets: who gets one, for what, and which sessions it opens. Each opens one at most."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
from aiohttp import WSMsgType, web

from relay.core.access import Client, ClientKey, Rights, TicketTerms
from relay.core.errors import RateLimited, TicketInvalid
from relay.core.exchange import Caller
from relay.gate.keys import ClientKeys
from relay.gate.tickets import LIFETIME_S, MOST_TICKETS, WINDOW_S, Tickets
from relay.periodic import sweep
from relay.registry.clients import Clients, rights_of
from relay.storage.access import AccessStore
from relay.storage.access_rows import NewKey
from relay.storage.database import Database, DatabaseUnavailable, database_url
from relay.storage.tickets import TicketStore
from tests.conftest import StartRelay
from tests.relays import Relay, canary, packaged_provider, provider
from tests.upstream.media import deepgram
from tests.upstream.vendors import SEEN, Seen, echo, note, vendor

KEY, OTHER, ANY = canary("client-key"), canary("other-key"), canary("any-credential")
STORED = "rk_" + canary("stored-key")
PAGE, EVIL = "https://app.example", "https://evil.example"
CLIENTS: dict[str, Any] = {
    "web": {"key": KEY, "origins": [PAGE, "https://*.pages.example"]},
    "other": {"key": OTHER, "origins": "https://other.example", "providers": "mine", "models": ["gpt-5*"], "endpoints": ["realtime", "speech"]},
}  # fmt: skip


def _sha256(text: str) -> bytes:
    return sha256(text.encode()).digest()


async def _refuse(request: web.Request) -> web.StreamResponse:
    note(request)
    return web.Response(status=int(request.match_info["status"]), text="no")


class Site:
    """A relay with two clients and a database, and the handshakes that its provider got."""

    def __init__(self, relay: Relay, seen: list[Seen]) -> None:
        self.relay, self.seen = relay, seen

    async def ask(self, key: str = KEY, **wanted: Any) -> tuple[int, Any, dict[str, Any]]:
        """Ask for a ticket; returns status, headers and the answer."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self.relay.url}/api/v1/ai-gateway/tickets"
        status, answer, body = await self.relay.call("POST", url, json={"provider": "mine"} | wanted, headers=headers)
        return status, answer, json.loads(body)

    async def ticket(self, key: str = KEY, **wanted: Any) -> str:
        status, _, answer = await self.ask(key, **wanted)
        assert status == 201, answer
        return str(answer["ticket"])

    async def open(self, ticket: str, provider: str = "mine", endpoint: str = "", **headers: str) -> tuple[int, str]:
        """Open a session with a ticket and close it. Returns the status and the relay's error."""
        protocols = (f"cf-aig-authorization.{ticket}",)
        return await self.connect(self.relay.ws(provider, endpoint), protocols, {"Origin": PAGE} | headers)

    async def connect(self, url: str, protocols: tuple[str, ...], headers: dict[str, str]) -> tuple[int, str]:
        try:
            async with self.relay.client.ws_connect(url, protocols=protocols, headers={k: v for k, v in headers.items() if v}) as socket:
                await socket.send_str("hello")
                assert (await socket.receive()).data == "hello"
                return 101, ""
        except aiohttp.WSServerHandshakeError as refused:
            assert refused.headers is not None
            return refused.status, refused.headers.get("x-relay-error", "")

    async def why(self, ticket: str, **headers: str) -> tuple[int, str, str]:
        """Ask with a GET, as a page does, why a handshake was refused."""
        url, sent = self.relay.ws("mine"), {"Authorization": f"Bearer {ticket}", "Origin": PAGE} | headers
        status, answer, body = await self.relay.call("GET", url, headers={k: v for k, v in sent.items() if v})
        return status, answer["x-relay-error"], json.loads(body)["error"]["message"]


@pytest.fixture
async def site(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> Site:
    return await _site(start, aiohttp_server, sqlite_setting)


async def _site(start: StartRelay, aiohttp_server: Any, sqlite_setting: str, **more: Any) -> Site:
    server = await aiohttp_server(vendor(("GET", "/echo", echo), ("GET", "/v1/speech/{voice}", echo), ("GET", "/no/{status}", _refuse)))
    url = str(server.make_url("")).rstrip("/")
    entry = provider(url, websocket={"default_path": "echo", "subprotocols": {"realtime": "pass"}}, query_credentials=["fal_jwt_token", "access_token"])
    document = {"access": {"mode": "required"}, "clients": CLIENTS, "database": sqlite_setting, "cors": {"origins": [PAGE]}} | more
    relay = await start(document, mine=entry, second=entry | {"format": "elevenlabs"}, plain=provider(url), unset=provider(url, "UNSET_KEY", websocket={"default_path": "echo"}))
    return Site(relay, server.app[SEEN])


async def test_forged_tickets_are_refused_early_after_ten_a_minute_and_a_real_one_still_opens(site: Site) -> None:
    for number in range(10):
        assert await site.open("rt_" + f"{number}" * 32) == (401, "ticket_invalid")
    assert await site.open("rt_" + "x" * 32) == (429, "too_many_attempts")
    ticket = await site.ticket()
    assert await site.open(ticket) == (101, "")
    assert await site.open(ticket) == (401, "ticket_invalid"), "a ticket that was used is no guess"


@contextmanager
def statements(about: str) -> Iterator[list[str]]:
    """The statements about a table that any connection of this process executes."""
    found: list[str] = []

    def executed(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if about in statement:
            found.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", executed)
    yield found
    sa.event.remove(sa.Engine, "before_cursor_execute", executed)


# --- getting a ticket


async def test_a_client_gets_a_ticket_with_all_that_a_page_needs(site: Site) -> None:
    status, headers, answer = await site.ask(endpoint="/v1/speech//")
    ticket = answer["ticket"]
    assert (status, headers["Cache-Control"]) == (201, "no-store")
    assert re.fullmatch(r"rt_[A-Za-z0-9_-]{32}", ticket)
    url = f"ws://127.0.0.1:{site.relay.port}/api/v1/ai-gateway/ws/mine/v1/speech"
    assert answer == {
        "ticket": ticket, "expires_at": answer["expires_at"], "websocket_url": url,
        "subprotocols": ["realtime", f"cf-aig-authorization.{ticket}"], "openai_ticket": f"ek_{ticket}",
    }  # fmt: skip
    [event] = await site.relay.events("ticket.issued")
    assert (event["client"], event["key_id"], event["provider"]) == ("web", "web/1", "mine")
    assert "openai_ticket" not in (await site.ask(provider="second"))[2]


async def test_the_url_of_the_session_is_the_public_one(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> None:
    site = await _site(start, aiohttp_server, sqlite_setting, server={"public_url": "https://ai.example.com"})
    assert (await site.ask())[2]["websocket_url"] == "wss://ai.example.com/api/v1/ai-gateway/ws/mine"
    assert (await site.ask(origin="https://ai.example.com"))[0] == 201  # a page of the relay's own origin


async def test_what_the_answer_says_opens_the_session(site: Site) -> None:
    answer = (await site.ask())[2]
    async with site.relay.client.ws_connect(answer["websocket_url"], protocols=answer["subprotocols"], headers={"Origin": PAGE}) as socket:
        assert socket.protocol == "realtime"
    assert site.seen[0].header("Sec-WebSocket-Protocol") == "realtime"


@pytest.mark.parametrize("mode", ["open", "required"])
async def test_only_a_client_key_gets_a_ticket(start: StartRelay, aiohttp_server: Any, sqlite_setting: str, mode: str) -> None:
    clients = CLIENTS | {"public": {"origins": PAGE}, "old": {"key": canary("expired-key"), "expires": "2020-01-01"}}
    site = await _site(start, aiohttp_server, sqlite_setting, access={"mode": mode, "anonymous": "public"}, clients=clients)
    cases = (
        ("", "client_key_missing"), (ANY, "client_key_invalid"), ("rk_" + canary("unknown"), "client_key_invalid"), (KEY[:-1], "client_key_invalid"),
        (await site.ticket(), "ticket_invalid"), ("rt_" + "A" * 32, "ticket_invalid"), (canary("expired-key"), "client_key_expired"),
    )  # fmt: skip
    for key, error in cases:
        status, headers, answer = await site.ask(key)
        assert (status, headers["x-relay-error"], headers["x-should-retry"]) == (401, error, "false"), key
        assert answer["error"]["type"] == "authentication_error"


async def test_a_wrong_key_is_refused_before_the_body_is_read(site: Site) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was asked for")
        yield b""

    url = f"{site.relay.url}/api/v1/ai-gateway/tickets"
    status, headers, _ = await site.relay.call("POST", url, data=body(), headers={"Authorization": "Bearer rk_x", "Expect": "100-continue"})
    assert (status, headers["x-relay-error"]) == (401, "client_key_invalid")


async def test_a_page_of_another_origin_cannot_use_a_key_to_get_a_ticket(site: Site) -> None:
    url = f"{site.relay.url}/api/v1/ai-gateway/tickets"
    for origin, status in ((EVIL, 403), (PAGE, 201)):
        assert (await site.relay.call("POST", url, json={"provider": "mine"}, headers={"x-relay-key": KEY, "Origin": origin}))[0] == status


@pytest.mark.parametrize(
    ("wanted", "status", "error"),
    [({"provider": "second"}, 403, "provider_not_allowed"), ({"models": ["gpt-5-mini", "gpt-5*"]}, 201, ""), ({"models": ["gpt-*"]}, 403, "model_not_allowed"),
     ({"models": ["*"]}, 403, "model_not_allowed"), ({"models": ["gpt-5", "o3"]}, 403, "model_not_allowed"),
     ({"endpoint": "echo"}, 201, ""), ({"origin": PAGE}, 403, "origin_not_allowed"), ({"origin": "https://OTHER.example:443/"}, 201, ""),
     ({"origin": "http://other.example"}, 403, "origin_not_allowed"), ({"origin": "https://other.example:8443"}, 403, "origin_not_allowed"),
     ({"origin": "null"}, 400, "bad_request"), ({"origin": "https://other.example/path"}, 400, "bad_request"), ({"origin": "*"}, 400, "bad_request"),
     ({"provider": "mnie"}, 403, "provider_not_allowed"), ({"endpoint": "a/../b"}, 400, "bad_path"), ({"endpoint": "a%2f..%2fb"}, 400, "bad_path"),
     ({"endpoint": "a?key=1"}, 400, "bad_request"), ({"client": "web"}, 400, "bad_request"), ({"provider": 1}, 400, "bad_request"), ({"provider": None}, 400, "bad_request"),
     ({"max_session_s": 0}, 400, "bad_request"), ({"max_session_s": 1e9}, 400, "bad_request"), ({"max_session_s": True}, 400, "bad_request"),
     ({"max_messages": 0}, 400, "bad_request"), ({"max_messages": 1.5}, 400, "bad_request"), ({"max_messages": -1}, 400, "bad_request"),
     ({"max_session_s": 60.5, "max_messages": 1, "models": None, "origin": None, "endpoint": None}, 201, ""), ({"models": ["m"] * 51}, 400, "bad_request"),
     ({"models": "gpt-5"}, 400, "bad_request"), ({"endpoint": "x" * 513}, 400, "bad_request")],
)  # fmt: skip
async def test_a_ticket_allows_no_more_than_its_client_may_do(site: Site, wanted: dict[str, Any], status: int, error: str) -> None:
    got, headers, _ = await site.ask(OTHER, **wanted)
    assert (got, headers.get("x-relay-error", "")) == (status, error)


async def test_a_client_without_the_right_to_open_sessions_gets_no_ticket(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> None:
    site = await _site(start, aiohttp_server, sqlite_setting, clients={"web": {"key": KEY, "endpoints": ["chat"]}})
    status, headers, _ = await site.ask()
    assert (status, headers["x-relay-error"]) == (403, "endpoint_not_allowed")


async def test_a_ticket_needs_a_provider_with_sockets(site: Site) -> None:
    assert [(await site.ask(provider=name))[0] for name in ("plain", "nothing", "mine")] == [400, 404, 201]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"provider": "\xff"}', b"[" * 60000, b" " * 70000])
async def test_a_body_that_is_no_small_json_object_is_refused(site: Site, body: bytes) -> None:
    status, headers, _ = await site.relay.call("POST", f"{site.relay.url}/api/v1/ai-gateway/tickets", data=body, headers={"x-relay-key": KEY})
    assert (status, headers["x-relay-error"]) == (400, "bad_request")


async def test_without_a_database_there_are_no_tickets(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> None:
    site = await _site(start, aiohttp_server, sqlite_setting, database=None)
    status, headers, _ = await site.ask()
    assert (status, headers["x-relay-error"]) == (503, "store_unavailable")
    assert await site.open("rt_" + "A" * 32) == (401, "ticket_invalid")


# --- using it

PLACES: list[tuple[str, tuple[str, ...]]] = [
    ("?ticket={}", ()), ("?x=1&ticket={}&y=2", ()), ("?key={}", ()), ("?access_token={}", ()), ("?token={}", ()), ("?api_key={}", ()), ("?fal_jwt_token={}", ()),
    ("?anything={}", ()), ("?tic%6bet=%72t{}", ()), ("", ("cf-aig-authorization.{}",)), ("", ("openai-insecure-api-key.{}",)), ("", ("xi-api-key.{}",)),
    ("", ("bearer.{}",)), ("", ("Bearer.{}",)), ("?key=ek_{}", ()), ("", ("ek_{}",)), ("", ("realtime", "openai-insecure-api-key.ek_{}")), ("", ("{}",)), ("", ("token", "{}")), ("?model=m", ("realtime", "openai-insecure-api-key.{}", "openai-agents-sdk.0.20.0")),
    ("", ("realtime", f"openai-insecure-api-key.{ANY}", "cf-aig-authorization.{}")),
]  # fmt: skip


@pytest.mark.parametrize(("query", "protocols"), PLACES)
async def test_a_ticket_opens_one_session_from_any_place_of_a_key_and_does_not_reach_the_provider(site: Site, query: str, protocols: tuple[str, ...]) -> None:
    ticket = await site.ticket()
    sent = ticket[2:] if "%72t" in query else ticket
    url, offered = site.relay.ws("mine") + query.format(sent), tuple(each.format(sent) for each in protocols)
    assert await site.connect(url, offered, {"Origin": PAGE}) == (101, "")
    assert await site.connect(url, offered, {"Origin": PAGE}) == (401, "ticket_invalid")
    [seen] = site.seen
    assert ticket[3:] not in seen.target + repr(seen.headers)
    await site.relay.idle()
    first, second = await site.relay.events(count=2)
    assert (first["client"], first["status"], second["error"]) == ("web", 101, "ticket_invalid")


async def test_the_page_gets_its_own_subprotocol_and_that_of_the_ticket_only_if_it_is_alone(site: Site) -> None:
    for offered, chosen in ((("realtime", "bearer.{}"), "realtime"), (("bearer.{}", "mine"), "mine"), (("bearer.{}",), "bearer.{}"), (("ticketless",), None)):
        ticket = await site.ticket()
        url = site.relay.ws("mine") + ("" if chosen else f"?ticket={ticket}")
        async with site.relay.client.ws_connect(url, protocols=[each.format(ticket) for each in offered], headers={"Origin": PAGE}) as socket:
            assert socket.protocol == (chosen or offered[0]).format(ticket)


async def test_a_session_with_a_ticket_belongs_to_its_client_in_limits_log_and_ledger(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> None:
    clients = {"web": {"key": KEY, "metadata": {"team": "growth"}, "limits": [{"handshakes": 2, "window_s": 3600}]}}
    site = await _site(start, aiohttp_server, sqlite_setting, clients=clients)
    assert [await site.open(await site.ticket()) for _ in range(3)] == [(101, ""), (101, ""), (429, "rate_limited")]
    await site.relay.idle()
    events = await site.relay.events(count=3)
    assert {(event["client"], event["key_id"], event["metadata"]["team"]) for event in events} == {("web", "web/1", "growth")}
    _, _, body = await site.relay.call("GET", f"{site.relay.url}/api/v1/ai-gateway/logs?team=growth")
    assert {(row["client"], row["key_id"]) for row in json.loads(body)["logs"]} == {("web", "web/1")}


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
@pytest.mark.parametrize("headers", [{"Authorization": "Bearer {}"}, {"x-relay-key": "{}"}, {"x-api-key": "ek_{}"}, {}])
async def test_a_ticket_opens_no_rest_call_and_is_not_used_up_by_one(site: Site, method: str, headers: dict[str, str]) -> None:
    ticket = await site.ticket()
    sent = {name: value.format(ticket) for name, value in headers.items()} | {"Origin": PAGE}
    for endpoint in ("echo", ""):
        url = site.relay.path("mine", endpoint) + ("" if headers else f"?ticket={ticket}")
        status, answer, body = await site.relay.call(method, url, headers=sent)
        assert (status, answer["x-relay-error"], answer["x-should-retry"]) == (401, "ticket_invalid", "false")
        assert method == "HEAD" or b"any other request needs a client key" in body
    assert not site.seen
    assert await site.open(ticket) == (101, "")


async def test_a_key_beside_a_ticket_decides_and_the_ticket_stays_usable(site: Site) -> None:
    ticket = await site.ticket()
    url = f"{site.relay.ws('mine')}?ticket={ticket}"
    assert await site.connect(url, (f"bearer.{KEY}",), {}) == (101, "")
    assert await site.connect(url, (), {"Origin": PAGE}) == (101, "")
    assert "rt_" not in site.seen[0].target + repr(site.seen[0].headers)


async def test_of_two_tickets_the_first_one_is_used_and_neither_reaches_the_provider(site: Site) -> None:
    first, second = await site.ticket(), await site.ticket()
    url = f"{site.relay.ws('mine')}?ticket={first}&key={second}"
    assert await site.connect(url, (f"bearer.{second}",), {"Origin": PAGE}) == (101, "")
    assert "rt_" not in site.seen[0].target + repr(site.seen[0].headers)
    assert (await site.open(first), await site.open(second)) == ((401, "ticket_invalid"), (101, ""))


# --- what it is bound to

REFUSED_ORIGINS = ["", "null", EVIL, f"{PAGE}.evil.example", f"{PAGE}:8443", PAGE.replace("https", "http"), f"https://evil{PAGE[8:]}", "https://pages.example", f"{PAGE}/", f"{PAGE}@evil.example"]


@pytest.mark.parametrize("origin", REFUSED_ORIGINS)
@pytest.mark.parametrize("mode", ["open", "required"])
async def test_an_origin_of_no_client_is_refused_before_the_ticket_is_used(start: StartRelay, aiohttp_server: Any, sqlite_setting: str, origin: str, mode: str) -> None:
    site = await _site(start, aiohttp_server, sqlite_setting, access={"mode": mode})
    ticket = await site.ticket()
    with statements("tickets") as asked:
        assert await site.open(ticket, Origin=origin) == (403, "origin_not_allowed" if origin else "origin_required")
    assert not asked and not site.seen
    assert await site.open(ticket) == (101, "")


@pytest.mark.parametrize(
    ("secret", "origin", "expected"),
    [("key", "", (101, "")), ("key", PAGE, (101, "")), *((secret, origin, (403, "origin_not_allowed")) for secret in ("key", "anonymous") for origin in REFUSED_ORIGINS if origin),
     ("anonymous", PAGE, (101, "")), ("anonymous", "", (403, "origin_required"))],
)  # fmt: skip
async def test_a_socket_with_a_key_or_without_one_checks_the_origin_before_the_provider_is_called(
    start: StartRelay, aiohttp_server: Any, sqlite_setting: str, secret: str, origin: str, expected: tuple[int, str]
) -> None:
    clients = CLIENTS | {"public": {"origins": [PAGE, "https://*.pages.example"]}}
    site = await _site(start, aiohttp_server, sqlite_setting, access={"mode": "required", "anonymous": "public"}, clients=clients)
    protocols = (f"bearer.{KEY}",) if secret == "key" else ("realtime",)
    assert await site.connect(site.relay.ws("mine"), protocols, {"Origin": origin}) == expected
    assert len(site.seen) == (expected[0] == 101)


@pytest.mark.parametrize(
    ("wanted", "used", "expected"),
    [({}, {"provider": "second"}, "ticket_mismatch"), ({"endpoint": "v1/speech"}, {}, "ticket_mismatch"), ({"endpoint": "v1/speech"}, {"endpoint": "v1/speech/anna"}, ""),
     ({"endpoint": "v1/speech/anna"}, {"endpoint": "v1//speech/anna"}, ""), ({"endpoint": "v1/speech/ann"}, {"endpoint": "v1/speech/anna"}, "ticket_mismatch"),
     ({"endpoint": "v1/speech/anna"}, {"endpoint": "v1/speech"}, "ticket_mismatch"), ({"endpoint": "v1/speech/anna"}, {"endpoint": "v1/speech/Anna"}, "ticket_mismatch"),
     ({"endpoint": "v1/speech/anna"}, {"endpoint": "v1/speech%2Fanna"}, "ticket_mismatch"), ({"endpoint": "v1/speech/a"}, {"endpoint": "v1/speech/a%2fb"}, "ticket_mismatch"),
     ({"endpoint": "echo"}, {}, ""), ({"origin": PAGE}, {}, ""), ({"origin": PAGE}, {"Origin": "https://x.pages.example"}, "ticket_mismatch"),
     ({"origin": "https://x.pages.example"}, {"Origin": "https://y.pages.example"}, "ticket_mismatch"), ({}, {"Origin": "https://other.example"}, "origin_not_allowed")],
)  # fmt: skip
async def test_a_ticket_that_is_used_for_something_else_is_refused_and_used_up(site: Site, wanted: dict[str, Any], used: dict[str, str], expected: str) -> None:
    ticket = await site.ticket(**wanted)
    assert await site.open(ticket, **used) == ((403, expected) if expected else (101, ""))
    assert len(site.seen) == (not expected)
    assert await site.open(ticket, endpoint=wanted.get("endpoint", "")) == (401, "ticket_invalid")


@pytest.mark.parametrize(("model", "opened"), [("gpt-5-mini", (True, True)), ("gpt-5", (True, False)), ("o3-mini", (False, False))])
async def test_a_model_must_match_the_ticket_and_the_client(start: StartRelay, vendors: Any, sqlite_setting: str, model: str, opened: tuple[bool, bool]) -> None:
    clients = {"web": {"key": KEY, "origins": PAGE, "models": ["gpt-5*"]}}
    site = Site(await start({"clients": clients, "database": sqlite_setting, "providers": vendors.entries()}), vendors.seen("openai"))
    for models, is_opened in zip((["gpt-5*"], ["gpt-5-*"]), opened, strict=True):
        ticket = await site.ticket(provider="openai", models=models)
        try:
            async with site.relay.client.ws_connect(f"{site.relay.ws('openai')}?model={model}", protocols=[f"bearer.{ticket}"], headers={"Origin": PAGE}):
                assert is_opened
        except aiohttp.WSServerHandshakeError as refused:
            assert not is_opened and refused.headers is not None and refused.headers["x-relay-error"] == "model_not_allowed"
    assert len(site.seen) == sum(opened)


async def test_a_message_that_names_another_model_than_those_of_the_ticket_ends_the_session(start: StartRelay, vendors: Any, sqlite_setting: str) -> None:
    relay = await start({"clients": {"web": {"key": KEY, "origins": PAGE}}, "database": sqlite_setting, "providers": vendors.entries()})
    site = Site(relay, vendors.seen("openai"))
    ticket = await site.ticket(provider="openai", models=["gpt-realtime*"], max_messages=5)
    async with relay.client.ws_connect(relay.ws("openai"), protocols=["realtime", f"bearer.{ticket}"], headers={"Origin": PAGE}) as socket:
        assert (await socket.receive_json())["type"] == "session.created"
        await socket.send_json({"type": "session.update", "session": {"model": "gpt-5"}})
        assert (await socket.receive_json())["error"]["code"] == "model_not_allowed"
        assert (await socket.receive()).data == 1008
    assert not any("gpt-5" in str(message) for message in site.seen[0].messages)


@pytest.mark.parametrize(
    ("record", "key", "expires_s", "expected"),
    [({"providers": ["second"]}, KEY, None, (403, "provider_not_allowed")), ({"endpoints": ["speech"]}, KEY, None, (403, "endpoint_not_allowed")),
     ({"addresses": ["10.0.0.0/8"]}, KEY, None, (403, "address_not_allowed")), ({"origins": [EVIL]}, KEY, None, (403, "origin_not_allowed")),
     ({}, KEY, 1, (401, "ticket_invalid")), ({}, OTHER, None, (401, "ticket_invalid")), ({}, KEY, None, (101, ""))],
)  # fmt: skip
async def test_the_record_of_the_client_is_checked_again_when_the_ticket_is_used(
    site: Site, record: dict[str, Any], key: str, expires_s: int | None, expected: tuple[int, str]
) -> None:
    ticket = await site.ticket()
    client = Client("web", rights_of(json.dumps({"origins": [PAGE]} | record)))
    digest = _sha256(key)
    site.relay.gateway.keys.configure(Clients({"web": client}, {digest: ClientKey("web/1", digest, client, expires_s)}))
    assert await site.open(ticket) == expected
    assert len(site.seen) == (expected[0] == 101)
    assert await site.open(ticket) == (401, "ticket_invalid")


async def test_a_key_that_now_belongs_to_another_client_refuses_its_tickets(site: Site) -> None:
    ticket, other = await site.ticket(), Client("other", rights_of(json.dumps({"origins": [PAGE]})))
    site.relay.gateway.keys.configure(Clients({"other": other}, {_sha256(KEY): ClientKey("other/1", _sha256(KEY), other)}))
    assert await site.open(ticket) == (401, "ticket_invalid")


async def test_a_key_that_is_revoked_refuses_its_tickets_and_ends_their_sessions(site: Site, sqlite_setting: str) -> None:
    database = Database(database_url(sqlite_setting))
    store = AccessStore(database)
    await store.create_key("stored", json.dumps({"origins": [PAGE]}), NewKey("0123456789ab", _sha256(STORED)), "test")
    await site.relay.gateway.refresh_access()
    before, ticket = await site.ticket(STORED), await site.ticket(STORED)
    async with site.relay.client.ws_connect(site.relay.ws("mine"), protocols=[f"bearer.{before}"], headers={"Origin": PAGE}) as socket:
        await store.revoke_key("0123456789ab", "test")
        assert await site.open(ticket) == (401, "ticket_invalid")
        assert "was revoked" in (await site.why(ticket))[2]
        await site.relay.gateway.refresh_access()
        assert (await socket.receive()).data == 4401
    assert {(event["client"], event["error"]) for event in await site.relay.events(count=2)} == {("stored", "access_revoked"), ("127.0.0.1", "ticket_invalid")}
    await database.close()


async def test_a_key_that_this_process_does_not_know_yet_is_read_from_the_database(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> None:
    """Another worker has made the ticket, half a second before this one polls."""
    first, second = await _site(start, aiohttp_server, sqlite_setting), await _site(start, aiohttp_server, sqlite_setting)
    database = Database(database_url(sqlite_setting))
    await AccessStore(database).create_key("stored", json.dumps({"origins": [PAGE]}), NewKey("0123456789ab", _sha256(STORED)), "test")
    await first.relay.gateway.refresh_access()
    for digest in second.relay.gateway.keys.stored_keys():
        second.relay.gateway.keys.remove_key(digest)
    assert await second.open(await first.ticket(STORED)) == (101, "")
    await database.close()


# --- forged, repeated, expired


async def test_a_forged_ticket_is_refused_without_a_query(site: Site) -> None:
    ticket = await site.ticket()
    flipped = ticket[:-1] + ("A" if ticket[-1] != "A" else "B")
    forged = ["rt_", "rt_" + "A" * 32, flipped, ticket[:3] + flipped[4:5] + ticket[4:] if flipped[4] != ticket[3] else flipped, ticket + "A", ticket[:-1], "rt_" + "'" * 32, "rt_" + "A" * 5000]
    with statements("tickets") as asked:
        for secret in forged:
            status, error = await site.connect(site.relay.ws("mine") + f"?ticket={secret}", (), {"Origin": PAGE})
            assert (status, error) == (401, "ticket_invalid"), secret
            assert (await site.why(secret))[:2] == (401, "ticket_invalid")
    assert not asked and not site.seen
    assert await site.open(ticket) == (101, "")


async def test_a_repeated_ticket_is_refused_without_a_query(site: Site) -> None:
    ticket = await site.ticket()
    assert await site.open(ticket) == (101, "")
    with statements("tickets") as asked:
        assert [await site.open(ticket) for _ in range(3)] == [(401, "ticket_invalid")] * 3
    assert not asked


async def test_of_parallel_handshakes_with_one_ticket_one_is_opened(site: Site) -> None:
    ticket = await site.ticket()
    results = await asyncio.gather(*(site.open(ticket) for _ in range(20)))
    assert sorted(results) == [(101, ""), *[(401, "ticket_invalid")] * 19]
    assert len(site.seen) == 1


@pytest.fixture
async def tickets(sqlite_setting: str) -> AsyncIterator[tuple[Tickets, ClientKey, list[float]]]:
    """The tickets of a database with a clock of their own, and a key."""
    database, now = Database(database_url(sqlite_setting)), [1_000_000.0]
    key = ClientKey("web/1", _sha256(KEY), Client("web", Rights()))
    keys = ClientKeys(lambda: 0.0)
    keys.configure(Clients({"web": key.client}, {key.digest: key}))

    async def refresh() -> None:
        """Do nothing: no key is of the database."""

    tickets = Tickets(TicketStore(database), keys, lambda: now[0], refresh)
    await tickets.load_secret()
    yield tickets, key, now
    await database.close()


async def test_a_ticket_can_be_used_for_a_minute(tickets: tuple[Tickets, ClientKey, list[float]]) -> None:
    made, key, now = tickets
    terms = TicketTerms("mine", "a/b", ("m*",), PAGE, 5.5, 3)
    first, second = (await made.issue(key, terms))[0], (await made.issue(key, terms))[0]
    now[0] += LIFETIME_S - 0.1
    assert (await made.redeem(first, "id")) == (key, terms)
    now[0] += 0.2
    for _ in range(2):
        with pytest.raises(TicketInvalid, match="it has expired"):
            await made.redeem(second, "id")
    refusal = await made.refusal(second)
    assert isinstance(refusal, TicketInvalid) and "expired" in refusal.message


async def test_no_repr_shows_a_ticket(tickets: tuple[Tickets, ClientKey, list[float]]) -> None:
    made, key, _ = tickets
    issued = await made.issue(key, TicketTerms("mine"))
    objects = (issued, await made.redeem(issued.ticket, "id"), made, Caller("web", ticket=issued.ticket))
    assert "rt_" not in repr(objects)


async def test_a_client_gets_a_bounded_number_of_tickets_in_a_window(tickets: tuple[Tickets, ClientKey, list[float]]) -> None:
    made, key, now = tickets
    made._issued["web"] = (now[0] - 10, MOST_TICKETS - 1)
    other = ClientKey("other/1", b"2" * 32, Client("other", Rights()))
    await made.issue(key, TicketTerms("mine"))
    with pytest.raises(RateLimited) as refused:
        await made.issue(key, TicketTerms("mine"))
    assert refused.value.retry_after_s == WINDOW_S - 10
    await made.issue(other, TicketTerms("mine"))
    now[0] += WINDOW_S
    await made.issue(key, TicketTerms("mine"))


async def test_tickets_of_another_database_are_refused_after_it_was_replaced(tickets: tuple[Tickets, ClientKey, list[float]], tmp_path: Path) -> None:
    made, key, _ = tickets
    ticket = (await made.issue(key, TicketTerms("mine"))).ticket
    other = Database(database_url(str(tmp_path / "other.db")))
    made._store = TicketStore(other)
    made.forget_secret()
    await made.load_secret()
    with pytest.raises(TicketInvalid):
        await made.redeem(ticket, "id")
    assert (await made.redeem((await made.issue(key, TicketTerms("mine"))).ticket, "id")).key is key
    await other.close()


async def test_a_restored_database_has_another_secret_and_the_process_reads_it(site: Site, sqlite_setting: str) -> None:
    database = Database(database_url(sqlite_setting))
    await AccessStore(database).create_key("stored", "{}", NewKey("0123456789ab", _sha256(STORED)), "test")
    await site.relay.gateway.refresh_access()
    ticket = await site.ticket()
    with sa.create_engine(f"sqlite:///{sqlite_setting}").begin() as connection:
        connection.execute(sa.text("UPDATE access_state SET version = 0, ticket_secret = :secret"), {"secret": b"s" * 32})
    await site.relay.gateway.refresh_access()
    assert await site.open(ticket) == (401, "ticket_invalid")
    assert await site.open(await site.ticket()) == (101, "")
    await database.close()


async def test_while_the_secret_cannot_be_written_only_tickets_are_unavailable(start: StartRelay, aiohttp_server: Any, sqlite_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk can be read."""

    async def fail(_store: TicketStore) -> bytes:
        raise DatabaseUnavailable("OperationalError")

    with monkeypatch.context() as patched:
        patched.setattr(TicketStore, "ticket_secret", fail)
        site = await _site(start, aiohttp_server, sqlite_setting)
        site.relay.gateway.keys.require_fresh()
        status, headers, _ = await site.ask()
        assert (status, headers["x-relay-error"]) == (503, "store_unavailable")
        assert await site.open("rt_" + "A" * 32) == (503, "store_unavailable")
    await site.relay.gateway.refresh_access()
    assert await site.open(await site.ticket()) == (101, "")


async def test_while_the_database_is_unavailable_no_ticket_is_used_up(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> None:
    site = await _site(start, aiohttp_server, sqlite_setting)
    ticket = await site.ticket()
    with sa.create_engine(f"sqlite:///{sqlite_setting}").connect() as connection:
        connection.execute(sa.text("ALTER TABLE tickets RENAME TO away"))
        connection.commit()
        assert await site.open(ticket) == (503, "store_unavailable")
        assert (await site.ask())[0] == 503
        connection.execute(sa.text("ALTER TABLE away RENAME TO tickets"))
        connection.commit()
    assert await site.open(ticket) == (101, "")


async def test_the_database_has_no_ticket_but_its_hash(site: Site, sqlite_setting: str) -> None:
    ticket = await site.ticket()
    await site.open(ticket)
    await site.relay.idle()
    stored = b"".join(path.read_bytes() for path in Path(sqlite_setting).parent.glob("relay.db*"))
    assert _sha256(ticket) in stored and ticket[3:].encode() not in stored and KEY.encode() not in stored


# --- ceilings


async def test_a_session_ends_after_the_messages_that_its_ticket_allows(site: Site) -> None:
    ticket = await site.ticket(max_messages=2)
    async with site.relay.client.ws_connect(site.relay.ws("mine"), protocols=[f"bearer.{ticket}"], headers={"Origin": PAGE}) as socket:
        for message in ("one", "two", "three"):
            await socket.send_str(message)
        assert [(await socket.receive()).data for _ in range(2)] == ["one", "two"]
        closed = await socket.receive()
        assert (closed.type, closed.data, closed.extra) == (WSMsgType.CLOSE, 4409, "the session reached its limit of 2 messages")
    assert site.seen[0].messages[:2] == ["one", "two"] and "three" not in site.seen[0].messages


async def test_binary_messages_count_too_where_models_are_checked(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> None:
    server = await aiohttp_server(deepgram())
    entry = packaged_provider("deepgram", str(server.make_url("")).rstrip("/"))
    relay = await start({"clients": {"web": {"key": KEY, "origins": PAGE}}, "database": sqlite_setting}, deepgram=entry)
    ticket = await Site(relay, []).ticket(provider="deepgram", models=["nova*"], max_messages=1)
    async with relay.client.ws_connect(f"{relay.ws('deepgram')}?model=nova-3", protocols=["token", ticket], headers={"Origin": PAGE}) as socket:
        await socket.send_bytes(b"audio")
        assert (await socket.receive_json())["type"] == "Results"
        await socket.send_bytes(b"audio")
        assert (await socket.receive()).data == 4409


@pytest.mark.parametrize(("own", "common"), [(5, None), (5, 60), (60, 5)])
async def test_a_session_ends_after_the_shorter_time_of_its_ticket_and_its_provider(start: StartRelay, aiohttp_server: Any, sqlite_setting: str, own: int, common: int | None) -> None:
    site = await _site(start, aiohttp_server, sqlite_setting, websocket={"max_session_s": common} if common else {})
    ticket = await site.ticket(max_session_s=own)
    gateway = site.relay.gateway
    async with site.relay.client.ws_connect(site.relay.ws("mine"), protocols=[f"bearer.{ticket}"], headers={"Origin": PAGE}) as socket:
        await socket.send_str("hello")
        assert (await socket.receive()).data == "hello"
        now, real = 5.5, gateway.clock
        gateway.clock = lambda: real() + now
        gateway.sessions.make_all_due()
        await sweep(gateway)
        closed = await socket.receive(20)
        assert (closed.data, closed.extra) == (4409, "the session reached its limit of 5 s")


# --- why a handshake was refused


async def test_a_page_asks_why_the_handshake_with_its_ticket_was_refused(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> None:
    limits = [{"handshakes": 1, "window_s": 3600, "per": "client"}]
    site = await _site(start, aiohttp_server, sqlite_setting, limits=limits)
    ticket = await site.ticket(provider="second")
    assert (await site.why(ticket))[:2] == (426, "upgrade_required")
    assert await site.open(ticket) == (403, "ticket_mismatch")
    for _ in range(2):
        status, error, message = await site.why(ticket)
        assert (status, error) == (403, "ticket_mismatch") and "for the provider 'second', and was used for 'mine'" in message
    used = await site.ticket()
    assert await site.open(used) == (101, "")
    assert (await site.why(used))[:2] == (401, "ticket_invalid")
    ticket = await site.ticket()
    assert await site.open(ticket) == (429, "rate_limited")
    assert (await site.why(ticket))[:2] == (429, "rate_limited")


async def test_a_page_learns_that_the_provider_refused_the_handshake_with_its_ticket(site: Site) -> None:
    for answered, expected in ((402, 402), (500, 500), (200, 502), (304, 502)):
        ticket = await site.ticket()
        assert (await site.open(ticket, endpoint=f"no/{answered}"))[0] == answered
        status, error, message = await site.why(ticket)
        assert (status, error, message) == (expected, "handshake_refused", f"The provider refused the WebSocket handshake with {answered}.")
    ticket = await site.ticket(provider="unset")
    assert await site.open(ticket, "unset") == (503, "provider_not_configured")
    assert (await site.why(ticket))[:2] == (503, "provider_not_configured")


async def test_asking_why_does_not_use_up_a_ticket_and_obeys_the_origin(site: Site) -> None:
    ticket = await site.ticket()
    assert (await site.why(ticket))[:2] == (426, "upgrade_required")
    assert (await site.why(ticket, Origin="", **{"Sec-Fetch-Site": "same-origin"}))[:2] == (426, "upgrade_required")
    assert (await site.why(ticket, Origin=EVIL))[:2] == (403, "origin_not_allowed")
    assert (await site.why(ticket, Origin=""))[:2] == (403, "origin_required")
    assert await site.open(ticket) == (101, "")


async def test_a_page_of_another_origin_may_ask_why_with_a_header(site: Site) -> None:
    for name in ("Authorization", "x-relay-key"):
        preflight = {"Origin": PAGE, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": name}
        status, headers, _ = await site.relay.call("OPTIONS", site.relay.ws("mine"), headers=preflight)
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, PAGE)
