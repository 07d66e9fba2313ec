"""Responses that quote the relay's keys: in the body of an error, a header or a reason phrase."""

from __future__ import annotations

import base64
import gzip
import zlib
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from relay.core.provider import Credential, Keys
from relay.core.redaction import Redactor, redactor_of
from tests.conftest import StartRelay
from tests.relays import CLIENT_KEY, HANG_GUARD_S, KEYS, provider
from tests.sessions.test_handshakes import refused
from tests.upstream.raw import CLOSE, LAST_CHUNK, RawUpstream, Step, chunk, head, ok
from tests.upstream.vendors import vendor

SECRET = KEYS["OPENAI_API_KEY"]
BY_QUERY = {"query": "key", "value": "${OPENAI_API_KEY}"}
KEY_TO_ESCAPE = "sk+odd/key=="
SOCKETS = {"websocket": {"default_path": "x"}}
QUOTING = f'{{"error": {{"message": "Incorrect API key provided: {SECRET}."}}}}'.encode()
REDACTED = QUOTING.replace(SECRET.encode(), b"[redacted]")
CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize("endpoint", ["x", "chat/completions"])
async def test_the_relays_key_is_redacted_in_an_error(start: StartRelay, raw: RawUpstream, endpoint: str) -> None:
    """Both in a call of its own and in a call that identical requests share."""
    raw.plays(ok(QUOTING, 'ETag: "a"', "Content-Type: application/json", status="401 No"))
    relay = await start({"cache": {"coalesce": True}}, openai=provider(raw.url))
    status, headers, body = await relay.call("POST", relay.path("openai", endpoint), data=b"{}")
    assert (status, body, headers["Content-Length"]) == (401, REDACTED, str(len(REDACTED)))
    assert "ETag" not in headers and headers["x-relay-error-source"] == "provider"


async def test_an_error_that_quotes_no_key_is_relayed_byte_for_byte(start: StartRelay, raw: RawUpstream) -> None:
    packed = gzip.compress(b'{"error": "no"}')
    raw.plays(ok(packed, 'ETag: "a"', "Content-Encoding: gzip", status="400 Bad"))
    relay = await start(openai=provider(raw.url))
    _, headers, body = await relay.call("GET", relay.path("openai", "x"))
    assert (body, headers["ETag"], headers["Content-Encoding"]) == (packed, '"a"', "gzip")


async def test_a_key_of_the_query_is_redacted_in_each_escaped_form(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"no page at /x?key=sk%2Bodd%2Fkey%3D%3D, sk+odd/key== or sk+odd\\/key==", status="404 None"))
    relay = await start(openai={"base_url": raw.url, "auth": {"query": "key", "value": KEY_TO_ESCAPE}})
    assert (await relay.call("GET", relay.path("openai", "x")))[2] == b"no page at /x?key=[redacted], [redacted] or [redacted]"


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
@pytest.mark.parametrize("transport", ["rest", "websocket"])
async def test_a_compressed_error_that_quotes_a_key_is_decompressed_and_redacted(start: StartRelay, raw: RawUpstream, pack: Any, transport: str) -> None:
    coding = "gzip" if pack is gzip.compress else "deflate"
    raw.plays(ok(pack(QUOTING), f"Content-Encoding: {coding}", status="400 Bad"))
    relay = await start(openai=provider(raw.url, **SOCKETS))
    if transport == "rest":
        _, headers, body = await relay.call("GET", relay.path("openai", "x"))
    else:
        response = await refused(relay)
        headers, body = response.headers, response.body  # type: ignore[assignment]
    assert (body, "Content-Encoding" in headers, "content-encoding" in headers) == (REDACTED, False, False)


LARGE = gzip.compress(base64.b64encode(bytes(range(256)) * 400 + zlib.compress(b"x")), compresslevel=0)
UNREADABLE: dict[str, tuple[Step, ...]] = {
    "an unknown coding": (ok(QUOTING, "Content-Encoding: compress", status="400 Bad"),),
    "broken": (ok(b"\x1f\x8b" + QUOTING, "Content-Encoding: gzip", status="400 Bad"),),
    "too long": (ok(LARGE, "Content-Encoding: gzip", status="400 Bad"),),
    "a bomb": (ok(gzip.compress(b"x" * 3_000_000), "Content-Encoding: gzip", status="400 Bad"),),
}


@pytest.mark.parametrize("how", UNREADABLE)
@pytest.mark.parametrize("endpoint", ["x", "chat/completions"])
async def test_the_body_of_a_compressed_error_that_cannot_be_searched_is_dropped(start: StartRelay, raw: RawUpstream, how: str, endpoint: str) -> None:
    raw.plays(*UNREADABLE[how])
    relay = await start({"cache": {"coalesce": True}}, openai=provider(raw.url))
    status, headers, body = await relay.call("POST", relay.path("openai", endpoint), data=b"{}")
    assert (status, body, headers["Content-Length"], "Content-Encoding" in headers) == (400, b"", "0", False)


async def test_the_head_of_an_error_without_a_body_is_unchanged(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head("Content-Length: 99", "Content-Encoding: gzip", status="400 Bad"))
    relay = await start(openai=provider(raw.url))
    _, headers, _ = await relay.call("HEAD", relay.path("openai", "x"))
    assert (headers["Content-Length"], headers["Content-Encoding"]) == ("99", "gzip")


LONG = b"x" * 70_000 + QUOTING + b"y" * 70_000
MASKED = LONG.replace(SECRET.encode(), b"*" * len(SECRET))


@pytest.mark.parametrize("endpoint", ["x", "chat/completions"])
@pytest.mark.parametrize("framed", ["length", "chunks", "broken off"])
async def test_an_error_too_long_to_buffer_is_redacted_while_it_streams(start: StartRelay, raw: RawUpstream, framed: str, endpoint: str) -> None:
    steps: dict[str, tuple[Step, ...]] = {
        "length": (ok(LONG, status="400 Bad"),),
        "chunks": (head(CHUNKED, status="400 Bad"), *(chunk(LONG[at : at + 4001]) for at in range(0, len(LONG), 4001)), LAST_CHUNK),
        "broken off": (head("Content-Length: 999999", status="400 Bad"), LONG, CLOSE),
    }
    raw.plays(*steps[framed])
    relay = await start({"cache": {"coalesce": True}}, openai=provider(raw.url))
    async with relay.client.post(relay.path("openai", endpoint), data=b"{}") as answer:
        body = b""
        try:
            async for piece in answer.content.iter_any():
                body += piece
        except aiohttp.ClientError:
            assert framed == "broken off"
        if framed == "length":
            assert answer.headers["Content-Length"] == str(len(LONG))
    if framed == "broken off":
        assert MASKED.startswith(body) and len(body) >= 70_000
    else:
        assert body == MASKED


@pytest.mark.parametrize("split", range(0, len(SECRET) + 1, 3))
async def test_a_key_is_found_wherever_it_is_split(start: StartRelay, raw: RawUpstream, split: int) -> None:
    at = LONG.index(SECRET.encode()) + split
    raw.plays(head(CHUNKED, "Content-Type: text/event-stream", status="400 Bad"), chunk(LONG[:at]), chunk(LONG[at:]), LAST_CHUNK)
    relay = await start(openai=provider(raw.url))
    assert (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[2] == MASKED


REPEATED = f"https://elsewhere.example/x?key={SECRET}&a=1"


@pytest.mark.parametrize("status", ["302 Found", "307 Temporary Redirect", "400 Bad", "200 OK"])
async def test_a_key_of_the_query_is_redacted_in_headers(start: StartRelay, raw: RawUpstream, status: str) -> None:
    raw.plays(ok(b"", f"Location: {REPEATED}", f"X-Debug: a {SECRET} b", "X-Other: 1", status=status))
    relay = await start(openai={"base_url": raw.url, "auth": BY_QUERY})
    _, headers, _ = await relay.call("GET", relay.path("openai", "x"))
    assert SECRET in raw.arrived[0].target
    assert (headers["Location"], headers["X-Debug"], headers["X-Other"]) == (REPEATED.replace(SECRET, "[redacted]"), "a [redacted] b", "1")


async def test_a_key_of_a_header_is_redacted_in_the_headers_and_the_reason_of_an_error(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"", f"WWW-Authenticate: Bearer error={SECRET}", status=f"401 bad {SECRET}"))
    relay = await start(openai=provider(raw.url, **SOCKETS))
    async with relay.client.get(relay.path("openai", "x")) as answer:
        assert (answer.headers["WWW-Authenticate"], answer.reason) == ("Bearer error=[redacted]", "bad [redacted]")
    response = await refused(relay)
    assert response.headers["www-authenticate"] == "Bearer error=[redacted]"


async def test_a_clients_own_key_is_not_redacted(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(CLIENT_KEY.encode(), status="401 No"))
    relay = await start(openai=provider(raw.url, client_credentials="allow"))
    assert (await relay.call("GET", relay.path("openai", "x"), headers={"Authorization": f"Bearer {CLIENT_KEY}"}))[2] == CLIENT_KEY.encode()


async def test_a_key_is_redacted_in_the_reason_of_a_close(start: StartRelay, aiohttp_server: Any) -> None:
    async def close(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.close(code=4000, message=f"no such key: {SECRET}".encode())
        return socket

    server = await aiohttp_server(vendor(("GET", "/x", close)))
    relay = await start(openai=provider(str(server.make_url("")), **SOCKETS))
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        message = await socket.receive(HANG_GUARD_S)
        assert (message.data, message.extra) == (4000, "no such key: [redacted]")


def test_a_mask_keeps_the_length_of_the_text() -> None:
    redactor = Redactor([SECRET, KEY_TO_ESCAPE])
    text = f"a {SECRET} b sk%2bodd%2Fkey%3D%3D c".encode()
    masked = redactor.mask(text)
    assert len(masked) == len(text) and masked == b"a " + b"*" * len(SECRET) + b" b " + b"*" * 20 + b" c"
    assert redactor.mask(b"nothing") == b"nothing"


def test_only_the_relays_own_credentials_are_redacted() -> None:
    own, token = Credential("header", "Authorization", "Bearer sk-own-1", "A"), Credential("header", "cf-aig-authorization", "Bearer cf-own", "B")
    found = redactor_of(Keys(own, token))
    assert found is not None and found.redact(b"sk-own-1 cf-own Bearer") == b"[redacted] [redacted] Bearer"
    assert redactor_of(Keys(Credential("header", "Authorization", "Bearer x-theirs", "client"))) is None and redactor_of(Keys()) is None
