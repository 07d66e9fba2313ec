"""Which responses are complete: whole, truncated at every document, and failed."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from relay.core.completeness import MAX_READ_BYTES, READ_AT_ONCE_BYTES, Response, is_complete
from relay.core.meters.unpack import zstd
from tests.core.cost import assert_cheap

JSON, SSE = "application/json", "text/event-stream"


def complete(format_: str, kind: str, body: bytes, media: str = SSE, coding: str = "", most: int = READ_AT_ONCE_BYTES) -> bool | None:
    return is_complete(Response(format_, kind, media, coding, body), most)


def sse(*documents: Any) -> list[bytes]:
    """Return each document as an event; a string is the data itself, a pair is a name and data."""
    events = []
    for each in documents:
        name, data = each if isinstance(each, tuple) else (None, each)
        text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
        events.append((f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode())
    return events


def part(index: int = 0, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": 'a "finish_reason":"stop" of a text'}, "finish_reason": reason}]} | more


def candidate(reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"candidates": [{"content": {"parts": [{"text": "hi"}]}} | ({"finishReason": reason} if reason else {}) | more], "usageMetadata": {"promptTokenCount": 1}}


USAGE = {"choices": [], "usage": {"prompt_tokens": 1}}
MESSAGES = [
    ("message_start", {"type": "message_start", "message": {"model": "m", "stop_reason": None}}),
    ("content_block_delta", {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "message_stop"}}),
    ("message_delta", {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}),
    ("message_stop", {"type": "message_stop"}),
]
RESPONSES = [
    {"type": "response.created", "response": {"status": "in_progress"}},
    {"type": "response.output_text.delta", "delta": 'the "response.completed" of a text'},
    {"type": "response.completed", "response": {"status": "completed", "output": []}},
]
STREAMS: dict[str, tuple[str, str, list[bytes], int]] = {
    "chat": ("openai", "chat", sse(part(), part(reason="stop"), "[DONE]"), 3),
    "chat with its usage": ("openai", "chat", sse(part(), part(reason="stop"), USAGE, "[DONE]"), 3),
    "chat of two choices": ("openai", "chat", sse(part(), part(1), part(1, "stop"), part(0, "length"), "[DONE]"), 5),
    "chat with tool calls": ("openai", "chat", sse({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 1}]}, "finish_reason": None}]}, part(reason="tool_calls"), "[DONE]"), 3),
    "chat of a vendor without [DONE]": ("openai", "chat", sse(part(usage={"a": 1}), part(reason="stop", usage={"a": 2})), 2),
    "chat filtered after its end": ("openai", "chat", sse(part(reason="stop"), part(), "[DONE]"), 3),
    "completion": ("openai", "completion", sse({"choices": [{"index": 0, "text": "a", "finish_reason": None}]}, {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}, "[DONE]"), 3),
    "responses": ("openai", "responses", sse(*[(each["type"], each) for each in RESPONSES]), 3),
    "messages": ("anthropic", "messages", sse(*MESSAGES), 4),
    "generate": ("google", "generate", sse(candidate(), candidate("STOP")), 2),
    "generate of two candidates": ("google", "generate", sse(candidate(), candidate(index=1), candidate("STOP", index=1), candidate("STOP")), 4),
    "interactions": ("google", "interactions", sse({"event_type": "interaction.status_update", "status": "in_progress"}, {"event_type": "interaction.completed", "interaction": {"status": "completed"}}), 2),
    "cohere": ("cohere", "chat", sse({"type": "content-delta"}, {"type": "message-end", "delta": {"finish_reason": "COMPLETE"}}), 2),
    "speech": ("openai", "speech", sse({"type": "speech.audio.delta", "audio": "aa"}, {"type": "speech.audio.done"}), 2),
    "speech of cartesia": ("cartesia", "speech", sse({"type": "chunk", "data": "aa", "done": False}, {"type": "done", "done": True}), 2),
    "transcription": ("openai", "transcription", sse({"type": "transcript.text.delta"}, {"type": "transcript.text.done"}), 2),
    "image": ("openai", "image", sse({"type": "image_generation.partial_image"}, {"type": "image_generation.completed"}), 2),
    "chat of an unknown path": ("fal", "other", sse(part(), part(reason="stop"), "[DONE]"), 3),
    "messages of an unknown path": ("google", "other", sse(*MESSAGES), 4),
    "responses of an unknown path": ("fal", "other", sse(*RESPONSES), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("line", [b"\n", b"\r\n"])
def test_a_stream_is_complete_with_its_last_event_and_not_before(name: str, line: bytes) -> None:
    format_, kind, events, needed = STREAMS[name]
    events = [event.replace(b"\n", line) for event in events]
    ends = [at for at in range(len(events) + 1) if complete(format_, kind, b"".join(events[:at]))]
    assert ends[-1] == len(events) and ends[0] >= min(needed, len(events))
    assert complete(format_, kind, b": a comment" + line * 2 + b"".join(events) + line)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_ends_within_an_event_is_not_complete(name: str) -> None:
    format_, kind, events, _ = STREAMS[name]
    body = b"".join(events)
    assert not complete(format_, kind, body[: -len(events[-1]) // 2])
    assert not complete(format_, kind, body + b'data: {"a": ')
    assert complete(format_, kind, body[:-2]), "some servers leave out the last empty line"


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error":{"message":"overloaded"}}\n\n',
        b'data: {"id":1,"choices":[{"index":0,"finish_reason":null}],"error":{"code":500}}\n\n',
        b"event: error\ndata: {}\n\n",
        b'data: {"type":"error","message":"no"}\n\n',
        b'data: {"success":false,"errors":[]}\n\n',
    ],
)
def test_a_stream_with_an_error_at_any_place_is_not_complete(name: str, error: bytes) -> None:
    format_, kind, events, _ = STREAMS[name]
    for at in range(len(events)):
        assert not complete(format_, kind, b"".join([*events[:at], error, *events[at:]]))


@pytest.mark.parametrize("reason", ["error", "insufficient_system_resource"])
def test_a_response_with_a_finish_reason_that_is_a_failure_is_not_complete(reason: str) -> None:
    assert not complete("openai", "chat", b"".join(sse(part(), part(reason=reason), "[DONE]")))
    assert not complete("openai", "chat", json.dumps(part(reason=reason)).encode(), JSON)
    assert not complete("cohere", "chat", b"".join(sse({"type": "message-end", "delta": {"finish_reason": "ERROR"}})))


def test_an_end_marker_within_a_text_does_not_complete_a_stream() -> None:
    quoted = '"type":"message_stop"'
    text = sse(MESSAGES[0], ("content_block_delta", {"type": "content_block_delta", "delta": {"text": quoted}}))
    assert not complete("anthropic", "messages", b"".join(text))
    assert not complete("openai", "responses", b"".join(sse(*RESPONSES[:2])))


WHOLE: dict[str, tuple[str, str, Any, Any]] = {
    "chat": ("openai", "chat", part(reason="stop"), part()),
    "chat without a result": ("openai", "chat", part(reason="stop"), {"model": "m"}),
    "chat of two": ("openai", "chat", {"choices": [{"index": 0, "finish_reason": "stop"}, {"index": 1, "finish_reason": "stop"}]}, {"choices": [{"index": 0, "finish_reason": "stop"}, {"index": 1, "finish_reason": None}]}),
    "chat without choices": ("openai", "chat", part(reason="stop"), {"choices": []}),
    "completion": ("openai", "completion", part(reason="length"), part()),
    "messages": ("anthropic", "messages", {"type": "message", "stop_reason": "end_turn"}, {"type": "message", "stop_reason": None}),
    "responses": ("openai", "responses", {"object": "response", "status": "completed", "error": None}, {"object": "response", "status": "in_progress"}),
    "responses without a status": ("openai", "responses", {"object": "response.compaction", "output": []}, {"object": "response"}),
    "an incomplete response": ("openai", "responses", {"status": "completed"}, {"status": "incomplete"}),
    "generate": ("google", "generate", candidate("STOP"), candidate()),
    "generate, blocked": ("google", "generate", candidate("SAFETY"), {"promptFeedback": {"blockReason": "OTHER"}}),
    "generate in an array": ("google", "generate", [candidate(), candidate("STOP")], [candidate(), candidate()]),
    "interactions": ("google", "interactions", {"status": "completed"}, {"status": "in_progress"}),
    "cohere": ("cohere", "chat", {"finish_reason": "COMPLETE"}, {"message": {}}),
    "embeddings": ("openai", "embeddings", {"data": []}, {"error": {"message": "no"}}),
    "models": ("openai", "models", {"data": []}, {"success": False, "errors": []}),
    "a job": ("fal", "other", {"status": "COMPLETED"}, {"status": "IN_QUEUE"}),
    "a transcript": ("assemblyai", "transcription", {"status": "completed"}, {"status": "processing"}),
    "chat of an unknown path": ("fal", "other", part(reason="stop"), part()),
    "a list": ("openai", "other", ["a", 1], {"error": "no"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_json_document_is_complete_with_a_finish_reason_and_without_an_error(name: str) -> None:
    format_, kind, good, bad = WHOLE[name]
    text = json.dumps(good).encode()
    assert complete(format_, kind, text, JSON) and complete(format_, kind, b"\xef\xbb\xbf" + text + b"\n", f"{JSON}; charset=utf-8")
    assert not complete(format_, kind, json.dumps(bad).encode(), JSON)
    assert not any(complete(format_, kind, text[:at], JSON) for at in range(len(text)))
    assert not complete(format_, kind, text + b"}", JSON)


@pytest.mark.parametrize("format_", ["cohere", "fal"])
def test_json_lines_are_complete_with_their_last_document(format_: str) -> None:
    kind = "chat" if format_ == "cohere" else "other"
    lines = [b'{"event_type": "text-generation", "done": false}\n', b'{"event_type": "stream-end", "done": true}\n']
    assert complete(format_, kind, b"".join(lines), "application/stream+json")
    assert not complete(format_, kind, lines[0] * 2, "application/stream+json")
    assert not complete(format_, kind, lines[0] + lines[1][:20], "application/stream+json")


PAGE = b"<!-- a proxy's -->\n<!DOCTYPE html><html><body>We will be back soon</body></html>"
GOOD = json.dumps(part(reason="stop")).encode()


@pytest.mark.parametrize(
    ("kind", "media", "body", "expected"),
    [
        ("speech", "audio/mpeg", b"ID3" + bytes(100), True),
        ("speech", "audio/pcm", b"{" + bytes(100), True),
        ("speech", "audio/mpeg", PAGE, False),
        ("speech", "audio/mpeg", b'{"error": {"message": "no"}}', False),
        ("speech", "text/plain", b"We will be back soon", False),
        ("image", "image/png", b"\x89PNG" + bytes(100), True),
        ("image", "image/png", PAGE, False),
        ("image", "image/svg+xml", b"<svg/>", True),
        ("chat", "text/html", PAGE, False),
        ("chat", JSON, PAGE, False),
        ("chat", SSE, PAGE, False),
        ("chat", "text/plain", PAGE, False),
        ("chat", "text/plain", b"We will be back soon", False),
        ("chat", "text/plain", GOOD, True),
        ("chat", "audio/mpeg", GOOD, False),
        ("transcription", "text/plain", b"1\n00:00:00,000 --> 00:00:01,000\nhi\n", True),
        ("transcription", "text/plain", b'{"error": {"message": "no"}}', False),
        ("transcription", "text/plain", PAGE, False),
        ("other", "text/plain", b"{ is how this text begins", True),
        *[(kind, media, b"", False) for kind in ("chat", "speech", "other") for media in (JSON, SSE, "audio/mpeg", "text/plain")],
        ("other", SSE, b"\n\n: nothing\n\n", False),
        ("other", SSE, b"data: hello\n\n", False),
        ("other", SSE, b"data: 1\n\n", True),
        ("chat", JSON, b'"a text"', False),
    ],
)  # fmt: skip
def test_a_response_of_another_kind_than_requested_is_not_complete(kind: str, media: str, body: bytes, expected: bool) -> None:
    assert complete("openai", kind, body, media) is expected


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "zstd", "GZIP", "identity", ""])
def test_a_compressed_response_is_complete_if_its_content_is(coding: str) -> None:
    pack = {"g": gzip.compress, "x": gzip.compress, "z": zstd.compress}.get(coding[:1].lower(), bytes)
    for media, good, bad in ((JSON, GOOD, b'{"choices": []}'), (SSE, b"".join(sse(part(), part(reason="stop"), "[DONE]")), sse(part())[0])):
        assert complete("openai", "chat", pack(good), media, coding)
        assert not complete("openai", "chat", pack(bad), media, coding)
        assert not complete("openai", "chat", pack(good)[:-5], media, coding)


def test_a_response_in_an_unknown_or_a_wrong_coding_is_not_complete() -> None:
    assert not complete("openai", "chat", GOOD, JSON, "snappy") and not complete("openai", "chat", GOOD, JSON, "gzip")


LONG = {
    "events": (SSE, b"".join(sse(part()) * 5000 + sse(part(reason="stop"), "[DONE]"))),
    "short events": (SSE, b"data: 1\n\n" * 9000 + b"".join(sse(part(reason="stop"), "[DONE]"))),
    "an array": (JSON, b"[" + b",".join([json.dumps(part()).encode()] * 5000 + [json.dumps(part(reason="stop", usage={"a": 1})).encode()]) + b"]"),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_a_response_that_takes_long_to_read_is_not_read_at_once(name: str) -> None:
    media, body = LONG[name]
    assert complete("openai", "chat", body, media) is None
    assert complete("openai", "chat", body, media, most=MAX_READ_BYTES) is True
    assert complete("openai", "chat", gzip.compress(body, 1), media, "gzip") is None


@pytest.mark.parametrize("piece", [b"data: {}\n\n", b"data:1\n\n", b"\n\n", b'data: {"error":[]}\n\n', b'{"a":1}\n', b"[{}]"])
def test_any_response_that_is_read_at_once_takes_little_time(piece: bytes) -> None:
    body = piece * (READ_AT_ONCE_BYTES // len(piece))
    for size in (len(body), len(body) // 8):
        for media in (SSE, JSON):
            assert_cheap(lambda: complete("openai", "chat", body[:size], media), 0.3)  # noqa: B023


def test_a_decompression_bomb_is_unpacked_only_up_to_the_limit() -> None:
    bomb = gzip.compress(bytes(3 * READ_AT_ONCE_BYTES))
    assert complete("openai", "chat", bomb, JSON, "gzip") is None
    assert complete("openai", "chat", bomb, JSON, "gzip", most=2 * READ_AT_ONCE_BYTES) is None


def test_json_that_would_take_long_even_to_skip_is_not_complete() -> None:
    body = b'{"choices": [{"finish_reason": "stop"}], "a": [' + b"[]," * 2_100_000 + b"0]}"
    assert not complete("openai", "chat", body, JSON)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b'{"choices": {"a": 1}}', b'{"choices": [1]}', b'{"choices": [{"index": "x"}]}', b'{"choices": null}', b'{"type": 1, "status": []}'])
def test_malformed_json_is_not_complete_and_does_not_raise(body: bytes) -> None:
    for media in (JSON, SSE):
        assert not complete("openai", "chat", body if media == JSON else b"data: " + body + b"\n\n", media)
