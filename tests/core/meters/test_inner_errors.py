"""Errors inside a response with status 200 are found in every format, however it is split."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from relay.core.meters.answer_meter import AnswerMeter, answer_meter, read_whole
from relay.core.meters.inner_errors import FirstEvent, contains_error
from relay.core.meters.sent_call import SentCall
from relay.core.usage import total

ANTHROPIC = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n'
OPENROUTER = b'data: {"error":{"code":502,"message":"Provider returned error"},"choices":[]}\n\n'
RESPONSES = b'event: error\ndata: {"type":"error","code":"server_error","message":"overloaded"}\n\n'
FAILED = b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"code":"rate_limit_exceeded"}}}\n\n'
GEMINI = b'data: {"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED"}}\r\n\r\n'
GEMINI_ARRAY = b'data: [{"error": {"code": 503, "status": "UNAVAILABLE"}}]\n\n'
COHERE = b'event: message-end\ndata: {"type":"message-end","delta":{"finish_reason":"ERROR","error":"it failed"}}\n\n'
PLAIN = b"event: error\ndata: upstream timed out\n\n"
STRING = b'data: {"error": "model is loading"}\n\n'

ERRORS = {
    "anthropic": (ANTHROPIC, 529), "openrouter": (OPENROUTER, 502), "responses": (RESPONSES, 500), "response.failed": (FAILED, 429),
    "gemini": (GEMINI, 429), "gemini array": (GEMINI_ARRAY, 503), "cohere": (COHERE, 0), "plain text": (PLAIN, 0), "a string": (STRING, 0),
    "a key": (b'data: {"error":{"type":"authentication_error"}}\n\n', 401), "bare JSON": (b'{"error":{"code":403}}', 403),
}  # fmt: skip
GOOD = {
    "chat": b'data: {"choices":[{"delta":{"content":"an \\"error\\": yes"}}]}\n\n',
    "error is null": b'data: {"type":"response.created","response":{"error":null},"error":null}\n\n',
    "error is empty": b'data: {"error":{},"choices":[]}\n\n',
    "messages": b'event: message_start\ndata: {"type":"message_start","message":{"content":[]}}\n\n',
    "a nested error": b'data: {"choices":[{"delta":{"tool":{"error":{"code":500}}}}]}\n\n',
    "text": b"data: hello\n\n",
}
EMPTY = {"nothing": b"", "comments": b": keep-alive\n\n: keep-alive\n\n", "done": b"data: [DONE]\n\n", "a field": b"retry: 3000\n\n", "half a comment": b": kee"}


def _read_first_event(stream: bytes, size: int) -> FirstEvent:
    found = FirstEvent()
    if not any(found.feed(stream[at : at + size]) for at in range(0, len(stream), size)):
        found.end()
    return found


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("before", [b"", b": OPENROUTER PROCESSING\n\n", b"retry: 3\r\n\r\n:\r\r", b"\xef\xbb\xbf"])
def test_an_error_in_the_first_event_is_found_with_its_status(name: str, before: bytes, size: int) -> None:
    event, status = ERRORS[name]
    assert _read_first_event(before + event, size).error_status == status


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("name", GOOD)
def test_a_first_event_without_an_error_is_accepted(name: str, size: int) -> None:
    assert _read_first_event(b": wait\n\n" + GOOD[name] + ANTHROPIC, size).error_status is None


@pytest.mark.parametrize("name", EMPTY)
def test_a_stream_without_an_event_is_a_failure(name: str) -> None:
    assert _read_first_event(EMPTY[name], 3).error_status == 0


def test_events_after_the_first_are_not_examined() -> None:
    found = FirstEvent()
    assert not found.feed(b": wait\n\ndata: {")
    assert found.feed(b"}\n\n" + ANTHROPIC)
    assert found.error_status is None


@pytest.mark.parametrize("name", [name for name in ERRORS if name != "bare JSON"])
def test_an_error_among_events_is_found(name: str) -> None:
    assert contains_error(GOOD["chat"] + ERRORS[name][0] + b"data: [DONE]\n\n")


@pytest.mark.parametrize("name", GOOD)
def test_events_without_an_error_are_accepted(name: str) -> None:
    assert not contains_error(GOOD[name] * 3)


# What a meter reports about a whole response

SSE = {"Content-Type": "text/event-stream"}
JSON = {"Content-Type": "application/json"}
CHAT, MESSAGES, GENERATE = (SentCall(kind, endpoint=end) for kind, end in (
    ("chat", "chat/completions"), ("messages", "v1/messages"), ("generate", "v1beta/models/m:streamGenerateContent")))  # fmt: skip
DELTA = b'data: {"model":"m","choices":[{"delta":{"content":"hello"}}]}\n\n'


def _feed_meter(format_: str, sent: SentCall, headers: dict[str, str], *chunks: bytes) -> AnswerMeter:
    meter = answer_meter(format_, sent, headers.get)
    assert meter is not None
    for chunk in chunks:
        meter.feed(chunk)
    return meter


@pytest.mark.parametrize("name", [name for name in ERRORS if name != "bare JSON"])
@pytest.mark.parametrize("format_", ["openai", "anthropic", "google", "cohere", "cartesia"])
def test_an_error_at_the_end_of_a_stream_is_found(format_: str, name: str) -> None:
    chunks = [DELTA] * 20 + [ERRORS[name][0], b'data: {"usage":{"prompt_tokens":1}}\n\n', b"data: [DONE]\n\n"]
    assert _feed_meter(format_, CHAT, SSE, *chunks).has_error
    assert not _feed_meter(format_, CHAT, SSE, *chunks[:20]).has_error


def test_an_error_is_found_in_a_stream_whose_usage_event_is_removed() -> None:
    meter = _feed_meter("openai", CHAT, SSE, *[DELTA] * 9)
    for chunk in (DELTA, OPENROUTER, b"data: [DONE]\n\n"):
        meter.feed_without_usage(chunk)
    assert meter.has_error


@pytest.mark.parametrize(("length", "size"), [(300_000, 16_000), (20_000, 1400), (70_000, 100), (100, 1)])
def test_an_error_event_of_any_length_is_found(length: int, size: int) -> None:
    event = b'event: response.failed\ndata: {"type":"response.failed","response":{"output":"%b","error":{}}}\n\n' % (b"x" * length)
    pieces = [event[at : at + size] for at in range(0, len(event), size)]
    assert _feed_meter("openai", SentCall("responses", endpoint="responses"), SSE, *[DELTA] * 9, *pieces).has_error


@pytest.mark.parametrize(("format_", "sent", "body"), [
    ("openai", CHAT, b'{"error":{"message":"Provider returned error","code":502},"user_id":"u"}'),
    ("openai", SentCall("responses", endpoint="responses"), b'{"object":"response","model":"m","status":"failed","error":{"code":"server_error"},"usage":null}'),
    ("anthropic", MESSAGES, b'{"type":"error","error":{"type":"api_error","message":"x"}}'),
    ("google", GENERATE, b'[{"error":{"code":503,"status":"UNAVAILABLE"}}]'),
    ("google", SentCall("generate", endpoint="v1beta/models/m:generateContent"), b'{"error":{"code":503}}'),
    ("openai", SentCall("moderation", endpoint="moderations"), b'{"error":{"message":"x"}}'),
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 9, 1000])
def test_a_whole_response_that_is_an_error_is_found(format_: str, sent: SentCall, body: bytes, size: int) -> None:
    assert _feed_meter(format_, sent, JSON, *(body[at : at + size] for at in range(0, len(body), size))).has_error
    meter = read_whole(format_, sent, JSON.get, body)
    assert meter is not None and meter.has_error
    assert meter.parts == (), "an estimate would be a guess at what an error costs"


@pytest.mark.parametrize("body", [
    {"model": "m", "choices": [{"message": {"content": "an error"}}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}},
    {"model": "m", "error": None, "usage": {"prompt_tokens": 1, "completion_tokens": 1}},
    {"model": "m", "choices": [{"message": {"tool_calls": [{"error": {"code": 1}}]}}]},
])  # fmt: skip
def test_a_whole_response_without_an_error_is_accepted(body: dict[str, Any]) -> None:
    meter = read_whole("openai", CHAT, JSON.get, json.dumps(body).encode())
    assert meter is not None and not meter.has_error


def test_usage_beside_an_error_is_reported() -> None:
    body = b'{"model":"m","error":{"code":502},"usage":{"prompt_tokens":7,"completion_tokens":2}}'
    meter = read_whole("openai", CHAT, JSON.get, body)
    usage = total(meter.parts) if meter is not None and meter.has_error else None
    assert usage is not None and (usage.input_tokens, usage.output_tokens) == (7, 2)


@pytest.mark.parametrize("stream", EMPTY.values(), ids=EMPTY)
def test_an_empty_stream_is_an_error(stream: bytes) -> None:
    assert _feed_meter("openai", CHAT, SSE, stream).has_error
    assert _feed_meter("openai", CHAT, SSE, *[b": keep-alive\n\n"] * 20).has_error
    assert not _feed_meter("openai", CHAT, SSE, DELTA, stream).has_error


@pytest.mark.parametrize("coding", ["compress", "gzip, br", "gzip"])
def test_a_response_that_cannot_be_decompressed_is_not_an_error(coding: str) -> None:
    assert not _feed_meter("openai", CHAT, SSE | {"Content-Encoding": coding}, b"\x01\x02\x03").has_error


def test_an_error_in_a_compressed_stream_is_found() -> None:
    stream = gzip.compress(DELTA + ANTHROPIC)
    assert _feed_meter("openai", CHAT, SSE | {"Content-Encoding": "gzip"}, stream[:20], stream[20:]).has_error


def test_comments_before_the_first_event_do_not_hide_it() -> None:
    meter = _feed_meter("openai", CHAT, SSE, *[b": keep-alive\n\n"] * 20, DELTA)
    assert meter.model == "m" and not meter.has_error


def test_reading_a_stored_response_that_failed_is_not_a_failure() -> None:
    meter = read_whole("openai", SentCall("responses", method="GET", endpoint="responses/resp_1"), JSON.get, b'{"status":"failed","error":{"code":"x"}}')
    assert meter is None or not meter.has_error
