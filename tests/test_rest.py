"""REST calls: what reaches the provider, what reaches the client, and what is refused."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import random
from collections.abc import AsyncIterator

import pytest

from tests.conftest import StartRelay, Vendors
from tests.relays import CLIENT_KEY, KEYS, Relay, provider
from tests.upstream.raw import RESET, Pause, RawUpstream, head, ok

ADDED_DOWN = {"cf-aig-log-id", "server-timing", "date", "x-accel-buffering", "connection", "transfer-encoding"}


async def test_method_path_query_and_body_reach_the_provider_byte_for_byte(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(f"{raw.url}/base"))
    target = "a%2Fb/%20x:y/ü".replace("ü", "%C3%BC") + "?q=%2F&plus=a+b&sp=%20&dup=1&dup=2&empty=&semi=a;b&flag"
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        await _raw_call(relay, method, f"/api/v1/ai-gateway/providers/openai/{target}", b"\x00\xff{bytes}")
        assert raw.arrived[-1].target == f"/base/{target}"
        assert raw.arrived[-1].head.startswith(method.encode())
        assert raw.arrived[-1].body == b"\x00\xff{bytes}"


async def _raw_call(relay: Relay, method: str, target: str, body: bytes = b"", *headers: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{relay.port}", "Connection: close", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return answer


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE", "POST"])
async def test_every_method_is_relayed_without_a_body(start: StartRelay, raw: RawUpstream, method: str) -> None:
    raw.plays(head("Content-Length: 2") if method == "HEAD" else ok())
    relay = await start(openai=provider(raw.url))
    status, headers, body = await relay.call(method, relay.path("openai", "x"))
    assert (status, headers["Content-Length"]) == (200, "2")
    assert body == (b"" if method == "HEAD" else b"ok")
    assert raw.arrived[-1].head.startswith(method.encode())


async def test_five_hundred_random_exchanges_pass_unchanged(start: StartRelay, raw: RawUpstream) -> None:
    """Bodies, statuses and headers are equal on both sides, except the documented headers."""
    relay = await start(openai=provider(raw.url))
    rnd = random.Random(7)
    for _ in range(500):
        sent = rnd.randbytes(rnd.choice([0, 1, 50, 2000, 70_000]))
        back = rnd.randbytes(rnd.choice([0, 1, 50, 2000, 70_000]))
        own = [f"X-H{rnd.randrange(9)}: {rnd.randrange(10**6)}" for _ in range(rnd.randrange(6))]
        status = rnd.choice(["200 OK", "201 Created", "202 Fine by me", "400 Bad", "418 Teapot", "500 Oops"])
        chunked = rnd.random() < 0.5
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(back)}"
        body = f"{len(back):x}\r\n".encode() + back + b"\r\n0\r\n\r\n" if chunked and back else b"0\r\n\r\n" if chunked else back
        raw.scripts.clear()
        raw.plays(head(*own, "Content-Type: application/x-thing", framing, status=status) + body)
        data = _pieces(sent, rnd) if rnd.random() < 0.3 else sent
        got_status, headers, got = await relay.call("POST", relay.path("openai", "x"), data=data, headers={"X-Up": "1"})
        assert (got_status, got) == (int(status[:3]), back)
        assert raw.arrived[-1].body == sent
        assert len(raw.arrived[-1].header("Content-Length") + raw.arrived[-1].header("Transfer-Encoding")) == 1
        mine = sorted((n.lower(), v) for n, v in headers.items() if n.lower() not in ADDED_DOWN | {"content-length", "x-relay-error-source"})
        theirs = sorted((n.lower(), v) for line in [*own, "Content-Type: application/x-thing"] for n, _, v in [line.partition(": ")])
        assert mine == theirs
        assert not ("Content-Length" in headers and "Transfer-Encoding" in headers)


async def _pieces(body: bytes, rnd: random.Random) -> AsyncIterator[bytes]:
    while body:
        size = rnd.randrange(1, 20_000)
        yield body[:size]
        body = body[size:]


async def test_the_reason_phrase_is_relayed(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(status="299 Quite Fine"))
    relay = await start(openai=provider(raw.url))
    answer = await _raw_call(relay, "GET", "/api/v1/ai-gateway/providers/openai/x")
    assert answer.startswith(b"HTTP/1.1 299 Quite Fine\r\n")


async def test_only_documented_headers_are_added_to_a_response(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"body"))
    relay = await start(openai=provider(raw.url))
    _, headers, _ = await relay.call("GET", relay.path("openai", "x"))
    assert {name.lower() for name in headers} == {"content-length", "date", "cf-aig-log-id", "server-timing"}


async def test_only_the_credential_is_added_to_a_request(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    await _raw_call(relay, "GET", "/api/v1/ai-gateway/providers/openai/x", b"", "X-Only: this")
    assert {n.lower() for n, _ in raw.arrived[-1].headers} == {"host", "x-only", "authorization"}
    assert raw.arrived[-1].header("Host") == [f"127.0.0.1:{raw.port}"]


async def test_hop_by_hop_headers_and_those_that_connection_names_are_not_relayed(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head("Connection: x-secret, close", "X-Secret: 1", "Keep-Alive: timeout=5", "Content-Length: 2") + b"ok")
    relay = await start(openai=provider(raw.url))
    sent = ["Connection: x-foo, authorization", "X-Foo: 1", "TE: trailers", "Keep-Alive: 1", "Proxy-Connection: x", "Trailer: y", "Authorization: Bearer mine"]
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    lines = ["GET /api/v1/ai-gateway/providers/openai/x HTTP/1.1", f"Host: 127.0.0.1:{relay.port}", *sent]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\nok"), 20)
    writer.close()
    up = {n.lower() for n, _ in raw.arrived[-1].headers}
    assert up == {"host", "authorization"}
    assert raw.arrived[-1].header("Authorization") == [f"Bearer {KEYS['OPENAI_API_KEY']}"]
    assert b"x-secret" not in answer.lower() and b"keep-alive: timeout" not in answer.lower()


async def test_each_of_several_connection_headers_names_hop_by_hop_headers(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head("Connection: keep-alive", "Connection: x-secret, X-Other", "X-Secret: 1", "X_Other: 2", "X-End: 3", "Content-Length: 2") + b"ok")
    relay = await start(openai=provider(raw.url))
    sent = ["Connection: keep-alive", "Connection: x-foo", "X-Foo: 1", "X-End: 2"]
    answer = (await _raw_call(relay, "GET", "/api/v1/ai-gateway/providers/openai/x", b"", *sent)).lower()
    assert {n.lower() for n, _ in raw.arrived[-1].headers} == {"host", "authorization", "x-end"}
    assert b"\r\nx-end: 3\r\n" in answer and b"x-secret" not in answer and b"x_other" not in answer


VALUES = {"latin-1": "Zoë".encode("latin-1"), "utf-8": "Zoë 日本 🎉".encode(), "neither": b"\xff\xfe\x80", "half a character": "日".encode()[:2]}
BODIES = {"none": b"", "small": b"x" * 100, "large": b"x" * 200_000}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("body", BODIES)
async def test_header_bytes_outside_ascii_reach_the_provider_unchanged(start: StartRelay, raw: RawUpstream, value: str, body: str) -> None:
    """With no body, a body that is written with the request head, and one that is streamed."""
    raw.plays(ok())
    for server in ({}, {"buffer_bytes": 10}):
        relay = await start({"server": server}, openai=provider(raw.url))
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        lines = ["POST /api/v1/ai-gateway/providers/openai/x HTTP/1.1", "Host: localhost", f"Content-Length: {len(BODIES[body])}"]
        writer.write("\r\n".join(lines).encode() + b"\r\nX-Title: " + VALUES[value] + b"\r\n\r\n" + BODIES[body])
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        writer.close()
        arrived = raw.arrived[-1]
        assert answer.startswith(b"HTTP/1.1 200") and b"X-Title: " + VALUES[value] + b"\r\n" in arrived.head
        assert arrived.body == BODIES[body]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("framing", ["whole", "streamed", "error"])
async def test_header_bytes_outside_ascii_reach_the_client_unchanged(start: StartRelay, raw: RawUpstream, value: str, framing: str) -> None:
    line = b"Content-Disposition: attachment; filename=" + VALUES[value] + b".mp3\r\n"
    status = b"HTTP/1.1 404 N" + VALUES["latin-1"] + b"\r\n" if framing == "error" else b"HTTP/1.1 200 OK\r\n"
    gate = asyncio.Event()
    if framing == "streamed":
        raw.plays(status + line + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", gate, b"0\r\n\r\n")
    else:
        raw.plays(status + line + b"Content-Length: 2\r\n\r\nok")
    relay = await start(openai=provider(raw.url))
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"GET /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    gate.set()
    body = await asyncio.wait_for(reader.readuntil(b"ok"), 20)
    writer.close()
    assert answer.startswith(status) and line in answer and body.endswith(b"ok")


async def test_a_response_with_header_bytes_outside_ascii_is_cached_and_replayed_unchanged(start: StartRelay, raw: RawUpstream) -> None:
    whole = b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}'
    raw.plays(b"HTTP/1.1 200 OK\r\nX-Name: " + VALUES["latin-1"] + b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole)
    relay = await start({"cache": {"ttl_s": 60}}, openai=provider(raw.url))
    for status in (b"MISS", b"HIT"):
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(b'POST /api/v1/ai-gateway/providers/openai/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 13\r\n\r\n{"model":"m"}')
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        writer.close()
        assert b"X-Name: " + VALUES["latin-1"] + b"\r\n" in answer and b"cf-aig-cache-status: " + status in answer
        await relay.idle()


async def test_headers_that_identify_the_clients_browser_or_network_are_not_sent_upstream(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    private = {
        "Cookie": "session=1", "Referer": "http://x", "Forwarded": "for=1.2.3.4", "X-Forwarded-For": "1.2.3.4",
        "X_Forwarded_For": "1.2.3.4", "X-Real-IP": "1.2.3.4", "x-fal-target-url": "http://169.254.169.254/",
        "cf-aig-cache-ttl": "60", "Origin": relay.url,
    }  # fmt: skip
    await relay.call("GET", relay.path("openai", "x"), headers=private | {"X-Stainless-Lang": "python"})
    names = {n.lower() for n, _ in raw.arrived[-1].headers}
    assert "x-stainless-lang" in names
    assert not names & {name.lower() for name in private}


async def test_response_headers_that_control_the_browser_or_nginx_are_not_relayed(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"", "Set-Cookie: a=1", "Set-Cookie: b=2", "X-Accel-Redirect: /secret", "Strict-Transport-Security: max-age=1", "Alt-Svc: h3", 'Clear-Site-Data: "*"', "Access-Control-Allow-Origin: *", "X-Kept: 1"))
    relay = await start(openai=provider(raw.url))
    _, headers, _ = await relay.call("GET", relay.path("openai", "x"))
    assert headers["X-Kept"] == "1"
    for name in ("Set-Cookie", "X-Accel-Redirect", "Strict-Transport-Security", "Alt-Svc", "Clear-Site-Data", "Access-Control-Allow-Origin"):
        assert name not in headers


@pytest.mark.parametrize("place", ["Authorization", "X-Api-Key", "api-key", "xi-api-key", "x-goog-api-key", "cf-aig-authorization"])
async def test_a_credential_of_the_client_is_replaced_wherever_it_is_sent(start: StartRelay, raw: RawUpstream, place: str) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url, query_credentials=["key"]))
    await relay.call("GET", relay.path("openai", f"x?KEY={CLIENT_KEY}&a=1&k%65y=2"), headers={place: f"Bearer {CLIENT_KEY}"})
    assert CLIENT_KEY.encode() not in raw.arrived[-1].head
    assert raw.arrived[-1].target == "/x?a=1"
    assert raw.arrived[-1].header("Authorization") == [f"Bearer {KEYS['OPENAI_API_KEY']}"]


async def test_a_client_may_send_its_own_key_if_the_registry_allows_it(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(mine=provider(raw.url, key="NOT_SET", client_credentials="allow"))
    await relay.call("GET", relay.path("mine", "x"), headers={"x-api-key": CLIENT_KEY})
    assert raw.arrived[-1].header("Authorization") == [f"Bearer {CLIENT_KEY}"]
    assert raw.arrived[-1].header("x-api-key") == []
    status, headers, _ = await relay.call("GET", relay.path("mine", "x"))
    assert (status, headers["x-relay-error"]) == (503, "provider_not_configured")


async def test_a_pool_of_keys_is_used_in_turn(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    auth = {"header": "x-key", "value": ["${OPENAI_API_KEY}", "${FAL_KEY}"]}
    relay = await start(pool={"base_url": raw.url, "auth": auth})
    for _ in range(4):
        await relay.call("GET", relay.path("pool", "x"), headers={"X_Key": "twin"})
    used = [arrived.header("x-key")[0] for arrived in raw.arrived]
    assert sorted(used) == sorted([KEYS["OPENAI_API_KEY"], KEYS["FAL_KEY"]] * 2)
    assert used[0] != used[1]
    assert raw.arrived[-1].header("x_key") == []


async def test_a_query_credential_is_added_and_escaped(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    auth = {"query": "key", "value": "${OPENAI_API_KEY}&+ /"}
    relay = await start(google={"base_url": raw.url, "auth": auth})
    await relay.call("GET", relay.path("google", "x?a=1&key=theirs"))
    assert raw.arrived[-1].target == f"/x?a=1&key={KEYS['OPENAI_API_KEY']}%26%2B%20%2F"


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
async def test_compressed_responses_are_relayed_undecoded(start: StartRelay, raw: RawUpstream, coding: str) -> None:
    packed = gzip.compress(b"x" * 50_000) if coding == "gzip" else bytes(range(256)) * 10
    raw.plays(ok(packed, f"Content-Encoding: {coding}"))
    relay = await start(openai=provider(raw.url))
    _, headers, body = await relay.call("GET", relay.path("openai", "x"), headers={"Accept-Encoding": coding})
    assert headers["Content-Encoding"] == coding
    assert hashlib.sha256(body).digest() == hashlib.sha256(packed).digest()
    assert raw.arrived[-1].header("Accept-Encoding") == [coding]


async def test_compressed_requests_are_relayed_undecoded(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    packed = gzip.compress(b'{"model": "gpt-5"}' * 1000)
    relay = await start(openai=provider(raw.url))
    await relay.call("POST", relay.path("openai", "x"), data=packed, headers={"Content-Encoding": "gzip", "Content-Type": "application/json"})
    assert raw.arrived[-1].body == packed
    assert raw.arrived[-1].header("Content-Encoding") == ["gzip"]


@pytest.mark.parametrize(
    ("answer", "status", "length"),
    [
        (head(status="204 No Content"), 204, None),
        (head("ETag: x", status="304 Not Modified"), 304, None),
        (head("Content-Length: 0", status="205 Reset Content"), 205, "0"),
        (head("Content-Length: 0"), 200, "0"),
        (head("Transfer-Encoding: chunked") + b"0\r\n\r\n", 200, None),
    ],
)
async def test_responses_without_a_body_leave_the_connection_usable(
    start: StartRelay, raw: RawUpstream, answer: bytes, status: int, length: str | None
) -> None:
    raw.plays(answer)
    raw.plays(ok(b"next"))
    relay = await start(openai=provider(raw.url))
    got, headers, body = await relay.call("GET", relay.path("openai", "x"))
    assert (got, body, headers.get("Content-Length")) == (status, b"", length)
    assert (await relay.call("GET", relay.path("openai", "y")))[2] == b"next"
    assert raw.connections == 1


async def test_a_head_response_keeps_its_content_length(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head("Content-Length: 12345", "Content-Type: audio/mpeg"))
    raw.plays(ok(b"next"))
    relay = await start(openai=provider(raw.url))
    _, headers, body = await relay.call("HEAD", relay.path("openai", "x"))
    assert (headers["Content-Length"], headers["Content-Type"], body) == ("12345", "audio/mpeg", b"")
    assert (await relay.call("GET", relay.path("openai", "y")))[2] == b"next"


async def test_range_requests_are_relayed(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"bc", "Content-Range: bytes 1-2/4", status="206 Partial Content"))
    relay = await start(openai=provider(raw.url))
    status, headers, body = await relay.call("GET", relay.path("openai", "x"), headers={"Range": "bytes=1-2", "If-Range": '"e"'})
    assert (status, headers["Content-Range"], body) == (206, "bytes 1-2/4", b"bc")
    assert raw.arrived[-1].header("Range") == ["bytes=1-2"]


async def test_chunked_and_multipart_uploads_arrive_whole(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start({"server": {"buffer_bytes": 1000}}, openai=provider(raw.url))
    broken = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--not-the-boundary'

    async def pieces():  # type: ignore[no-untyped-def]
        for at in range(50):
            yield bytes([at]) * 100

    for sent in (broken, pieces()):
        expected = broken if sent is broken else b"".join(bytes([at]) * 100 for at in range(50))
        await relay.call("POST", relay.path("openai", "x"), data=sent, headers={"Content-Type": "multipart/form-data; boundary=b"})
        assert raw.arrived[-1].body == expected
        framing = (raw.arrived[-1].header("Content-Length"), raw.arrived[-1].header("Transfer-Encoding"))
        assert len([part for part in framing if part]) == 1
    assert "model" not in (await relay.events("exchange", 2))[0], "the end of the field in the broken form is unknown"


async def test_bodies_on_both_sides_of_every_limit_arrive_whole(start: StartRelay, raw: RawUpstream) -> None:
    """Bodies that are sent in one write, in pieces, and streamed, as JSON and as another type."""
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    for size in (65_536, 65_537, 1_048_576, 1_048_577, 5_000_000):
        sent = b'{"model":"m","x":"' + b"y" * (size - 20) + b'"}'
        for kind in ("application/json", "application/octet-stream"):
            await relay.call("POST", relay.path("openai", "x"), data=io.BytesIO(sent), headers={"Content-Type": kind})
            assert raw.arrived[-1].body == sent
            assert raw.arrived[-1].header("Content-Length") == [str(size)]
    await relay.idle()
    assert relay.gateway.held_bytes == 0


async def test_an_early_response_to_an_upload_is_relayed_at_once(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays("early", ok(b"too large", status="413 Payload Too Large"), Pause(30))
    relay = await start({"server": {"buffer_bytes": 1000}}, openai=provider(raw.url))
    sent = asyncio.Event()

    async def endless():  # type: ignore[no-untyped-def]
        yield b"x" * 5000
        await sent.wait()

    try:
        async with asyncio.timeout(10):
            status, _, body = await relay.call("POST", relay.path("openai", "x"), data=endless())
    finally:
        sent.set()
    assert (status, body) == (413, b"too large")


async def test_100_continue_is_sent_only_after_admission(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url), empty=provider(raw.url, key="NOT_SET"))

    async def ask(name: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        lines = [f"POST /api/v1/ai-gateway/providers/{name}/x HTTP/1.1", f"Host: 127.0.0.1:{relay.port}", "Expect: 100-continue", "Content-Length: 2", "Connection: close"]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
        first = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        if first.startswith(b"HTTP/1.1 100"):
            writer.write(b"hi")
            first += await asyncio.wait_for(reader.read(), 20)
        writer.close()
        return first

    assert (await ask("empty")).startswith(b"HTTP/1.1 503")
    answer = await ask("openai")
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
    assert raw.arrived[-1].body == b"hi"
    assert raw.arrived[-1].header("Expect") == []


async def test_a_redirect_reaches_the_client_and_is_not_followed(start: StartRelay, raw: RawUpstream) -> None:
    other = await RawUpstream.start()
    relay = await start(openai=provider(raw.url))
    for status in ("301 Moved", "302 Found", "307 Temporary", "308 Permanent"):
        raw.scripts.clear()
        raw.plays(head(f"Location: {other.url}/steal", "Content-Length: 0", status=status))
        got, headers, _ = await relay.call("POST", relay.path("openai", "x"), data=b"secret")
        assert (got, headers["Location"]) == (int(status[:3]), f"{other.url}/steal")
    assert other.connections == 0
    await other.stop()


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "POST"])
async def test_a_request_on_a_stale_connection_is_not_repeated(start: StartRelay, raw: RawUpstream, method: str) -> None:
    """aiohttp repeats idempotent requests by itself; the relay switches that off."""
    raw.plays(ok())
    raw.plays(RESET)
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    assert (await relay.call(method, relay.path("openai", "x")))[0] == 200
    status, headers, _ = await relay.call(method, relay.path("openai", "x"))
    assert (status, headers["x-relay-error"]) == (502, "upstream_disconnected")
    assert len(raw.arrived) == 2


async def test_a_response_has_the_request_id_the_log_id_and_the_timing(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    raw.plays(ok(b"", "x-request-id: theirs"))
    relay = await start(openai=provider(raw.url))
    _, headers, _ = await relay.call("GET", relay.path("openai", "x"), headers={"x-request-id": "mine-1"})
    assert headers["x-request-id"] == "mine-1"
    assert len(headers["cf-aig-log-id"]) == 36 and headers["cf-aig-log-id"][14] == "7"
    assert headers["server-timing"].startswith("relay;dur=")
    _, headers, _ = await relay.call("GET", relay.path("openai", "x"), headers={"x-request-id": "mine-1"})
    assert headers["x-request-id"] == "theirs"
    [event] = await relay.events()
    assert event["id"] == headers["cf-aig-log-id"]


async def test_the_log_has_the_model_of_the_body_or_the_path(start: StartRelay, vendors: Vendors) -> None:
    relay = await start({"providers": vendors.entries()})
    body = {"messages": [{"role": "user", "content": "x" * 5000}], "model": "gpt-5", "stream": True}
    await relay.call("POST", relay.path("openai", "chat/completions"), json=body)
    await relay.call("POST", relay.path("google-ai-studio", "v1beta/models/gemini-2.5-flash:generateContent"), json={})
    first, second = await relay.events("exchange", 2)
    assert (first["model"], second["model"]) == ("gpt-5", "gemini-2.5-flash")


async def test_log_lines_contain_neither_query_nor_credential(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    await relay.call("GET", relay.path("openai", f"x?secret={CLIENT_KEY}"), headers={"Authorization": CLIENT_KEY})
    [event] = await relay.events()
    assert event["endpoint"] == "x"
    assert "secret" not in json.dumps(event)
