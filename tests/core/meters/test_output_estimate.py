"""The output of a response that reports none, estimated from its bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.meters.answer_meter import answer_meter
from relay.core.meters.output_estimate import _WINDOW_BYTES
from relay.core.meters.sent_call import SentCall
from relay.core.usage import Usage, total

TEXT = "four" * 100
BASE64 = "A" * 64_000
"""A second of 16-bit PCM at 24 kHz."""


def event(data: Any) -> bytes:
    return b"data: %s\n\n" % json.dumps(data, separators=(",", ":")).encode()


def chat(**delta: Any) -> bytes:
    return event({"model": "m", "choices": [{"index": 0, "delta": delta}]})


def gemini(**part: Any) -> bytes:
    return event({"candidates": [{"content": {"parts": [part]}}], "modelVersion": "m"})


def anthropic(**delta: Any) -> bytes:
    return event({"type": "content_block_delta", "index": 0, "delta": delta})


def delta_of(kind: str) -> bytes:
    return event({"type": f"response.{kind}.delta", "delta": TEXT})


OUTPUT: dict[str, tuple[str, str, bytes, Usage]] = {
    "chat text": ("openai", "chat", chat(content=TEXT), Usage(0, 100)),
    "chat refusal": ("openai", "chat", chat(refusal=TEXT), Usage(0, 100)),
    "chat tool call": ("openai", "chat", chat(tool_calls=[{"index": 0, "function": {"arguments": TEXT}}]), Usage(0, 100)),
    "chat audio": ("openai", "chat", chat(audio={"id": "a", "data": BASE64}), Usage(0, 20, output_audio_tokens=20)),
    "chat transcript": ("openai", "chat", chat(audio={"id": "a", "transcript": TEXT}), Usage(0, 100)),
    "completion": ("openai", "completion", event({"choices": [{"text": TEXT}]}), Usage(0, 100)),
    "responses text": ("openai", "responses", delta_of("output_text"), Usage(0, 100)),
    "responses custom tool": ("openai", "responses", delta_of("custom_tool_call_input"), Usage(0, 100)),
    "anthropic text": ("anthropic", "messages", anthropic(type="text_delta", text=TEXT), Usage(0, 100)),
    "anthropic tool": ("anthropic", "messages", anthropic(type="input_json_delta", partial_json=TEXT), Usage(0, 100)),
    "anthropic signature": ("anthropic", "messages", anthropic(type="signature_delta", signature="A" * 1600), Usage(0, 300)),
    "anthropic thoughts and their signature": (
        "anthropic", "messages",
        anthropic(type="thinking_delta", thinking=TEXT) + anthropic(type="signature_delta", signature="A" * 1600), Usage(0, 300),
    ),
    "anthropic compaction": ("anthropic", "messages", anthropic(type="compaction_delta", content=TEXT), Usage(0, 100)),
    "gemini text": ("google", "generate", gemini(text=TEXT), Usage(0, 100)),
    "gemini function": ("google", "generate", gemini(functionCall={"name": "f", "args": {"a": TEXT[:-6]}}), Usage(0, 100)),
    "gemini nested arguments": ("google", "generate", gemini(functionCall={"name": "f", "args": {"a": {"b": TEXT[:-12]}}}), Usage(0, 100)),
    "gemini code": ("google", "generate", gemini(executableCode={"language": "PYTHON", "code": TEXT}), Usage(0, 100)),
    "gemini audio": ("google", "generate", gemini(inlineData={"mimeType": "audio/L16;rate=24000", "data": BASE64}), Usage(0, 25, output_audio_tokens=25)),
    "gemini image": ("google", "generate", gemini(inlineData={"mimeType": "image/png", "data": BASE64}), Usage(0, 1290, output_image_tokens=1290)),
    "cohere text": ("cohere", "chat", event({"type": "content-delta", "delta": {"message": {"content": {"text": TEXT}}}}), Usage(0, 100)),
    "cohere tool plan": ("cohere", "chat", event({"type": "tool-plan-delta", "delta": {"message": {"tool_plan": TEXT}}}), Usage(0, 100)),
    "cohere tool call": ("cohere", "chat", event({"type": "tool-call-delta", "delta": {"message": {"tool_calls": {"function": {"arguments": TEXT}}}}}), Usage(0, 100)),
}  # fmt: skip

ENDPOINTS = {"responses": "responses"}
BIG = "x" * 50_000
HEADS = {
    "openai": event({"type": "response.created", "response": {"id": "r", "model": "m", "status": "in_progress", "instructions": BIG}}),
    "anthropic": event({"type": "content_block_start", "content_block": {"type": "web_search_tool_result", "content": [{"encrypted_content": BIG}]}}),
    "google": gemini(codeExecutionResult={"output": BIG}),
    "cohere": event({"type": "citation-start", "delta": {"documents": [{"snippet": BIG}]}}),
}


def estimated(format_: str, kind: str, *chunks: bytes, content_type: str = "text/event-stream") -> Usage | None:
    meter = answer_meter(format_, SentCall(kind, endpoint=ENDPOINTS.get(kind, "")), {"Content-Type": content_type}.get)
    assert meter is not None
    for chunk in chunks:
        meter.feed(chunk)
    return total(meter.parts)


def as_estimate(usage: Usage) -> tuple[int, int, int]:
    return usage.output_tokens, usage.output_audio_tokens, usage.output_image_tokens


def head_tokens(format_: str) -> int:
    """What a long line without output may count."""
    return len(HEADS[format_]) // 1024 + 1


@pytest.mark.parametrize("name", OUTPUT)
def test_every_kind_of_output_is_counted(name: str) -> None:
    format_, kind, chunk, expected = OUTPUT[name]
    usage = estimated(format_, kind, chunk)
    assert usage is not None and usage.estimated and as_estimate(usage) == as_estimate(expected)


@pytest.mark.parametrize("name", OUTPUT)
def test_the_output_behind_a_long_head_is_counted(name: str) -> None:
    format_, kind, chunk, expected = OUTPUT[name]
    usage = estimated(format_, kind, HEADS[format_] * 2, *[chunk] * 3)
    assert usage is not None
    assert 0 <= usage.output_tokens - expected.output_tokens * 3 <= 2 * head_tokens(format_)


@pytest.mark.parametrize("name", OUTPUT)
def test_the_result_of_a_tool_within_a_stream_is_no_output(name: str) -> None:
    format_, kind, chunk, expected = OUTPUT[name]
    usage = estimated(format_, kind, chunk, HEADS[format_], chunk)
    assert usage is not None
    assert 0 <= usage.output_tokens - expected.output_tokens * 2 <= head_tokens(format_)


@pytest.mark.parametrize("name", OUTPUT)
def test_the_output_of_a_long_stream_is_counted_by_samples(name: str) -> None:
    format_, kind, chunk, expected = OUTPUT[name]
    many = 20 * _WINDOW_BYTES // len(chunk)
    usage = estimated(format_, kind, *[chunk] * many)
    assert usage is not None
    for count, each in zip(as_estimate(usage), as_estimate(expected), strict=True):
        assert count == pytest.approx(each * many, rel=0.1)


def test_output_that_begins_late_in_a_long_stream_is_counted() -> None:
    usage = estimated("openai", "responses", delta_of("output_text"), *[HEADS["openai"]] * 20, *[delta_of("output_text")] * 200)
    assert usage is not None and usage.output_tokens == pytest.approx(201 * 100, rel=0.1)


def test_a_text_that_a_stream_repeats_at_its_end_counts_once() -> None:
    done = event({"type": "response.output_text.done", "text": TEXT})
    usage = estimated("openai", "responses", delta_of("output_text"), done)
    assert usage is not None and usage.output_tokens == 100


def test_events_of_an_unknown_kind_count_by_their_bytes() -> None:
    unknown = event({"type": "response.thing", "thing": TEXT})
    usage = estimated("openai", "responses", *[unknown] * 200)
    assert usage is not None and len(unknown) * 200 // 128 < usage.output_tokens <= len(unknown) * 200 // 64


def test_a_stream_that_is_only_an_error_has_no_output() -> None:
    created = event({"type": "response.created", "response": {"id": "r", "model": "m", "instructions": BIG}})
    error = event({"type": "error", "error": {"type": "server_error", "message": "x"}})
    assert estimated("openai", "responses", created, error) is None


def test_an_input_that_is_reported_alone_does_not_hide_the_output() -> None:
    only_input = event({"candidates": [{"content": {"parts": [{"text": TEXT}]}}], "usageMetadata": {"promptTokenCount": 7, "totalTokenCount": 7}})
    assert estimated("google", "generate", only_input) == Usage(7, 100, estimated=True)


@pytest.mark.parametrize("usage", [{"total_tokens": 1000}, {"prompt_tokens": 1000, "completion_tokens": 0}])
def test_a_usage_that_is_reported_at_the_end_is_believed_although_text_passed(usage: dict[str, int]) -> None:
    found = estimated("openai", "chat", chat(content="some text"), event({"choices": [], "usage": usage}))
    assert found == Usage(input_tokens=1000)


def test_a_blocked_prompt_has_its_reported_usage() -> None:
    blocked = b'{"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 7, "totalTokenCount": 7}}'
    assert estimated("google", "generate", blocked, content_type="application/json") == Usage(7)


@given(splits=st.lists(st.integers(1, 3 * _WINDOW_BYTES), max_size=12), escaped=st.booleans())
def test_the_estimate_of_a_long_text_does_not_depend_on_its_chunks(splits: list[int], escaped: bool) -> None:
    body = b'{"choices": [{"message": {"content": "%b"}}]}' % ((b'\\"xx' if escaped else b"four") * (3 * _WINDOW_BYTES // 4))
    ends = sorted({*splits, len(body)})
    chunks = [body[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    usage = estimated("openai", "chat", *chunks, content_type="application/json")
    assert usage is not None and usage.output_tokens == 3 * _WINDOW_BYTES // 4
