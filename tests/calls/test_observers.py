"""Usage in the log: every call and session reports it, and a meter that fails affects neither."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from relay.core.meters.answer_meter import AnswerMeter
from relay.core.meters.openai_realtime import Realtime
from tests.conftest import StartRelay
from tests.relays import provider
from tests.upstream.raw import CLOSE, LAST_CHUNK, SSE_HEAD, RawUpstream, chunk, gated_events, ok
from tests.upstream.vendors import vendor

CHAT = [b'data: {"choices": [{"delta": {"content": "hi"}}], "usage": null}\n\n', b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\n', b"data: [DONE]\n\n"]
USAGE = b'{"model": "gpt-x-2026", "usage": {"prompt_tokens": 7, "completion_tokens": 3}}'


async def test_the_log_line_of_a_call_has_its_usage_and_the_model_of_the_response(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(USAGE, "Content-Type: application/json"))
    relay = await start(openai=provider(raw.url))
    await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "gpt-x"})
    (line,) = await relay.events()
    assert line["usage"] == {"input_tokens": 7, "output_tokens": 3}
    assert (line["model"], line["model_answered"]) == ("gpt-x", "gpt-x-2026")


async def test_the_usage_of_a_broken_stream_is_estimated_and_marked(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(b'data: {"choices":[{"delta":{"content":"1234"}}]}\n\n') * 3, CLOSE)
    relay = await start(openai=provider(raw.url))
    with pytest.raises(Exception, match=r"not enough data|payload|closed"):
        await relay.call("POST", relay.path("openai", "chat/completions"), data=b"x" * 40)
    (line,) = await relay.events()
    assert line["usage"] == {"input_tokens": 10, "output_tokens": 3, "estimated": True}


async def _read_and_disconnect(relay: Any, gates: list[asyncio.Event]) -> None:
    """Read the first event and disconnect."""
    async with relay.client.post(relay.path("openai", "chat/completions"), data=b"x" * 40) as answer:
        gates[0].set()
        await answer.content.readany()


async def test_an_abandoned_stream_can_be_drained_to_learn_its_usage(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(1)
    end = asyncio.Event()
    raw.plays(*steps[:-1], end, chunk(CHAT[1]), LAST_CHUNK)
    relay = await start(openai=provider(raw.url, on_disconnect="drain"))
    await _read_and_disconnect(relay, gates)
    end.set()
    (line,) = await relay.events()
    assert (line["outcome"], line["usage"]) == ("client_gone", {"input_tokens": 7, "output_tokens": 3})


async def test_an_abandoned_stream_is_drained_for_a_limited_time(start: StartRelay, raw: RawUpstream) -> None:
    gates = [asyncio.Event()]
    raw.plays(SSE_HEAD, gates[0], chunk(b'data: {"choices":[{"delta":{"content":"1234"}}]}\n\n'), asyncio.Event())
    relay = await start(openai=provider(raw.url, on_disconnect="drain", drain_s=0.1))
    await _read_and_disconnect(relay, gates)
    (line,) = await relay.events()
    assert (line["outcome"], line["usage"]) == ("client_gone", {"input_tokens": 10, "output_tokens": 1, "estimated": True})


async def test_an_error_response_has_no_usage(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(USAGE, status="400 Bad Request"))
    relay = await start(openai=provider(raw.url))
    await relay.call("POST", relay.path("openai", "chat/completions"), data=b"{}")
    assert "usage" not in (await relay.events())[0]


async def test_a_response_from_the_cache_has_no_usage(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(USAGE[:-1] + b', "choices": [{"finish_reason": "stop"}]}', "Content-Type: application/json"))
    relay = await start({"cache": {"ttl_s": 60}}, openai=provider(raw.url))
    for _ in range(2):
        await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "gpt-x"})
    missed, hit = await relay.events(count=2)
    assert "usage" in missed and "usage" not in hit


DONE: dict[str, Any] = {"type": "response.done", "response": {"usage": {"input_tokens": 5, "output_tokens": 2}}}


async def _sessions(start: StartRelay, aiohttp_server: Any, *answers: str) -> Any:
    """Start a relay whose provider replies to each message with `answers`, or with DONE."""

    async def session(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for _ in socket:
            for answer in answers or [json.dumps(DONE)]:
                await socket.send_str(answer)
        return socket

    server = await aiohttp_server(vendor(("GET", "/realtime", session)))
    return await start(openai=provider(str(server.make_url("")), websocket={"default_path": "realtime"}))


async def test_the_log_line_of_a_session_has_the_sum_of_its_responses(start: StartRelay, aiohttp_server: Any) -> None:
    relay = await _sessions(start, aiohttp_server)
    async with relay.client.ws_connect(relay.ws("openai") + "?model=gpt-realtime") as socket:
        for _ in range(3):
            await socket.send_str("{}")
            await socket.receive_str()
    (line,) = await relay.events()
    assert line["usage"] == {"input_tokens": 15, "output_tokens": 6} and line["model"] == "gpt-realtime"


async def test_a_meter_that_fails_is_dropped_and_the_stream_continues(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: AnswerMeter, chunk: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(AnswerMeter, "feed", broken)
    raw.plays(SSE_HEAD, chunk(b"data: 1\n\n"), chunk(b"data: 2\n\n"), LAST_CHUNK)
    relay = await start(openai=provider(raw.url))
    status, _, body = await relay.call("POST", relay.path("openai", "chat/completions"), data=b"{}")
    assert (status, body) == (200, b"data: 1\n\ndata: 2\n\n")
    (line,) = await relay.events()
    assert "usage" not in line and line["outcome"] == "relayed"
    (failure,) = await relay.events("meter.failed")
    assert failure["level"] == "error" and failure["id"] == line["id"]
    _, _, ready = await relay.call("GET", f"{relay.url}/readyz")
    assert json.loads(ready)["meter_failures"] == 1


async def test_a_meter_that_fails_does_not_end_its_session(start: StartRelay, aiohttp_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Realtime, data: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Realtime, "received", broken)
    relay = await _sessions(start, aiohttp_server)
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        for _ in range(3):
            await socket.send_str("{}")
            assert "response.done" in await socket.receive_str()
    assert (await relay.events())[0]["close_code"] == 1000 and relay.gateway.ledger.lost.meters == 1


async def test_the_log_line_of_a_voice_session_has_its_turns_and_the_relays_overhead(start: StartRelay, aiohttp_server: Any) -> None:
    relay = await _sessions(start, aiohttp_server, json.dumps({"type": "response.output_audio.delta", "delta": "UklGRg=="}))
    async with relay.client.ws_connect(relay.ws("openai") + "?model=gpt-realtime") as socket:
        for _ in range(2):
            await socket.send_str(json.dumps({"type": "response.create"}))
            await socket.receive_str()
    (line,) = await relay.events()
    assert [turn["first"] for turn in line["turns"]] == ["audio", "audio"]
    assert all(turn["wait_ms"] >= 0 and 0 <= turn["overhead_ms"] < 1000 for turn in line["turns"])


async def test_deltas_are_skipped_and_metadata_of_a_client_cannot_hide_the_usage(start: StartRelay, aiohttp_server: Any) -> None:
    piece = '{"type":"response.output_audio.delta","event_id":"event_1","delta":"UklGRg=="}'
    done = {"type": "response.done", "event_id": "event_2", "response": {"metadata": {"a": "b.delta"}, **DONE["response"]}}
    relay = await _sessions(start, aiohttp_server, piece, piece, piece, json.dumps(done))
    async with relay.client.ws_connect(relay.ws("openai") + "?model=gpt-realtime") as socket:
        for _ in range(2):
            await socket.send_str(json.dumps({"type": "response.create"}))
            for _ in range(4):
                await socket.receive_str()
    (line,) = await relay.events()
    assert line["usage"] == {"input_tokens": 10, "output_tokens": 4} and [turn["first"] for turn in line["turns"]] == ["audio", "audio"]
