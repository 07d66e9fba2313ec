"""Meters read the usage that each vendor reports, however it is split, compressed or broken."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from typing import Any

import brotli
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.fields import MAX_FIELD_BYTES
from relay.core.meters.answer_meter import AnswerMeter, answer_meter, read_whole
from relay.core.meters.sent_call import SentCall
from relay.core.meters.unpack import zstd
from relay.core.usage import Usage, total

CHAT_STREAM = b'data: {"model": "gpt-x", "choices": [1], "usage": null}\n\ndata: {"choices": [], "usage": {"prompt_tokens":7,"completion_tokens":3}}\n\ndata: [DONE]\n\n'

# (format, kind, response, usage, model of the response)
ANSWERS: dict[str, tuple[str, str, bytes, Usage | None, str | None]] = {
    "chat": (
        "openai", "chat",
        b'{"model": "gpt-4o", "usage": {"prompt_tokens": 17, "completion_tokens": 9, "total_tokens": 26, "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 5, "audio_tokens": 1}}}',
        Usage(17, 9, cache_read_tokens=4, reasoning_tokens=5, input_audio_tokens=2, output_audio_tokens=1), "gpt-4o",
    ),
    "chat stream": ("openai", "chat", CHAT_STREAM, Usage(7, 3), "gpt-x"),
    "responses stream": (
        "openai", "responses",
        b'event: response.created\ndata: {"type": "response.created", "response": {"model": "gpt-5", "usage": null}}\n\nevent: response.completed\ndata: {"type": "response.completed", "response": {"usage": {"input_tokens": 11, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 3}, "total_tokens": 16}}}\n\n',
        Usage(11, 5, cache_read_tokens=2, reasoning_tokens=3), "gpt-5",
    ),
    "embeddings": ("openai", "embeddings", b'{"model": "e", "usage": {"prompt_tokens": 7, "total_tokens": 7}}', Usage(7, 0), "e"),
    "images": (
        "openai", "image", b'{"usage": {"input_tokens": 50, "output_tokens": 30, "input_tokens_details": {"text_tokens": 10, "image_tokens": 40}}}',
        Usage(50, 30, input_image_tokens=40, output_image_tokens=30), None,
    ),
    "transcription": (
        "openai", "transcription", b'{"usage": {"type": "tokens", "input_tokens": 14, "input_token_details": {"text_tokens": 0, "audio_tokens": 14}, "output_tokens": 4}}',
        Usage(14, 4, input_audio_tokens=14), None,
    ),
    "transcription by time": ("openai", "transcription", b'{"text": "", "usage": {"type": "duration", "seconds": 12.5}}', Usage(audio_ms=12_500), None),
    "groq stream": ("openai", "chat", b'data: {"x_groq": {"id": "r", "usage": {"queue_time": 0.1, "prompt_tokens": 4, "completion_tokens": 2}}}\n\n', Usage(4, 2), None),
    "deepseek": ("openai", "chat", b'{"usage": {"prompt_tokens": 9, "completion_tokens": 1, "prompt_cache_hit_tokens": 8}}', Usage(9, 1, cache_read_tokens=8), None),
    "xai": ("openai", "chat", b'{"usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 40, "completion_tokens_details": {"reasoning_tokens": 28}}}', Usage(10, 30, reasoning_tokens=28), None),
    "anthropic": (
        "anthropic", "messages", b'{"model": "claude", "usage": {"input_tokens": 5, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 10, "output_tokens": 8}}',
        Usage(35, 8, cache_read_tokens=10, cache_write_tokens=20), "claude",
    ),
    "anthropic stream": (
        "anthropic", "messages",
        b'event: message_start\ndata: {"type": "message_start", "message": {"model": "claude", "usage": {"input_tokens": 5, "cache_read_input_tokens": 10, "output_tokens": 1}}}\n\nevent: message_delta\ndata: {"type": "message_delta", "usage": {"output_tokens": 15}}\n\nevent: message_delta\ndata: {"type": "message_delta", "usage": {"input_tokens": 5, "output_tokens": 27}}\n\n',
        Usage(15, 27, cache_read_tokens=10), "claude",
    ),
    "gemini": (
        "google", "generate",
        b'{"usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 4, "thoughtsTokenCount": 5, "cachedContentTokenCount": 3, "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 5}, {"modality": "AUDIO", "tokenCount": 2}]}, "modelVersion": "gemini-x"}',
        Usage(7, 9, cache_read_tokens=3, reasoning_tokens=5, input_audio_tokens=2), "gemini-x",
    ),
    "gemini stream": (
        "google", "generate",
        b'data: {"usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 1}}\r\n\r\ndata: {"usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 6}}\r\n\r\n',
        Usage(7, 6), None,
    ),
    "deepgram": ("deepgram", "transcription", b'{"metadata": {"duration": 25.933313, "channels": 1}, "results": {}}', Usage(audio_ms=25_933), None),
    "assemblyai": ("assemblyai", "other", b'{"audio_duration": 281, "status": "completed"}', Usage(audio_ms=281_000), None),
    "cartesia": ("cartesia", "transcription", b'{"text": "hi", "duration": 1.5}', Usage(audio_ms=1_500), None),
    "a text that quotes usage": ("openai", "other", b'{"content": "{\\"usage\\": {\\"prompt_tokens\\": 900}}"}', None, None),
    "braces in a string": ("openai", "other", b'{"usage": {"note": "} \\" }", "input_tokens": 7, "output_tokens": 3}}', Usage(7, 3), None),
    "counts of the wrong type": ("openai", "other", b'{"usage": {"prompt_tokens": "many", "completion_tokens": true}}', None, None),
    "truncated": ("openai", "other", b'{"usage": {"prompt_tokens": 7, "compl', None, None),
    "binary": ("openai", "other", b"\x00\xff no json", None, None),
    "a stream without usage": ("openai", "chat", b'data: {"choices":[{"delta":{"content":"1234"}}]}\n\n' * 5, Usage(400, 5, estimated=True), None),
    "a response without usage": ("openai", "chat", b'{"choices": [{"message": {"content": "%b"}}]}' % (b"x" * 80), Usage(400, 20, estimated=True), None),
    "a response without text": ("openai", "chat", b"x" * 80, Usage(400, 0, estimated=True), None),
}  # fmt: skip


def meter_of(name: str, headers: dict[str, str] | None = None) -> Any:
    format_, kind, body, *_ = ANSWERS[name]
    meter = answer_meter(format_, SentCall(kind, input_tokens=400), ({"Content-Type": type_of(body)} | (headers or {})).get)
    assert meter is not None
    return meter


def type_of(body: bytes) -> str:
    return "text/event-stream" if body.startswith((b"data: ", b"event: ")) else "application/json"


@pytest.mark.parametrize("name", ANSWERS)
@given(data=st.data())
def test_any_split_of_the_bytes_gives_the_same_usage(name: str, data: st.DataObject) -> None:
    _, _, body, expected, model = ANSWERS[name]
    splits = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    meter = meter_of(name)
    for start, end in zip([0, *splits], [*splits, len(body)], strict=True):
        meter.feed(body[start:end])
    assert (total(meter.parts), meter.model) == (expected, model)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_whole_response_is_read_like_one_in_pieces(name: str) -> None:
    format_, kind, body, expected, model = ANSWERS[name]
    meter = read_whole(format_, SentCall(kind, input_tokens=400), {"Content-Type": type_of(body)}.get, body)
    assert meter is not None and (total(meter.parts), meter.model) == (expected, model)


@pytest.mark.parametrize(("cost", "billed"), [("0.0012", 1_200_000), ("0", 0), ("-3", None), ('"NaN"', None), ('"Infinity"', None)])
def test_a_billed_cost_that_is_not_an_amount_is_ignored(cost: str, billed: int | None) -> None:
    body = b'{"usage": {"prompt_tokens": 7, "completion_tokens": 3, "cost": %b}}' % cost.encode()
    meter = read_whole("openai", SentCall("chat", input_tokens=400), {}.get, body)
    assert meter is not None and total(meter.parts) == Usage(7, 3, billed_nano_usd=billed)


PACKED = {"gzip": gzip.compress, "deflate": zlib.compress, "br": functools.partial(brotli.compress, quality=1), "zstd": zstd.compress}


@pytest.mark.parametrize("coding", PACKED)
@pytest.mark.parametrize("name", ["chat stream", "anthropic stream", "deepgram"])
def test_a_compressed_response_is_read_byte_by_byte(name: str, coding: str) -> None:
    _, _, body, expected, _ = ANSWERS[name]
    packed = PACKED[coding](body)
    meter = meter_of(name, {"Content-Encoding": coding})
    for at in range(len(packed)):
        meter.feed(packed[at : at + 1])
    assert total(meter.parts) == expected


@pytest.mark.parametrize("coding", PACKED)
def test_a_decompression_bomb_and_broken_data_make_the_usage_incomplete(coding: str) -> None:
    bomb = meter_of("embeddings", {"Content-Encoding": coding})
    bomb.feed(PACKED[coding](b"\0" * (80 << 20)))
    broken = meter_of("embeddings", {"Content-Encoding": coding})
    broken.feed(b"not packed at all" * 10)
    broken.feed(ANSWERS["embeddings"][2])
    assert total(bomb.parts) == total(broken.parts) == Usage(incomplete=True)


def test_a_usage_object_that_never_ends_is_not_buffered() -> None:
    meter = meter_of("chat")
    for _ in range(100):
        meter.feed(b'{"usage": {' + b"x" * 1000)
    assert sum(map(len, meter._source._take or [])) <= MAX_FIELD_BYTES and len(meter._source._held) < 1000


@pytest.mark.parametrize(
    ("format_", "kind", "body", "headers", "expected"),
    [
        ("elevenlabs", "speech", {"text": "hello"}, {"character-cost": "3"}, Usage(characters=3)),
        ("elevenlabs", "speech", {"text": "hällo"}, {}, Usage(characters=5)),
        ("openai", "speech", {"input": "hello"}, {}, Usage(characters=5)),
        ("cartesia", "speech", {"transcript": "hello you"}, {}, Usage(characters=9)),
        ("fal", "other", {}, {"x-fal-billable-units": "1.25"}, Usage(units_milli=1250)),
    ],
)
def test_usage_is_read_from_the_request_and_the_response_headers(format_: str, kind: str, body: dict[str, Any], headers: dict[str, str], expected: Usage) -> None:
    meter = answer_meter(format_, SentCall(kind, json.dumps(body).encode(), 100), headers.get)
    assert meter is not None
    meter.feed(b"\x00\x01 audio")
    assert total(meter.parts) == expected


@pytest.mark.parametrize("headers", [{"x-fal-billable-units": "many"}, {"x-fal-billable-units": "-1"}, {}])
def test_billable_units_that_are_missing_or_invalid_make_the_usage_incomplete(headers: dict[str, str]) -> None:
    meter = answer_meter("fal", SentCall("other", endpoint="fal-ai/flux"), headers.get)
    assert meter is not None
    meter.feed(b"{}")
    assert total(meter.parts) == Usage(incomplete=True)


@pytest.mark.parametrize("coding", ["", "x-unknown"])
def test_only_a_stored_object_that_was_read_may_have_used_nothing(coding: str) -> None:
    meter = AnswerMeter("openai", SentCall("responses", method="GET", endpoint="responses/resp_1"), {"Content-Encoding": coding}.get)
    meter.feed(b'{"id":"resp_1","object":"response","status":"failed","usage":null}')
    assert meter.used_nothing == (not coding)
