"""Refused WebSocket handshakes: what the client gets, what follows, and what is written down."""

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
EAGER = {"max_attempts": 3, "delay_s": 0.001, "max_delay_s": 0.05}
POOL = {"header": "Authorization", "value": ["Bearer ${OPENAI_API_KEY}", "Bearer ${FAL_KEY}"]}
MESSAGE = b'{"error": {"message": "no such model"}}'
LIMIT_BYTES = 64 * 1024


class Refused:
    """What a client saw of a refused handshake, read from the connection itself."""

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
    """One handshake that is not answered with 101."""
    seen, _, writer = await _dial(relay, name)
    writer.close()
    return seen


@pytest.fixture
async def spare(aiohttp_server: Any) -> Any:
    """A provider that takes every handshake, to fall back to."""
    return await aiohttp_server(vendor(("GET", "/echo", echo)))


def _pooled(raw: RawUpstream, spare: Any) -> dict[str, Any]:
    """Two keys, retries and a fallback: whatever could be tried after a refusal is there."""
    first = {"base_url": raw.url, "auth": POOL, "fallback": [{"provider": "spare"}], **SOCKETS}
    return {"retries": EAGER, "providers": {"openai": first, "spare": provider(str(spare.make_url("")), **SOCKETS)}}


FINAL = ["200 OK", "204 No Content", "301 Moved", "302 Found", "304 Not Modified", "308 Permanent", "400 Bad Request", "404 Not Found", "409 Conflict", "413 Too Large", "422 Unprocessable", "426 Upgrade Required"]


@pytest.mark.parametrize("status", FINAL)
async def test_a_refusal_that_is_final_is_asked_once_passed_on_and_rests_nothing(start: StartRelay, raw: RawUpstream, spare: Any, status: str) -> None:
    raw.plays(ok(b"" if status[:3] in ("204", "304") else MESSAGE, "X-Vendor: a", "Set-Cookie: a=b", status=status))
    relay = await start(_pooled(raw, spare))
    for number in range(1, 7):
        seen = await refused(relay)
        assert (seen.status, seen.headers["x-vendor"], "set-cookie" in seen.headers) == (int(status[:3]), "a", False)
        assert seen.body == (b"" if seen.status in (204, 304) else MESSAGE)
        assert (seen.headers["x-relay-error"], seen.headers["x-relay-error-source"]) == ("handshake_refused", "provider")
        assert (len(raw.arrived), len(spare.app[SEEN])) == (number, 0)
    health = relay.gateway.attempts.health
    assert [state.failures for state in (*health._keys.values(), *health._targets.values())] == [0] * len(health._keys)


async def test_the_row_of_a_refusal_has_what_the_client_saw_and_who_refused(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(MESSAGE, status="404 Not Found"))
    relay = await start(openai=provider(raw.url, websocket={"default_path": "echo", "default_query": {"model": "big"}}))
    seen = await refused(relay)
    [row] = await relay.events()
    assert (row["status"], row["outcome"], row["error"]) == (404, "failed", "handshake_refused")
    assert (row["provider"], row["model"], row["bytes_down"], row["id"]) == ("openai", "big", len(MESSAGE), seen.headers["cf-aig-log-id"])
    assert 0 < row["first_byte_ms"] <= row["duration_ms"]
    [attempt] = row["attempts"]
    assert (attempt["provider"], attempt["key"], attempt["status"], attempt["error"]) == ("openai", "OPENAI_API_KEY", 404, "handshake_refused")


@pytest.mark.parametrize(
    ("answer", "rests_s"),
    [(("401 No",), 300), (("402 Pay",), 300), (("403 No",), 300), (("429 Slow",), 20), (("429 Slow", "Retry-After: 1800"), 1800), (("500 Oops",), 1), (("503 Busy",), 1)],
)
@pytest.mark.parametrize("transport", ["rest", "websocket"])
async def test_a_refused_key_rests_as_long_after_a_handshake_as_after_a_call(start: StartRelay, raw: RawUpstream, transport: str, answer: tuple[str, ...], rests_s: float) -> None:
    raw.plays(ok(MESSAGE, *answer[1:], status=answer[0]))
    relay = await start(openai={"base_url": raw.url, "auth": POOL | {"value": POOL["value"][0]}, **SOCKETS})
    if transport == "rest":
        await relay.call("GET", relay.path("openai", "x"))
    else:
        await refused(relay)
    health = relay.gateway.attempts.health
    [key] = health._keys.values()
    assert key.failures == 1 and rests_s - 5 < key.cooldown_until_s - health._clock() <= rests_s


@pytest.mark.parametrize("status", ["401 No", "402 Pay", "403 No", "429 Slow"])
async def test_another_key_takes_over_from_one_that_is_refused(start: StartRelay, aiohttp_server: Any, status: str) -> None:
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
    assert sum(len(row.get("attempts", ())) == 2 for row in rows) == 1, "the bad key rests after the first time"


async def test_a_retry_after_that_is_too_long_reaches_the_client(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(MESSAGE, "Retry-After: 1800", status="429 Slow"))
    relay = await start({"retries": EAGER}, openai=provider(raw.url, **SOCKETS))
    seen = await refused(relay)
    assert (seen.status, seen.headers["retry-after"], len(raw.arrived)) == (429, "1800", 1)


BODIES: dict[str, tuple[tuple[Step, ...], bytes]] = {
    "chunked": ((head("Transfer-Encoding: chunked", status="400 Bad"), chunk(b"one "), chunk(b"two"), b"0\r\n\r\n"), b"one two"),
    "until the connection closes": ((head(status="400 Bad"), b"all of it", CLOSE), b"all of it"),
    "none": ((head("Content-Length: 0", status="400 Bad"),), b""),
    "closed before the body": ((head("Content-Length: 100", status="400 Bad"), CLOSE), b""),
    "closed within the body": ((head("Content-Length: 100", status="400 Bad"), b"half", CLOSE), b"half"),
    "closed within its chunks": ((head("Transfer-Encoding: chunked", status="400 Bad"), chunk(b"half"), CLOSE), b"half"),
    "too long": ((ok(b"x" * LIMIT_BYTES + b"y", status="400 Bad"),), b"x" * LIMIT_BYTES),
    "as long as may be": ((ok(b"x" * LIMIT_BYTES, status="400 Bad"),), b"x" * LIMIT_BYTES),
    "never ending": ((head("Transfer-Encoding: chunked", status="400 Bad"), *[chunk(b"x" * 8192)] * 64), b"x" * LIMIT_BYTES),
    "a length without a body": ((head("Content-Length: 100", status="304 Not Modified"),), b""),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
async def test_however_a_refusals_body_ends_its_status_passes(start: StartRelay, raw: RawUpstream, body: str) -> None:
    steps, expected = BODIES[body]
    raw.plays(*steps)
    relay = await start({"retries": EAGER}, openai=provider(raw.url, **SOCKETS))
    seen = await refused(relay)
    assert (seen.status, seen.body) == (304 if body == "a length without a body" else 400, expected)
    assert len(raw.arrived) == 1


async def test_a_refusals_body_that_stops_coming_is_not_waited_for(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head("Content-Length: 100", status="404 Not Found"), b"half", asyncio.Event())
    relay = await start(openai=provider(raw.url, **SOCKETS))
    seen = await refused(relay)
    assert (seen.status, seen.body) == (404, b"half")


async def test_a_compressed_refusal_passes_as_it_came(start: StartRelay, raw: RawUpstream) -> None:
    packed = gzip.compress(MESSAGE)
    raw.plays(ok(packed, "Content-Encoding: gzip", status="400 Bad"))
    relay = await start(openai=provider(raw.url, **SOCKETS))
    seen = await refused(relay)
    assert (seen.body, seen.headers["content-encoding"]) == (packed, "gzip")


async def test_the_beginning_of_a_compressed_refusal_is_of_no_use_to_anybody(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head("Content-Encoding: gzip", "Content-Length: 900", status="400 Bad"), gzip.compress(MESSAGE)[:20], CLOSE)
    relay = await start(openai=provider(raw.url, **SOCKETS))
    seen = await refused(relay)
    assert (seen.status, seen.body, "content-encoding" in seen.headers) == (400, b"", False)


async def test_a_refusal_tells_no_credential_that_stood_in_the_query(start: StartRelay, raw: RawUpstream) -> None:
    secret = KEYS["OPENAI_API_KEY"]
    raw.plays(ok(f"no page at /echo?key={secret}".encode(), f"Location: https://elsewhere.example/echo/?key={secret}", status="308 Permanent"))
    relay = await start(openai={"base_url": raw.url, "auth": {"query": "key", "value": "${OPENAI_API_KEY}"}, **SOCKETS})
    seen = await refused(relay)
    assert secret in raw.arrived[0].target
    assert (seen.status, seen.headers["location"]) == (308, "https://elsewhere.example/echo/?key=[redacted]")
    assert seen.body == b"no page at /echo?key=[redacted]"


@pytest.mark.parametrize("status", ["0", "99", "600", "999"])
async def test_a_status_that_is_none_is_the_providers_protocol_error(start: StartRelay, raw: RawUpstream, status: str) -> None:
    raw.plays(ok(MESSAGE, status=f"{status:0>3} Odd"))
    relay = await start(openai=provider(raw.url, **SOCKETS))
    seen = await refused(relay)
    assert (seen.status, seen.headers["x-relay-error"]) == (502, "upstream_protocol_error")


@pytest.mark.parametrize("status", ["200 OK", "302 Found", "404 Not Found"])
async def test_the_connection_serves_the_next_request_after_a_refusal(start: StartRelay, raw: RawUpstream, status: str) -> None:
    raw.plays(ok(MESSAGE, "Location: /x", status=status))
    relay = await start(openai=provider(raw.url, **SOCKETS))
    seen, reader, writer = await _dial(relay)
    writer.write(f"GET /version HTTP/1.1\r\nHost: 127.0.0.1:{relay.port}\r\n\r\n".encode())
    answer = Refused(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20), b"")
    assert (seen.status, answer.status) == (int(status[:3]), 200)
    writer.close()


async def test_a_refusal_says_what_every_answer_says(start: StartRelay, raw: RawUpstream, spare: Any) -> None:
    raw.plays(ok(MESSAGE, status="400 Bad"))
    relay = await start(_pooled(raw, spare) | {"limits": [{"handshakes": 9, "per": "client"}]})
    seen = await refused(relay)
    assert seen.headers["cf-aig-step"] == "0" and "ratelimit" in seen.headers and "server-timing" in seen.headers


async def test_a_refusal_of_cloudflares_is_not_called_the_providers(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b'{"success":false,"error":[{"code":2001}]}', "cf-aig-log-id: 01ABC", status="400 Bad"))
    account = {"account_id": "acct", "api_key": CLOUDFLARE_TOKEN, "base_url": f"{raw.url}/v1"}
    entry = provider("http://127.0.0.1:9", cloudflare={"slug": "openai", "websocket": {"slug": "openai"}}, **SOCKETS)
    relay = await start({"cloudflare": account}, openai=entry)
    seen = await refused(relay)
    assert (seen.status, seen.headers["x-relay-error-source"]) == (400, "cloudflare")
    [row] = await relay.events()
    assert row["cloudflare_log_id"] == "01ABC"


async def test_a_connection_that_breaks_without_an_answer_is_no_refusal(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(RESET)
    relay = await start(openai=provider(raw.url, **SOCKETS))
    seen = await refused(relay)
    assert (seen.status, seen.headers["x-relay-error"]) == (502, "upstream_disconnected")
    assert json.loads(seen.body)["error"]["code"] == "upstream_disconnected"
    assert canary("openai") not in str(seen.headers)
