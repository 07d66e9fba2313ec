"""Faults of the provider: each ends in time with a documented status or close; none leaks."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import ClientConnectorDNSError, WSMsgType

from relay.core.errors import UpstreamUnreachable
from relay.periodic import sweep
from relay.sessions.session import close_payload
from tests.conftest import StartRelay
from tests.processes import free_port
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
    ok,
)

EVENT = b'data: {"n": 1}\n\n'
QUICK = {"first_byte_timeout_s": 0.6, "idle_timeout_s": 0.6, "connect_timeout_s": 0.6}


async def _outcome(relay: Relay, kind: str, name: str = "openai") -> tuple[Any, str]:
    """Return (status, 'close' or 'cut', error code) of a GET, POST, SSE call or WebSocket."""
    if kind == "ws":
        try:
            async with relay.client.ws_connect(relay.ws(name), autoclose=False) as ws:
                message = await ws.receive(20)
                return ("close", message.data) if message.type is WSMsgType.CLOSE else ("message", "")
        except aiohttp.WSServerHandshakeError as error:
            return error.status, (error.headers or {}).get("x-relay-error", "")
    method, data = ("GET", None) if kind == "get" else ("POST", b'{"stream": true}')
    try:
        status, headers, _ = await relay.call(method, relay.path(name, "x"), data=data)
    except aiohttp.ClientPayloadError:
        return "cut", ""
    return status, headers.get("x-relay-error", "")


KINDS = ("get", "post", "sse", "ws")
TOXICS: dict[str, tuple[tuple[Step, ...], set[tuple[Any, str]]]] = {
    "blackhole": ((SILENCE,), {(504, "upstream_timeout")}),
    "closes at once": ((CLOSE,), {(502, "upstream_disconnected")}),
    "resets at once": ((RESET,), {(502, "upstream_disconnected")}),
    "resets within the head": ((b"HTTP/1.1 200 OK\r\nContent-", RESET), {(502, "upstream_disconnected")}),
    "another protocol": ((b"SSH-2.0-OpenSSH_9.2\r\n", CLOSE), {(502, "upstream_protocol_error")}),
    "late": ((Pause(0.3), ok()), {(200, ""), (502, "upstream_protocol_error")}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("toxic", TOXICS)
async def test_a_bad_upstream_gives_its_documented_error(start: StartRelay, raw: RawUpstream, toxic: str, kind: str) -> None:
    steps, expected = TOXICS[toxic]
    raw.plays(*steps)
    relay = await start({"websocket": {"handshake_timeout_s": 0.6}}, openai=provider(raw.url, websocket={"default_path": "x"}, **QUICK))
    async with asyncio.timeout(20):
        status, code = await _outcome(relay, kind)
    if (kind, toxic) == ("ws", "late"):
        assert (status, code) == (200, "handshake_refused")
    else:
        assert (status, code) in expected
    assert len(raw.arrived) == 1, "nothing is sent twice"
    await relay.idle()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_upstream_that_cannot_be_reached_is_502(start: StartRelay, kind: str) -> None:
    port = free_port()
    relay = await start(openai=provider(f"http://127.0.0.1:{port}", websocket={"default_path": "x"}))
    assert await _outcome(relay, kind) == (502, "upstream_unreachable")
    message = f"No connection to the provider 'openai' at 127.0.0.1:{port}: connection refused."
    assert (await relay.events("exchange"))[0]["cause"] == message
    if kind != "ws":
        assert message in (await relay.call("GET", relay.path("openai", "x")))[2].decode()


def test_the_message_of_an_unreachable_provider_fits_into_the_reason_of_a_close() -> None:
    error = UpstreamUnreachable("google-ai-studio", "generativelanguage.googleapis.com:443", "connection refused")
    assert error.message.encode() == close_payload(1014, error.message)[2:]


async def test_an_ipv6_address_that_cannot_be_reached_is_named_in_brackets(start: StartRelay) -> None:
    relay = await start(openai=provider(f"http://[::1]:{free_port()}"))
    assert b" at [::1]:" in (await relay.call("GET", relay.path("openai", "x")))[2]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_certificate_that_is_not_trusted_is_502(start: StartRelay, kind: str, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost", "127.0.0.1").configure_cert(context)
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    relay = await start(openai=provider(f"https://127.0.0.1:{port}", websocket={"default_path": "x"}))
    assert await _outcome(relay, kind) == (502, "upstream_tls_failed")
    message = f"TLS with the provider 'openai' at 127.0.0.1:{port} failed: its certificate is not trusted."
    assert (await relay.events("exchange"))[0]["cause"] == message
    server.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_tls_handshake_without_a_response_times_out(start: StartRelay, raw: RawUpstream, kind: str) -> None:
    raw.plays(CLOSE)
    relay = await start({"websocket": {"handshake_timeout_s": 0.6}}, openai=provider(raw.url.replace("http:", "https:"), websocket={"default_path": "x"}, connect_timeout_s=0.6))
    expected = {"ws": (504, "upstream_timeout")}
    assert await _outcome(relay, kind) == expected.get(kind, (502, "upstream_unreachable"))


async def test_a_name_that_does_not_resolve_is_502(start: StartRelay, upstream_mock: Any) -> None:
    key = aiohttp.client_reqrep.ConnectionKey("nowhere.invalid", 443, True, True, None, None, None, None)
    failure = ClientConnectorDNSError(key, OSError(-2, "Name or service not known"))
    upstream_mock.add("https://nowhere.invalid/v1/x", exception=failure)
    relay = await start(openai=provider("https://nowhere.invalid/v1"))
    status, headers, body = await relay.call("GET", relay.path("openai", "x"))
    assert (status, headers["x-relay-error"]) == (502, "upstream_unreachable")
    assert b"the name does not resolve" in body


@pytest.mark.parametrize("status", [200, 429, 529])
async def test_responses_of_a_mocked_provider_are_relayed(start: StartRelay, upstream_mock: Any, status: int) -> None:
    """The provider is aioresponses, so the relay gets a plain aiohttp response."""
    upstream_mock.add("https://api.example/v1/x", method="POST", status=status, body=b"hello", headers={"X-A": "1", "Retry-After": "3"})
    relay = await start(openai=provider("https://api.example/v1"))
    got, headers, body = await relay.call("POST", relay.path("openai", "x"), data=b"{}")
    assert (got, headers["X-A"], headers["Retry-After"], body) == (status, "1", "3", b"hello")


async def test_a_reset_at_any_byte_is_an_error_and_never_a_second_call(start: StartRelay, raw: RawUpstream) -> None:
    whole = ok(b"0123456789" * 4, "Content-Type: application/json")
    relay = await start(openai=provider(raw.url, **QUICK))
    for at in range(len(whole)):
        raw.scripts.clear()
        raw.plays(whole[:at] if at else b"", RESET)
        raw.arrived.clear()
        outcome = await _outcome(relay, "post")
        assert outcome in {(502, "upstream_disconnected"), ("cut", ""), (200, "")}, (at, outcome)
        assert outcome != (200, "") and len(raw.arrived) == 1
    raw.scripts.clear()
    raw.plays(ok(b"fine"))
    assert await _outcome(relay, "post") == (200, "")


async def test_a_slow_stream_is_relayed_as_long_as_bytes_arrive(start: StartRelay, raw: RawUpstream) -> None:
    steps: list[Step] = [SSE_HEAD]
    for byte in EVENT:
        steps += [chunk(bytes([byte])), Pause(0.02)]
    raw.plays(*steps, LAST_CHUNK)
    relay = await start(openai=provider(raw.url, **QUICK))
    assert (await relay.call("GET", relay.path("openai", "x")))[2] == EVENT


POINTS = [
    ("aiohttp.client.ClientSession._request", OSError("disk on fire")),
    ("aiohttp.client.ClientSession._request", RuntimeError("session gone mad")),
    ("relay.rest.body_at_hand", OSError("read")),
    ("relay.calls.attempt.upstream_headers", KeyError("x")),
    ("relay.rest.send_call", ZeroDivisionError("send")),
    ("relay.calls.send.plan_transform", ZeroDivisionError("begin")),
    ("relay.rest.deliver", ZeroDivisionError("deliver")),
    ("relay.calls.stream.RelayedResponse.send_whole", OSError("prepare")),
    ("relay.calls.response._serialize_headers", ValueError("not a header")),
    ("relay.upstream.attempts.Attempts._keys", ValueError("pool")),
]


@pytest.mark.parametrize(("point", "failure"), POINTS, ids=[f"{p}-{type(f).__name__}" for p, f in POINTS])
async def test_a_failure_at_any_step_leaks_nothing_and_the_next_call_works(
    start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch, point: str, failure: Exception
) -> None:
    raw.plays(ok(b"fine"))
    relay = await start(openai=provider(raw.url))
    client_call = relay.client.request
    own = aiohttp.ClientSession._request

    with monkeypatch.context() as patch:

        def broken(*args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], aiohttp.ClientSession) and args[0] is relay.client:
                return own(*args, **kwargs)
            raise failure

        patch.setattr(point, broken)
        try:
            async with client_call("POST", relay.path("openai", "x"), data=b"{}") as answer:
                assert answer.status >= 500 or answer.status == 400
                assert "disk on fire" not in (await answer.text())
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            assert "write" in point or "prepare" in point
    await relay.idle()
    assert (relay.gateway.held_bytes, len(relay.gateway.running)) == (0, 0)
    assert (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[2] == b"fine"


async def test_a_cancel_at_every_await_of_a_call_leaks_nothing(start: StartRelay, raw: RawUpstream) -> None:
    """The client disconnects after n turns of the loop, for every n until the call is done."""
    raw.plays(SSE_HEAD, chunk(EVENT), chunk(EVENT), LAST_CHUNK)
    relay = await start(openai=provider(raw.url))
    await relay.call("POST", relay.path("openai", "x"), data=b"{}")
    tasks = len(asyncio.all_tasks())
    for turns in range(40):
        _, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(b"POST /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        for _ in range(turns):
            await asyncio.sleep(0)
        writer.transport.abort()
    await relay.idle()
    await asyncio.sleep(0.1)
    assert relay.gateway.held_bytes == 0
    assert len(asyncio.all_tasks()) <= tasks + len(raw._tasks)
    assert (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[0] == 200


async def test_a_periodic_sweep_that_fails_is_logged_and_the_next_one_runs(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(SILENCE)
    relay = await start(openai=provider(raw.url, **QUICK))
    calls = 0

    async def flaky(gateway: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("once")
        await sweep(gateway)

    monkeypatch.setattr("relay.periodic.sweep", flaky)
    assert await _outcome(relay, "get") == (504, "upstream_timeout")
    assert "once" in (await relay.events("periodic.failed"))[0]["traceback"]


async def test_tasks_sockets_and_descriptors_return_to_their_baseline(start: StartRelay, vendors: Any) -> None:
    relay = await start({"providers": vendors.entries()})
    fds = Path("/proc/self/fd")

    async def run_calls_and_sessions() -> None:
        for _ in range(20):
            await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m", "stream": True})
            async with relay.client.ws_connect(relay.ws("openai")) as ws:
                await ws.receive(20)
        await relay.idle()
        await asyncio.sleep(0.3)

    await run_calls_and_sessions()
    tasks, open_fds = len(asyncio.all_tasks()), len(list(fds.iterdir()))
    await run_calls_and_sessions()
    assert len(asyncio.all_tasks()) <= tasks + 1
    assert len(list(fds.iterdir())) <= open_fds + 2
