"""The estimate of what a call may use before it is sent, and the keys that it is counted under."""

from __future__ import annotations

import json

import pytest

from relay.core.bounds import estimate
from relay.core.limits import key_part
from relay.core.metadata import parse_metadata
from relay.core.usage import Estimate


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_tokens": 50}, 50),
        ({"max_completion_tokens": 70, "max_tokens": 50}, 70),
        ({"max_output_tokens": 60, "n": 3}, 180),
        ({"generationConfig": {"maxOutputTokens": 40}}, 40),
        ({"max_tokens": -5}, 1000),
        ({"max_tokens": "50", "n": "3"}, 150),
        ({"max_tokens": "many"}, 1000),
        ({}, 1000),
    ],
)
def test_the_estimate_is_the_body_and_the_response_that_the_request_allows(body: dict[str, object], expected: int) -> None:
    sent = json.dumps(body).encode()
    kind = "generate" if "generationConfig" in body else "responses" if "max_output_tokens" in body else "chat"
    assert estimate(kind, "openai", None, sent, None).tokens(1000) == len(sent) // 4 + expected


def test_a_body_that_is_not_json_is_counted_by_its_size() -> None:
    assert estimate("chat", "openai", None, b"x" * 400, None) == Estimate(100)


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
    assert parse_metadata(header) == entries


def test_values_from_callers_cannot_collide_in_a_key() -> None:
    values = ("a|b", "a", "b|c", "", "=client", "client")
    parts = {key_part(value, "client") for value in values}
    # `|` separates the parts of a key: no part may hold one.
    assert len(parts) == len(values) and not any("|" in each for each in parts)
    for hostile in ("x" * 100_000, "\ud800", "\r\n|", "é" * 99):
        assert len(key_part(hostile, "client").encode()) < 70
