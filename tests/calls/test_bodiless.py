"""Responses without a body, invalid statuses, and interim responses, on keep-alive connections."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import StartRelay
from tests.relays import Relay, provider
from tests.upstream.raw import CLOSE, SSE_HEAD, RawUpstream, chunk, head, ok

CALL = "/api/v1/ai-gateway/providers/openai/"
FORGED = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
NEXT = b"the next one"
FIRST_LINE = {"205": "205 Reset Content", "204": "204 No Content", "304": "304 Not Modified", "HEAD": "200 OK", "HEAD 404": "404 Not Found"}


class KeepAlive:
    """A keep-alive connection to a relay: `async with KeepAlive(relay) as connection`."""

    def __init__(self, relay: Relay) -> None:
        self._port = relay.port

    async def __aenter__(self) -> KeepAlive:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, or everything until the end."""
        return await asyncio.wait_for(self._reader.read() if size < 0 else self._reader.readexactly(size), 20)

    async def head(self, method: str, target: str, *lines: str) -> bytes:
        """Send a request without a body, and read the head of its response."""
        self._writer.write("\r\n".join([f"{method} {target} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode())
        return await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 20)

    async def last_response(self, target: str) -> tuple[bytes, bytes]:
        """Send a last request and return its (head, body).

        Bytes that came before its response are at the beginning of its head.
        """
        head = await self.head("GET", target, "Connection: close")
        return head, await self.read()


async def _check_no_body(relay: Relay, method: str, target: str, *lines: str) -> bytes:
    """Return the head of a response after checking that no byte follows it."""
    async with KeepAlive(relay) as connection:
        first = await connection.head(method, target, *lines)
        following, _ = await connection.last_response("/version")
    assert following.startswith(b"HTTP/1.1 200 OK\r\n"), following
    return first


# --- responses of the provider

WITH_BODY = {
    "length": (b"Content-Length: %d\r\n\r\n" % len(FORGED) + FORGED,),
    "length, later": (b"Content-Length: %d\r\n\r\n" % len(FORGED), "gate", FORGED),
    "chunked": (b"Transfer-Encoding: chunked\r\n\r\n" + chunk(FORGED) + b"0\r\n\r\n",),
    "chunked, later": (b"Transfer-Encoding: chunked\r\n\r\n", "gate", chunk(FORGED) + b"0\r\n\r\n"),
    "length 0, later": (b"Content-Length: 0\r\n\r\n", "gate", FORGED),
    "length 0": (b"Content-Length: 0\r\n\r\n" + FORGED,),
    "until the end": (b"\r\n" + FORGED, CLOSE),
    "an event stream": (b"Content-Type: text/event-stream\r\n\r\ndata: 1\n\n", "gate", b"data: 2\n\n", CLOSE),
}  # fmt: skip


@pytest.mark.parametrize("status", FIRST_LINE)
@pytest.mark.parametrize("body", WITH_BODY)
async def test_a_provider_cannot_send_a_body_after_a_response_that_has_none(start: StartRelay, raw: RawUpstream, status: str, body: str) -> None:
    gate = asyncio.Event()
    steps = [gate if step == "gate" else step for step in WITH_BODY[body]]
    steps[0] = f"HTTP/1.1 {FIRST_LINE[status]}\r\n".encode() + steps[0]  # type: ignore[operator]
    raw.plays(*steps)
    raw.plays(ok(NEXT))
    relay = await start(openai=provider(raw.url))
    async with KeepAlive(relay) as connection:
        first = await connection.head("HEAD" if status.startswith("HEAD") else "GET", CALL + "first")
        if first.startswith(b"HTTP/1.1 502 "):
            # Only if invalid bytes arrived in one piece with the head: the parser returns neither.
            assert status != "205" and steps[0].partition(b"\r\n\r\n")[2]  # type: ignore[union-attr]
            return
        assert first.startswith(f"HTTP/1.1 {FIRST_LINE[status]}\r\n".encode())
        gate.set()
        following, answer = await connection.last_response(CALL + "second")
    assert following.startswith(b"HTTP/1.1 200 OK\r\n") and answer == NEXT
    if status == "205":
        assert b"\r\nContent-Length: 0\r\n" in first and b"chunked" not in first
    await relay.idle()


async def test_unsolicited_bytes_are_not_the_response_to_the_next_call(start: StartRelay, raw: RawUpstream) -> None:
    """A second whole response arrives while the connection is idle."""
    gate = asyncio.Event()
    raw.plays(ok(b"first"), gate, FORGED, CLOSE)
    raw.plays(ok(NEXT))
    relay = await start(openai=provider(raw.url))
    assert (await relay.call("GET", relay.path("openai", "x")))[2] == b"first"
    gate.set()
    await asyncio.wait_for(raw.closed.wait(), 20)
    for _ in range(3):
        assert (await relay.call("GET", relay.path("openai", "x")))[2] == NEXT


async def test_of_two_responses_in_one_piece_the_first_is_relayed_and_the_connection_closed(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"first") + FORGED)
    raw.plays(ok(NEXT))
    relay = await start(openai=provider(raw.url))
    assert (await relay.call("GET", relay.path("openai", "x")))[2] == b"first"
    assert (await relay.call("GET", relay.path("openai", "x")))[2] == NEXT
    assert raw.connections == 2


async def test_head_keeps_the_content_length_of_the_provider(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head("Content-Length: 1234567", "Content-Type: audio/mpeg"))
    relay = await start(openai=provider(raw.url))
    assert b"\r\nContent-Length: 1234567\r\n" in await _check_no_body(relay, "HEAD", CALL + "file")


async def test_a_head_response_that_is_rewritten_or_metered_has_no_body(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head("Content-Length: 20", "Content-Type: application/json"))
    relay = await start(openai=provider(raw.url, rewrite={"headers": ["Location"], "fields": {"": ["url"]}}))
    assert b"\r\nContent-Length: 20\r\n" in await _check_no_body(relay, "HEAD", CALL + "chat/completions")


@pytest.mark.parametrize("line", ["205 Reset Content", "204 No Content", "304 Not Modified"])
async def test_a_shared_response_without_a_body_has_no_body(start: StartRelay, raw: RawUpstream, line: str) -> None:
    gate = asyncio.Event()
    raw.plays(f"HTTP/1.1 {line}\r\nContent-Type: application/json\r\nContent-Length: 6\r\n\r\n".encode(), gate, b"forged")
    relay = await start({"cache": {"coalesce": True}}, openai=provider(raw.url))
    assert (await _check_no_body(relay, "GET", CALL + "models")).startswith(f"HTTP/1.1 {line}".encode())


# --- statuses


@pytest.mark.parametrize("status", ["101 Switching Protocols", "0 X", "000 X", "1 X", "42 X", "99 X", "099 X", "600 X", "999 X", "1000 X", "-1 X", "abc X", "2000 X"])
async def test_an_invalid_final_status_is_502(start: StartRelay, raw: RawUpstream, status: str) -> None:
    upgrade = ["Connection: Upgrade", "Upgrade: websocket"] if status.startswith("101") else []
    raw.plays(head(*upgrade, "Content-Length: 2", status=status) + b"no")
    raw.plays(ok(NEXT))
    relay = await start(openai=provider(raw.url, websocket={"default_path": "x"}))
    answer, headers, _ = await relay.call("POST", relay.path("openai", "x"), data=b"{}")
    assert (answer, headers["x-relay-error"]) == (502, "upstream_protocol_error")
    assert (await relay.call("GET", relay.path("openai", "x")))[2] == NEXT
    assert (await relay.events("exchange"))[0]["status"] in (200, 502)


@pytest.mark.parametrize("status", ["0 X", "99 X", "600 X", "999 X"])
async def test_an_invalid_status_of_a_handshake_is_502(start: StartRelay, raw: RawUpstream, status: str) -> None:
    raw.plays(head("Content-Length: 2", status=status) + b"no")
    relay = await start(openai=provider(raw.url, websocket={"default_path": "x"}))
    lines = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
    async with KeepAlive(relay) as connection:
        answer = await connection.head("GET", CALL + "x", *lines)
    assert answer.startswith(b"HTTP/1.1 502 ") and b"x-relay-error: upstream_protocol_error" in answer


@pytest.mark.parametrize("status", ["200 OK", "299 Odd", "404 Not Found", "599 Network"])
async def test_any_status_from_200_to_599_is_relayed(start: StartRelay, raw: RawUpstream, status: str) -> None:
    raw.plays(ok(b"body", status=status))
    relay = await start(openai=provider(raw.url))
    assert (await relay.call("GET", relay.path("openai", "x")))[0] == int(status[:3])


@pytest.mark.parametrize("line", ["204 No Content", "205 Reset Content", "304 Not Modified"])
async def test_a_handshake_refused_without_a_body_has_no_body(start: StartRelay, raw: RawUpstream, line: str) -> None:
    raw.plays(f"HTTP/1.1 {line}\r\nContent-Length: 6\r\n\r\n".encode())
    relay = await start(openai=provider(raw.url, websocket={"default_path": "x"}))
    lines = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
    assert (await _check_no_body(relay, "GET", CALL + "x", *lines)).startswith(f"HTTP/1.1 {line}".encode())


# --- interim responses

INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"


async def test_interim_responses_are_dropped_up_to_a_limit(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(INTERIM * 33, ok(b"body"))
    relay = await start(openai=provider(raw.url))
    async with KeepAlive(relay) as connection:
        first = await connection.head("GET", CALL + "x")
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("pieces", [1, 34])
async def test_a_flood_of_interim_responses_is_502_and_ends_its_connection(start: StartRelay, raw: RawUpstream, pieces: int) -> None:
    raw.plays(*[INTERIM * (34 // pieces)] * pieces, "silence")
    raw.plays(ok(NEXT))
    relay = await start(openai=provider(raw.url))
    status, headers, body = await relay.call("GET", relay.path("openai", "x"))
    assert (status, headers["x-relay-error"]) == (502, "upstream_protocol_error") and b"100 interim responses" in body
    await asyncio.wait_for(raw.closed.wait(), 20)
    assert (await relay.call("GET", relay.path("openai", "x")))[2] == NEXT


async def test_interim_responses_to_a_handshake_are_limited(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(INTERIM * 40, "silence")
    relay = await start(openai=provider(raw.url, websocket={"default_path": "x"}))
    lines = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
    async with KeepAlive(relay) as connection:
        answer = await connection.head("GET", CALL + "x", *lines)
    assert answer.startswith(b"HTTP/1.1 502 ") and b"x-relay-error: upstream_protocol_error" in answer


async def test_the_limit_of_interim_responses_applies_to_each_call_of_a_connection(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(INTERIM * 30, ok(b"body"))
    relay = await start(openai=provider(raw.url))
    for _ in range(3):
        assert (await relay.call("GET", relay.path("openai", "x")))[2] == b"body"
    assert raw.connections == 1


# --- the relay's own responses to HEAD


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/nowhere", 404), ("/api/v1/ai-gateway/providers/nobody/x", 404), ("/api/v1/ai-gateway/ws/openai", 426), ("/api/v1/ai-gateway/cache", 404),
        ("/api/v1/ai-gateway/providers", 200), ("/api/v1/ai-gateway/usage", 200), ("/api/v1/ai-gateway/logs", 200), ("/api/v1/ai-gateway/logs/x", 404),
        ("/api/v1/ai-gateway/logs/export", 200), ("/api/v1/ai-gateway/logs?limit=x", 400), ("/healthz", 200), ("/readyz", 200), ("/version", 200), ("/metrics", 200),
        (CALL + "x/%2e%2e/y", 400), (CALL + "x", 502),
    ],
)  # fmt: skip
async def test_the_relays_own_response_to_head_has_no_body(start: StartRelay, raw: RawUpstream, sqlite_setting: str, target: str, status: int) -> None:
    raw.plays(ok())
    relay = await start({"database": sqlite_setting}, openai=provider(raw.url, websocket={"default_path": "x"}), gone=provider("http://127.0.0.1:9"))
    await relay.call("GET", relay.path("openai", "x"))
    await relay.idle()
    if status == 502:
        target = target.replace("openai", "gone")
    assert (await _check_no_body(relay, "HEAD", target)).startswith(f"HTTP/1.1 {status} ".encode())


async def test_a_head_request_that_is_shed_has_no_body(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok())
    relay = await start({"limits": [{"calls_at_once": 1}]}, openai=provider(raw.url))
    holder = asyncio.create_task(relay.call("GET", relay.path("openai", "x")))
    async with asyncio.timeout(20):
        while not raw.arrived:
            await asyncio.sleep(0.01)
    first = await _check_no_body(relay, "HEAD", CALL + "x")
    assert first.startswith(b"HTTP/1.1 503 ") and relay.gateway.requests_shed == 1
    async with KeepAlive(relay) as connection:
        refused = await connection.head("GET", CALL + "x")
        length = int(refused.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert f"content-length: {length}".encode() in first.lower() and len(await connection.read(length)) == length
    gate.set()
    await holder


@pytest.mark.parametrize("lines", [["Bad Header: 1"], ["Content-Length: x"], ["Transfer-Encoding: gzip, chunked", "Content-Length: 1"], ["X: " + "y" * 40_000]])
async def test_a_head_request_that_cannot_be_parsed_has_no_body(start: StartRelay, lines: list[str]) -> None:
    relay = await start()
    for method in ("HEAD", "GET"):
        async with KeepAlive(relay) as connection:
            first = await connection.head(method, "/healthz", *lines)
            assert first.split(b" ", 2)[1] == b"400" and b"x-relay-error: bad_request" in first
            assert bool(await connection.read()) == (method == "GET")


async def test_an_event_stream_in_response_to_head_has_no_body(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD)
    relay = await start(openai=provider(raw.url))
    assert (await _check_no_body(relay, "HEAD", CALL + "x")).startswith(b"HTTP/1.1 200 OK\r\n")
