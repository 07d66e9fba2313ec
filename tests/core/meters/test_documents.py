"""Fields found in streamed JSON are those that `json.loads` finds, however the bytes are split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.fields import MAX_FIELD_BYTES
from relay.core.meters import documents
from relay.core.meters.documents import Scanner, Wanted
from relay.core.meters.events import MAX_WHOLE_BYTES, Events

PLACES = ("id", "usage", "response.usage", "response.model", "a.b.c")
WANTED = Wanted(*PLACES)


def expected_fields(document: Any) -> dict[str, Any]:
    """Return the wanted fields of a document that json.loads has read."""
    found = {}
    for place in PLACES:
        value = document
        for name in place.split("."):
            value = value[name] if isinstance(value, dict) and name in value else ...
        if value is not ...:
            found[place] = value
    return found


def decode_fields(found: Any) -> dict[str, Any]:
    return {place: json.loads(raw) for place, raw in found.items()}


def scan(pieces: Sequence[bytes]) -> list[dict[str, Any]]:
    scanner = Scanner(WANTED)
    return [decode_fields(each) for piece in pieces for each in scanner.feed(piece)]


def read_events(pieces: Sequence[bytes], needle: bytes = b'"usage') -> list[dict[str, Any]]:
    events = Events(WANTED, needle)
    return [decode_fields(each) for piece in pieces for each in events.feed(piece)]


def split_at(data: bytes, splits: Sequence[int]) -> list[bytes]:
    ends = sorted(min(at, len(data)) for at in splits)
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12) | st.sampled_from(['"', "\\", '\\"', "{", "}", "[", "]", "usage", "a\nb", "é", "\u2028", "😀"])
NAMES = st.sampled_from(["id", "usage", "response", "model", "a", "b", "c", "Usage", "usag\u0065", "", "us\\age", '"usage"']) | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=20)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=6)
CUTS = st.lists(st.integers(0, 400), max_size=10)


@given(document=OBJECTS, splits=CUTS, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_an_object_is_read_as_json_loads_reads_it(document: Any, splits: list[int], ascii_only: bool, indent: int | None) -> None:
    data = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode()
    assert scan(split_at(data, splits)) == [expected_fields(document)]
    assert decode_fields(WANTED.of(data)) == expected_fields(document)


@given(listed=st.lists(OBJECTS, max_size=4), splits=CUTS, between=st.sampled_from(["", "\n", "\r\n", " \t\n\n", "\x1e"]))
def test_each_object_of_json_lines_is_read(listed: list[Any], splits: list[int], between: str) -> None:
    data = between.join(json.dumps(each) for each in listed).encode()
    assert scan(split_at(data, splits)) == [expected_fields(each) for each in listed]


@given(listed=st.lists(OBJECTS, max_size=4), splits=CUTS)
def test_each_object_of_an_array_is_read(listed: list[Any], splits: list[int]) -> None:
    data = json.dumps(listed, indent=1).encode()
    assert scan(split_at(data, splits)) == [expected_fields(each) for each in listed]


@given(listed=st.lists(OBJECTS, max_size=4), splits=CUTS, end=st.sampled_from(["\n", "\r\n", "\r"]), mark=st.booleans(), space=st.sampled_from(["", " "]))
def test_server_sent_events_are_read_as_the_standard_says(listed: list[Any], splits: list[int], end: str, mark: bool, space: str) -> None:
    lines = [["event: x", "id: 7", f"data:{space}{json.dumps(each)}", ": usage", ""] for each in listed]
    text = end.join(line for event in lines for line in [*event, ""][:-1]) + end
    data = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
    found = read_events(split_at(data, splits))
    assert found == [wanted for each in listed if (wanted := expected_fields(each))]


EVERY_BYTE = {
    "escaped keys": b'{"us\\u0061ge": {"x": 1}, "\\"usage": 2, "i\\u0064": "\\u00e9\\\\\\""}',
    "an array of two": b'[{"usage": 1, "response": {"usage": [1, {"usage": 2}]}}, {"id": null}]',
    "empty things": b' {"a": {}, "id": "", "response": {}, "usage": []} {} {"usage": {}} ',
    "levels": b'{"a": {"b": {"c": {"d": [[[[[[["]}"]]]]]]]}}}, "usage": -1.5e-7}',
    "texts of brackets": b'{"text": "}{][\\\\\\"", "usage": "{\\"usage\\": 3}", "id": true}',
    "a key twice": b'{"usage": 1, "usage": {"x": 2}}',
}


@pytest.mark.parametrize("name", EVERY_BYTE)
def test_a_split_at_any_byte_changes_nothing(name: str) -> None:
    data = EVERY_BYTE[name]
    whole = scan([data])
    decoder, at, expected, text = json.JSONDecoder(), 0, [], data.decode().strip()
    while at < len(text):
        document, at = decoder.raw_decode(text, at)
        expected += [expected_fields(each) for each in (document if isinstance(document, list) else [document])]
        at += len(text[at:]) - len(text[at:].lstrip())
    assert whole == expected
    for at in range(len(data) + 1):
        assert scan([data[:at], data[at:]]) == whole
    assert scan([bytes([byte]) for byte in data]) == whole


STREAM = b'\xef\xbb\xbf: hello\r\n\r\nevent: a\r\ndata: {"id": "1"}\r\n\r\ndata: {"usage": {"x": 1}}\n\ndata:{"usage":\ndata: {"x": 2}}\n\n\ndata: {"usage": {"x": 3}}\r\rdata: [DONE]\n\n'


def test_events_are_the_same_if_split_at_any_byte() -> None:
    expected = [{"id": "1"}, {"usage": {"x": 1}}, {"usage": {"x": 2}}, {"usage": {"x": 3}}]
    assert read_events([STREAM]) == expected
    for at in range(len(STREAM) + 1):
        assert read_events([STREAM[:at], STREAM[at:]]) == expected, at
    assert read_events([bytes([byte]) for byte in STREAM]) == expected


def test_an_event_without_its_end_is_not_reported() -> None:
    assert read_events([b'data: {"usage": {"x": 1}}\n']) == []


def test_once_the_model_is_known_only_events_with_an_object_after_the_needle_are_read() -> None:
    events = Events(WANTED, b'"usage')
    events.named()
    found = [decode_fields(each) for each in events.feed(b'data: {"id": 1, "usage": null}\n\ndata: {"id": 2}\n\ndata: {"id": 3, "usage" : {}}\n\n')]
    assert found == [{"id": 3, "usage": {}}]


@pytest.mark.parametrize("size", [1000, 4096, MAX_WHOLE_BYTES])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\ndata: more\n\n"])
def test_a_long_event_is_scanned_and_not_buffered(size: int, end: bytes) -> None:
    data = b'event: x\ndata: {"text": "' + b"x" * (1 << 20) + b'", "response": {"usage": {"x": 1}}}' + end + b'data: {"id": 5}\n\n'
    events, found, most = Events(WANTED, b'"usage'), [], 0
    for at in range(0, len(data), size):
        found += [decode_fields(each) for each in events.feed(data[at : at + size])]
        most = max(most, sum(map(len, events._held)))
    assert found == [{"response.usage": {"x": 1}}, {"id": 5}]
    assert most <= MAX_WHOLE_BYTES + size


def test_a_field_over_the_size_limit_is_reported_as_empty() -> None:
    """Whole and in pieces; the fields beside it are read."""
    data = b'{"usage": "' + b"x" * MAX_FIELD_BYTES + b'", "id": 1}'
    scanner = Scanner(WANTED)
    pieces = [dict(each) for at in range(0, len(data), 999) for each in scanner.feed(data[at : at + 999])]
    assert pieces == [WANTED.of(data)] == [{"usage": b"", "id": b"1"}]


def test_a_wanted_field_is_buffered_up_to_its_size_limit() -> None:
    scanner = Scanner(WANTED)
    for piece in [b'{"usage": "', *[b"x" * 4096] * 100]:
        scanner.feed(piece)
        assert sum(map(len, scanner._take or [])) + len(scanner._held) <= MAX_FIELD_BYTES


@pytest.mark.parametrize("depth", [3, 4, 5, 50, 1000])
def test_deep_nesting_is_skipped(depth: int) -> None:
    data = b'{"x": ' + b"[" * depth + b'"usage"' + b"]" * depth + b', "usage": 1}'
    for size in (1, 7, len(data)):
        assert scan([data[at : at + size] for at in range(0, len(data), size)]) == [{"usage": 1}]


def test_text_that_is_not_json_is_skipped_and_the_object_after_it_is_read() -> None:
    for junk in (b"hello", b"]]}}", b'"text" ', b"\x00\xff", b"null 5 , :"):
        assert scan([junk, b'\n{"usage": 1}']) == [{"usage": 1}], junk
    assert WANTED.of(b"[1]") == WANTED.of(b'{"usage": ') == WANTED.of(b"") == {}


def steps_of(data: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Count the bytes that the scanner's patterns match; each match is one call into C."""
    matched_bytes = 0

    class Counting:
        def __init__(self, pattern: Any) -> None:
            self.pattern = pattern

        def match(self, text: bytes, at: int) -> Any:
            nonlocal matched_bytes
            found = self.pattern.match(text, at)
            matched_bytes += 1 + (found.end() - at if found is not None else 0)
            return found

    for name in ("_BALANCED", "_REST_OF_STRING", "_SPACE", "_KEY", "_SCALAR"):
        monkeypatch.setattr(documents, name, Counting(getattr(documents, name)))
    scanner = Scanner(WANTED)
    for at in range(0, len(data), size):
        scanner.feed(data[at : at + size])
    monkeypatch.undo()
    return matched_bytes


@pytest.mark.parametrize("size", [16, 1000, 1 << 20])
@pytest.mark.parametrize("unit", [b"x", b'\\"', b"{}", b'"a":{"b":[1,2]},', b" "], ids=["text", "escapes", "objects", "nested", "space"])
def test_work_is_proportional_to_the_bytes(unit: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start = b'{"text": "' if unit in (b"x", b'\\"') else b'{"more": [' if unit == b"{}" else b'{"a": {'
    once, twice = ((start + unit * (count // len(unit))) for count in (40_000, 80_000))
    first, second = steps_of(once, size, monkeypatch), steps_of(twice, size, monkeypatch)
    assert second <= 2.2 * first + 4 * len(once) and second <= 12 * len(twice)


def test_256_mib_without_a_boundary_are_not_buffered() -> None:
    """64 MiB show it, and are faster."""
    scanner, events, chunk = Scanner(WANTED), Events(WANTED, b'"usage'), b"x" * (1 << 20)
    scanner.feed(b'{"text": "')
    events.feed(b'data: {"text": "')
    for _ in range(64):
        assert not scanner.feed(chunk) and not events.feed(chunk)
        assert len(scanner._held) < 300 and sum(map(len, events._held)) <= MAX_WHOLE_BYTES + len(chunk)
    assert [decode_fields(each) for each in scanner.feed(b'", "usage": 1}')] == [{"usage": 1}]
    assert [decode_fields(each) for each in events.feed(b'", "usage": 1}\n\n')] == [{"usage": 1}]


def test_the_scanner_gives_up_on_json_of_brackets_alone_and_reports_it() -> None:
    scanner = Scanner(WANTED)
    scanner.feed(b'{"usage": 1, "a": {"b": ' + b"[" * 200_000)
    assert scanner.gave_up and not scanner.feed(b'"usage": 2}}') and not scanner._fields


@pytest.mark.parametrize("size", [1, 100, 4096, 1 << 16, 1 << 20])
def test_a_million_bytes_of_short_lines_are_read_to_the_end_in_any_pieces(size: int) -> None:
    line = b'{"id":1,"usage":{"n":2},"response":{"model":"m"},"a":{}}\n'
    data, scanner = line * (1_000_000 // len(line)), Scanner(WANTED)
    found = sum(len(scanner.feed(data[at : at + size])) for at in range(0, len(data), size))
    assert found == len(data) // len(line) and not scanner.gave_up


def test_the_fields_of_a_truncated_document_are_reported() -> None:
    scanner = Scanner(WANTED)
    scanner.feed(b'{"id": 7, "usage": {"x": 1}, "text": "and')
    assert decode_fields(scanner._fields) == {"id": 7, "usage": {"x": 1}}
