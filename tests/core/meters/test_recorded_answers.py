"""Usage is read from recorded responses: whole, in pieces, compressed, and with decoys."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest

from relay.core.meters.answer_meter import AnswerMeter, read_whole
from relay.core.meters.sent_call import SentCall
from relay.core.peek import kind_of
from relay.core.provider import Provider
from tests.core.meters.recorded import ROWS, Row, event
from tests.core.meters.usage_table import routed, shipped


@pytest.fixture(scope="module")
def providers() -> dict[str, Provider]:
    """The providers of the shipped gateway.yaml."""
    return shipped()


def meter_of(row: Row, providers: dict[str, Provider], coding: str = "") -> AnswerMeter:
    endpoint, form = routed(row, providers)
    sent = SentCall(kind_of(endpoint), row.sent, 1000, row.method, endpoint)
    headers = {**row.headers, **({"Content-Encoding": coding} if coding else {})}
    return AnswerMeter(form, sent, headers.get)


IDS = [f"{row.method} {row.provider} {row.path} {number}" for number, row in enumerate(ROWS)]
each_row = pytest.mark.parametrize("row", ROWS, ids=IDS)


@each_row
def test_a_whole_response_is_read(row: Row, providers: dict[str, Provider]) -> None:
    whole, fed = meter_of(row, providers), meter_of(row, providers)
    whole.read_whole(row.answer)
    fed.feed(row.answer)
    assert whole.parts == fed.parts == row.expected
    assert whole.ignored == fed.ignored == 0


@each_row
def test_a_split_at_any_byte_changes_nothing(row: Row, providers: dict[str, Provider]) -> None:
    for at in range(1, len(row.answer)):
        meter = meter_of(row, providers)
        meter.feed(row.answer[:at])
        meter.feed(row.answer[at:])
        assert meter.parts == row.expected, at
    meter = meter_of(row, providers)
    for byte in row.answer:
        meter.feed(bytes([byte]))
    assert meter.parts == row.expected


@each_row
def test_a_compressed_response_is_read(row: Row, providers: dict[str, Provider]) -> None:
    meter, packed = meter_of(row, providers, "gzip"), gzip.compress(row.answer)
    for at in range(0, len(packed), 5):
        meter.feed(packed[at : at + 5])
    assert meter.parts == row.expected


COUNTS = dict.fromkeys(("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens", "total_input_tokens", "promptTokenCount", "candidatesTokenCount", "cache_read_input_tokens", "seconds", "cost", "pages_processed"), 999999)
FAKE: dict[str, Any] = {"usage": COUNTS, "usageMetadata": COUNTS, "usage_info": COUNTS, "meta": {"billed_units": COUNTS}, "model": "decoy", "modelVersion": "decoy", "id": "decoy", "status": "queued", "service_tier": "flex", "duration": 9999, "audio_duration_secs": 9999, "message": {"usage": COUNTS, "model": "decoy"}}
DECOYS: dict[str, Any] = {
    "metadata": FAKE,
    "tools": [{"type": "function", "name": "usage", "parameters": {"type": "object", "properties": FAKE}}],
    "text": {"format": {"schema": {"properties": FAKE}}, "note": json.dumps(FAKE)},
    "choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"arguments": json.dumps(FAKE)}}], "input": FAKE}, "usage_of": FAKE}],
    "content": [{"type": "tool_use", "name": "log", "input": FAKE}, {"type": "text", "text": 'data: {"usage":' + json.dumps(COUNTS) + "}"}],
    "candidates": [{"content": {"parts": [{"functionCall": {"name": "log", "args": FAKE}}]}}],
    "output": [{"type": "function_call", "arguments": json.dumps(FAKE), "svg_usage": COUNTS, **FAKE}],
    "data": [FAKE],
    "moderation": {"input": {"model": "decoy"}},
    "delta": {"type": "input_json_delta", "partial_json": json.dumps(FAKE), "input": FAKE},
    "item": FAKE,
}  # fmt: skip


def with_decoys(row: Row) -> Iterator[bytes]:
    """Yield the response with decoys in its content, after and before the fields to read."""
    if row.content_type == "text/event-stream":
        events = row.answer.split(b"\n\n")[:-1]
        decoy = event(DECOYS).removesuffix(b"\n\n")
        yield b"\n\n".join([events[0], decoy, *events[1:], decoy, b""])
    elif "json" in row.content_type and row.answer[:1] == b"{":
        documents = [json.loads(line) for line in row.answer.splitlines()]
        decoys = {name: value for name, value in DECOYS.items() if name not in ("metadata", "delta")} | {"extra": DECOYS}
        for before, behind in (({}, decoys), (decoys, {})):
            yield b"\n".join(json.dumps({n: v for n, v in before.items() if n not in each} | each | {n: v for n, v in behind.items() if n not in each}).encode() for each in documents)


PLAIN = [row for row in ROWS if not any(part.usage.estimated for part in row.expected)]


@pytest.mark.parametrize("row", PLAIN, ids=[IDS[ROWS.index(row)] for row in PLAIN])
def test_objects_in_the_content_that_look_like_usage_are_not_read(row: Row, providers: dict[str, Provider]) -> None:
    for answer in with_decoys(row):
        whole, cut = meter_of(row, providers), meter_of(row, providers)
        whole.read_whole(answer)
        for at in range(0, len(answer), 37):
            cut.feed(answer[at : at + 37])
        assert whole.parts == cut.parts == row.expected
        assert whole.model != "decoy"


def test_no_two_rows_are_the_same() -> None:
    assert len({(row.method, row.provider, row.path, row.answer, *row.headers.values()) for row in ROWS}) == len(ROWS) >= 150


WHOLE = [row for row in ROWS if row.content_type == "application/json"]
CHAT = {"id": "c", "object": "chat.completion", "model": "m", "choices": [{"usage": {"prompt_tokens": 9}}], "usage": {"prompt_tokens": 7, "completion_tokens": 3}, "service_tier": "default"}
ODDITIES: list[dict[str, Any]] = [
    {}, {"service_tier": "flex"}, {"service_tier": None}, {"service_tier": 5}, {"service_tier": "x" * 300}, {"model": ""}, {"model": None}, {"model": "x" * 300},
    {"object": None}, {"object": 5}, {"object": "thread.run.step"}, {"object": "batch"}, {"status": "queued"}, {"status": "COMPLETED"}, {"type": "response.completed", "response": CHAT},
    {"usage": None}, {"usage": 5}, {"usage": {}}, {"usage": {"total_tokens": 5}}, {"usage": {"prompt_tokens": "7", "completion_tokens": 3}}, {"usage": {"prompt_tokens": 7, "completion_tokens": 3, "cost": 0.5}},
    {"usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 40}}, {"usage": None, "x_groq": {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}},
    {"tool_usage": {"web_search": {"num_requests": 1}}}, {"request_id": "r"}, {"background": True}, {"duration": 5}, {"usage_info": {"pages_processed": 2}}, {"svg_usage": {"input_tokens": 1, "model": "s"}},
    {"usage": {"prompt_tokens": 7, "completion_tokens": 3, "note": "x" * 70_000}}, {"id": 5}, {"id": "r-1"},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["chat", "completion", "embeddings"])
@pytest.mark.parametrize("endpoint", ["chat/completions", "async/chat/completions", "embeddings"])
def test_the_fast_path_for_a_plain_response_finds_what_the_reader_finds(kind: str, endpoint: str) -> None:
    sent = SentCall(kind, input_tokens=100, endpoint=endpoint)
    for odd in ODDITIES:
        answer = json.dumps(CHAT | odd).encode()
        for text in (answer, answer[:-1], b" " + answer, b"[" + answer + b"]"):
            quick, slow = read_whole("openai", sent, {}.get, text), AnswerMeter("openai", sent, {}.get)
            slow.read_whole(text)
            assert quick is not None and (quick.parts, quick.model, quick.ignored) == (slow.parts, slow.model, slow.ignored), odd


@pytest.mark.parametrize("row", WHOLE, ids=[IDS[ROWS.index(row)] for row in WHOLE])
def test_read_whole_finds_the_same_usage(row: Row, providers: dict[str, Provider]) -> None:
    endpoint, form = routed(row, providers)
    read = read_whole(form, SentCall(kind_of(endpoint), row.sent, 1000, row.method, endpoint), row.headers.get, row.answer)
    assert (read.parts if read is not None else ()) == row.expected
