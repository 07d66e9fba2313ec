"""Requesting usage of a stream and removing its usage event, however the bytes are split."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.core import fields
from relay.core.fields import spans
from relay.core.injection import (
    MAX_EVENT_BYTES,
    UsageEventRemover,
    UsageRefusals,
    asking_for_usage,
    can_be_asked,
    refusal_key,
    without_usage_event,
)
from tests.core.cost import assert_cheap

OPTIONS = b'"stream_options":{"include_usage":true}'


# The request


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        (b'{"stream":true}', b'{"stream":true,' + OPTIONS + b"}"),
        (b' {\n "n" : 1.50,"stream" : true\n}\r\n ', b' {\n "n" : 1.50,"stream" : true\n,' + OPTIONS + b"}\r\n "),
        (b'{"stream":true,"messages":[{"content":"a } \\"stream_options\\": {}"}]}', b'{"stream":true,"messages":[{"content":"a } \\"stream_options\\": {}"}],' + OPTIONS + b"}"),
        (b'{"stream":true,"x":{"stream_options":{"include_usage":false}}}', b'{"stream":true,"x":{"stream_options":{"include_usage":false}},' + OPTIONS + b"}"),
        (b'{"\\u0073tream":true,"a":"\xc3\xa9"}', b'{"\\u0073tream":true,"a":"\xc3\xa9",' + OPTIONS + b"}"),
        (b'{"stream":true,"model":"a","model":"b"}', b'{"stream":true,"model":"a","model":"b",' + OPTIONS + b"}"),
        (b'{"stream_options":{"include_obfuscation": false },"stream":true}', b'{"stream_options":{"include_obfuscation": false ,"include_usage":true},"stream":true}'),
        (b'{"stream_options" : { } ,"stream":true}', b'{"stream_options" : { "include_usage":true} ,"stream":true}'),
        (b'{"stream_options":{},"stream":true}', b'{"stream_options":{"include_usage":true},"stream":true}'),
        (b'{"stream_options":null,"stream":true}', b'{"stream_options":{"include_usage":true},"stream":true}'),
        (b'{"stream":true,"\\u0073tream_options":{"a":"}"}}', b'{"stream":true,"\\u0073tream_options":{"a":"}","include_usage":true}}'),
    ],
)
def test_the_option_is_inserted_and_every_other_byte_stays(body: bytes, changed: bytes) -> None:
    assert asking_for_usage(body) == changed
    document = json.loads(changed)
    assert document["stream_options"]["include_usage"] is True and document["stream"] is True


@pytest.mark.parametrize(
    "body",
    [
        b'{"stream":true,"stream_options":{"include_usage":true}}',
        b'{"stream":true,"stream_options":{"include_usage":false}}',
        b'{"stream":true,"stream_options":{"include_usage":null}}',
        b'{"stream":true,"stream_options":{"include_\\u0075sage":false}}',
        b'{"stream":true,"stream_options":{},"stream_options":{}}',
        b'{"stream":true,"stream_options":{},"stream_option\\u0073":{}}',
        b'{"stream":false,"stream":true}',
        b'{"stream":true,"stream_options":[]}',
        b'{"stream":true,"stream_options":"yes"}',
        b'{"stream":true,"stream_options":{"a":1}',
        b'{"stream":false,"stream_options":{}}',
        b"[1]",
        b"",
        b'{"model":"\\u006d"}',
    ],
)
def test_a_body_with_the_option_or_that_cannot_be_read_is_unchanged(body: bytes) -> None:
    assert asking_for_usage(body) is None


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(["stream", "stream_options", "include_usage"]), inner, max_size=4),
)


@settings(max_examples=40)
@given(st.dictionaries(st.text().filter(lambda name: name != "stream"), _JSON, max_size=5), st.booleans(), st.sampled_from([None, 1]))
def test_the_rest_of_a_body_stays(rest: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    sent = {"stream": True} | rest
    body = json.dumps(sent, ensure_ascii=ascii_only, indent=indent).encode()
    changed = asking_for_usage(body)
    options = sent.get("stream_options") or {}
    if ("stream_options" in sent and not isinstance(sent["stream_options"], dict | None)) or "include_usage" in options:
        assert changed is None
        return
    assert changed is not None and json.loads(changed) == sent | {"stream_options": options | {"include_usage": True}}
    if sent.get("stream_options", {}) is not None:
        inserted = len(changed) - len(body)
        assert any(changed[:at] + changed[at + inserted :] == body for at in range(len(body)))


@settings(max_examples=40)
@given(st.dictionaries(st.text(), _JSON, max_size=5), st.sampled_from([None, 1]))
def test_the_offsets_of_values_are_found(value: dict[str, Any], indent: int | None) -> None:
    body = json.dumps(value, indent=indent).encode()
    found = spans(body)
    assert found is not None
    assert [(name, json.loads(body[start:end])) for name, start, end in found] == list(value.items())


def test_a_body_of_millions_of_values_is_not_changed() -> None:
    body = b'{"stream":true,"stream_options":{"x":[' + b",".join([b"{}"] * (fields._ALWAYS_READ_BYTES // 2)) + b"]}}"
    assert asking_for_usage(body) is None


@pytest.mark.parametrize(
    ("endpoint", "format_", "can"),
    [
        ("chat/completions", "openai", True), ("my-gpt/chat/completions", "openai", True), ("completions", "openai", True), ("v1beta/openai/chat/completions", "openai", True),
        ("responses", "openai", False), ("v1/chat", "openai", False), ("chat/completions/chatcmpl-1", "openai", False), ("xcompletions", "openai", False),
        ("chat/completions", "anthropic", False), ("v1/messages", "anthropic", False),
    ],
)  # fmt: skip
def test_only_completions_in_openais_format_are_asked_for_usage(endpoint: str, format_: str, can: bool) -> None:
    assert can_be_asked(endpoint, format_) is can


# The response

FILTER = b'{"choices":[],"id":"","model":"","prompt_filter_results":[{"prompt_index":0}],"usage":null}'
DELTA = b'{"id":"c","choices":[{"index":0,"delta":{"content":"\\"usage\\":{ }\\n\\n"}}],"usage":null}'
FINISH = b'{"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}'
USAGE = b'{"id":"c","choices":[],"usage":{"prompt_tokens":10,"completion_tokens":5}}'
SPACED = b'{ "usage" : { "prompt_tokens" : 10 } , "id": "c", "choices" : [ ] }'
BEFORE, AFTER = [FILTER, DELTA, FINISH], [b"[DONE]"]


def events(*data: bytes, end: bytes = b"\n") -> bytes:
    return b"".join(b"data: " + each + end * 2 for each in data)


def filtered(data: bytes, splits: list[int]) -> bytes:
    """Filter chunks as relay/calls/transforms.py does."""
    remover, forwarded = UsageEventRemover(), []
    for start, end in itertools.pairwise([0, *splits, len(data)]):
        if chunk := data[start:end]:
            forwarded.append(chunk if remover.passes(chunk) else remover.feed(chunk))
    return b"".join(forwarded) + remover.rest()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("usage", [USAGE, SPACED], ids=["plain", "spaced"])
def test_only_the_usage_event_is_removed_wherever_the_bytes_are_split(usage: bytes, end: bytes) -> None:
    whole, rest = events(*BEFORE, usage, *AFTER, end=end), events(*BEFORE, *AFTER, end=end)
    assert without_usage_event(whole) == rest
    for cut in range(len(whole) + 1):
        assert filtered(whole, [cut]) == rest, cut
    for size in (1, 2, 3, 7, 64):
        assert filtered(whole, list(range(size, len(whole), size))) == rest, size


@given(st.data())
def test_the_result_does_not_depend_on_how_the_bytes_are_split(data: st.DataObject) -> None:
    kinds = [FILTER, DELTA, FINISH, USAGE, SPACED, b"[DONE]", b"", b'{"choices":[],"usage":{}', b'{"choices":[{"a":1}],"choices":[],"usage":{}}', b'{"x":{"choices":[1]},"choices":[],"usage":{}}', b"x" * MAX_EVENT_BYTES, b'{"choices":[],"usage":{"x":"' + b"y" * MAX_EVENT_BYTES + b'"}}']
    pieces = data.draw(st.lists(st.tuples(st.sampled_from([b"data: ", b"event: x\ndata:", b": ping\n", b"\n", b"\r\n"]), st.sampled_from(kinds), st.sampled_from([b"\n\n", b"\r\n\r\n", b"\n"])), max_size=6))
    whole = b"".join(itertools.chain.from_iterable(pieces))
    splits = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    assert filtered(whole, splits) == without_usage_event(whole)


@pytest.mark.parametrize(
    "data",
    [
        FILTER, DELTA, FINISH,
        b'{"choices":[],"usage":null}', b'{"choices":[],"usage":0}', b'{"choices":[],"x":{"usage":{}}}', b'{"usage":{}}', b'{"choices":null,"usage":{}}',
        b'{"choices":{},"usage":{}}', b'[{"choices":[],"usage":{}}]', b'{"choices":[],"usage":{}', b'{"choices":[{"delta":{"content":""}}],"usage":{}}',
    ],
)  # fmt: skip
def test_any_other_event_stays(data: bytes) -> None:
    whole = events(DELTA, data, b"[DONE]")
    assert without_usage_event(whole) == whole
    assert all(filtered(whole, [cut]) == whole for cut in range(len(whole)))


def test_one_event_is_removed_and_a_second_stays() -> None:
    assert without_usage_event(events(USAGE, USAGE)) == events(USAGE)
    assert filtered(events(USAGE, USAGE), [5, len(events(USAGE)) + 5]) == events(USAGE)


def test_an_event_of_several_data_lines_is_removed() -> None:
    usage = b'id: 7\nevent: message\ndata: {"choices": [],\ndata:  "usage": {"prompt_tokens": 1}}\n\n'
    assert without_usage_event(events(DELTA) + usage + events(b"[DONE]")) == events(DELTA, b"[DONE]")


def test_a_stream_that_ends_within_the_event_is_unchanged() -> None:
    cut = events(DELTA) + b"data: " + USAGE
    assert filtered(cut, [len(cut) - 9]) == cut == without_usage_event(cut)


def test_whole_events_without_usage_are_not_buffered_or_split() -> None:
    remover = UsageEventRemover()
    assert all(remover.passes(events(each, end=end)) for each in (FILTER, DELTA, b"[DONE]") for end in (b"\n", b"\r\n"))
    assert not remover.passes(events(USAGE)) and not remover.passes(events(SPACED)) and not remover.passes(events(DELTA)[:-1])


def test_an_event_with_a_choice_is_forwarded_before_it_ends() -> None:
    remover = UsageEventRemover()
    audio = b'data: {"id":"c","created":1,"choices":[{"index":0,"delta":{"audio":{"data":"'
    assert remover.feed(events(DELTA) + audio) == events(DELTA) + audio
    assert remover.feed(b"UklGR" * 100) == b"UklGR" * 100
    end = b'"}}}],"usage":null}\n\n'
    assert remover.feed(end + events(USAGE, b"[DONE]")) == end + events(b"[DONE]")


def test_only_an_event_that_may_be_the_usage_event_is_buffered() -> None:
    remover = UsageEventRemover()
    assert remover.feed(events(DELTA) + b'data: {"id":"c","choices":[') == events(DELTA)
    assert remover.feed(b'],"usage":{"prompt_tokens":1}}\n\n' + events(b"[DONE]")) == events(b"[DONE]")


@pytest.mark.parametrize("size", [1, 100, 4096])
def test_no_more_than_the_limit_is_buffered(size: int) -> None:
    remover, forwarded = UsageEventRemover(), 0
    piece = b"x" * size
    for _ in range(3 * MAX_EVENT_BYTES // size):
        forwarded += len(remover.feed(piece))
        assert len(remover._held) <= MAX_EVENT_BYTES
    assert forwarded + len(remover.rest()) == 3 * MAX_EVENT_BYTES // size * size and forwarded > MAX_EVENT_BYTES


HOSTILE = [b'"usage":{}', b'data: "usage":{\n\n', b'data: {"choices":[],"usage":{"a":}}\n\n', b'{"a":', b'data: {"a":"\\', b"\n", b"\r", b'data: {"a":1,"b":2,']


@pytest.mark.parametrize("size", [100, 4096, 256 * 1024])
@pytest.mark.parametrize("unit", HOSTILE)
def test_a_hostile_stream_takes_time_in_proportion_to_its_bytes(unit: bytes, size: int) -> None:
    whole = unit * ((1 << 20) // len(unit))
    splits = list(range(size, len(whole), size))
    assert filtered(whole, splits) == whole
    # This takes 0.01 to 0.5 s; a search from the start with each chunk takes a minute.
    assert_cheap(lambda: filtered(whole, splits), 5)


# Refusals


def test_refusals_are_bounded_and_the_oldest_is_forgotten() -> None:
    refusals = UsageRefusals()
    for number in range(1001):
        refusals.add(refusal_key("openai", f"m{number}", "chat/completions"))
    assert ("openai", "m0") not in refusals and ("openai", "m1") in refusals and ("openai", "m1000") in refusals


def test_the_endpoint_identifies_a_call_without_a_model() -> None:
    assert refusal_key("azure-openai", None, "my-gpt/chat/completions") == ("azure-openai", "my-gpt/chat/completions")
    assert len(refusal_key("x", "m" * 5000, "")[1]) == 200
