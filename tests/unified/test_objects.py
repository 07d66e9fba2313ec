"""Paths of /v1 that name a stored response go to the provider that made it, for its client only."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, packaged_provider, provider
from tests.upstream.raw import RawUpstream, ok
from tests.upstream.vendors import SEEN, echo, vendor

pytestmark = pytest.mark.usefixtures("no_lists")

WEB, APP = "sk-local-objects-web-0123456789", "sk-local-objects-app-0123456789"
MADE = b'{"id":"%s","object":"response","status":"completed","model":"m","output":[],"usage":{"input_tokens":1,"output_tokens":1,"total_tokens":2}}'
STREAM = b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_9","object":"response","status":"in_progress"}}\n\n'
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream, database_setting: str) -> Relay:
    clients = {"web": {"key": WEB}, "app": {"key": APP}}
    entries = {"openai": provider(f"{raw.url}/openai"), "grok": provider(f"{raw.url}/grok")}
    return await start({"database": database_setting, "access": {"mode": "required"}, "clients": clients, "providers": entries})


async def call(relay: Relay, method: str, endpoint: str, key: str = WEB, **body: Any) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    status, _, answer = await relay.call(method, f"{relay.url}/v1/{endpoint}", headers=headers, data=json.dumps(body) if body else None)
    return status, answer


@pytest.mark.parametrize("made", ["resp_1", "a-uuid-of-another-vendor"])
async def test_a_response_is_read_continued_and_cancelled_where_it_was_made(relay: Relay, raw: RawUpstream, made: str) -> None:
    raw.scripts[:] = [(ok(MADE % made.encode()),)]
    assert (await call(relay, "POST", "responses", model="grok/grok-4", input="x"))[0] == 200
    for method, endpoint in (("GET", f"responses/{made}"), ("GET", f"responses/{made}/input_items?limit=2"), ("POST", f"responses/{made}/cancel"), ("DELETE", f"responses/{made}")):
        assert (await call(relay, method, endpoint))[0] == 200
    assert [each.target for each in raw.arrived] == [
        "/grok/responses", f"/grok/responses/{made}", f"/grok/responses/{made}/input_items?limit=2", f"/grok/responses/{made}/cancel", f"/grok/responses/{made}",
    ]  # fmt: skip


async def test_a_streamed_response_is_known_while_it_runs(relay: Relay, raw: RawUpstream) -> None:
    raw.scripts[:] = [(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(STREAM), STREAM),), (ok(MADE % b"resp_9"),)]
    assert (await call(relay, "POST", "responses", model="openai/gpt-5", input="x", stream=True))[0] == 200
    assert (await call(relay, "GET", "responses/resp_9"))[0] == 200
    assert raw.arrived[-1].target == "/openai/responses/resp_9"


async def test_another_client_and_an_unknown_id_get_404_and_nothing_is_sent(relay: Relay, raw: RawUpstream) -> None:
    raw.scripts[:] = [(ok(MADE % b"resp_1"),)]
    await call(relay, "POST", "responses", model="openai/gpt-5", input="x")
    for key, endpoint in ((APP, "responses/resp_1"), (WEB, "responses/resp_2"), (APP, "responses/resp_1/cancel")):
        status, answer = await call(relay, "GET" if endpoint[-1] != "l" else "POST", endpoint, key)
        assert (status, json.loads(answer)["error"]["code"]) == (404, "object_not_found")
    assert len(raw.arrived) == 1


async def test_it_is_known_after_a_restart(start: StartRelay, raw: RawUpstream, relay: Relay, database_setting: str) -> None:
    raw.scripts[:] = [(ok(MADE % b"resp_1"),)]
    await call(relay, "POST", "responses", model="openai/gpt-5", input="x")
    await relay.gateway.background.done()
    document = {"database": database_setting, "access": {"mode": "required"}, "clients": {"web": {"key": WEB}}}
    again = await start(document | {"providers": {"openai": provider(f"{raw.url}/openai"), "grok": provider(f"{raw.url}/grok")}})
    assert (await call(again, "GET", "responses/resp_1"))[0] == 200
    assert raw.arrived[-1].target == "/openai/responses/resp_1"


async def created(socket: Any, name: str, **more: Any) -> None:
    """Let the stand-in, which sends back what it gets, create a response."""
    await socket.send_json({"type": "response.created", "response": {"id": name, "object": "response", "model": "grok-4"} | more})
    assert (await socket.receive_json(timeout=HANG_GUARD_S))["type"] == "response.created"


async def test_a_response_of_a_socket_is_read_where_it_was_made_unless_it_is_not_stored(start: StartRelay, aiohttp_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XAI_API_KEY", "k-of-a-test")
    server = await aiohttp_server(vendor(("GET", "/{path:.*}", echo)))
    url = str(server.make_url("")).rstrip("/")
    entries = {name: packaged_provider(name, f"{url}/{name}") for name in ("openai", "grok")}
    relay = await start({"unified": {"sockets": {"responses": "grok"}}, "providers": entries})
    async with relay.client.ws_connect(f"{relay.url}/v1/responses") as socket:
        await created(socket, "resp_1")
        await created(socket, "resp_2", store=False)
        await relay.call("GET", f"{relay.url}/v1/responses/resp_1")
        assert server.app[SEEN][-1].target == "/grok/v1/responses/resp_1"
        assert (await relay.call("GET", f"{relay.url}/v1/responses/resp_2"))[0] == 404
    assert len(server.app[SEEN]) == 2
