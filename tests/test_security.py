"""Attacks: request smuggling, path traversal, choice of the destination, foreign web pages."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest
from yarl import URL

from relay.gateway import GATEWAY
from tests.conftest import StartRelay
from tests.relays import CLIENT_KEY, HANG_GUARD_S, Relay, provider
from tests.upstream.raw import RawUpstream, ok

API = "/api/v1/ai-gateway/providers/openai"


async def send_raw(relay: Relay, data: bytes) -> bytes:
    """Send bytes. Returns everything until the relay closes or sends nothing for 0.5 s."""
    return await send_raw_to(relay.port, data)


async def send_raw_to(port: int, data: bytes) -> bytes:
    """Do the same as `send_raw`, for any port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    got = b""
    try:
        while piece := await asyncio.wait_for(reader.read(65536), 0.5):
            got += piece
    except (TimeoutError, ConnectionError):
        pass
    writer.close()
    return got


async def send_one(relay: Relay, data: bytes) -> bytes:
    """Send one request. Returns its response without waiting for the relay to close."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(data)
    async with asyncio.timeout(HANG_GUARD_S):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
    writer.close()
    return head + body


def _request(*lines: str, body: bytes = b"", method: str = "POST") -> bytes:
    head = "\r\n".join([f"{method} {API}/x HTTP/1.1", *lines])
    return head.encode("latin-1") + b"\r\n\r\n" + body


HOST = "Host: localhost"
SMUGGLING: dict[str, bytes] = {
    "length and chunked": _request(HOST, "Content-Length: 4", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "two lengths": _request(HOST, "Content-Length: 4", "Content-Length: 5", body=b"aaaaa"),
    "two equal lengths": _request(HOST, "Content-Length: 4", "Content-Length: 4", body=b"aaaa"),
    "a list of lengths": _request(HOST, "Content-Length: 1, 1", body=b"a"),
    "a signed length": _request(HOST, "Content-Length: +1", body=b"a"),
    "a negative length": _request(HOST, "Content-Length: -1", body=b"a"),
    "an unknown coding": _request(HOST, "Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "chunked not last": _request(HOST, "Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n"),
    "another coding first": _request(HOST, "Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "two codings": _request(HOST, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "space before the colon": _request(HOST, "Transfer-Encoding : chunked", body=b"0\r\n\r\n"),
    "a folded header": _request(HOST, "X: a", " b"),
    "a bare line feed": f"POST {API}/x HTTP/1.1\n{HOST}\nContent-Length: 0\n\n".encode(),
    "a bare carriage return": _request(HOST, "X: a\rb"),
    "a NUL in a value": _request(HOST, "X: a\0b"),
    "two hosts": _request(HOST, "Host: evil.com"),
    "no host": _request("X: 1"),
    "a line feed in a chunk extension": _request(HOST, "Transfer-Encoding: chunked", body=b"1;a\nb\r\na\r\n0\r\n\r\n"),
    "a hex prefix": _request(HOST, "Transfer-Encoding: chunked", body=b"0x1\r\na\r\n0\r\n\r\n"),
    "an oversize chunk": _request(HOST, "Transfer-Encoding: chunked", body=b"fffffffffffffffff\r\na\r\n0\r\n\r\n"),
    "a header too long": _request(HOST, "X: " + "a" * 20_000),
    "too many headers": _request(HOST, *(f"X-{n}: 1" for n in range(300))),
    "a target too long": f"GET {API}/{'a' * 20_000} HTTP/1.1\r\n{HOST}\r\n\r\n".encode(),
    "an asterisk": f"OPTIONS * HTTP/1.1\r\n{HOST}\r\n\r\n".encode(),
    "authority form": f"GET evil.com:443 HTTP/1.1\r\n{HOST}\r\n\r\n".encode(),
    "absolute form": f"GET http://evil.com{API}/x HTTP/1.1\r\n{HOST}\r\n\r\n".encode(),
    "chunked in HTTP/1.0": f"POST {API}/x HTTP/1.0\r\n{HOST}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(),
    "TLS on a plain port": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 100 + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
async def test_an_ambiguous_request_gets_400_and_is_not_sent_upstream(start: StartRelay, raw: RawUpstream, name: str) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    answer = await send_raw(relay, SMUGGLING[name])
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400")), answer[:200]
    assert b"x-relay-error: bad_" in head
    assert json.loads(body)["error"]["code"] in ("bad_request", "bad_path")
    assert raw.arrived == []


async def test_the_log_does_not_show_the_request_line_of_a_refused_request(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    await send_raw(relay, f"GET {API}/x?key={CLIENT_KEY} HTTP/1.1\r\nBad Header: {CLIENT_KEY}\r\n\r\n".encode())
    [event] = await relay.events("request.refused")
    assert event["error"] == "bad_request" and CLIENT_KEY not in "".join(relay.logged.lines)


ESCAPES = ["..", "%2e%2e", "%2E%2e", ".%2e", "%252e%252e", "..;", "..%2f", "%2f..", "..%5c", "\\..\\", "%00", "%0d%0aX:1", "/", "//", "@evil.com", ":80", "evil.com", "%2e", "."]


async def test_no_mutation_of_a_path_leaves_the_providers_prefix(start: StartRelay, raw: RawUpstream) -> None:
    """Over 500 mutations, directly and through Cloudflare, whose URL has an account prefix."""
    raw.plays(ok())
    account = {"account_id": "acct", "gateway_id": "gw", "base_url": f"{raw.url}/v1"}
    direct = await start(openai=provider(f"{raw.url}/base/v1"))
    through = await start({"cloudflare": account}, openai=provider("https://unused.example", cloudflare={"slug": "openai"}))
    mutations = ["/".join(parts) for size in (1, 2) for parts in itertools.product(ESCAPES, repeat=size)]
    mutations += [f"a/{part}/b" for part in ESCAPES] + [f"{part}{other}" for part in ESCAPES for other in ESCAPES[:8]]
    assert len(mutations) >= 500
    for relay, prefix in ((direct, "/base/v1"), (through, "/v1/acct/gw/openai")):
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        for mutation in mutations:
            writer.write(f"GET {API}/{mutation} HTTP/1.1\r\n{HOST}\r\n\r\n".encode())
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
            status = int(head.split(b" ")[1])
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            assert status in (200, 400)
            if b"connection: close" in head.lower():
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.close()
        targets = [arrived.target for arrived in raw.arrived]
        assert targets
        for target in targets:
            # A provider whose parser normalises the path must end below the prefix too.
            assert target.startswith(prefix) and URL(f"http://h{target}").raw_path.startswith(prefix), target
        assert {arrived.header("Host")[0] for arrived in raw.arrived} == {f"127.0.0.1:{raw.port}"}
        raw.arrived.clear()


async def test_no_header_query_or_body_field_changes_the_destination(start: StartRelay, raw: RawUpstream) -> None:
    other = await RawUpstream.start()
    other.plays(ok())
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    evil = f"127.0.0.1:{other.port}"
    headers = {
        "x-fal-target-url": f"http://{evil}/", "X-Forwarded-Host": evil, "Forwarded": f"host={evil}", "x-portkey-custom-host": f"http://{evil}",
        "Destination": f"http://{evil}", "X-Original-URL": f"http://{evil}", "Location": f"http://{evil}",
    }  # fmt: skip
    body = {"api_base": f"http://{evil}", "base_url": f"http://{evil}", "model": f"http://{evil}/x", "url": f"http://{evil}"}
    status, _, _ = await relay.call("POST", relay.path("openai", f"x?base_url=http://{evil}&target=http://{evil}"), json=body, headers=headers)
    assert status == 200
    assert (len(raw.arrived), other.connections) == (1, 0)
    assert raw.arrived[0].header("Host") == [f"127.0.0.1:{raw.port}"]
    await other.stop()


ORIGINS = {
    None: True, "own": True, "http://localhost:5173": True, "https://app.example.com": True, "https://a.b.wild.example": True,
    "null": False, "http://evil.com": False, "http://localhost:5174": False, "https://localhost:5173": False, "https://app.example.com.evil.com": False,
    "https://xapp.example.com": False, "https://wild.example": False, "https://evilwild.example": False, "http://a.wild.example": False,
    "https://a.wild.example:444": False, "https://evil.com/.wild.example": False,
}  # fmt: skip


@pytest.mark.parametrize("socket", ["rest", "websocket"])
async def test_only_allowed_pages_may_call_while_access_is_open(start: StartRelay, raw: RawUpstream, socket: str) -> None:
    raw.plays(ok(b"refused", status="403 Forbidden") if socket == "websocket" else ok())
    cors = {"origins": ["http://localhost:5173", "https://app.example.com", "https://*.wild.example"]}
    relay = await start({"cors": cors}, openai=provider(raw.url, websocket={"default_path": "x"}))
    extra = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
    for origin, allowed in ORIGINS.items():
        raw.arrived.clear()
        host = f"localhost:{relay.port}"
        lines = [f"Host: {host}", *(extra if socket == "websocket" else [])]
        if origin is not None:
            lines.append(f"Origin: {f'http://{host}' if origin == 'own' else origin}")
        answer = await send_one(relay, _request(*lines, "Connection: close" if socket == "rest" else "X: 1", method="GET"))
        assert bool(raw.arrived) == allowed, origin
        assert (b"x-relay-error: origin_not_allowed" in answer) == (not allowed), origin


@pytest.mark.parametrize(("host", "allowed"), [("localhost", True), ("127.0.0.1:1", True), ("[::1]:8787", True), ("relay.internal", True), ("RELAY.internal:80", True), ("evil.com", False), ("127.0.0.1.evil.com", False), ("localhost.evil.com", False), ("0.0.0.0", False), ("169.254.169.254", False)])
async def test_only_known_host_names_are_accepted(start: StartRelay, raw: RawUpstream, host: str, allowed: bool) -> None:
    """DNS rebinding: evil.com resolves to 127.0.0.1, and the browser sends `Host: evil.com`."""
    raw.plays(ok())
    relay = await start({"server": {"hosts": ["relay.internal"]}}, openai=provider(raw.url))
    answer = await send_raw(relay, _request(f"Host: {host}", "Connection: close", method="GET"))
    assert bool(raw.arrived) == allowed
    assert (b"x-relay-error: host_not_allowed" in answer) == (not allowed)


async def test_the_error_names_the_host_as_it_is_listed(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"server": {"hosts": ["relay.internal"]}}, openai=provider(raw.url))
    answer = await send_raw(relay, _request("Host: ai.example.com:8443", "Connection: close", method="GET"))
    assert b"the host name 'ai.example.com' must be listed" in answer


async def test_management_accepts_only_requests_from_this_machine(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"cors": {"origins": ["https://app.example.com"]}, "server": {"hosts": ["relay.internal"]}}, openai=provider(raw.url))
    target = "/api/v1/ai-gateway/providers"
    allowed = await send_raw(relay, f"GET {target} HTTP/1.1\r\n{HOST}\r\nConnection: close\r\n\r\n".encode())
    assert b" 200 " in allowed and b'"name": "openai"' in allowed
    for line in ("X-Forwarded-For: 127.0.0.1", "Forwarded: for=x", "Origin: https://app.example.com", "Origin: null", "Host: relay.internal"):
        lines = [HOST, line] if not line.startswith("Host") else [line]
        head = "\r\n".join([f"GET {target} HTTP/1.1", *lines, "Connection: close"])
        assert b" 403 " in await send_raw(relay, head.encode() + b"\r\n\r\n"), line


async def test_an_error_of_the_relay_shows_no_url_path_stack_or_key(start: StartRelay, raw: RawUpstream) -> None:
    """Errors contain no URL, path, stack or key, and a repr of the configuration no secret."""
    relay = await start(openai=provider("http://127.0.0.1:9"))
    status, headers, body = await relay.call("POST", relay.path("openai", f"x?k={CLIENT_KEY}"), headers={"Authorization": CLIENT_KEY})
    assert (status, headers["x-relay-error"]) == (502, "upstream_unreachable")
    error = json.loads(body)["error"]
    assert error["message"] == "No connection to the provider 'openai' at 127.0.0.1:9: connection refused."
    gateway = relay.app[GATEWAY]
    for thing in (gateway.config, gateway.registry, gateway.settings, *gateway.registry.providers.values()):
        assert "CANARY" not in repr(thing)
