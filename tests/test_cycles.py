"""A call leaves nothing for the garbage collector: reference counts free it at once.

A cycle, such as a closure that holds its exchange and is held by it, keeps each call's objects until a collection, and made a
call a fifth dearer.
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
from pathlib import Path as Path_
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

    left = await _left_by(calls, relay)
    assert [name for name, count in left.items() if count >= CALLS] == []


# Whatever refuses or ends a call: a client of plain sockets, in a thread, leaves nothing of its own.


class Peer:
    """A client's connection, blocking."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), HANG_GUARD_S)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def until(self, end: bytes) -> bytes:
        """Read until this came, or the other side ended."""
        text = b""
        while end not in text and (data := self.sock.recv(65536)):
            text += data
        return text

    def answer(self) -> bytes:
        """Read one whole answer with a length, or to the end of the connection."""
        head = self.until(b"\r\n\r\n")
        found = re.search(rb"(?i)content-length: (\d+)", head)
        while found and len(head.partition(b"\r\n\r\n")[2]) < int(found[1]) and (data := self.sock.recv(65536)):
            head += data
        return head

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def request(path: str, *headers: str, body: bytes = b'{"model": "m", "stream": true}', method: str = "POST") -> bytes:
    """A whole request on the wire."""
    head = [f"{method} {API}/providers/{path} HTTP/1.1", *(() if any(h.startswith("Host") for h in headers) else ("Host: localhost",)), *headers]
    if not any(name.startswith(("Content-Length", "Transfer-Encoding")) for name in headers):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def handshake(path: str, *headers: str, version: str = "13") -> bytes:
    """A WebSocket handshake on the wire."""
    head = [
        f"GET {API}/ws/{path} HTTP/1.1", "Host: localhost", "Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Version: {version}",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *headers,
    ]  # fmt: skip
    return "\r\n".join(head).encode() + b"\r\n\r\n"


Act = Callable[[Peer], None]


def asks(data: bytes, code: bytes) -> Act:
    """One request, answered with this status or code."""

    def act(peer: Peer) -> None:
        peer.send(data)
        answered = peer.answer()
        assert code in answered, answered

    return act


def until(data: bytes, code: bytes) -> Act:
    """The same request until this is the answer, as limits give it."""

    def act(peer: Peer) -> None:
        peer.send(data)
        while code not in peer.answer():
            peer.send(data)

    return act


def leaves(data: bytes, after: bytes = b"", sent: bytes = b"") -> Act:
    """A client that leaves: at once, or when it has read this much and sent `sent`."""

    def act(peer: Peer) -> None:
        peer.send(data)
        if after:
            peer.until(after)
        peer.send(sent)
        peer.reset()

    return act


def reads(data: bytes, *until: bytes, sent: bytes = b"") -> Act:
    """A client that reads these in turn, then to the end."""

    def act(peer: Peer) -> None:
        peer.send(data)
        for end in until:
            peer.until(end)
        peer.send(sent)
        peer.until(b"\0never\0")

    return act


CLOSE_FRAME = bytes([0x88, 0x82, 0, 0, 0, 0]) + struct.pack("!H", 1000)
TEXT_FRAME = bytes([0x81, 0x82, 0, 0, 0, 0]) + b"hi"
BAD_FRAME = bytes([0x83, 0x80, 0, 0, 0, 0])
OPEN = b"\r\n\r\n"
EVENT = chunk(b"data: 1\n\n")
CHAT = "openai/chat/completions"


@dataclass
class Path:
    """One way for a call to end: what the provider plays, what the client does, and the settings that matter."""

    act: Act
    plays: tuple[Step, ...] = (JSON,)
    settings: dict[str, Any] = field(default_factory=dict)
    entry: dict[str, Any] = field(default_factory=dict)
    dials: str = ""
    """Another base URL than the provider's."""


RETRIES = {"max_attempts": 3, "delay_s": 0.001, "max_delay_s": 0.001}
SOCKET = {"websocket": {"default_path": "realtime"}}
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n"

PATHS: dict[str, Path] = {
    "bad_path": Path(asks(request("openai/../x"), b"bad_path")),
    "unknown_route": Path(asks(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", b"unknown_route")),
    "unknown_provider": Path(asks(request("nobody/x"), b"unknown_provider")),
    "host": Path(asks(request(CHAT, "Host: evil.example"), b"host_not_allowed")),
    "origin": Path(asks(request(CHAT, "Origin: https://evil.example"), b"origin_not_allowed")),
    "not_http": Path(asks(b"GARBAGE\r\n\r\n", b"bad_request")),
    "bad_framing": Path(asks(request(CHAT, "Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), b"bad_request")),
    "bad_chunks": Path(asks(request(CHAT, "Transfer-Encoding: chunked", body=b"zz\r\n"), b"bad_request")),
    "body_timeout": Path(asks(request(CHAT, "Content-Length: 100"), b"body_timeout"), settings={"server": {"body_idle_timeout_s": 0.05}}),
    "not_configured": Path(asks(request(CHAT), b"provider_not_configured"), entry={"auth": {"header": "Authorization", "value": "Bearer ${NOT_SET_ANYWHERE}"}}),
    "rate_limited": Path(until(request(CHAT), b"rate_limited"), settings={"limits": [{"requests": 1, "window_s": 9999}]}),
    "rate_limited_sliding": Path(until(request(CHAT), b"rate_limited"), settings={"limits": [{"requests": 1, "window_s": 9999, "technique": "sliding", "per": ["client", "model"]}]}),
    "tokens": Path(until(request(CHAT), b"rate_limited"), settings={"limits": [{"tokens": 1, "window_s": 9999}]}),
    "model_unknown": Path(asks(request(CHAT, body=b'{"model": "a", "model": "b"}'), b"model_unknown"), settings={"limits": [{"requests": 9, "per": "model"}]}),
    "bad_wish": Path(asks(request(CHAT, "cf-aig-cache-ttl: x"), b"bad_request"), settings={"cache": {"ttl_s": 60}}),
    "unreachable": Path(asks(request(CHAT), b"upstream_unreachable"), dials="http://127.0.0.1:1"),
    "no_http": Path(asks(request(CHAT), b"upstream_protocol_error"), plays=(b"GARBAGE\r\n\r\n", CLOSE)),
    "hangs_up": Path(asks(request(CHAT), b"upstream_disconnected"), plays=(CLOSE,)),
    "resets": Path(asks(request(CHAT), b"upstream_disconnected"), plays=(RESET,)),
    "silent": Path(asks(request(CHAT), b"upstream_timeout"), plays=(SILENCE,), entry={"first_byte_timeout_s": 0.05}),
    "refused_by_provider": Path(asks(request(CHAT), b"401 No"), plays=(ok(b"{}", status="401 No"),)),
    "retried_503": Path(asks(request(CHAT), b"503 Busy"), plays=(ok(b"{}", status="503 Busy"),), settings={"retries": RETRIES}),
    "retried_unreachable": Path(asks(request(CHAT), b"upstream_unreachable"), dials="http://127.0.0.1:1", settings={"retries": RETRIES}),
    "fallback": Path(asks(request(CHAT), b"200 OK"), dials="http://127.0.0.1:1", entry={"fallback": [{"provider": "other"}]}),
    "fallbacks_exhausted": Path(asks(request(CHAT), b"upstream_unreachable"), dials="http://127.0.0.1:1", entry={"fallback": [{"provider": "gone"}]}),
    "cut_whole": Path(reads(request(CHAT)), plays=(head("Content-Length: 99"), b"part", CLOSE)),
    "cut_stream": Path(reads(request(CHAT)), plays=(SSE_HEAD, EVENT, CLOSE)),
    "reset_stream": Path(reads(request(CHAT)), plays=(SSE_HEAD, EVENT, RESET)),
    "bad_stream": Path(reads(request(CHAT, "Connection: close")), plays=(SSE_HEAD, EVENT, b"zz\r\n")),
    "idle_stream": Path(reads(request(CHAT)), plays=(SSE_HEAD, EVENT, SILENCE), entry={"idle_timeout_s": 0.05}),
    "gone_before_answer": Path(leaves(request(CHAT)), plays=(SILENCE,)),
    "gone_in_upload": Path(leaves(request(CHAT, "Content-Length: 100")), plays=(SILENCE,)),
    "gone_in_stream": Path(leaves(request(CHAT), after=b"data: 1"), plays=(SSE_HEAD, EVENT, SILENCE)),
    "gone_and_drained": Path(leaves(request(CHAT), after=b"data: 1"), plays=(SSE_HEAD, EVENT, EVENT, LAST_CHUNK), entry={"on_disconnect": "drain", "drain_s": 1}),
    "shared_refused": Path(asks(request(CHAT), b"upstream_unreachable"), dials="http://127.0.0.1:1", settings={"cache": {"coalesce": True}}),
    "shared_cut": Path(reads(request(CHAT)), plays=(SSE_HEAD, EVENT, CLOSE), settings={"cache": {"coalesce": True}}),
    "shared_gone": Path(leaves(request(CHAT), after=b"data: 1"), plays=(SSE_HEAD, EVENT, SILENCE), settings={"cache": {"coalesce": True}}),
    "ws_unknown_provider": Path(asks(handshake("nobody"), b"unknown_provider")),
    "ws_not_supported": Path(asks(handshake("openai"), b"websocket_not_supported")),
    "ws_plain_get": Path(asks(request("openai/x", method="GET", body=b"").replace(b"/providers/", b"/ws/"), b"upgrade_required"), entry=SOCKET),
    "ws_bad_version": Path(asks(handshake("openai", version="12"), b"bad_request"), entry=SOCKET),
    "ws_not_configured": Path(asks(handshake("openai"), b"provider_not_configured"), entry=SOCKET | {"auth": {"header": "Authorization", "value": "Bearer ${NOT_SET_ANYWHERE}"}}),
    "ws_handshakes": Path(until(handshake("openai"), b"rate_limited"), entry=SOCKET, settings={"limits": [{"handshakes": 1, "window_s": 9999}]}, plays=(ok(b"no", status="401 No"),)),
    "ws_refused": Path(asks(handshake("openai"), b"401 No"), entry=SOCKET, plays=(ok(b"no", status="401 No"),)),
    "ws_unreachable": Path(asks(handshake("openai"), b"upstream_unreachable"), entry=SOCKET, dials="http://127.0.0.1:1"),
    "ws_no_http": Path(asks(handshake("openai"), b"upstream_protocol_error"), entry=SOCKET, plays=(b"GARBAGE\r\n\r\n", CLOSE)),
    "ws_wrong_accept": Path(asks(handshake("openai"), b"upstream_protocol_error"), entry=SOCKET, plays=(SWITCH % b'wrong',)),
    "ws_silent": Path(asks(handshake("openai"), b"upstream_timeout"), entry=SOCKET, plays=(SILENCE,), settings={"websocket": {"handshake_timeout_s": 0.05}}),
    "ws_gone_in_handshake": Path(leaves(handshake("openai")), entry=SOCKET, plays=(SILENCE,)),
}  # fmt: skip

async def _left_by(acts: Callable[[], Awaitable[None]], relay: Relay, ended: Callable[[], Awaitable[None]] | None = None) -> dict[str, int]:
    """What the second round of these left for the collector, by type; the first one warms up."""

    async def calls() -> None:
        await acts()
        await (ended or relay.idle)()
        await relay.gateway.background.done()

    await calls()
    gc.freeze()  # what is there now is not looked at: a collection of the whole process takes a second
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


def _acts(act: Act, port: int) -> Callable[[], Awaitable[None]]:
    def run() -> None:
        for _ in range(CALLS):
            peer = Peer(port)
            try:
                act(peer)
            finally:
                peer.sock.close()

    return lambda: asyncio.to_thread(run)


@pytest.mark.parametrize("path", PATHS)
async def test_a_call_that_is_refused_or_fails_leaves_nothing_for_the_collector(path: str, start: StartRelay, raw: RawUpstream, tmp_path: Path_) -> None:
    given = PATHS[path]
    raw.plays(*given.plays)
    settings = {"database": str(tmp_path / "relay.db"), "ledger": {"bodies": "on"}} | given.settings
    openai = provider(given.dials or raw.url, **given.entry)
    relay = await start(settings, openai=openai, other=provider(raw.url), gone=provider("http://127.0.0.1:1"))
    left = await _left_by(_acts(given.act, relay.port), relay)
    assert {name: count for name, count in left.items() if count >= CALLS} == {}


async def test_a_call_whose_provider_has_a_bad_certificate_leaves_nothing_for_the_collector(start: StartRelay, tmp_path: Path_) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    relay = await start({"database": str(tmp_path / "relay.db")}, openai=provider(f"https://localhost:{port}"))
    left = await _left_by(_acts(asks(request(CHAT), b"upstream_tls_failed"), relay.port), relay)
    server.close()
    # The stand-in provider's own connections are cycles: of the relay's there is none.
    assert not [name for name in left if name.startswith(("relay.", "aiohttp."))]


@pytest.mark.parametrize("before_a_request", [True, False])
async def test_shed_calls_leave_nothing_for_the_collector(before_a_request: bool, start: StartRelay, raw: RawUpstream, tmp_path: Path_) -> None:
    gate = asyncio.Event()
    raw.plays(gate, JSON)
    limit: dict[str, Any] = {"calls_at_once": 1} if before_a_request else {"calls_at_once": 1, "providers": ["openai"]}
    relay = await start({"database": str(tmp_path / "relay.db"), "limits": [limit]}, openai=provider(raw.url))
    holding = asyncio.create_task(relay.call("POST", relay.path("openai", "chat/completions"), json={}))
    while not raw.arrived:
        await asyncio.sleep(0.01)
    acts = _acts(asks(request(CHAT), b"overloaded"), relay.port)
    await acts()
    left = await _left_by(acts, relay, ended=lambda: relay.gateway.ledger.flushed())
    gate.set()
    assert (await holding)[0] == 200
    assert {name: count for name, count in left.items() if count >= CALLS} == {}


async def test_a_failure_of_the_relays_own_leaves_nothing_for_the_collector(start: StartRelay, raw: RawUpstream, tmp_path: Path_, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await start({"database": str(tmp_path / "relay.db")}, openai=provider(raw.url, **SOCKET))

    async def fail(*_arguments: object) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(relay.gateway.attempts, "open", fail)
    for data in (request(CHAT), handshake("openai")):
        left = await _left_by(_acts(asks(data, b"internal_error"), relay.port), relay)
        assert {name: count for name, count in left.items() if count >= CALLS} == {}
    assert "a bug" in (await relay.events("exchange.failed"))[0]["traceback"]


async def test_a_client_that_stalls_leaves_nothing_for_the_collector(start: StartRelay, raw: RawUpstream, tmp_path: Path_) -> None:
    raw.plays(SSE_HEAD, *[chunk(b"x" * 1024 * 1024)] * 16, LAST_CHUNK)
    relay = await start({"database": str(tmp_path / "relay.db"), "server": {"write_timeout_s": 0.1}}, openai=provider(raw.url))

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

    left = await _left_by(stalled, relay)
    assert {line["error"] for line in await relay.events(count=2 * CALLS)} == {"client_stalled"}
    # The stand-in provider's own connections are cycles: of the relay's there is none.
    assert not [name for name in left if name.startswith(("relay.", "aiohttp."))]


class SocketProvider:
    """A provider of WebSockets in a thread, with blocking sockets. `mode`: it waits for the client's end, closes, or is lost."""

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
            self._one(sock)
            sock.close()

    def _one(self, sock: socket.socket) -> None:
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


SESSIONS: dict[str, tuple[str, Act, dict[str, Any]]] = {
    "client_closes": ("waits", reads(handshake("openai"), b"hi", sent=CLOSE_FRAME), {}),
    "client_lost": ("waits", leaves(handshake("openai"), after=b"hi", sent=TEXT_FRAME), {}),
    "client_breaks_protocol": ("waits", reads(handshake("openai"), b"hi", sent=BAD_FRAME), {}),
    "provider_closes": ("closes", reads(handshake("openai"), b"hi", b"\x88", sent=CLOSE_FRAME), {}),
    "provider_breaks_protocol": ("breaks", reads(handshake("openai"), b"hi", b"\x88", sent=CLOSE_FRAME), {}),
    "provider_lost": ("is lost", reads(handshake("openai"), b"\x88", sent=CLOSE_FRAME), {}),
    "idle": ("waits", reads(handshake("openai"), b"\x88", sent=CLOSE_FRAME), {"idle_timeout_s": 0.05}),
}  # fmt: skip


@pytest.mark.parametrize("end", SESSIONS)
async def test_a_session_leaves_nothing_for_the_collector_however_it_ends(end: str, start: StartRelay, tmp_path: Path_) -> None:
    mode, act, websocket = SESSIONS[end]
    settings = {"websocket": {"close_timeout_s": 0.05} | websocket}
    sockets = SocketProvider(mode)
    try:
        relay = await start({"database": str(tmp_path / "relay.db")} | settings, openai=provider(sockets.url, **SOCKET))
        left = await _left_by(_acts(act, relay.port), relay)
    finally:
        sockets.stop()
    assert {name: count for name, count in left.items() if count >= CALLS} == {}
