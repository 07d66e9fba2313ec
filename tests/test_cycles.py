"""A call leaves nothing for the garbage collector: reference counts free it at once.

A reference cycle, such as a closure that references its exchange and is referenced by it, keeps the
objects of each call until a collection, and made a call 20 % more expensive.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import gc
import hashlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trustme

from relay.app import API
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, provider
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
    head,
    ok,
)

JSON = ok(b'{"model": "m", "usage": {"prompt_tokens": 1, "completion_tokens": 2}}', "Content-Type: application/json")
STREAM = SSE_HEAD + chunk(b"data: 1\n\n") + chunk(b"data: 2\n\n") + LAST_CHUNK
PIECES = (SSE_HEAD, chunk(b"data: 1\n\n"), Pause(0.002), chunk(b"data: 2\n\n"), LAST_CHUNK)
CALLS = 10

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "limits": {"limits": [{"calls_at_once": 90}, {"calls_at_once": 9, "per": "client"}, {"requests": 9999, "per": "client"}, {"tokens": 10**9}]},
    "cache": {"cache": {"ttl_s": 60}},
    "shared": {"cache": {"coalesce": True}},
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("answer", [(JSON,), (STREAM,), PIECES], ids=["whole", "stream", "stream in pieces"])
async def test_a_call_leaves_nothing_for_the_collector(setting: str, answer: tuple[Any, ...], start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(*answer)
    relay = await start(SETTINGS[setting], openai=provider(raw.url, inject_usage=True))

    async def calls() -> None:
        for _ in range(CALLS):
            await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m", "stream": True})

    left = await _garbage_of(calls, relay)
    assert [name for name, count in left.items() if count >= CALLS] == []


# Each way to refuse or end a call. The client uses blocking sockets in a thread, so that it leaves
# no cycles itself.


class Peer:
    """A blocking connection of a client."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), HANG_GUARD_S)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def until(self, end: bytes) -> bytes:
        """Read until `end` has arrived or the relay closes."""
        text = b""
        while end not in text and (data := self.sock.recv(65536)):
            text += data
        return text

    def answer(self) -> bytes:
        """Read one response with a Content-Length, or everything until the relay closes."""
        head = self.until(b"\r\n\r\n")
        found = re.search(rb"(?i)content-length: (\d+)", head)
        while found and len(head.partition(b"\r\n\r\n")[2]) < int(found[1]) and (data := self.sock.recv(65536)):
            head += data
        return head

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def request(path: str, *headers: str, body: bytes = b'{"model": "m", "stream": true}', method: str = "POST") -> bytes:
    """The bytes of a request."""
    head = [f"{method} {API}/providers/{path} HTTP/1.1", *(() if any(h.startswith("Host") for h in headers) else ("Host: localhost",)), *headers]
    if not any(name.startswith(("Content-Length", "Transfer-Encoding")) for name in headers):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def handshake(path: str, *headers: str, version: str = "13") -> bytes:
    """The bytes of a WebSocket handshake."""
    head = [
        f"GET {API}/ws/{path} HTTP/1.1", "Host: localhost", "Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Version: {version}",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *headers,
    ]  # fmt: skip
    return "\r\n".join(head).encode() + b"\r\n\r\n"


Action = Callable[[Peer], None]


def expect(data: bytes, code: bytes) -> Action:
    """Send one request; its response must contain this status or error code."""

    def action(peer: Peer) -> None:
        peer.send(data)
        answered = peer.answer()
        assert code in answered, answered

    return action


def repeat_until(data: bytes, code: bytes) -> Action:
    """Repeat a request until the response contains this error code, for limits."""

    def action(peer: Peer) -> None:
        peer.send(data)
        while code not in peer.answer():
            peer.send(data)

    return action


def disconnect(data: bytes, after: bytes = b"", sent: bytes = b"") -> Action:
    """Send a request and reset the connection, once `after` was read and `sent` was sent."""

    def action(peer: Peer) -> None:
        peer.send(data)
        if after:
            peer.until(after)
        peer.send(sent)
        peer.reset()

    return action


def read(data: bytes, *until: bytes, sent: bytes = b"") -> Action:
    """Read each of `until` in turn, send `sent`, and read until the relay closes."""

    def action(peer: Peer) -> None:
        peer.send(data)
        for end in until:
            peer.until(end)
        peer.send(sent)
        peer.until(b"\0never\0")

    return action


CLOSE_FRAME = bytes([0x88, 0x82, 0, 0, 0, 0]) + struct.pack("!H", 1000)
TEXT_FRAME = bytes([0x81, 0x82, 0, 0, 0, 0]) + b"hi"
BAD_FRAME = bytes([0x83, 0x80, 0, 0, 0, 0])
OPEN = b"\r\n\r\n"
EVENT = chunk(b"data: 1\n\n")
CHAT = "openai/chat/completions"


@dataclass
class Case:
    """One way for a call to end: the script of the provider, the client's action, the settings."""

    action: Action
    plays: tuple[Step, ...] = (JSON,)
    settings: dict[str, Any] = field(default_factory=dict)
    entry: dict[str, Any] = field(default_factory=dict)
    base_url: str = ""
    """A base URL in place of the stand-in provider's."""


RETRIES = {"max_attempts": 3, "delay_s": 0.001, "max_delay_s": 0.001}
SOCKET = {"websocket": {"default_path": "realtime"}}
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n"

CASES: dict[str, Case] = {
    "bad_path": Case(expect(request("openai/../x"), b"bad_path")),
    "unknown_route": Case(expect(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", b"unknown_route")),
    "unknown_provider": Case(expect(request("nobody/x"), b"unknown_provider")),
    "host": Case(expect(request(CHAT, "Host: evil.example"), b"host_not_allowed")),
    "origin": Case(expect(request(CHAT, "Origin: https://evil.example"), b"origin_not_allowed")),
    "not_http": Case(expect(b"GARBAGE\r\n\r\n", b"bad_request")),
    "bad_framing": Case(expect(request(CHAT, "Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), b"bad_request")),
    "bad_chunks": Case(expect(request(CHAT, "Transfer-Encoding: chunked", body=b"zz\r\n"), b"bad_request")),
    "body_timeout": Case(expect(request(CHAT, "Content-Length: 100"), b"body_timeout"), settings={"server": {"body_idle_timeout_s": 0.05}}),
    "not_configured": Case(expect(request(CHAT), b"provider_not_configured"), entry={"auth": {"header": "Authorization", "value": "Bearer ${NOT_SET_ANYWHERE}"}}),
    "rate_limited": Case(repeat_until(request(CHAT), b"rate_limited"), settings={"limits": [{"requests": 1, "window_s": 9999}]}),
    "rate_limited_sliding": Case(repeat_until(request(CHAT), b"rate_limited"), settings={"limits": [{"requests": 1, "window_s": 9999, "technique": "sliding", "per": ["client", "model"]}]}),
    "tokens": Case(repeat_until(request(CHAT), b"rate_limited"), settings={"limits": [{"tokens": 1, "window_s": 9999}]}),
    "model_unknown": Case(expect(request(CHAT, body=b'{"model": "a", "model": "b"}'), b"model_unknown"), settings={"limits": [{"requests": 9, "per": "model"}]}),
    "bad_control_header": Case(expect(request(CHAT, "cf-aig-cache-ttl: x"), b"bad_request"), settings={"cache": {"ttl_s": 60}}),
    "unreachable": Case(expect(request(CHAT), b"upstream_unreachable"), base_url="http://127.0.0.1:1"),
    "no_http": Case(expect(request(CHAT), b"upstream_protocol_error"), plays=(b"GARBAGE\r\n\r\n", CLOSE)),
    "hangs_up": Case(expect(request(CHAT), b"upstream_disconnected"), plays=(CLOSE,)),
    "resets": Case(expect(request(CHAT), b"upstream_disconnected"), plays=(RESET,)),
    "silent": Case(expect(request(CHAT), b"upstream_timeout"), plays=(SILENCE,), entry={"first_byte_timeout_s": 0.05}),
    "refused_by_provider": Case(expect(request(CHAT), b"401 No"), plays=(ok(b"{}", status="401 No"),)),
    "retried_503": Case(expect(request(CHAT), b"503 Busy"), plays=(ok(b"{}", status="503 Busy"),), settings={"retries": RETRIES}),
    "retried_unreachable": Case(expect(request(CHAT), b"upstream_unreachable"), base_url="http://127.0.0.1:1", settings={"retries": RETRIES}),
    "fallback": Case(expect(request(CHAT), b"200 OK"), base_url="http://127.0.0.1:1", entry={"fallback": [{"provider": "other"}]}),
    "fallbacks_exhausted": Case(expect(request(CHAT), b"upstream_unreachable"), base_url="http://127.0.0.1:1", entry={"fallback": [{"provider": "gone"}]}),
    "cut_whole": Case(read(request(CHAT)), plays=(head("Content-Length: 99"), b"part", CLOSE)),
    "cut_stream": Case(read(request(CHAT)), plays=(SSE_HEAD, EVENT, CLOSE)),
    "reset_stream": Case(read(request(CHAT)), plays=(SSE_HEAD, EVENT, RESET)),
    "bad_stream": Case(read(request(CHAT, "Connection: close")), plays=(SSE_HEAD, EVENT, b"zz\r\n")),
    "idle_stream": Case(read(request(CHAT)), plays=(SSE_HEAD, EVENT, SILENCE), entry={"idle_timeout_s": 0.05}),
    "keepalives": Case(read(request(CHAT, "Connection: close")), plays=(SSE_HEAD, EVENT, LAST_CHUNK), entry={"keepalive_s": 1}),
    "keepalives_idle": Case(read(request(CHAT)), plays=(SSE_HEAD, EVENT, SILENCE), entry={"keepalive_s": 1, "idle_timeout_s": 0.05}),
    "gone_before_answer": Case(disconnect(request(CHAT)), plays=(SILENCE,)),
    "gone_in_upload": Case(disconnect(request(CHAT, "Content-Length: 100")), plays=(SILENCE,)),
    "gone_in_stream": Case(disconnect(request(CHAT), after=b"data: 1"), plays=(SSE_HEAD, EVENT, SILENCE)),
    "gone_and_drained": Case(disconnect(request(CHAT), after=b"data: 1"), plays=(SSE_HEAD, EVENT, EVENT, LAST_CHUNK), entry={"on_disconnect": "drain", "drain_s": 1}),
    "shared_refused": Case(expect(request(CHAT), b"upstream_unreachable"), base_url="http://127.0.0.1:1", settings={"cache": {"coalesce": True}}),
    "shared_cut": Case(read(request(CHAT)), plays=(SSE_HEAD, EVENT, CLOSE), settings={"cache": {"coalesce": True}}),
    "shared_gone": Case(disconnect(request(CHAT), after=b"data: 1"), plays=(SSE_HEAD, EVENT, SILENCE), settings={"cache": {"coalesce": True}}),
    "ws_unknown_provider": Case(expect(handshake("nobody"), b"unknown_provider")),
    "ws_not_supported": Case(expect(handshake("openai"), b"websocket_not_supported")),
    "ws_plain_get": Case(expect(request("openai/x", method="GET", body=b"").replace(b"/providers/", b"/ws/"), b"upgrade_required"), entry=SOCKET),
    "ws_bad_version": Case(expect(handshake("openai", version="12"), b"bad_request"), entry=SOCKET),
    "ws_not_configured": Case(expect(handshake("openai"), b"provider_not_configured"), entry=SOCKET | {"auth": {"header": "Authorization", "value": "Bearer ${NOT_SET_ANYWHERE}"}}),
    "ws_handshakes": Case(repeat_until(handshake("openai"), b"rate_limited"), entry=SOCKET, settings={"limits": [{"handshakes": 1, "window_s": 9999}]}, plays=(ok(b"no", status="401 No"),)),
    "ws_refused": Case(expect(handshake("openai"), b"401 No"), entry=SOCKET, plays=(ok(b"no", status="401 No"),)),
    "ws_unreachable": Case(expect(handshake("openai"), b"upstream_unreachable"), entry=SOCKET, base_url="http://127.0.0.1:1"),
    "ws_no_http": Case(expect(handshake("openai"), b"upstream_protocol_error"), entry=SOCKET, plays=(b"GARBAGE\r\n\r\n", CLOSE)),
    "ws_wrong_accept": Case(expect(handshake("openai"), b"upstream_protocol_error"), entry=SOCKET, plays=(SWITCH % b'wrong',)),
    "ws_silent": Case(expect(handshake("openai"), b"upstream_timeout"), entry=SOCKET, plays=(SILENCE,), settings={"websocket": {"handshake_timeout_s": 0.05}}),
    "ws_gone_in_handshake": Case(disconnect(handshake("openai")), entry=SOCKET, plays=(SILENCE,)),
}  # fmt: skip

async def _garbage_of(run_calls: Callable[[], Awaitable[None]], relay: Relay, settled: Callable[[], Awaitable[None]] | None = None) -> dict[str, int]:
    """Count by type what the second round of calls leaves for the collector; the first warms up."""

    async def calls() -> None:
        await run_calls()
        await (settled or relay.idle)()
        await relay.gateway.background.done()

    await calls()
    gc.freeze()  # skip all existing objects: a collection of the whole process takes a second
    gc.disable()
    try:
        await calls()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return dict(collections.Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _repeat(action: Action, port: int) -> Callable[[], Awaitable[None]]:
    def run() -> None:
        for _ in range(CALLS):
            peer = Peer(port)
            try:
                action(peer)
            finally:
                peer.sock.close()

    return lambda: asyncio.to_thread(run)


@pytest.mark.parametrize("name", CASES)
async def test_a_call_that_is_refused_or_fails_leaves_nothing_for_the_collector(name: str, start: StartRelay, raw: RawUpstream, sqlite_setting: str) -> None:
    case = CASES[name]
    raw.plays(*case.plays)
    settings = {"database": sqlite_setting, "ledger": {"bodies": "on"}} | case.settings
    openai = provider(case.base_url or raw.url, **case.entry)
    relay = await start(settings, openai=openai, other=provider(raw.url), gone=provider("http://127.0.0.1:1"))
    left = await _garbage_of(_repeat(case.action, relay.port), relay)
    assert {name: count for name, count in left.items() if count >= CALLS} == {}


async def test_a_call_whose_provider_has_a_bad_certificate_leaves_nothing_for_the_collector(start: StartRelay, sqlite_setting: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    relay = await start({"database": sqlite_setting}, openai=provider(f"https://localhost:{port}"))
    left = await _garbage_of(_repeat(expect(request(CHAT), b"upstream_tls_failed"), relay.port), relay)
    server.close()
    # The connections of the stand-in provider are cycles; those of the relay are not.
    assert not [name for name in left if name.startswith(("relay.", "aiohttp."))]


@pytest.mark.parametrize("before_a_request", [True, False])
async def test_shed_calls_leave_nothing_for_the_collector(before_a_request: bool, start: StartRelay, raw: RawUpstream, sqlite_setting: str) -> None:
    gate = asyncio.Event()
    raw.plays(gate, JSON)
    limit: dict[str, Any] = {"calls_at_once": 1} if before_a_request else {"calls_at_once": 1, "providers": ["openai"]}
    relay = await start({"database": sqlite_setting, "limits": [limit]}, openai=provider(raw.url))
    holding = asyncio.create_task(relay.call("POST", relay.path("openai", "chat/completions"), json={}))
    while not raw.arrived:
        await asyncio.sleep(0.01)
    run_calls = _repeat(expect(request(CHAT), b"overloaded"), relay.port)
    await run_calls()
    left = await _garbage_of(run_calls, relay, settled=lambda: relay.gateway.ledger.flushed())
    gate.set()
    assert (await holding)[0] == 200
    assert {name: count for name, count in left.items() if count >= CALLS} == {}


async def test_an_internal_error_leaves_nothing_for_the_collector(start: StartRelay, raw: RawUpstream, sqlite_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await start({"database": sqlite_setting}, openai=provider(raw.url, **SOCKET))

    async def fail(*_arguments: object) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(relay.gateway.attempts, "open", fail)
    for data in (request(CHAT), handshake("openai")):
        left = await _garbage_of(_repeat(expect(data, b"internal_error"), relay.port), relay)
        assert {name: count for name, count in left.items() if count >= CALLS} == {}
    assert "a bug" in (await relay.events("exchange.failed"))[0]["traceback"]


async def test_a_client_that_stalls_leaves_nothing_for_the_collector(start: StartRelay, raw: RawUpstream, sqlite_setting: str) -> None:
    raw.plays(SSE_HEAD, *[chunk(b"x" * 1024 * 1024)] * 16, LAST_CHUNK)
    relay = await start({"database": sqlite_setting, "server": {"write_timeout_s": 0.1}}, openai=provider(raw.url))

    ended = 0

    async def stalled() -> None:
        nonlocal ended
        peers = [Peer(relay.port) for _ in range(CALLS)]
        for peer in peers:
            peer.send(request(CHAT))
        ended += CALLS
        await relay.events(count=ended)
        for peer in peers:
            peer.sock.close()

    left = await _garbage_of(stalled, relay)
    assert {line["error"] for line in await relay.events(count=2 * CALLS)} == {"client_stalled"}
    # The connections of the stand-in provider are cycles; those of the relay are not.
    assert not [name for name in left if name.startswith(("relay.", "aiohttp."))]


class SocketProvider:
    """A WebSocket provider in a thread, with blocking sockets.

    By `mode` it waits for the close of the client, closes, violates the protocol, or is lost.
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._serve_one(sock)
            sock.close()

    def _serve_one(self, sock: socket.socket) -> None:
        head = b""
        while OPEN not in head:
            head += sock.recv(65536)
        key = re.search(rb"(?i)sec-websocket-key: (\S+)", head)
        assert key is not None
        accept = base64.b64encode(hashlib.sha1(key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        sock.sendall(SWITCH % accept + b"\x81\x02hi")
        if self._mode == "closes":
            sock.sendall(b"\x88\x02" + struct.pack("!H", 1000))
        if self._mode == "breaks":
            sock.sendall(b"\x83\x00")
        while self._mode != "is lost" and (data := sock.recv(65536)):
            if data[0] == 0x88 and self._mode == "waits":
                sock.sendall(b"\x88\x02" + struct.pack("!H", 1000))


SESSIONS: dict[str, tuple[str, Action, dict[str, Any]]] = {
    "client_closes": ("waits", read(handshake("openai"), b"hi", sent=CLOSE_FRAME), {}),
    "client_lost": ("waits", disconnect(handshake("openai"), after=b"hi", sent=TEXT_FRAME), {}),
    "client_breaks_protocol": ("waits", read(handshake("openai"), b"hi", sent=BAD_FRAME), {}),
    "provider_closes": ("closes", read(handshake("openai"), b"hi", b"\x88", sent=CLOSE_FRAME), {}),
    "provider_breaks_protocol": ("breaks", read(handshake("openai"), b"hi", b"\x88", sent=CLOSE_FRAME), {}),
    "provider_lost": ("is lost", read(handshake("openai"), b"\x88", sent=CLOSE_FRAME), {}),
    "idle": ("waits", read(handshake("openai"), b"\x88", sent=CLOSE_FRAME), {"idle_timeout_s": 0.05}),
}  # fmt: skip


@pytest.mark.parametrize("end", SESSIONS)
async def test_a_session_leaves_nothing_for_the_collector_however_it_ends(end: str, start: StartRelay, sqlite_setting: str) -> None:
    mode, action, websocket = SESSIONS[end]
    settings = {"websocket": {"close_timeout_s": 0.05} | websocket}
    sockets = SocketProvider(mode)
    try:
        relay = await start({"database": sqlite_setting} | settings, openai=provider(sockets.url, **SOCKET))
        left = await _garbage_of(_repeat(action, relay.port), relay)
    finally:
        sockets.stop()
    assert {name: count for name, count in left.items() if count >= CALLS} == {}
