"""WebSocket sessions: handshakes, messages, closes and limits."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import struct

import pytest
from aiohttp import WSMsgType, web

from tests.conftest import StartRelay, Through, Vendors
from tests.relays import CLIENT_KEY, CLOUDFLARE_TOKEN, KEYS, Relay, canary, provider
from tests.upstream.raw import SILENCE, RawUpstream, head, ok
from tests.upstream.vendors import SEEN, echo, vendor

SOCKETS = {"websocket": {"default_path": "echo"}}


@pytest.fixture
async def echoing(start: StartRelay, aiohttp_server):  # type: ignore[no-untyped-def]
    """A relay in front of an echo provider, and the sessions that the provider saw."""
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start(openai=provider(str(server.make_url("")), websocket={"default_path": "echo"}))
    return relay, server.app[SEEN]


async def test_text_and_binary_messages_keep_their_order_and_type(echoing) -> None:  # type: ignore[no-untyped-def]
    relay, seen = echoing
    sent = ["wörld", b"\x00\xff", "", b"", "x" * 70_000, b"y" * 1_000_000] * 20
    async with relay.client.ws_connect(relay.ws("openai"), max_msg_size=0) as socket:
        for message in sent:
            await (socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message))
            assert (await socket.receive(20)).data == message
    await asyncio.wait_for(seen[0].ended.wait(), 20)
    assert seen[0].messages[:-1] == sent
    [event] = await relay.events()
    assert (event["messages_up"], event["messages_down"], event["status"], event["outcome"]) == (120, 120, 101, "relayed")
    assert (event["close_code"], event["closed_by"]) == (1000, "client")


async def test_the_rest_url_of_each_websocket_path_upgrades_too(through: Through) -> None:
    """OpenAI has two WebSocket paths, /realtime and /responses."""
    relay = through.relay
    async with relay.client.ws_connect(relay.path("openai", "v1/responses")) as socket:
        await socket.send_str('{"type": "response.create"}')
        kinds = [(await socket.receive_json(timeout=20))["type"] for _ in range(6)]
        assert kinds[-1] == "response.completed"
    async with relay.client.ws_connect(relay.path("openai", "realtime?model=gpt-realtime-mini")) as socket:
        assert (await socket.receive_json(timeout=20))["session"]["model"] == "gpt-realtime-mini"


async def test_a_default_model_is_used_when_the_client_names_none(through: Through) -> None:
    relay, seen = through.relay, through.vendors.seen("openai")
    for query, expected in (("", "model=gpt-realtime-2.1"), ("?intent=transcription", "intent=transcription"), ("?call_id=c1", "call_id=c1")):
        async with relay.client.ws_connect(relay.ws("openai") + query):
            pass
        assert seen[-1].target.partition("?")[2] == expected


async def test_gemini_live_keeps_its_json_in_binary_frames(through: Through) -> None:
    relay = through.relay
    url = relay.ws("google-ai-studio") + f"?key={CLIENT_KEY}"
    async with relay.client.ws_connect(url) as socket:
        await socket.send_str('{"setup": {}}')
        message = await socket.receive(20)
        assert message.type is WSMsgType.BINARY and b"responseTokenCount" in message.data
    [seen] = through.vendors.seen("google-ai-studio")
    assert seen.header("x-goog-api-key") == KEYS["GOOGLE_AI_API_KEY"] and "key" not in seen.target
    assert through.front == [], "Gemini Live does not use Cloudflare by default"


BROWSER_FORMS = {
    "openai": (["realtime", f"openai-insecure-api-key.{canary('b1')}", "openai-beta.realtime-v1"], "realtime"),
    "openai agents": (["realtime", f"openai-insecure-api-key.{canary('b2')}", "openai-agents-sdk.0.20.0"], "realtime"),
    "cloudflare openai": (["realtime", f"openai-insecure-api-key.{canary('b3')}", "openai-beta.realtime-v1", f"cf-aig-authorization.{canary('b4')}"], "realtime"),
    "two secrets alone": ([f"cf-aig-authorization.{canary('b5')}", f"xi-api-key.{canary('b6')}"], f"cf-aig-authorization.{canary('b5')}"),
    "elevenlabs agent": (["convai", f"bearer.{canary('b7')}"], "convai"),
    "elevenlabs": ([f"xi-api-key.{canary('b8')}", f"cf-aig-authorization.{canary('b9')}"], f"xi-api-key.{canary('b8')}"),
    "fal": ([f"fal-api-key.{canary('c1')}", f"cf-aig-authorization.{canary('c2')}"], f"fal-api-key.{canary('c1')}"),
    "cartesia": ([f"cf-aig-authorization.{canary('c3')}"], f"cf-aig-authorization.{canary('c3')}"),
}  # fmt: skip
PROVIDER_OF = {"openai agents": "openai", "cloudflare openai": "openai", "two secrets alone": "elevenlabs", "elevenlabs agent": "elevenlabs"}


@pytest.mark.parametrize("form", BROWSER_FORMS)
async def test_every_form_of_browser_credentials_connects_and_its_secrets_are_not_sent_upstream(through: Through, form: str) -> None:
    relay, name = through.relay, PROVIDER_OF.get(form, form)
    offered, echoed = BROWSER_FORMS[form]
    endpoint = "fal-ai/fast-lcm-diffusion/realtime" if name == "fal" else ""
    async with relay.client.ws_connect(relay.ws(name, endpoint), protocols=offered) as socket:
        assert socket.protocol == echoed
    seen = through.vendors.seen(name)[-1]
    raw_head = f"{seen.target} {seen.headers}"
    assert not any(item.partition(".")[2] in raw_head for item in offered if "CANARY" in item)
    up = (seen.header("Sec-WebSocket-Protocol") or "").replace(" ", "").split(",")
    assert "openai-beta.realtime-v1" not in up and "openai-agents-sdk.0.20.0" not in up
    for arrived in through.front[-1:]:
        assert arrived.header("cf-aig-authorization") == f"Bearer {CLOUDFLARE_TOKEN}"


async def test_the_subprotocol_after_token_is_a_credential_for_deepgram(start: StartRelay, aiohttp_server) -> None:  # type: ignore[no-untyped-def]
    server = await aiohttp_server(vendor(("GET", "/v1/listen", echo)))
    rules = {"default_path": "v1/listen", "subprotocols": {"token": "credential_next"}}
    relay = await start(deepgram=provider(str(server.make_url("")), websocket=rules))
    async with relay.client.ws_connect(relay.ws("deepgram"), protocols=["token", CLIENT_KEY]) as socket:
        assert socket.protocol == "token"
    assert CLIENT_KEY not in str(server.app[SEEN][0].headers)


async def test_a_client_may_send_its_key_in_a_subprotocol_if_the_registry_allows_it(start: StartRelay, aiohttp_server) -> None:  # type: ignore[no-untyped-def]
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start(mine=provider(str(server.make_url("")), key="NOT_SET", client_credentials="allow", **SOCKETS))
    async with relay.client.ws_connect(relay.ws("mine"), protocols=["realtime", f"openai-insecure-api-key.{CLIENT_KEY}"]):
        pass
    assert server.app[SEEN][0].header("Authorization") == f"Bearer {CLIENT_KEY}"


REFUSALS = [(401, "Unauthorized"), (403, "Forbidden"), (404, "Not Found"), (429, "Too Many Requests"), (500, "Oops")]


@pytest.mark.parametrize(("status", "reason"), REFUSALS)
async def test_a_refused_handshake_keeps_its_status_and_body(start: StartRelay, raw: RawUpstream, status: int, reason: str) -> None:
    raw.plays(ok(b'{"error": {"message": "no"}}', "Content-Type: application/json", "Retry-After: 7", "Set-Cookie: a=b", status=f"{status} {reason}"))
    relay = await start(openai=provider(raw.url, **SOCKETS))
    got, headers, body = await _upgrade(relay, "/api/v1/ai-gateway/ws/openai")
    assert (got, body) == (status, b'{"error": {"message": "no"}}')
    assert (headers["retry-after"], headers["x-relay-error-source"]) == ("7", "provider")
    assert "set-cookie" not in headers


async def test_a_redirect_of_a_handshake_is_not_followed(start: StartRelay, raw: RawUpstream) -> None:
    other = await RawUpstream.start()
    raw.plays(head(f"Location: {other.url}/steal", "Content-Length: 0", status="307 Temporary Redirect"))
    relay = await start(openai=provider(raw.url, **SOCKETS))
    status, headers, _ = await _upgrade(relay, "/api/v1/ai-gateway/ws/openai")
    assert (status, headers["location"]) == (307, f"{other.url}/steal")
    assert other.connections == 0
    await other.stop()


async def _upgrade(relay: Relay, target: str, *extra: str) -> tuple[int, dict[str, str], bytes]:
    """Send a handshake as bytes. Returns (status, headers, body)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [f"GET {target} HTTP/1.1", f"Host: 127.0.0.1:{relay.port}", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}"]
    replaced = {line.partition(":")[0] for line in extra}
    lines = [line for line in lines if line.partition(":")[0] not in replaced] + [line for line in extra if not line.endswith(":")]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    status = int(answer.split(b" ", 2)[1])
    headers = {n.lower(): v.strip() for line in answer.decode().split("\r\n")[1:] if line for n, _, v in [line.partition(":")]}
    body = await asyncio.wait_for(reader.readexactly(int(headers.get("content-length", "0"))), 20)
    writer.close()
    return status, headers, body


@pytest.mark.parametrize(
    "wrong",
    ["Sec-WebSocket-Version: 8", "Sec-WebSocket-Key: short", "Sec-WebSocket-Key:", "Connection: keep-alive"],
)
async def test_an_invalid_handshake_is_refused_before_the_relay_connects(start: StartRelay, raw: RawUpstream, wrong: str) -> None:
    relay = await start(openai=provider(raw.url, **SOCKETS))
    status, headers, _ = await _upgrade(relay, "/api/v1/ai-gateway/ws/openai", wrong)
    assert (status, headers["x-relay-error"]) == (400, "bad_request")
    assert raw.connections == 0


async def test_the_relay_refuses_a_handshake_with_its_own_status_and_code(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url, **SOCKETS), plain=provider(raw.url), empty=provider(raw.url, key="NOT_SET", **SOCKETS))
    table = {"plain": (426, "websocket_not_supported"), "empty": (503, "provider_not_configured"), "opnai": (404, "unknown_provider")}
    for name, expected in table.items():
        status, headers, body = await _upgrade(relay, f"/api/v1/ai-gateway/ws/{name}")
        assert (status, headers["x-relay-error"]) == expected
    assert b"Did you mean 'openai'?" in body
    status, headers, _ = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/ws/openai")
    assert (status, headers["x-relay-error"]) == (426, "upgrade_required")
    raw.plays(SILENCE)
    slow = await start({"websocket": {"handshake_timeout_s": 0.3}}, openai=provider(raw.url, **SOCKETS))
    status, headers, _ = await _upgrade(slow, "/api/v1/ai-gateway/ws/openai")
    assert (status, headers["x-relay-error"]) == (504, "upstream_timeout")
    raw.scripts[:] = [(head("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Accept: wrong", status="101 Switching Protocols"),)]
    status, headers, _ = await _upgrade(relay, "/api/v1/ai-gateway/ws/openai")
    assert (status, headers["x-relay-error"]) == (502, "upstream_protocol_error")


CODES = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999]


@pytest.mark.parametrize("reason", ["", "r" * 123])
@pytest.mark.parametrize("code", CODES)
async def test_close_codes_and_reasons_are_relayed_in_both_directions(echoing, start: StartRelay, aiohttp_server, code: int, reason: str) -> None:  # type: ignore[no-untyped-def]
    relay, seen = echoing
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        await socket.close(code=code, message=reason.encode())
    await asyncio.wait_for(seen[0].ended.wait(), 20)
    assert (seen[0].close_code, seen[0].messages[-1]) == (code, reason)

    closing = await _closing_upstream(aiohttp_server, struct.pack("!H", code) + reason.encode())
    other = await start(openai=provider(closing, **SOCKETS))
    assert await _close_seen(other) == (code, reason)


async def _closing_upstream(aiohttp_server, payload: bytes | None) -> str:  # type: ignore[no-untyped-def]
    """Start a provider that upgrades, then sends this close payload, or disconnects for None."""

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        if payload is None:
            assert request.transport is not None
            request.transport.abort()
        else:
            await socket.send_frame(payload, WSMsgType.CLOSE)
            await socket.receive(20)
        return socket

    server = await aiohttp_server(vendor(("GET", "/echo", handler)))
    return str(server.make_url(""))


async def _close_seen(relay: Relay) -> tuple[int | None, str]:
    """Open a session. Returns (code, reason) of the close frame that the client receives."""
    async with relay.client.ws_connect(relay.ws("openai"), autoclose=False) as socket:
        message = await socket.receive(20)
        assert message.type is WSMsgType.CLOSE, message
        return message.data, message.extra


@pytest.mark.parametrize(
    ("payload", "code"),
    [(b"", 0), (None, 1014), (struct.pack("!H", 1005), 1002), (struct.pack("!H", 1006), 1002), (struct.pack("!H", 1015), 1002), (struct.pack("!H", 2999), 1002), (struct.pack("!H", 5000), 1002)],
)
async def test_missing_and_reserved_close_codes_of_the_provider_are_translated(start: StartRelay, aiohttp_server, payload: bytes | None, code: int) -> None:  # type: ignore[no-untyped-def]
    """No code stays none (aiohttp shows 0), reserved codes become 1002, a lost connection 1014."""
    relay = await start(openai=provider(await _closing_upstream(aiohttp_server, payload), **SOCKETS))
    assert (await _close_seen(relay))[0] == code


async def test_a_lost_client_closes_the_provider_with_1011(echoing) -> None:  # type: ignore[no-untyped-def]
    relay, seen = echoing
    socket = await relay.client.ws_connect(relay.ws("openai"))
    socket._response.connection.transport.abort()
    await asyncio.wait_for(seen[0].ended.wait(), 20)
    assert seen[0].close_code == 1011
    [event] = await relay.events()
    assert (event["outcome"], event["error"]) == ("client_gone", "client_gone")
    await relay.idle()


async def test_both_sides_closing_at_once_leaves_no_task(start: StartRelay, aiohttp_server) -> None:  # type: ignore[no-untyped-def]
    relay = await start(openai=provider(await _closing_upstream(aiohttp_server, struct.pack("!H", 1000)), **SOCKETS))
    before = len(asyncio.all_tasks())
    for _ in range(100):
        async with relay.client.ws_connect(relay.ws("openai")) as socket:
            await socket.close()
    await relay.idle()
    await asyncio.sleep(0.2)
    assert len(asyncio.all_tasks()) <= before + 2


async def test_a_message_of_exactly_the_limit_passes_and_one_more_byte_is_1009(start: StartRelay, aiohttp_server) -> None:  # type: ignore[no-untyped-def]
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    rules = {"default_path": "echo", "max_message_bytes": 100_000}
    relay = await start(openai=provider(str(server.make_url("")), websocket=rules))
    async with relay.client.ws_connect(relay.ws("openai"), autoclose=False) as socket:
        await socket.send_bytes(b"x" * 100_000)
        assert len((await socket.receive(20)).data) == 100_000
        await socket.send_bytes(b"x" * 100_001)
        message = await socket.receive(20)
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1009)
    await asyncio.wait_for(server.app[SEEN][0].ended.wait(), 20)
    assert server.app[SEEN][0].close_code == 1009


async def test_a_text_message_of_15_mib_is_relayed(echoing) -> None:  # type: ignore[no-untyped-def]
    relay, _ = echoing
    async with relay.client.ws_connect(relay.ws("openai"), max_msg_size=0) as socket:
        await socket.send_str("x" * 15 * 2**20)
        assert len((await socket.receive(30)).data) == 15 * 2**20


async def test_invalid_utf8_ends_with_1007_and_never_reaches_the_other_side(echoing) -> None:  # type: ignore[no-untyped-def]
    relay, seen = echoing
    async with relay.client.ws_connect(relay.ws("openai"), autoclose=False) as socket:
        await socket.send_frame(b"bad \xff\xfe", WSMsgType.TEXT)
        message = await socket.receive(20)
        assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 1007, "invalid UTF-8 from the client")
    await asyncio.wait_for(seen[0].ended.wait(), 20)
    assert seen[0].messages[:-1] == [] and seen[0].close_code == 1007


async def test_deflate_is_not_negotiated(echoing) -> None:  # type: ignore[no-untyped-def]
    relay, seen = echoing
    async with relay.client.ws_connect(relay.ws("openai"), compress=15) as socket:
        assert socket.compress == 0
    assert seen[0].header("Sec-WebSocket-Extensions") is None


@pytest.mark.serial
async def test_time_limits_have_their_own_close_codes(start: StartRelay, aiohttp_server) -> None:  # type: ignore[no-untyped-def]
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    for limit, code in (("idle_timeout_s", 4408), ("max_session_s", 4409)):
        relay = await start(openai=provider(str(server.make_url("")), websocket={"default_path": "echo", limit: 0.4}))
        assert (await _close_seen(relay))[0] == code


async def test_concurrent_sessions_are_limited_per_client(start: StartRelay, aiohttp_server) -> None:  # type: ignore[no-untyped-def]
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start({"websocket": {"max_sessions_per_client": 2}}, openai=provider(str(server.make_url("")), **SOCKETS))
    sockets = [await relay.client.ws_connect(relay.ws("openai")) for _ in range(2)]
    status, headers, _ = await _upgrade(relay, "/api/v1/ai-gateway/ws/openai")
    assert (status, headers["x-relay-error"], headers["retry-after"]) == (429, "too_many_sessions", "1")
    for socket in sockets:
        await socket.close()
    await relay.idle()
    async with relay.client.ws_connect(relay.ws("openai")):
        pass


async def test_the_providers_ping_is_answered(start: StartRelay, aiohttp_server) -> None:  # type: ignore[no-untyped-def]
    answered = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(autoping=False)
        await socket.prepare(request)
        await socket.ping(b"there?")
        message = await socket.receive(20)
        if message.type is WSMsgType.PONG and message.data == b"there?":
            answered.set()
        return socket

    server = await aiohttp_server(vendor(("GET", "/echo", handler)))
    relay = await start(openai=provider(str(server.make_url("")), **SOCKETS))
    async with relay.client.ws_connect(relay.ws("openai")):
        await asyncio.wait_for(answered.wait(), 20)


@pytest.mark.serial
async def test_a_silent_peer_is_pinged_and_a_dead_one_is_closed(start: StartRelay, aiohttp_server) -> None:  # type: ignore[no-untyped-def]
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start({"websocket": {"ping_after_s": 0.3}}, openai=provider(str(server.make_url("")), **SOCKETS))
    async with relay.client.ws_connect(relay.ws("openai")) as alive:
        answer = asyncio.create_task(alive.receive())  # replies to pings meanwhile
        async with relay.client.ws_connect(relay.ws("openai"), autoping=False, autoclose=False) as dead:
            assert (await dead.receive(20)).type is WSMsgType.PING
            [event] = await relay.events("exchange")  # no pong arrives, so the relay closes
            assert event["close_code"] == 1011
        await alive.send_str("still here")
        assert (await asyncio.wait_for(answer, 20)).data == "still here"


async def test_a_peer_that_reads_nothing_is_closed_with_1013(start: StartRelay, aiohttp_server) -> None:  # type: ignore[no-untyped-def]
    codes: list[int] = []

    async def note_close(socket: web.WebSocketResponse) -> None:
        codes.append((await socket.receive()).data)

    async def flooding(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        reader = asyncio.create_task(note_close(socket))
        try:
            while True:
                await socket.send_bytes(b"x" * 65536)
        finally:
            await reader

    server = await aiohttp_server(vendor(("GET", "/echo", flooding)))
    relay = await start({"websocket": {"send_timeout_s": 0.5}}, openai=provider(str(server.make_url("")), **SOCKETS))
    socket = await relay.client.ws_connect(relay.ws("openai"))  # it reads nothing
    [event] = await relay.events()
    assert (event["close_code"], event["closed_by"]) == (1013, "relay")
    async with asyncio.timeout(20):
        while not codes:
            await asyncio.sleep(0.01)
    assert codes == [1013]
    socket._response.connection.transport.abort()


async def test_backpressure_stalls_the_sender_and_loses_nothing(start: StartRelay, aiohttp_server) -> None:  # type: ignore[no-untyped-def]
    """The sender stalls while the client does not read, for longer than the ping interval.

    Then all messages arrive in order.
    """
    sent = 0

    async def counting(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for number in range(2000):
            await socket.send_bytes(struct.pack("!I", number) + b"x" * 65532)
            sent += 1
        await socket.close()
        return socket

    server = await aiohttp_server(vendor(("GET", "/echo", counting)))
    relay = await start({"websocket": {"ping_after_s": 0.3, "send_timeout_s": 60}}, openai=provider(str(server.make_url("")), **SOCKETS))
    socket = await relay.client.ws_connect(relay.ws("openai"), max_msg_size=0)
    before = -1
    async with asyncio.timeout(20):
        while sent == 0 or sent != before:
            before = sent
            await asyncio.sleep(1)
    assert sent < 1000, "the sender stalls"
    numbers = [struct.unpack("!I", (await socket.receive(20)).data[:4])[0] for _ in range(2000)]
    assert numbers == list(range(2000))
    await socket.close()


async def test_a_flooding_provider_is_disconnected_soon_after_its_client_left(start: StartRelay, aiohttp_server) -> None:  # type: ignore[no-untyped-def]
    """The provider ignores the close frame and keeps sending: the relay reads little more."""
    gone = asyncio.Event()
    sent_after = 0
    left = False

    async def flooding(request: web.Request) -> web.StreamResponse:
        nonlocal sent_after
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        try:
            while True:
                await socket.send_bytes(b"x" * 65536)
                sent_after += 65536 * left
        finally:
            gone.set()

    server = await aiohttp_server(vendor(("GET", "/echo", flooding)))
    relay = await start(openai=provider(str(server.make_url("")), **SOCKETS))
    socket = await relay.client.ws_connect(relay.ws("openai"), max_msg_size=0)
    for _ in range(50):
        await socket.receive(20)
    left = True
    socket._response.connection.transport.abort()
    async with asyncio.timeout(10):
        await gone.wait()
    assert sent_after < 16 * 2**20, "only what fits into kernel buffers"
    await relay.idle()


async def test_a_realtime_session_has_its_model_in_the_log(through: Through) -> None:
    relay = through.relay
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        assert json.loads((await socket.receive(20)).data)["type"] == "session.created"
        await socket.send_json({"type": "response.create"})
        answers = [json.loads((await socket.receive(20)).data) for _ in range(5)]
        assert answers[-1]["response"]["usage"]["total_tokens"] == 253
    [event] = await relay.events()
    assert (event["model"], event["messages_up"]) == ("gpt-realtime-2.1", 1)


async def test_subprotocols_of_a_plain_client_are_not_logged(vendors: Vendors, start: StartRelay) -> None:
    relay = await start({"providers": vendors.entries()})
    async with relay.client.ws_connect(relay.ws("openai"), protocols=["unknown.thing", f"openai-insecure-api-key.{CLIENT_KEY}"]) as socket:
        assert socket.protocol == "unknown.thing"
    await relay.events()
    assert CLIENT_KEY not in "".join(relay.logged.lines)
