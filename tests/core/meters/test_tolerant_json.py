"""Typed fields out of malformed JSON: a field of the wrong type is left out and counted, the fields
beside it are read.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.meters.tolerant_json import (
    Count,
    IgnoredFields,
    Money,
    Reader,
    Seconds,
    count_of,
    milliseconds,
    nano_usd,
    text_of,
)


class Inner(msgspec.Struct):
    a: Count | None = None
    b: Count | None = None


class Outer(msgspec.Struct):
    tokens: Count | None = None
    seconds: Seconds | None = None
    cost: Money | Inner | None = None
    name: str | None = None
    flag: bool | None = None
    inner: Inner | None = None
    listed: list[Inner] | None = None


READ = Reader(Outer)
GOOD = {"tokens": 5, "seconds": 1.5, "cost": 0.25, "name": "n", "flag": True, "inner": {"a": 1, "b": 2}, "listed": [{"a": 3}]}
EXPECTED = Outer(5, 1.5, Decimal("0.25"), "n", True, Inner(1, 2), [Inner(3)])


def read(document: Any) -> tuple[Outer, int]:
    ignored = IgnoredFields()
    return READ(json.dumps(document).encode(), ignored), ignored.count


def test_fields_of_the_right_type_are_read_and_none_is_counted() -> None:
    assert read(GOOD) == (EXPECTED, 0)
    assert read({"unknown": [1, {"x": 2}]} | GOOD) == (EXPECTED, 0)
    assert read(dict.fromkeys(GOOD)) == (Outer(), 0)
    assert read({}) == read(None) == (Outer(), 0)


WRONG = [
    ("tokens", "5"), ("tokens", -1), ("tokens", 1 << 60), ("tokens", 10**30), ("tokens", 1.5), ("tokens", True), ("tokens", {}), ("tokens", [5]),
    ("seconds", "1.5"), ("seconds", -1), ("seconds", 1e300), ("seconds", []),
    ("cost", True), ("cost", [1]), ("cost", "much"), ("name", 5), ("name", {}), ("flag", 1), ("flag", "true"),
    ("inner", 5), ("inner", "x"), ("inner", [1]), ("listed", 5), ("listed", {"a": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_field_of_the_wrong_type_is_counted_and_the_others_are_read(field: str, value: Any) -> None:
    found, ignored = read(GOOD | {field: value})
    assert ignored == 1 and getattr(found, field) is None
    assert all(getattr(found, name) == getattr(EXPECTED, name) for name in GOOD if name != field)


def test_a_field_of_the_wrong_type_within_a_struct_or_a_list_is_counted() -> None:
    assert read(GOOD | {"inner": {"a": "x", "b": 2}}) == (msgspec.structs.replace(EXPECTED, inner=Inner(None, 2)), 1)
    assert read(GOOD | {"listed": [{"a": 1}, 5, {"a": [], "b": 7}]}) == (msgspec.structs.replace(EXPECTED, listed=[Inner(1), Inner(None, 7)]), 2)


def test_a_field_that_may_be_an_amount_or_an_object_is_read_as_either() -> None:
    assert read({"cost": {"a": 7}}) == (Outer(cost=Inner(7)), 0)
    assert read({"cost": "0.0123"}) == (Outer(cost=Decimal("0.0123")), 0)


@pytest.mark.parametrize("text", [b"", b"5", b'"x"', b"[1]", b'{"tokens": 5', b"\xff", b"[" * 100_000, b'{"tokens":' * 100_000])
def test_text_that_is_not_an_object_is_read_as_an_empty_object_and_counted(text: bytes) -> None:
    ignored = IgnoredFields()
    assert READ(text, ignored) == Outer() and ignored.count == 1


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(GOOD)), inner, max_size=7), max_leaves=12)


@given(st.dictionaries(st.sampled_from(list(GOOD)), JSON, max_size=7))
def test_no_document_raises_and_every_field_has_its_type(document: dict[str, Any]) -> None:
    found, _ = read(document)
    assert msgspec.convert(msgspec.to_builtins(found), Outer) == found


@pytest.mark.parametrize(("raw", "expected", "ignored"), [(b'"a"', "a", 0), (b'""', None, 0), (b"5", None, 0), (b"null", None, 0), (None, None, 0), (b"", None, 0), (b'"%b"' % (b"x" * 257), None, 0), (b'"\\u00e9"', "\u00e9", 0)])
def test_a_name_is_a_short_string(raw: bytes | None, expected: str | None, ignored: int) -> None:
    assert text_of(raw) == expected


@pytest.mark.parametrize(("raw", "expected", "ignored"), [(b"1.5", 1500, 0), (b'"8"', 8000, 0), (b"null", None, 0), (None, None, 0), (b"-1", None, 1), (b"9" * 5000, None, 1), (b'"many"', None, 1), (b"{}", None, 1)])
def test_seconds_are_a_number_or_a_number_in_a_string(raw: bytes | None, expected: int | None, ignored: int) -> None:
    counted = IgnoredFields()
    assert (milliseconds(raw, counted), counted.count) == (expected, ignored)


@pytest.mark.parametrize(("raw", "expected", "ignored"), [(b"7", 7, 0), (b"null", None, 0), (b"-1", None, 1), (b'"7"', None, 1)])
def test_a_count_is_a_whole_number(raw: bytes, expected: int | None, ignored: int) -> None:
    counted = IgnoredFields()
    assert (count_of(raw, counted), counted.count) == (expected, ignored)


@pytest.mark.parametrize(("usd", "expected"), [(None, None), ("0", 0), ("0.0000000005", 0), ("1.5", 1_500_000_000), ("-1", None), ("NaN", None), ("Infinity", None), ("1e7", None), ("1e999999", None)])
def test_amounts_have_bounds(usd: str | None, expected: int | None) -> None:
    assert nano_usd(None if usd is None else Decimal(usd)) == expected
