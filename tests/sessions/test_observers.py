"""Usage of WebSocket sessions through a running relay, with the shipped providers.

The row has the usage that the sockets report, under the right model, counted once.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.conftest import StartRelay
from tests.relays import Relay, packaged_provider
from tests.upstream.vendors import vendor

Talk = Callable[[web.WebSocketResponse, Any], Awaitable[None]]
PAUSE_S = 20


def token_usage(input_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {"input_tokens": input_tokens, "output_tokens": output_tokens, "total_tokens": input_tokens + output_tokens}


def response_event(kind: str, name: str, model: str, usage: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    status = kind.removeprefix("response.").replace("created", "in_progress")
    return {"type": kind, "response": {"id": name, "object": "response", "model": model, "status": status, "usage": usage, **more}}


class Provider:
    """A stand-in that passes each message of a socket to `talk`; REST calls get `stored`."""

    def __init__(self) -> None:
        self.talk: Talk | None = None
        self.seen: list[web.Request] = []
        self.stored: dict[str, Any] = {}

    async def socket(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request)
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return web.json_response(self.stored)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            assert self.talk is not None
            await self.talk(socket, message.data)
        return socket


@pytest.fixture
async def upstream(aiohttp_server: Any) -> Any:
    provider = Provider()
    provider.url = str((await aiohttp_server(vendor(("*", "/{path:.*}", provider.socket)))).make_url("")).rstrip("/")  # type: ignore[attr-defined]
    return provider


async def send_all(socket: web.WebSocketResponse, *messages: Any) -> None:
    for message in messages:
        await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_json(message))


async def start_relay(start: StartRelay, upstream: Any, name: str, **document: Any) -> Relay:
    entry = packaged_provider(name, upstream.url)
    entry["auth"]["value"] = entry["auth"]["value"].replace("XAI_API_KEY", "OPENAI_API_KEY")  # a key that the tests have
    return await start({"database": None, **document}, **{name: entry})


async def session(relay: Relay, path: str, *messages: Any, last: str = "") -> dict[str, Any]:
    """Send messages, wait for one that contains `last`, close, and return the log line."""
    before = len([line for line in relay.logged.lines if '"event":"exchange"' in line])
    async with relay.client.ws_connect(relay.ws(*path.split("/", 1)), max_msg_size=0) as socket:
        for message in messages:
            await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_json(message))
        while last:
            data = (await socket.receive(timeout=PAUSE_S)).data
            if last.encode() in (data if isinstance(data, bytes) else data.encode()):
                break
    found: dict[str, Any] = (await relay.events(count=before + 1))[-1]
    return found


async def test_each_response_of_a_socket_is_priced_by_its_own_model_as_over_rest(start: StartRelay, upstream: Any) -> None:
    async def talk(socket: web.WebSocketResponse, data: Any) -> None:
        request = json.loads(data)
        name = request["model"]
        await send_all(socket, response_event("response.created", name, name, None))
        if name == "gpt-5":  # the second one ends first
            await send_all(socket, response_event("response.completed", "gpt-5", "gpt-5", token_usage(1000, 500)), response_event("response.completed", "gpt-5-mini", "gpt-5-mini", token_usage(2000, 100)))

    upstream.talk = talk
    relay = await start_relay(start, upstream, "openai")
    line = await session(relay, "openai/responses", {"type": "response.create", "model": "gpt-5-mini"}, {"type": "response.create", "model": "gpt-5"}, last='"gpt-5-mini", "status": "completed"')
    assert line["model"] == "gpt-5-mini" and line["usage"] == {"input_tokens": 3000, "output_tokens": 600}
    assert line["cost_nano_usd"] == 1000 * 1250 + 500 * 10_000 + 2000 * 250 + 100 * 2000
    assert upstream.seen[-1].query_string == ""


@pytest.mark.parametrize("with_database", [False, True])
async def test_a_response_of_a_socket_that_is_read_again_over_rest_counts_once(with_database: bool, start: StartRelay, upstream: Any, tmp_path: Path) -> None:
    finished = response_event("response.completed", "resp_1", "gpt-5", token_usage(10, 5))

    async def talk(socket: web.WebSocketResponse, data: Any) -> None:
        await send_all(socket, finished)

    upstream.talk, upstream.stored = talk, finished["response"]
    relay = await start_relay(start, upstream, "openai", database=str(tmp_path / "relay.db") if with_database else None)
    line = await session(relay, "openai/responses", {"type": "response.create", "model": "gpt-5"}, last="resp_1")
    assert line["usage"] == {"input_tokens": 10, "output_tokens": 5}
    await relay.call("GET", relay.path("openai", "responses/resp_1"))
    assert "usage" not in (await relay.events(count=2))[-1]


@pytest.mark.parametrize("first", ["attached", "main"])
async def test_two_sockets_of_one_live_session_count_its_seconds_once(first: str, start: StartRelay, upstream: Any) -> None:
    seconds = iter((30, 75))

    async def talk(socket: web.WebSocketResponse, data: Any) -> None:
        ended = response_event("response.completed", "resp_9", "gpt-5-mini", token_usage(100, 20))
        await send_all(socket, {"type": "session.started", "session": {"id": "live_1", "model": "gpt-live-1"}})
        await send_all(socket, {"type": "response.event", "event_id": "e", "event": ended}, {"type": "session.usage.updated", "usage": {"seconds": next(seconds)}})

    upstream.talk = talk
    relay = await start_relay(start, upstream, "openai")
    paths = {"main": "openai/live/sessions", "attached": "openai/live/sessions/live_1/attach"}
    order = [paths.pop(first), *paths.values()]
    lines = [await session(relay, path, {"type": "session.start", "session": {"model": "gpt-live-1"}}, last="session.usage.updated") for path in order]
    assert [line["usage"].get("audio_ms") for line in lines] == [30_000, 45_000]
    assert [line["usage"].get("input_tokens", 0) for line in lines] == [100, 0]
    assert {line["model"] for line in lines} == {"gpt-live-1"}


async def test_a_response_that_its_client_abandons_is_estimated(start: StartRelay, upstream: Any) -> None:
    async def talk(socket: web.WebSocketResponse, data: Any) -> None:
        delta = {"type": "response.output_text.delta", "item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": "four", "sequence_number": 4}
        await send_all(socket, response_event("response.created", "resp_1", "gpt-5-mini", None), *[delta] * 400, {"type": "response.queued.marker"})

    upstream.talk = talk
    relay = await start_relay(start, upstream, "openai")
    line = await session(relay, "openai/responses", {"type": "response.create", "model": "gpt-5-mini", "input": "x" * 4000}, last="marker")
    usage = line["usage"]
    assert usage["estimated"] and 380 <= usage["output_tokens"] <= 420 and 1000 <= usage["input_tokens"] <= 1050
    assert line["cost_nano_usd"] == usage["input_tokens"] * 250 + usage["output_tokens"] * 2000


async def test_a_message_of_megabytes_is_read(start: StartRelay, upstream: Any) -> None:
    async def talk(socket: web.WebSocketResponse, data: Any) -> None:
        output = [{"type": "reasoning", "encrypted_content": "x" * 3_000_000, "usage": token_usage(1, 1)}]
        await send_all(socket, {"type": "response.completed", "sequence_number": 3, "response": {"output": output, "id": "resp_1", "model": "gpt-5", "status": "completed", "usage": token_usage(50, 9)}})

    upstream.talk = talk
    relay = await start_relay(start, upstream, "openai")
    line = await session(relay, "openai/responses", {"type": "response.create", "model": "gpt-5"}, last="response.completed")
    assert line["usage"] == {"input_tokens": 50, "output_tokens": 9}


async def _echo(socket: web.WebSocketResponse, data: Any) -> None:
    await send_all(socket, {"type": "Turn", "text": "ok"})


# provider, endpoint, message of the client, usage, model of the row
@pytest.mark.parametrize(
    ("name", "endpoint", "message", "usage", "model"),
    [
        ("cartesia", "tts/websocket", {"context_id": "1", "model_id": "sonic-3", "transcript": "hello"}, {"characters": 5}, "sonic-3"),
        ("cartesia", "stt/turns/websocket?model=ink-2&encoding=pcm_s16le&sample_rate=16000", b"\0" * 160_000, {"audio_ms": 5000, "estimated": True}, "ink-2"),
        ("deepgram", "v2/listen?model=flux-general-en&encoding=linear16&sample_rate=16000", b"\0" * 160_000, {"audio_ms": 5000, "estimated": True}, "flux-general-en"),
        ("deepgram", "v2/speak?model=aura-2", {"type": "Speak", "text": "hello"}, {"characters": 5, "estimated": True}, "aura-2"),
        ("elevenlabs", "v1/text-to-dialogue/stream-input?model_id=eleven_v3", {"inputs": [{"text": "hello", "voice_id": "v"}]}, {"characters": 5}, "eleven_v3"),
        ("grok", "tts?model=grok-tts", {"type": "text.delta", "delta": "hello"}, {"characters": 5}, "grok-tts"),
        ("grok", "stt?encoding=pcm&sample_rate=16000", b"\0" * 160_000, {"audio_ms": 5000, "estimated": True}, None),
        ("fal", "ws/fal-ai/x/realtime", b"\x81\xa6prompt\xa1a", {"incomplete": True}, None),
    ],
)  # fmt: skip
async def test_the_usage_that_is_counted_if_a_provider_reports_none(name: str, endpoint: str, message: Any, usage: dict[str, Any], model: str | None, start: StartRelay, upstream: Any) -> None:
    upstream.talk = _echo
    relay = await start_relay(start, upstream, name)
    if name == "fal":
        endpoint = endpoint.removeprefix("ws/")
    line = await session(relay, f"{name}/{endpoint}", message, last="Turn")
    assert line["usage"] == usage and line.get("model") == model


async def test_a_session_without_reported_usage_is_unpriced_and_not_free(start: StartRelay, upstream: Any, tmp_path: Path) -> None:
    upstream.talk = _echo
    relay = await start_relay(start, upstream, "fal", database=str(tmp_path / "relay.db"))
    line = await session(relay, "fal/fal-ai/x/realtime", b"\x81", last="Turn")
    assert "cost_nano_usd" not in line
    await relay.gateway.ledger.flushed()
    _, _, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/usage?by=provider")
    [sums] = json.loads(body)["rows"]
    assert sums["unpriced"] == 1


async def test_grok_voice_is_billed_by_seconds(start: StartRelay, upstream: Any) -> None:
    async def talk(socket: web.WebSocketResponse, data: Any) -> None:
        await send_all(socket, {"type": "response.done", "response": {"id": "r", "status": "completed", "usage": {}}, "usage": {**token_usage(10, 277), "billable_audio_seconds": 3}})

    upstream.talk = talk
    relay = await start_relay(start, upstream, "grok")
    line = await session(relay, "grok", {"type": "response.create"}, last="response.done")
    assert line["model"] == "grok-voice-latest" and line["usage"] == {"input_tokens": 10, "output_tokens": 277, "audio_ms": 3000}
    assert line["cost_nano_usd"] == 4_800_000_000 * 3 // 3600
    assert upstream.seen[-1].query_string == "model=grok-voice-latest"


async def test_an_ephemeral_xai_key_of_a_browser_is_not_forwarded(start: StartRelay, upstream: Any) -> None:
    upstream.talk = _echo
    relay = await start_relay(start, upstream, "grok")
    async with relay.client.ws_connect(relay.ws("grok"), protocols=["xai-client-secret.eph-1"]) as socket:
        await socket.send_str("{}")
        await socket.receive(timeout=PAUSE_S)
    assert "eph-1" not in upstream.seen[-1].headers.get("Sec-WebSocket-Protocol", "")


@pytest.mark.parametrize(("name", "endpoint", "query"), [("openai", "", "model=gpt-realtime-2.1"), ("openai", "realtime", "model=gpt-realtime-2.1"), ("openai", "responses", ""), ("openai", "live/sessions", ""), ("openai", "realtime/translations?model=t", "model=t"), ("grok", "stt?encoding=pcm", "encoding=pcm")])
async def test_a_default_query_applies_only_to_the_default_path(name: str, endpoint: str, query: str, start: StartRelay, upstream: Any) -> None:
    upstream.talk = _echo
    relay = await start_relay(start, upstream, name)
    await session(relay, f"{name}/{endpoint}".rstrip("/"), {"a": 1}, last="Turn")
    assert upstream.seen[-1].query_string == query


@pytest.mark.parametrize(("headers", "query", "expected"), [({}, "", "2026-03-01"), ({"Cartesia-Version": "2026-08-14"}, "", "2026-08-14"), ({}, "?cartesia_version=2026-08-14", None)])
async def test_cartesias_version_is_a_header_that_a_client_overrides(headers: dict[str, str], query: str, expected: str | None, start: StartRelay, upstream: Any) -> None:
    upstream.talk = _echo
    relay = await start_relay(start, upstream, "cartesia")
    async with relay.client.ws_connect(relay.ws("cartesia") + query, headers=headers) as socket:
        await socket.send_json({})
        await socket.receive(timeout=PAUSE_S)
    seen = upstream.seen[-1]
    assert seen.headers.get("Cartesia-Version") == expected, "no default is added beside the query, which the provider prefers"
    assert seen.query_string == query.removeprefix("?")


async def test_two_workers_count_a_live_session_once(start: StartRelay, upstream: Any, tmp_path: Path) -> None:
    async def talk(socket: web.WebSocketResponse, data: Any) -> None:
        await send_all(socket, {"type": "session.closed", "usage": {"seconds": 60}, "session": {"id": "live_1", "model": "gpt-live-1"}})

    upstream.talk = talk
    database = str(tmp_path / "relay.db")
    lines = []
    for _ in range(2):  # two relays on one database, as two workers are
        relay = await start_relay(start, upstream, "openai", database=database)
        lines.append(await session(relay, "openai/live/sessions", {"type": "session.start", "session": {"model": "gpt-live-1"}}, last="session.closed"))
        await relay.gateway.ledger.flushed()
    assert lines[0]["usage"] == {"audio_ms": 60_000} and lines[0]["cost_nano_usd"] == 50_000_000
    assert "usage" not in lines[1]
