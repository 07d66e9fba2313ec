"""Streams are relayed chunk by chunk with backpressure; a truncated one never looks complete."""

from __future__ import annotations

import asyncio
import json
import re
import shutil

import aiohttp
import pytest

from relay.periodic import sweep
from tests.conftest import StartRelay
from tests.relays import Relay, provider
from tests.upstream.raw import (
    CLOSE,
    LAST_CHUNK,
    RESET,
    SILENCE,
    SSE_HEAD,
    Pause,
    RawUpstream,
    Step,
    chunk,
    gated_events,
    head,
)

EVENT = b'data: {"n": 1}\n\n'


async def test_each_event_arrives_before_the_next_is_sent(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(20)
    raw.plays(*steps)
    relay = await start(openai=provider(raw.url))
    async with relay.client.get(relay.path("openai", "sse")) as answer, asyncio.timeout(20):
        assert answer.headers["x-accel-buffering"] == "no"
        for number, gate in enumerate(gates):
            gate.set()
            assert await answer.content.readany() == b"data: %d\n\n" % number
        assert await answer.content.read() == b""


async def test_headers_arrive_before_the_first_chunk(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, gate, chunk(EVENT), LAST_CHUNK)
    relay = await start(openai=provider(raw.url))
    async with asyncio.timeout(20), relay.client.get(relay.path("openai", "sse")) as answer:
        assert answer.status == 200
        gate.set()
        assert await answer.read() == EVENT


TRUNCATIONS: dict[str, tuple[Step, ...]] = {
    "reset in a chunked body": (SSE_HEAD, chunk(EVENT), Pause(0.05), RESET),
    "closed in a chunk": (SSE_HEAD, chunk(EVENT), b"40\r\nhalf", CLOSE),
    "closed between chunks": (SSE_HEAD, chunk(EVENT), CLOSE),
    "closed before the length": (head("Content-Length: 100"), b"short", Pause(0.05), CLOSE),
    "an invalid chunk size": (SSE_HEAD, chunk(EVENT), Pause(0.05), b"zz\r\nxx\r\n", CLOSE),
}


@pytest.mark.programs
@pytest.mark.parametrize("cut", TRUNCATIONS)
async def test_a_truncated_response_never_looks_complete(start: StartRelay, raw: RawUpstream, cut: str) -> None:
    raw.plays(*TRUNCATIONS[cut])
    relay = await start(openai=provider(raw.url))
    with pytest.raises(aiohttp.ClientPayloadError):
        await relay.call("POST", relay.path("openai", "x"), data=b"{}")
    [event] = await relay.events()
    assert (event["outcome"], event["error"]) == ("failed", "upstream_disconnected")
    if curl := shutil.which("curl"):
        process = await asyncio.create_subprocess_exec(curl, "-sN", relay.path("openai", "x"), stdout=asyncio.subprocess.PIPE)
        out, _ = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode in (18, 56), "curl: transfer closed with outstanding data"
        assert b"[DONE]" not in out


async def test_an_http_1_0_client_sees_a_truncation(start: StartRelay, raw: RawUpstream) -> None:
    """Its body ends with the connection, so a clean close would be a clean end."""
    raw.plays(SSE_HEAD, chunk(EVENT), Pause(0.1), RESET)
    raw.plays(SSE_HEAD, chunk(EVENT), LAST_CHUNK)
    relay = await start(openai=provider(raw.url))

    async def call() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(b"GET /api/v1/ai-gateway/providers/openai/x HTTP/1.0\r\nHost: localhost\r\n\r\n")
        try:
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()

    with pytest.raises(ConnectionResetError):
        await call()
    whole = await call()
    assert whole.endswith(b"\r\n\r\n" + EVENT) and b"chunked" not in whole


async def test_an_sse_stream_truncated_at_any_byte_still_parses(start: StartRelay, raw: RawUpstream) -> None:
    """An error event follows only at an event boundary, and no [DONE] is added."""
    body = b"".join(b'data: {"n": %d, "text": "%s"}\n\n' % (n, b"x" * (n % 90)) for n in range(24))
    body += b"event: thing\r\ndata: {}\r\n\r\n: comment\n\ndata: [DONE]\n\n"
    relay = await start(openai=provider(raw.url))
    # Truncate around the end of an event of each kind and within some; tests/core/test_sse.py
    # splits at every byte.
    ends = [found.end() for found in re.finditer(rb"\n\n|\r\n\r\n", body)]
    around = {end + by for end in (ends[0], ends[8], *ends[-4:-1]) for by in (-2, -1, 0, 1)}
    for at in sorted({0, 1, 100, 500, len(body) - 1} | around):
        raw.scripts.clear()
        raw.plays(SSE_HEAD, chunk(body[:at]) if at else b"", CLOSE)
        got = await _read_until_broken(relay)
        relayed, rest = got[:at], got[at:]
        assert relayed == body[:at]
        boundary = at == 0 or relayed.endswith((b"\n\n", b"\r\n\r\n"))
        if boundary:
            assert rest.startswith(b"data: ") and rest.endswith(b"\n\n")
            assert json.loads(rest[6:])["error"]["code"] == "upstream_disconnected"
        else:
            assert rest == b""


async def _read_until_broken(relay: Relay, path: str = "chat/completions", name: str = "openai") -> bytes:
    """Return what arrives until the connection breaks, which it must."""
    got = b""
    with pytest.raises(aiohttp.ClientPayloadError):
        async with relay.client.post(relay.path(name, path), data=b"{}", timeout=aiohttp.ClientTimeout(total=None)) as answer:
            while True:
                piece = await answer.content.readany()
                if not piece:
                    return got
                got += piece
    return got


@pytest.mark.parametrize(
    ("format_", "endpoint", "start_with"),
    [
        ("anthropic", "v1/messages", b'event: error\ndata: {"type":"error","error":{"type":"api_error"'),
        ("openai", "responses", b'event: error\ndata: {"type":"error","code":"upstream_disconnected"'),
        ("google", "v1/models/m:streamGenerateContent", b'data: {"error":{"code":502'),
    ],
)
async def test_the_error_event_has_the_format_of_the_provider(start: StartRelay, raw: RawUpstream, format_: str, endpoint: str, start_with: bytes) -> None:
    raw.plays(SSE_HEAD, chunk(EVENT), Pause(0.1), RESET)
    relay = await start(vendor=provider(raw.url, format=format_))
    got = await _read_until_broken(relay, endpoint, "vendor")
    assert got.startswith(EVENT + start_with)


async def test_a_compressed_or_plain_stream_gets_no_error_event(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    for kind in ("Content-Type: text/event-stream\r\nContent-Encoding: gzip", "Content-Type: audio/mpeg"):
        raw.scripts.clear()
        raw.plays(head(kind, "Transfer-Encoding: chunked"), chunk(b"abc\n\n"), Pause(0.1), RESET)
        assert await _read_until_broken(relay) == b"abc\n\n"


@pytest.mark.serial
async def test_silence_within_the_limit_is_tolerated_and_beyond_it_ends_the_call(start: StartRelay, raw: RawUpstream) -> None:
    """With short limits; `make soak` waits for minutes."""
    relay = await start(openai=provider(raw.url, idle_timeout_s=1.0, first_byte_timeout_s=1.0))
    raw.plays(Pause(0.5), SSE_HEAD, Pause(0.5), chunk(EVENT), Pause(0.5), chunk(EVENT), LAST_CHUNK)
    assert (await relay.call("GET", relay.path("openai", "x")))[2] == EVENT * 2

    raw.scripts.clear()
    raw.plays(SILENCE)
    status, headers, body = await relay.call("GET", relay.path("openai", "x"))
    assert (status, headers["x-relay-error"]) == (504, "upstream_timeout")
    assert json.loads(body)["error"]["message"] == "The provider was silent for 1 s (before its response began)."

    raw.scripts.clear()
    raw.plays(SSE_HEAD, chunk(EVENT), SILENCE)
    got = await _read_until_broken(relay)
    assert json.loads(got[len(EVENT) + 6 :])["error"]["code"] == "upstream_timeout"


@pytest.mark.serial
async def test_no_total_limit_ends_a_long_stream(start: StartRelay, raw: RawUpstream) -> None:
    """It may last many times the idle timeout as long as chunks arrive."""
    steps: list[Step] = [SSE_HEAD]
    for _ in range(30):
        steps += [chunk(EVENT), Pause(0.1)]
    raw.plays(*steps, LAST_CHUNK)
    relay = await start(openai=provider(raw.url, idle_timeout_s=0.8, first_byte_timeout_s=0.8))
    assert (await relay.call("GET", relay.path("openai", "x")))[2] == EVENT * 30


async def test_a_client_that_disconnects_cancels_its_upstream_call(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    for script in ((SILENCE,), (SSE_HEAD, SILENCE), (SSE_HEAD, chunk(EVENT), SILENCE)):
        raw.scripts.clear()
        raw.plays(*script)
        raw.closed.clear()
        _, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(b"GET /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\nHost: localhost\r\n\r\n")
        seen = len(raw.arrived)
        async with asyncio.timeout(20):
            while len(raw.arrived) == seen:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        writer.close()
        await asyncio.wait_for(raw.closed.wait(), 10)
    events = await relay.events("exchange", 3)
    assert {event["outcome"] for event in events} == {"client_gone"}
    assert {event["error"] for event in events} == {"client_gone"}


async def test_a_client_that_disconnects_during_its_upload_cancels_the_upstream_call(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SILENCE)
    relay = await start({"server": {"buffer_bytes": 10}}, openai=provider(raw.url))
    _, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"POST /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n" + b"x" * 50)
    async with asyncio.timeout(20):
        while not raw.arrived:
            await asyncio.sleep(0.01)
    writer.close()
    await asyncio.wait_for(raw.closed.wait(), 10)


async def test_a_slow_upload_ends_with_408(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SILENCE)
    relay = await start({"server": {"body_idle_timeout_s": 0.5}}, openai=provider(raw.url))
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"POST /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nsome")
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 408") and b"x-relay-error: body_timeout" in answer
    assert raw.connections == 0


BUFFERED, STREAMED = 1 << 20, 5
"""Values of server.buffer_bytes: the body is buffered before it is sent, or streamed."""


async def _send_slowly(relay: Relay, *pieces: tuple[float, int]) -> bytes:
    """Return the response head for a body that arrives in `pieces` of (pause in s, bytes).

    After the pieces no byte arrives for 20 s. Without a response by then the result is empty.
    """
    gateway, clock, passed_s, sent = relay.gateway, relay.gateway.clock, 0.0, 0
    gateway.clock = lambda: clock() + passed_s
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"POST /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
    async with asyncio.timeout(20):
        while not any(exchange.waiting.for_ == "request_body" for exchange in gateway.running):
            await asyncio.sleep(0.001)
        (exchange,) = gateway.running
        for pause_s, size in pieces:
            passed_s += pause_s
            await sweep(gateway)
            sent += size
            writer.write(bytes(size))
            while exchange.waiting.expired is None and (exchange.request.body_bytes < sent or exchange.waiting.for_ != "request_body"):
                await asyncio.sleep(0.001)
        passed_s += 20
        await sweep(gateway)
        cut = exchange.waiting.expired is not None or exchange.outcome.name is not None
        answer = await reader.readuntil(b"\r\n\r\n") if cut else b""
    writer.close()
    return answer


@pytest.mark.parametrize("buffer_bytes", [BUFFERED, STREAMED])
@pytest.mark.parametrize(
    ("pieces", "rate", "slow"),
    [
        ([(25, 10), (25, 10)], 512, True),
        ([(25, 10), (25, 10)], 0, False),
        ([(25, 10), (25, 10)], 1, False),
        ([(25, 20_000), (25, 10)], 512, False),
        ([(1, 60_000), (25, 10), (25, 10)], 512, True),
    ],
    ids=["trickles", "may trickle", "fast enough", "catches up", "was fast once"],
)
async def test_a_body_that_trickles_ends_with_408_though_it_never_pauses_for_long(
    pieces: list[tuple[float, int]], rate: int, slow: bool, buffer_bytes: int, start: StartRelay, raw: RawUpstream
) -> None:
    raw.plays(SILENCE)
    server = {"body_idle_timeout_s": 60, "buffer_bytes": buffer_bytes} | ({} if rate == 512 else {"min_body_bytes_per_s": rate})
    relay = await start({"server": server}, openai=provider(raw.url, first_byte_timeout_s=9999, idle_timeout_s=9999))
    answer = await _send_slowly(relay, *pieces)
    assert (answer.startswith(b"HTTP/1.1 408") and b"x-relay-error: body_too_slow" in answer) is slow
    assert bool(answer) is slow


async def test_the_time_that_a_provider_takes_for_an_upload_is_not_charged_to_the_client(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays("deaf", asyncio.Event())
    relay = await start({"server": {"buffer_bytes": 10, "body_idle_timeout_s": 60}}, openai=provider(raw.url, idle_timeout_s=9999))
    gateway, clock, passed_s = relay.gateway, relay.gateway.clock, 0.0
    gateway.clock = lambda: clock() + passed_s
    _, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"POST /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n" + bytes(20_000_000))
    async with asyncio.timeout(20):
        before = -1
        while not (exchange := next(iter(gateway.running), None)) or exchange.waiting.for_ != "upload" or exchange.request.body_bytes != before:
            before = exchange.request.body_bytes if exchange else -1
            await asyncio.sleep(0.02)
    passed_s += 600
    await sweep(gateway)
    assert exchange.waiting.expired is None and exchange.waiting.body_behind_s < 60
    writer.close()


async def test_an_upload_that_the_provider_does_not_read_ends_with_504(start: StartRelay, raw: RawUpstream) -> None:
    stuck = asyncio.Event()
    raw.plays("deaf", stuck)
    relay = await start({"server": {"buffer_bytes": 10}}, openai=provider(raw.url, idle_timeout_s=0.5))

    async def endless():  # type: ignore[no-untyped-def]
        while True:
            yield b"x" * 1_000_000

    status, headers, _ = await relay.call("POST", relay.path("openai", "x"), data=endless())
    stuck.set()
    assert (status, headers["x-relay-error"]) == (504, "upstream_timeout")


async def test_invalid_header_bytes_are_relayed_or_refused_clearly(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head(b"X-Bad: \xff\xfe".decode("latin-1"), "Content-Length: 2").decode("utf-8").encode("latin-1") + b"ok")
    relay = await start(openai=provider(raw.url))
    status, headers, _ = await relay.call("GET", relay.path("openai", "x"))
    assert status == 200 or headers["x-relay-error"] == "upstream_protocol_error"
    _, writer = reader_writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"GET /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\nHost: localhost\r\nX-Bad: \xff\xfe\r\n\r\n")
    answer = await asyncio.wait_for(reader_writer[0].readuntil(b"\r\n\r\n"), 20)
    writer.close()
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 200"))


async def test_large_heads_are_relayed_and_invalid_ones_are_502(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    raw.plays(head(*(f"X-{n}: {n}" for n in range(200)), "X-Long: " + "y" * 16_000, "Content-Length: 2") + b"ok")
    status, headers, body = await relay.call("GET", relay.path("openai", "x"))
    assert (status, body, len(headers["X-Long"]), headers["X-199"]) == (200, b"ok", 16_000, "199")
    for wrong in (head(*(f"X-{n}: {n}" for n in range(400))), head("X: " + "y" * 70_000), b"HTTP/9 what\r\n\r\n", b"\x16\x03\x01\r\n\r\n"):
        raw.scripts.clear()
        raw.plays(wrong, CLOSE)
        status, headers, _ = await relay.call("GET", relay.path("openai", "x"))
        assert (status, headers["x-relay-error"]) == (502, "upstream_protocol_error")


async def test_interim_responses_and_trailers_are_dropped(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + head("Transfer-Encoding: chunked", "Trailer: X-T") + chunk(b"ok") + b"0\r\nX-T: 1\r\n\r\n")
    relay = await start(openai=provider(raw.url))
    status, headers, body = await relay.call("GET", relay.path("openai", "x"))
    assert (status, body) == (200, b"ok") and "X-T" not in headers and "Link" not in headers


async def test_a_slow_client_slows_down_the_provider(start: StartRelay, raw: RawUpstream) -> None:
    """The relay does not buffer without bound: the provider stalls once the buffers are full."""
    sent = 0
    piece = b"x" * 65536

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head("Content-Length: 1073741824"))
        while True:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)

    server = await asyncio.start_server(flood, "127.0.0.1", 0)
    relay = await start(openai=provider(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port, limit=4096)
    writer.write(b"GET /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\nHost: localhost\r\n\r\n")
    before = -1
    async with asyncio.timeout(20):
        while sent == 0 or sent != before:
            before = sent
            await asyncio.sleep(0.5)
    assert sent < 64 * 1024 * 1024
    for _ in range(200):
        await reader.readexactly(65536)
    async with asyncio.timeout(20):
        while sent == before:
            await asyncio.sleep(0.05)
    writer.close()
    server.close()


@pytest.mark.soak
@pytest.mark.timeout(1000)
async def test_280_seconds_of_silence_before_and_within_a_stream_are_tolerated(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    raw.plays(Pause(280), SSE_HEAD, Pause(280), chunk(EVENT), LAST_CHUNK)
    client = aiohttp.ClientTimeout(total=None)
    assert (await relay.call("GET", relay.path("openai", "x"), timeout=client))[2] == EVENT


@pytest.mark.soak
@pytest.mark.timeout(1000)
async def test_a_stream_ends_after_300_seconds_of_silence(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    raw.plays(SSE_HEAD, chunk(EVENT), Pause(310), chunk(EVENT), LAST_CHUNK)
    got = await _read_until_broken(relay)
    assert json.loads(got[len(EVENT) + 6 :])["error"]["code"] == "upstream_timeout"


@pytest.mark.soak
@pytest.mark.timeout(1000)
async def test_a_stream_of_fifteen_minutes_is_relayed(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    steps: list[Step] = [SSE_HEAD]
    for _ in range(90):
        steps += [Pause(10), chunk(EVENT)]
    raw.plays(*steps, LAST_CHUNK)
    answer = await relay.call("GET", relay.path("openai", "x"), timeout=aiohttp.ClientTimeout(total=None))
    assert answer[2] == EVENT * 90
