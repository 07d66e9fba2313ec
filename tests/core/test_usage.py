"""Tokens: what a call may use, and what its answer says that it used, however its bytes are cut."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.limits import Rule, key
from relay.core.metadata import metadata
from relay.core.usage import Estimate, TokenMeter, Usage, estimate, readable_encodings

BODIES: dict[str, tuple[bytes, Usage | None]] = {
    "chat": (b'{"id": 1, "usage": {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}}', Usage(7, 3)),
    "chat stream": (b'data: {"usage": null}\n\ndata: {"choices": [], "usage": {"prompt_tokens":7,"completion_tokens":3}}\n\ndata: [DONE]\n\n', Usage(7, 3)),
    "embeddings": (b'{"usage": {"prompt_tokens": 7, "total_tokens": 7}}', Usage(7, 0)),
    "anthropic": (b'data: {"message":{"usage":{"input_tokens":4,"cache_read_input_tokens":3,"output_tokens":1}}}\n\ndata: {"usage":{"output_tokens":9}}\n\n', Usage(7, 9)),
    "gemini": (b'{"usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 2, "thoughtsTokenCount": 5}}', Usage(7, 7)),
    "braces in texts": (b'{"usage": {"note": "} \\" }", "input_tokens": 7, "output_tokens": 3}}', Usage(7, 3)),
    "a text that quotes one": (b'{"content": "{\\"usage\\": {\\"prompt_tokens\\": 900}}"}', None),
    "nonsense": (b'{"usage": {"prompt_tokens": "many", "completion_tokens": true}}', None),
    "cut": (b'{"usage": {"prompt_tokens": 7, "compl', None),
    "none": (b"\x00\xff no json", None),
}


@pytest.mark.parametrize("name", BODIES)
@given(data=st.data())
def test_any_split_of_the_bytes_gives_the_same_usage(name: str, data: st.DataObject) -> None:
    body, expected = BODIES[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    meter = TokenMeter()
    for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        meter.feed(body[start:end])
    assert meter.usage == expected


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_answer_is_read_byte_by_byte_too(coding: str) -> None:
    body, expected = BODIES["chat stream"]
    packed = gzip.compress(body) if coding == "gzip" else zlib.compress(body)
    meter = TokenMeter(coding)
    for at in range(len(packed)):
        meter.feed(packed[at : at + 1])
    assert meter.usage == expected


def test_a_bomb_and_a_broken_coding_are_borne() -> None:
    bomb = TokenMeter("gzip")
    bomb.feed(gzip.compress(b"\0" * (80 << 20)))
    broken = TokenMeter("gzip")
    broken.feed(b"not gzip at all")
    broken.feed(BODIES["chat"][0])
    assert bomb.usage is None and broken.usage is None


def test_a_usage_that_never_ends_is_not_kept() -> None:
    meter = TokenMeter()
    for _ in range(100):
        meter.feed(b'{"usage": {' + b"x" * 1000)
    assert len(meter._held) < 20_000


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_tokens": 50}, 50),
        ({"max_completion_tokens": 70, "max_tokens": 50}, 70),
        ({"max_output_tokens": 60, "n": 3}, 180),
        ({"generationConfig": {"maxOutputTokens": 40}}, 40),
        ({"max_tokens": -5}, 1000),
        ({"max_tokens": "50", "n": "3"}, 1000),
        ({}, 1000),
    ],
)
def test_a_call_may_use_its_body_and_the_answer_that_it_allows(body: dict[str, object], expected: int) -> None:
    sent = json.dumps(body).encode()
    assert estimate(sent).tokens(1000) == len(sent) // 4 + expected


def test_what_is_no_json_is_counted_by_its_size() -> None:
    assert estimate(b"x" * 400) == Estimate(100)


@pytest.mark.parametrize(
    ("accepted", "sent"),
    [(["gzip, br"], "gzip"), (["br", "deflate;q=0.5"], "deflate;q=0.5"), (["zstd"], "identity"), (["*"], "identity"), ([""], "identity")],
)
def test_only_codings_that_can_be_read_are_asked_for(accepted: list[str], sent: str) -> None:
    assert readable_encodings(accepted) == sent


@pytest.mark.parametrize(
    ("header", "entries"),
    [
        ('{"user": "ann", "n": 1, "on": true, "x": 1.5}', {"user": "ann", "n": 1, "on": True, "x": 1.5}),
        ('{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6}', {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}),
        ('{"cf.user": "x", "a": 1}', {"a": 1}),
        ('{"a": 1, "b": null}', {}),
        ('{"a": {"b": 1}}', {}),
        ("[1]", {}),
        ("not json", {}),
        ("[" * 100_000, {}),
        (None, {}),
    ],
)
def test_metadata_is_read_as_cloudflare_reads_it(header: str | None, entries: dict[str, object]) -> None:
    assert metadata(header) == entries


def test_values_that_callers_make_up_cannot_take_each_others_place() -> None:
    rule = Rule(name="r", counts="requests", amount=1)
    assert key(rule, ["a|b", "c"]) != key(rule, ["a", "b|c"])
    assert len(key(rule, ["x" * 100_000])) < 70
