"""Refused WebSocket handshakes: what the client gets, what is tried next, and what is recorded."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.relays import CLOUDFLARE_TOKEN, KEYS, Relay, canary, provider
from tests.upstream.raw import CLOSE, RESET, RawUpstream, Step, chunk, head, ok
from tests.upstream.vendors import SEEN, echo, vendor

SOCKETS = {"websocket": {"default_path": "echo"}}
QUICK_RETRIES = {"max_attempts": 3, "delay_s": 0.001, "max_delay_s": 0.05}
POOL = {"header": "Authorization", "value": ["Bearer ${OPENAI_API_KEY}", "Bearer ${FAL_KEY}"]}
MESSAGE = b'{"error": {"message": "no such model"}}'
LIMIT_BYTES = 64 * 1024


class Refused:
    """The response to a refused handshake, read from the connection itself."""

    def __init__(self, raw_head: bytes, body: bytes) -> None:
        status_line, *lines = raw_head.decode().split("\r\n")
        self.status = int(status_line.split(" ", 2)[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        self.body = body


async def _dial(relay: Relay, name: str = "openai", then: bytes = b"") -> tuple[Refused, asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    key = base64.b64encode(b"0123456789abcdef").decode()
    writer.write(
        f"GET /api/v1/ai-gateway/ws/{name} HTTP/1.1\r\nHost: 127.0.0.1:{relay.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode() + then
    )
    async with asyncio.timeout(20):
        refused = Refused(await reader.readuntil(b"\r\n\r\n"), b"")
        refused.body = await reader.readexactly(int(refused.headers.get("content-length", "0")))
    return refused, reader, writer


async def refused(relay: Relay, name: str = "openai") -> Refused:
    """Send a handshake that is refused, and return the response."""
    response, _, writer = await _dial(relay, name)
    writer.close()
    return response


@pytest.fixture
async def spare(aiohttp_server: Any) -> Any:
    """A fallback that accepts every handshake."""
    return await aiohttp_server(vendor(("GET", "/echo", echo)))


def _pooled(raw: RawUpstream, spare: Any) -> dict[str, Any]:
    """Configure two keys, retries and a fallback: all that could follow a refusal."""
    first = {"base_url": raw.url, "auth": POOL, "fallback": [{"provider": "spare"}], **SOCKETS}
    return {"retries": QUICK_RETRIES, "providers": {"openai": first, "spare": provider(str(spare.make_url("")), **SOCKETS)}}


FINAL = ["200 OK", "204 No Content", "301 Moved", "302 Found", "304 Not Modified", "308 Permanent", "400 Bad Request", "404 Not Found", "409 Conflict", "413 Too Large", "422 Unprocessable", "426 Upgrade Required"]


@pytest.mark.parametrize("status", FINAL)
async def test_a_final_refusal_is_relayed_without_retry_fallback_or_cooldown(start: StartRelay, raw: RawUpstream, spare: Any, status: str) -> None:
    raw.plays(ok(b"" if status[:3] in ("204", "304") else MESSAGE, "X-Vendor: a", "Set-Cookie: a=b", status=status))
    relay = await start(_pooled(raw, spare))
    for number in range(1, 7):
        response = await refused(relay)
        assert (response.status, response.headers["x-vendor"], "set-cookie" in response.headers) == (int(status[:3]), "a", False)
        assert response.body == (b"" if response.status in (204, 304) else MESSAGE)
        assert (response.headers["x-relay-error"], response.headers["x-relay-error-source"]) == ("handshake_refused", "provider")
        assert (len(raw.arrived), len(spare.app[SEEN])) == (number, 0)
    health = relay.gateway.attempts.health
    assert [state.failures for state in (*health._keys.values(), *health._targets.values())] == [0] * len(health._keys)


async def test_the_row_of_a_refusal_has_the_response_and_who_refused(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(MESSAGE, status="404 Not Found"))
    relay = await start(openai=provider(raw.url, websocket={"default_path": "echo", "default_query": {"model": "big"}}))
    response = await refused(relay)
    [row] = await relay.events()
    assert (row["status"], row["outcome"], row["error"]) == (404, "failed", "handshake_refused")
    assert (row["provider"], row["model"], row["bytes_down"], row["id"]) == ("openai", "big", len(MESSAGE), response.headers["cf-aig-log-id"])
    assert 0 < row["first_byte_ms"] <= row["duration_ms"]
    [attempt] = row["attempts"]
    assert (attempt["provider"], attempt["key"], attempt["status"], attempt["error"]) == ("openai", "OPENAI_API_KEY", 404, "handshake_refused")


@pytest.mark.parametrize(
    ("answer", "cooldown_s"),
    [(("401 No",), 300), (("402 Pay",), 300), (("403 No",), 300), (("429 Slow",), 20), (("429 Slow", "Retry-After: 1800"), 1800), (("500 Oops",), 1), (("503 Busy",), 1)],
)
@pytest.mark.parametrize("transport", ["rest", "websocket"])
async def test_the_cooldown_of_a_refused_key_is_the_same_after_a_handshake_and_a_call(start: StartRelay, raw: RawUpstream, transport: str, answer: tuple[str, ...], cooldown_s: float) -> None:
    raw.plays(ok(MESSAGE, *answer[1:], status=answer[0]))
    relay = await start(openai={"base_url": raw.url, "auth": POOL | {"value": POOL["value"][0]}, **SOCKETS})
    if transport == "rest":
        await relay.call("GET", relay.path("openai", "x"))
    else:
        await refused(relay)
    health = relay.gateway.attempts.health
    [key] = health._keys.values()
    assert key.failures == 1 and cooldown_s - 5 < key.cooldown_until_s - health._clock() <= cooldown_s


@pytest.mark.parametrize("status", ["401 No", "402 Pay", "403 No", "429 Slow"])
async def test_a_refused_key_is_replaced_by_another(start: StartRelay, aiohttp_server: Any, status: str) -> None:
    from aiohttp import web

    async def one_key_is_bad(request: web.Request) -> web.StreamResponse:
        if request.headers["Authorization"] == f"Bearer {KEYS['FAL_KEY']}":
            return web.Response(status=int(status[:3]), headers={"Retry-After": "1800"})
        return await echo(request)

    server = await aiohttp_server(vendor(("GET", "/echo", one_key_is_bad)))
    relay = await start(openai={"base_url": str(server.make_url("")), "auth": POOL, **SOCKETS})
    for _ in range(4):
        async with relay.client.ws_connect(relay.ws("openai")) as socket:
            await socket.send_str("hello")
            assert (await socket.receive(20)).data == "hello"
    rows = await relay.events(count=4)
    assert sum(len(row.get("attempts", ())) == 2 for row in rows) == 1, "the bad key is in cooldown after its first use"


async def test_a_retry_after_that_is_too_long_reaches_the_client(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(MESSAGE, "Retry-After: 1800", status="429 Slow"))
    relay = await start({"retries": QUICK_RETRIES}, openai=provider(raw.url, **SOCKETS))
    response = await refused(relay)
    assert (response.status, response.headers["retry-after"], len(raw.arrived)) == (429, "1800", 1)


BODIES: dict[str, tuple[tuple[Step, ...], bytes]] = {
    "chunked": ((head("Transfer-Encoding: chunked", status="400 Bad"), chunk(b"one "), chunk(b"two"), b"0\r\n\r\n"), b"one two"),
    "until the connection closes": ((head(status="400 Bad"), b"all of it", CLOSE), b"all of it"),
    "none": ((head("Content-Length: 0", status="400 Bad"),), b""),
    "closed before the body": ((head("Content-Length: 100", status="400 Bad"), CLOSE), b""),
    "closed within the body": ((head("Content-Length: 100", status="400 Bad"), b"half", CLOSE), b"half"),
    "closed within its chunks": ((head("Transfer-Encoding: chunked", status="400 Bad"), chunk(b"half"), CLOSE), b"half"),
    "too long": ((ok(b"x" * LIMIT_BYTES + b"y", status="400 Bad"),), b"x" * LIMIT_BYTES),
    "as long as allowed": ((ok(b"x" * LIMIT_BYTES, status="400 Bad"),), b"x" * LIMIT_BYTES),
    "never ending": ((head("Transfer-Encoding: chunked", status="400 Bad"), *[chunk(b"x" * 8192)] * 64), b"x" * LIMIT_BYTES),
    "a length without a body": ((head("Content-Length: 100", status="304 Not Modified"),), b""),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
async def test_the_status_of_a_refusal_is_relayed_however_its_body_ends(start: StartRelay, raw: RawUpstream, body: str) -> None:
    steps, expected = BODIES[body]
    raw.plays(*steps)
    relay = await start({"retries": QUICK_RETRIES}, openai=provider(raw.url, **SOCKETS))
    response = await refused(relay)
    assert (response.status, response.body) == (304 if body == "a length without a body" else 400, expected)
    assert len(raw.arrived) == 1


async def test_the_body_of_a_refusal_that_stalls_is_not_waited_for(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head("Content-Length: 100", status="404 Not Found"), b"half", asyncio.Event())
    relay = await start(openai=provider(raw.url, **SOCKETS))
    response = await refused(relay)
    assert (response.status, response.body) == (404, b"half")


async def test_a_compressed_refusal_is_relayed_unchanged(start: StartRelay, raw: RawUpstream) -> None:
    packed = gzip.compress(MESSAGE)
    raw.plays(ok(packed, "Content-Encoding: gzip", status="400 Bad"))
    relay = await start(openai=provider(raw.url, **SOCKETS))
    response = await refused(relay)
    assert (response.body, response.headers["content-encoding"]) == (packed, "gzip")


async def test_a_truncated_compressed_refusal_is_relayed_without_its_body(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head("Content-Encoding: gzip", "Content-Length: 900", status="400 Bad"), gzip.compress(MESSAGE)[:20], CLOSE)
    relay = await start(openai=provider(raw.url, **SOCKETS))
    response = await refused(relay)
    assert (response.status, response.body, "content-encoding" in response.headers) == (400, b"", False)


async def test_a_credential_of_the_query_is_redacted_in_a_refusal(start: StartRelay, raw: RawUpstream) -> None:
    secret = KEYS["OPENAI_API_KEY"]
    raw.plays(ok(f"no page at /echo?key={secret}".encode(), f"Location: https://elsewhere.example/echo/?key={secret}", status="308 Permanent"))
    relay = await start(openai={"base_url": raw.url, "auth": {"query": "key", "value": "${OPENAI_API_KEY}"}, **SOCKETS})
    response = await refused(relay)
    assert secret in raw.arrived[0].target
    assert (response.status, response.headers["location"]) == (308, "https://elsewhere.example/echo/?key=[redacted]")
    assert response.body == b"no page at /echo?key=[redacted]"


@pytest.mark.parametrize("status", ["0", "99", "600", "999"])
async def test_an_invalid_status_is_a_protocol_error_of_the_provider(start: StartRelay, raw: RawUpstream, status: str) -> None:
    raw.plays(ok(MESSAGE, status=f"{status:0>3} Odd"))
    relay = await start(openai=provider(raw.url, **SOCKETS))
    response = await refused(relay)
    assert (response.status, response.headers["x-relay-error"]) == (502, "upstream_protocol_error")


@pytest.mark.parametrize("status", ["200 OK", "302 Found", "404 Not Found"])
async def test_the_connection_serves_the_next_request_after_a_refusal(start: StartRelay, raw: RawUpstream, status: str) -> None:
    raw.plays(ok(MESSAGE, "Location: /x", status=status))
    relay = await start(openai=provider(raw.url, **SOCKETS))
    response, reader, writer = await _dial(relay)
    writer.write(f"GET /version HTTP/1.1\r\nHost: 127.0.0.1:{relay.port}\r\n\r\n".encode())
    answer = Refused(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20), b"")
    assert (response.status, answer.status) == (int(status[:3]), 200)
    writer.close()


async def test_a_refusal_has_the_headers_of_every_response(start: StartRelay, raw: RawUpstream, spare: Any) -> None:
    raw.plays(ok(MESSAGE, status="400 Bad"))
    relay = await start(_pooled(raw, spare) | {"limits": [{"handshakes": 9, "per": "client"}]})
    response = await refused(relay)
    assert response.headers["cf-aig-step"] == "0" and "ratelimit" in response.headers and "server-timing" in response.headers


async def test_a_refusal_by_cloudflare_is_not_attributed_to_the_provider(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b'{"success":false,"error":[{"code":2001}]}', "cf-aig-log-id: 01ABC", status="400 Bad"))
    account = {"account_id": "acct", "api_key": CLOUDFLARE_TOKEN, "base_url": f"{raw.url}/v1"}
    entry = provider("http://127.0.0.1:9", cloudflare={"slug": "openai", "websocket": {"slug": "openai"}}, **SOCKETS)
    relay = await start({"cloudflare": account}, openai=entry)
    response = await refused(relay)
    assert (response.status, response.headers["x-relay-error-source"]) == (400, "cloudflare")
    [row] = await relay.events()
    assert row["cloudflare_log_id"] == "01ABC"


async def test_a_connection_that_breaks_without_a_response_is_no_refusal(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(RESET)
    relay = await start(openai=provider(raw.url, **SOCKETS))
    response = await refused(relay)
    assert (response.status, response.headers["x-relay-error"]) == (502, "upstream_disconnected")
    assert json.loads(response.body)["error"]["code"] == "upstream_disconnected"
    assert canary("openai") not in str(response.headers)
