"""Upgrades: the headers of a 101, the paths that accept sockets, and protocol violations."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.relays import Relay, packaged_provider, provider
from tests.upstream.raw import RawUpstream

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
KEY = base64.b64encode(b"0123456789abcdef").decode()
SOCKETS = {"websocket": {"default_path": "echo"}}
TARGET = "/api/v1/ai-gateway/ws/openai"


class Socket:
    """One end of a WebSocket, as bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes = b"") -> None:
        self.reader, self.writer, self.head = reader, writer, head

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1])

    def lines(self, name: bytes) -> list[bytes]:
        """Return the raw values of a header."""
        found = [line.partition(b":") for line in self.head.split(b"\r\n")[1:]]
        return [value.strip() for key, _, value in found if key.lower() == name.lower()]

    async def read_to_end(self) -> bytes:
        """Read everything until the other end has sent its FIN."""
        return await asyncio.wait_for(self.reader.read(), 20)


class Accepting:
    """A provider that accepts each handshake with a 101 and the header lines in `extra`."""

    def __init__(self) -> None:
        self.extra: bytes = b""
        self.connection: bytes = b"Connection: Upgrade\r\n"
        self.heads: list[bytes] = []
        self.sockets: asyncio.Queue[Socket] = asyncio.Queue()
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        socket = Socket(reader, writer, head)
        digest = hashlib.sha1(socket.lines(b"Sec-WebSocket-Key")[0] + GUID).digest()
        accept = b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n"
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n" + self.connection + accept + self.extra + b"\r\n")
        self.sockets.put_nowait(socket)


@pytest.fixture
async def accepting() -> AsyncIterator[Accepting]:
    """A provider written as bytes that accepts every handshake."""
    running = Accepting()
    server = await asyncio.start_server(running.answer, "127.0.0.1", 0)
    running.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield running
    server.close()
    while not running.sockets.empty():
        running.sockets.get_nowait().writer.close()


async def dial(relay: Relay, target: str = TARGET, connection: str = "Connection: Upgrade\r\n", more: bytes = b"") -> Socket:
    """Send a client's handshake and read the head of the response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n{connection}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n"
    writer.write(head.encode() + more + b"\r\n")
    return Socket(reader, writer, await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20))


def frame(opcode: int, payload: bytes, masked: bool = True) -> bytes:
    """Return one short, final frame."""
    if not masked:
        return bytes([0x80 | opcode, len(payload)]) + payload
    return bytes([0x80 | opcode, 0x80 | len(payload)]) + b"\0\0\0\0" + payload


async def test_headers_of_the_provider_are_relayed_with_the_101(start: StartRelay, accepting: Accepting) -> None:
    accepting.extra = (
        b"x-request-id: req_1\r\nx-codex-turn-state: abc\r\nopenai-model: gpt-5\r\nopenai-processing-ms: 7\r\n"
        b"x-ratelimit-remaining-requests: 9\r\nx-codex-turn-state: def\r\nServer: provider\r\n"
    )
    relay = await start(openai=provider(accepting.url, **SOCKETS))
    socket = await dial(relay)
    socket.writer.close()
    assert socket.status == 101
    assert socket.lines(b"x-codex-turn-state") == [b"abc", b"def"]
    expected = {b"x-request-id": b"req_1", b"openai-model": b"gpt-5", b"openai-processing-ms": b"7", b"x-ratelimit-remaining-requests": b"9", b"server": b"provider"}
    assert {name: socket.lines(name) for name in expected} == {name: [value] for name, value in expected.items()}


async def test_headers_of_a_101_are_filtered_like_those_of_every_response(start: StartRelay, accepting: Accepting) -> None:
    accepting.extra = (
        b"Set-Cookie: a=b\r\nAlt-Svc: h3\r\nStrict-Transport-Security: max-age=1\r\nAccess-Control-Allow-Origin: *\r\nX-Accel-Redirect: /x\r\n"
        b"Keep-Alive: timeout=5\r\nSec-WebSocket-Extensions-Not: x\r\ncf-aig-cache-status: MISS\r\nContent-Length: 5\r\nContent-Type: text/html\r\n"
    )
    relay = await start(openai=provider(accepting.url, **SOCKETS))
    socket = await dial(relay)
    socket.writer.close()
    for name in (b"Set-Cookie", b"Alt-Svc", b"Strict-Transport-Security", b"Access-Control-Allow-Origin", b"X-Accel-Redirect", b"Keep-Alive", b"Sec-WebSocket-Extensions-Not", b"Content-Length", b"Content-Type", b"Server"):
        assert socket.lines(name) == [], name
    assert socket.lines(b"x-cloudflare-aig-cache-status") == [b"MISS"]


async def test_the_relays_own_headers_override_those_of_the_provider(start: StartRelay, accepting: Accepting) -> None:
    accepting.extra = b"Server-Timing: theirs\r\nratelimit: theirs\r\n"
    relay = await start({"limits": [{"handshakes": 9, "per": "client"}]}, openai=provider(accepting.url, **SOCKETS))
    socket = await dial(relay)
    socket.writer.close()
    [timing], [limit] = socket.lines(b"server-timing"), socket.lines(b"ratelimit")
    assert timing.startswith(b"relay;dur=") and limit != b"theirs"
    assert len(socket.lines(b"cf-aig-log-id")) == len(socket.lines(b"Upgrade")) == len(socket.lines(b"Connection")) == 1
    digest = base64.b64encode(hashlib.sha1(KEY.encode() + GUID).digest())
    assert socket.lines(b"Sec-WebSocket-Accept") == [digest]


@pytest.mark.parametrize("value", ["Zoë".encode("latin-1"), "Zoë 日本".encode(), b"\xff\xfe"], ids=["latin-1", "utf-8", "neither"])
async def test_header_bytes_outside_ascii_are_relayed_unchanged_in_a_handshake(start: StartRelay, accepting: Accepting, value: bytes) -> None:
    accepting.extra = b"x-name: " + value + b"\r\n"
    relay = await start(openai=provider(accepting.url, **SOCKETS))
    socket = await dial(relay, more=b"x-title: " + value + b"\r\n")
    socket.writer.close()
    assert socket.lines(b"x-name") == [value]
    assert b"x-title: " + value + b"\r\n" in accepting.heads[0]


async def test_a_101_with_an_invalid_header_is_a_protocol_error_of_the_provider(start: StartRelay, accepting: Accepting) -> None:
    accepting.extra = b"x-odd: a\x01b\r\n"
    relay = await start(openai=provider(accepting.url, **SOCKETS))
    socket = await dial(relay)
    socket.writer.close()
    assert (socket.status, socket.lines(b"x-relay-error")) == (502, [b"upstream_protocol_error"])
    upstream = await asyncio.wait_for(accepting.sockets.get(), 20)
    await upstream.read_to_end()
    upstream.writer.close()


async def test_a_101_whose_connection_header_has_two_lines_is_an_upgrade(start: StartRelay, accepting: Accepting) -> None:
    accepting.connection = b"Connection: keep-alive, x-hop\r\nConnection: Upgrade, x-second\r\n"
    accepting.extra = b"x-hop: 1\r\nx-second: 2\r\nx-end: 3\r\n"
    relay = await start(openai=provider(accepting.url, **SOCKETS))
    socket = await dial(relay)
    socket.writer.close()
    assert (socket.status, socket.lines(b"x-end")) == (101, [b"3"])
    assert socket.lines(b"x-hop") == socket.lines(b"x-second") == []


async def test_a_handshake_whose_connection_header_has_two_lines_is_accepted(start: StartRelay, accepting: Accepting) -> None:
    relay = await start(openai=provider(accepting.url, **SOCKETS))
    socket = await dial(relay, connection="Connection: x-hop\r\nConnection: keep-alive, Upgrade\r\n", more=b"x-hop: 1\r\nx-end: 2\r\n")
    socket.writer.close()
    assert socket.status == 101
    assert b"x-hop" not in accepting.heads[0] and b"x-end: 2" in accepting.heads[0]


# Protocol violations: the frames, and the code of the close that follows.
BROKEN = {
    "a reserved bit": (lambda masked: bytes([0xC1, 0x80 if masked else 0]) + (b"\0\0\0\0" if masked else b""), 1002),
    "a reserved opcode": (lambda masked: frame(0xB, b"", masked), 1002),
    "a continuation of nothing": (lambda masked: frame(0, b"x", masked), 1002),
    "text that is no UTF-8": (lambda masked: frame(1, b"\xff\xfe", masked), 1007),
    "a close code that is not allowed": (lambda masked: frame(8, struct.pack("!H", 5000), masked), 1002),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
async def test_a_client_that_breaks_the_protocol_gets_a_close_frame_and_fin_at_once(start: StartRelay, accepting: Accepting, broken: str) -> None:
    """The client waits for the end of the connection, so the relay must not wait for the client."""
    data, code = BROKEN[broken]
    relay = await start({"websocket": {"close_timeout_s": 3600}}, openai=provider(accepting.url, **SOCKETS))
    socket = await dial(relay)
    socket.writer.write(data(True))
    end = await socket.read_to_end()
    assert end[0] == 0x88 and struct.unpack("!H", end[2:4]) == (code,)
    socket.writer.close()
    upstream = accepting.sockets.get_nowait()
    upstream.writer.close()
    await relay.idle()


@pytest.mark.parametrize("broken", BROKEN)
async def test_a_provider_that_breaks_the_protocol_gets_a_close_frame_and_fin_at_once(start: StartRelay, accepting: Accepting, broken: str) -> None:
    data, code = BROKEN[broken]
    relay = await start({"websocket": {"close_timeout_s": 3600}}, openai=provider(accepting.url, **SOCKETS))
    socket = await dial(relay)
    upstream = await asyncio.wait_for(accepting.sockets.get(), 20)
    upstream.writer.write(data(False))
    end = await upstream.read_to_end()
    unmasked = bytes(byte ^ end[2 + at % 4] for at, byte in enumerate(end[6:8]))
    assert end[0] == 0x88 and struct.unpack("!H", unmasked) == (code,)
    upstream.writer.close()
    socket.writer.close()
    await relay.idle()


async def test_the_side_that_follows_the_protocol_gets_time_to_respond_to_the_close(start: StartRelay, accepting: Accepting) -> None:
    relay = await start({"websocket": {"close_timeout_s": 3600}}, openai=provider(accepting.url, **SOCKETS))
    socket = await dial(relay)
    upstream = await asyncio.wait_for(accepting.sockets.get(), 20)
    socket.writer.write(frame(0xB, b""))
    await socket.read_to_end()
    head = await asyncio.wait_for(upstream.reader.readexactly(2), 20)
    await upstream.reader.readexactly(4 + (head[1] & 0x7F))
    assert head[0] == 0x88 and not upstream.reader.at_eof()
    upstream.writer.write(frame(8, struct.pack("!H", 1002), masked=False))
    assert await upstream.read_to_end() == b""
    socket.writer.close()
    upstream.writer.close()
    await relay.idle()


async def _refused(relay: Relay, target: str) -> tuple[Socket, dict[str, Any]]:
    socket = await dial(relay, target)
    body = await asyncio.wait_for(socket.reader.readexactly(int(socket.lines(b"content-length")[0])), 20)
    socket.writer.close()
    return socket, json.loads(body)


async def test_a_path_without_sockets_is_426_without_a_connection_to_the_provider(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url, websocket={"default_path": "realtime", "paths": ["realtime", "live/*"]}))
    for url in ("/api/v1/ai-gateway/ws/openai/v1/chat/completions", "/api/v1/ai-gateway/providers/openai/chat/completions"):
        socket, body = await _refused(relay, url)
        assert (socket.status, body["error"]["code"]) == (426, "websocket_not_supported")
        assert "websocket.paths" in body["error"]["message"] and "chat/completions" in body["error"]["message"]
        assert socket.lines(b"Upgrade") == [] and socket.lines(b"x-should-retry") == [b"false"]
    assert raw.connections == 0
    rows = await relay.events(count=2)
    assert {(row["status"], row["error"], row["provider"]) for row in rows} == {(426, "websocket_not_supported", "openai")}


@pytest.mark.parametrize("target", ["", "/realtime", "/v1/realtime", "/live/sessions", "/live/sessions/s1/attach"])
async def test_the_configured_paths_accept_sockets(start: StartRelay, accepting: Accepting, target: str) -> None:
    entry = provider(f"{accepting.url}/v1", websocket={"default_path": "realtime", "paths": ["realtime", "v1/live/*"]})
    relay = await start(openai=entry)
    socket = await dial(relay, TARGET + target)
    socket.writer.close()
    assert socket.status == 101


@pytest.mark.parametrize(("format_", "where"), [("anthropic", ("error", "code")), ("elevenlabs", ("detail", "status")), ("google", ("error", "details"))])
async def test_a_provider_without_sockets_gives_426_in_its_own_format(start: StartRelay, raw: RawUpstream, format_: str, where: tuple[str, str]) -> None:
    relay = await start(openai=provider(raw.url, format=format_))
    socket, body = await _refused(relay, "/api/v1/ai-gateway/providers/openai/v1/x")
    found = body[where[0]][where[1]]
    assert socket.status == 426 and "websocket_not_supported" in str(found)
    assert raw.connections == 0


async def test_a_fallback_is_used_only_at_a_path_that_accepts_sockets(start: StartRelay, accepting: Accepting) -> None:
    first = provider("http://127.0.0.1:9", websocket={"default_path": "realtime"}, fallback=[{"provider": "spare", "endpoint": "nowhere"}, {"provider": "spare"}])
    spare = provider(accepting.url, websocket={"default_path": "realtime", "paths": ["realtime"]})
    relay = await start(openai=first, spare=spare)
    socket = await dial(relay)
    socket.writer.close()
    assert socket.status == 101 and b"GET /realtime" in accepting.heads[0] and len(accepting.heads) == 1


SHIPPED = {
    "openai": (["realtime", "v1/responses", "responses", "realtime/translations", "live/sessions", "live/sessions/s/attach"], ["chat/completions", "models"]),
    "google-ai-studio": (["ws/google.ai.generativelanguage.v1alpha.GenerativeService.BidiGenerateMusic"], ["v1beta/models/m:generateContent"]),
    "cartesia": (["tts/websocket", "stt/websocket", "stt/turns/websocket", "agents/stream/a"], ["tts/bytes"]),
    "elevenlabs": (["v1/convai/conversation", "v1/text-to-speech/v/stream-input", "v1/text-to-speech/v/multi-stream-input", "v1/speech-to-text/realtime"], ["v1/text-to-speech/v"]),
    "fal": (["fal-ai/x/realtime", "ws/fal-ai/flux", "me/app/ws"], ["fal-ai/flux", "queue/fal-ai/flux"]),
    "deepgram": (["v1/listen", "v2/listen", "v1/speak", "v1/agent/converse"], ["v1/projects"]),
    "grok": (["realtime", "v1/responses", "stt", "tts"], ["chat/completions"]),
    "assemblyai": (["v3/ws"], ["v2/transcript"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
async def test_the_shipped_providers_list_the_paths_that_accept_sockets(start: StartRelay, name: str) -> None:
    relay = await start({"providers": {name: packaged_provider(name, "http://127.0.0.1:9")}})
    has, has_not = SHIPPED[name]
    found = {path: relay.gateway.registry.match_websocket(name, path).takes_sockets for path in ["", *has, *has_not]}
    assert found == dict.fromkeys(["", *has], True) | dict.fromkeys(has_not, False)
