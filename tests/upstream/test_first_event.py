"""Errors inside a 200 are buffered while another attempt can follow, and recorded in any case."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from relay.calls import attempt as sending
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, canary, provider
from tests.upstream.raw import LAST_CHUNK, SILENCE, SSE_HEAD, RawUpstream, Step, chunk, head, ok

STREAM = b'{"model": "big", "messages": [], "stream": true}'
COMMENT = b": keep-alive\n\n"
DELTA = b'data: {"model":"m","choices":[{"delta":{"content":"hi"}}]}\n\n'
USAGE = b'data: {"model":"m","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"code":502,"message":"Provider returned error"},"choices":[]}\n\n'
OVERLOADED = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n'
REFUSED = b'data: {"error":{"type":"authentication_error","message":"no"}}\n\n'
RESPONSES = b'event: error\ndata: {"type":"error","code":"server_error","message":"overloaded"}\n\n'
GEMINI = b'data: {"error": {"code": 503, "status": "UNAVAILABLE"}}\r\n\r\n'
GOOD = DELTA + USAGE + DONE


def sse(*pieces: Step) -> list[Step]:
    """Return a whole SSE response, with one chunk for each piece."""
    return [SSE_HEAD, *(chunk(each) if isinstance(each, bytes) else each for each in pieces), LAST_CHUNK]


@pytest.fixture
async def other() -> AsyncIterator[RawUpstream]:
    """The fallback provider."""
    upstream = await RawUpstream.start()
    upstream.plays(*sse(GOOD))
    yield upstream
    await upstream.stop()


async def _with_fallback(start: StartRelay, raw: RawUpstream, other: RawUpstream, **more: Any) -> Relay:
    return await start(openai=provider(raw.url, fallback=[{"provider": "other"}], **more), other=provider(other.url))


async def _call(relay: Relay, endpoint: str = "chat/completions", body: bytes = STREAM) -> tuple[int, Any, bytes]:
    return await relay.call("POST", relay.path("openai", endpoint), data=body)


async def _attempts(relay: Relay) -> list[tuple[str, int, str]]:
    [event] = await relay.events()
    return [(each["provider"], each["status"], each["error"]) for each in event.get("attempts", [])]


FIRST = {
    "anthropic": ("v1/messages", [OVERLOADED]), "chat, after a comment": ("chat/completions", [COMMENT, ERROR, DONE]),
    "responses": ("responses", [RESPONSES]), "gemini": ("v1beta/models/m:streamGenerateContent", [GEMINI]),
    "in pieces": ("chat/completions", [COMMENT[:5], COMMENT[5:] + ERROR[:9], ERROR[9:-1], ERROR[-1:]]),
    "empty": ("chat/completions", []), "comments alone": ("chat/completions", [COMMENT, COMMENT]), "done": ("chat/completions", [DONE]),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
async def test_a_stream_that_begins_with_an_error_reaches_the_fallback(start: StartRelay, raw: RawUpstream, other: RawUpstream, name: str) -> None:
    endpoint, pieces = FIRST[name]
    raw.plays(*sse(*pieces))
    relay = await _with_fallback(start, raw, other)
    _, headers, body = await _call(relay, endpoint)
    assert (body, headers["cf-aig-step"]) == (GOOD, "1")
    assert await _attempts(relay) == [("openai", 200, "first_event_error"), ("other", 200, "")]


async def test_an_error_in_a_compressed_stream_reaches_the_fallback(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    packed = gzip.compress(COMMENT + ERROR)
    raw.plays(head("Content-Type: text/event-stream", "Content-Encoding: gzip", f"Content-Length: {len(packed)}") + packed)
    relay = await _with_fallback(start, raw, other)
    assert (await _call(relay))[2] == GOOD


async def test_a_stream_in_an_unknown_coding_is_relayed_unchanged(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(head("Content-Type: text/event-stream", "Content-Encoding: compress", f"Content-Length: {len(ERROR)}") + ERROR)
    relay = await _with_fallback(start, raw, other)
    assert (await _call(relay))[2] == ERROR


@pytest.mark.parametrize("pieces", [[COMMENT, COMMENT, DELTA, DELTA, DONE], [COMMENT + DELTA + ERROR], [DELTA], [COMMENT[:4], COMMENT[4:] + DELTA[:20], DELTA[20:]]])
@pytest.mark.parametrize("entry", [{}, {"inject_usage": True}, {"rewrite": {"fields": {"chat/": ["nothing"]}}}])
async def test_buffered_bytes_are_relayed_in_order(
    start: StartRelay, raw: RawUpstream, other: RawUpstream, pieces: list[bytes], entry: dict[str, Any]
) -> None:
    raw.plays(*sse(*pieces))
    relay = await _with_fallback(start, raw, other, **entry)
    status, headers, body = await _call(relay)
    assert (status, body, headers["cf-aig-step"]) == (200, b"".join(pieces), "0")
    assert await _attempts(relay) == []


async def test_the_usage_event_is_removed_from_a_stream_that_was_buffered(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    go_on = asyncio.Event()
    raw.plays(*sse(COMMENT + USAGE, go_on, DELTA, DONE))
    relay = await _with_fallback(start, raw, other, inject_usage=True)
    async with relay.client.post(relay.path("openai", "chat/completions"), data=STREAM) as answer:
        go_on.set()
        assert await answer.read() == COMMENT + DELTA + DONE
    [event] = await relay.events()
    assert event["usage"] == {"input_tokens": 7, "output_tokens": 2}


async def test_a_shared_call_is_buffered_and_relayed_whole(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(*sse(COMMENT, DELTA, DONE))
    entry = provider(raw.url, fallback=[{"provider": "other"}])
    relay = await start({"cache": {"coalesce": True}}, openai=entry, other=provider(other.url))
    assert (await _call(relay))[2] == COMMENT + DELTA + DONE


async def test_nothing_is_buffered_if_no_attempt_can_follow(start: StartRelay, raw: RawUpstream) -> None:
    go_on = asyncio.Event()
    raw.plays(*sse(COMMENT, go_on, ERROR))
    relay = await start(openai=provider(raw.url))
    async with asyncio.timeout(HANG_GUARD_S), relay.client.post(relay.path("openai", "chat/completions"), data=STREAM) as answer:
        assert await answer.content.readany() == COMMENT, "before the provider sends its first event"
        go_on.set()
        assert await answer.content.read() == ERROR


async def test_the_response_of_the_last_target_is_not_buffered(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(*sse(ERROR))
    other.scripts[:] = [tuple(sse(ERROR, DONE))]
    relay = await _with_fallback(start, raw, other)
    assert (await _call(relay))[2] == ERROR + DONE
    [event] = await relay.events()
    assert (event["outcome"], event["error"], event["status"]) == ("failed", "upstream_error_in_answer", 200)


async def test_no_more_than_64_kib_is_buffered(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    go_on, flood = asyncio.Event(), COMMENT * 6000
    raw.plays(*sse(flood, go_on, ERROR))
    relay = await _with_fallback(start, raw, other)
    async with asyncio.timeout(HANG_GUARD_S), relay.client.post(relay.path("openai", "chat/completions"), data=STREAM) as answer:
        assert await answer.content.readexactly(len(flood)) == flood
        go_on.set()
        assert await answer.content.read() == ERROR


async def test_a_stream_is_buffered_for_a_limited_time(start: StartRelay, raw: RawUpstream, other: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sending._HELD_S == 15
    monkeypatch.setattr(sending, "_HELD_S", 0.02)
    go_on = asyncio.Event()
    raw.plays(*sse(COMMENT, go_on, DELTA))
    relay = await _with_fallback(start, raw, other)
    async with asyncio.timeout(HANG_GUARD_S), relay.client.post(relay.path("openai", "chat/completions"), data=STREAM) as answer:
        assert await answer.content.readany() == COMMENT
        go_on.set()
        assert await answer.content.read() == DELTA


async def test_a_stream_that_breaks_before_its_first_event_reaches_the_fallback(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(COMMENT), "close")
    relay = await _with_fallback(start, raw, other)
    assert (await _call(relay))[2] == GOOD
    assert await _attempts(relay) == [("openai", 0, "upstream_disconnected"), ("other", 200, "")]


async def test_a_client_that_disconnects_while_a_stream_is_buffered_ends_the_call(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(*sse(COMMENT, SILENCE))
    relay = await _with_fallback(start, raw, other)
    call = asyncio.create_task(_call(relay))
    async with asyncio.timeout(HANG_GUARD_S):
        while not any(exchange.waiting.for_ == "upstream" for exchange in relay.gateway.running):
            await asyncio.sleep(0.001)
        call.cancel()
        await raw.closed.wait()
    await relay.idle()
    assert other.arrived == []


async def test_an_error_that_fallback_on_leaves_out_is_relayed(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(*sse(ERROR, DONE))
    relay = await _with_fallback(start, raw, other, fallback_on=["5xx"])
    assert (await _call(relay))[2] == ERROR + DONE
    assert other.arrived == []


# Keys ---------------------------------------------------------------------------------------------

POOL = {"header": "Authorization", "value": ["Bearer ${OPENAI_API_KEY}", "Bearer ${FAL_KEY}"]}


async def test_a_key_that_the_first_event_refuses_is_replaced_by_another(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(*sse(REFUSED))
    raw.plays(*sse(GOOD))
    relay = await start(openai={"base_url": raw.url, "auth": POOL})
    assert (await _call(relay))[2] == GOOD
    assert [request.header("Authorization") for request in raw.arrived] == [[f"Bearer {canary('openai')}"], [f"Bearer {canary('fal')}"]]
    [alarm] = await relay.events("key.refused")
    assert (alarm["key"], alarm["status"]) == ("OPENAI_API_KEY", 401)


async def test_a_key_without_credit_is_recognised_in_a_first_event(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(*sse(b'data: {"error":{"code":"insufficient_quota","message":"no money"}}\n\n'))
    raw.plays(*sse(GOOD))
    relay = await start(openai={"base_url": raw.url, "auth": POOL})
    assert (await _call(relay))[2] == GOOD
    [alarm] = await relay.events("key.refused")
    assert (alarm["key"], alarm["code"]) == ("OPENAI_API_KEY", "insufficient_quota")


async def test_a_limited_key_is_in_cooldown_as_long_as_the_first_event_says(start: StartRelay, raw: RawUpstream) -> None:
    details = b'[{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"500s"}]'
    raw.plays(*sse(b'data: {"error":{"code":429,"status":"RESOURCE_EXHAUSTED","details":%b}}\n\n' % details))
    raw.plays(*sse(GOOD))
    relay = await start(openai={"base_url": raw.url, "auth": POOL})
    assert (await _call(relay))[2] == GOOD
    [health] = json.loads((await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/providers"))[2])["providers"][0]["health"]
    [cooldown] = [each for each in health["keys"] if each["key"] == "OPENAI_API_KEY"]
    assert cooldown["rests_s"] > 400


async def test_an_error_that_is_not_about_the_key_is_relayed_if_only_another_key_could_follow(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(*sse(COMMENT, ERROR, DONE))
    relay = await start(openai={"base_url": raw.url, "auth": POOL})
    assert (await _call(relay))[2] == COMMENT + ERROR + DONE
    assert len(raw.arrived) == 1


# Rows ---------------------------------------------------------------------------------------------

FAILED = {
    "first event": ("chat/completions", [ERROR, DONE]), "in the middle": ("chat/completions", [*[DELTA] * 20, ERROR, DONE]),
    "anthropic": ("v1/messages", [*[b'event: ping\ndata: {"type":"ping"}\n\n'] * 12, OVERLOADED]), "no event": ("chat/completions", [COMMENT]),
    "responses": ("responses", [b'event: response.created\ndata: {"type":"response.created"}\n\n', RESPONSES]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILED)
@pytest.mark.parametrize("entry", [{}, {"inject_usage": True}])
async def test_a_stream_with_an_error_is_a_failed_row(start: StartRelay, raw: RawUpstream, name: str, entry: dict[str, Any]) -> None:
    endpoint, pieces = FAILED[name]
    raw.plays(*sse(*pieces))
    relay = await start(openai=provider(raw.url, **entry))
    status, headers, body = await _call(relay, endpoint)
    assert (status, body) == (200, b"".join(pieces)) and "x-relay-error" not in headers, "the stream is relayed unchanged"
    [event] = await relay.events()
    assert (event["outcome"], event["error"], event["status"]) == ("failed", "upstream_error_in_answer", 200)


@pytest.mark.parametrize("in_two_pieces", [True, False])
async def test_a_whole_response_that_is_an_error_is_a_failed_row(start: StartRelay, raw: RawUpstream, in_two_pieces: bool) -> None:
    body = b'{"error":{"message":"Provider returned error","code":502},"model":"m","usage":{"prompt_tokens":7,"completion_tokens":2}}'
    go_on, answer = asyncio.Event(), ok(body, "Content-Type: application/json")
    raw.plays(answer[:-20], go_on, answer[-20:])
    if not in_two_pieces:
        go_on.set()
    relay = await start(openai=provider(raw.url, pricing=[{"input_per_mtok": 1, "output_per_mtok": 2}]))
    async with relay.client.post(relay.path("openai", "chat/completions"), data=STREAM) as got:
        go_on.set()
        assert await got.read() == body
    [event] = await relay.events()
    assert (event["outcome"], event["error"]) == ("failed", "upstream_error_in_answer")
    assert event["usage"] == {"input_tokens": 7, "output_tokens": 2}
    assert event["cost_nano_usd"] == 11_000, "the reported usage has a cost"


async def test_a_shared_call_that_ends_with_an_error_is_a_failed_row(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(*sse(DELTA, ERROR))
    relay = await start({"cache": {"coalesce": True}}, openai=provider(raw.url))
    await _call(relay)
    [event] = await relay.events()
    assert (event["outcome"], event["error"]) == ("failed", "upstream_error_in_answer")


@pytest.mark.parametrize("endpoint", ["files", "x", "batches"])
async def test_an_error_field_in_the_response_to_another_endpoint_is_no_failure(start: StartRelay, raw: RawUpstream, endpoint: str) -> None:
    raw.plays(ok(b'{"id":"1","error":{"code":"x"}}', "Content-Type: application/json"))
    relay = await start(openai=provider(raw.url))
    await _call(relay, endpoint)
    [event] = await relay.events()
    assert event["outcome"] == "relayed"
