"""Bodies made to cost time and memory: what is read from them, and how much work they take."""

from __future__ import annotations

import functools
import json
import tracemalloc
from collections.abc import Callable

import pytest

from relay.core import fields
from relay.core.bounds import estimate
from relay.core.fields import ABSENT, pairs, value
from relay.core.injection import asking_for_usage
from relay.core.models import body_with_model
from relay.core.peek import NOTHING, model_is_plain, paid_fields, peek_body
from relay.core.usage import Estimate
from tests.core.cost import assert_cheap

JSON = "application/json"
BYTES = 5 * 1024 * 1024
"""To decode such a body takes up to a second and 150 MiB."""


def filled(before: bytes, unit: bytes, after: bytes) -> bytes:
    """Return a body of BYTES that repeats `unit`."""
    return before + b",".join([unit] * (BYTES // (len(unit) + 1))) + after


HOSTILE: dict[str, Callable[[], bytes]] = {
    "objects in metadata": lambda: filled(b'{"metadata":[', b"{}", b"]}"),
    "lists as the model": lambda: filled(b'{"model":[', b"[]", b"]}"),
    "numbers": lambda: filled(b'{"messages":[', b"1", b"]}"),
    "strings": lambda: filled(b'{"messages":[', b'""', b"]}"),
    "models at the top": lambda: filled(b"{", b'"model":1', b"}"),
    "limits at the top": lambda: filled(b"{", b'"max_tokens":1', b"}"),
    "limits of a configuration": lambda: filled(b'{"generationConfig":{', b'"maxOutputTokens":1', b"}}"),
    "escapes beside a limit": lambda: b'{"max_tokens":1,"x":"' + b"\\u006d" * (BYTES // 6) + b'"}',
    "nested models": lambda: filled(b'{"tools":[', b'{"model":1}', b"]}"),
    "different keys": lambda: b"{" + b",".join([b'"%x":1' % number for number in range(BYTES // 10)]) + b"}",
    "brackets within brackets": lambda: filled(b'{"x":[', b"[" * 900 + b"]" * 900, b"]}"),
    "a list without an end": lambda: b'{"model":' + b"[" * BYTES,
    "broken at its end": lambda: filled(b'{"model":[', b"{}", b"]"),
    "escaped quotes": lambda: b'{"model":"' + b'\\"' * (BYTES // 2) + b'"}',
    "escapes": lambda: b'{"model":"' + b"\\u006d" * (BYTES // 6) + b'"}',
    "a long name": lambda: b'{"' + b"a" * BYTES + b'":1}',
    "a long model": lambda: b'{"model":"' + b"a" * BYTES + b'"}',
    "whitespace": lambda: b'{"model":' + b" " * BYTES + b'"m"}',
    "whitespace alone": lambda: b" " * BYTES,
    "NaN over and over": lambda: filled(b'{"model":"m","x":[', b"NaN", b"]}")[: 4 << 20] + b"]}",
    "almost NaN": lambda: b'{"model":"m","n":NaN,"x":"' + b"a" * (4 * 1024 * 1024 - 100) + b'"}',
    "escaped surrogates": lambda: b'{"model":"m","x":"' + b"\\ud83d" * (BYTES // 8) + b'"}',
    "UTF-16": lambda: ('{"model":"' + "a" * (BYTES // 2) + '"}').encode("utf-16"),
}
"""Made when a test needs one: every test process imports this module, and all are 100 MB."""


@functools.lru_cache(maxsize=1)  # the tests of one body follow one another
def hostile(name: str) -> bytes:
    return HOSTILE[name]()


FUNCTIONS: dict[str, Callable[[bytes], object]] = {
    "peek": lambda body: peek_body(body, JSON),
    "plain": lambda body: model_is_plain(body, JSON, "m"),
    "estimate": lambda body: estimate("chat", "openai", None, body, None),
    "body_with_model": lambda body: body_with_model(body, JSON, "m", "google"),
    "asking_for_usage": asking_for_usage,
    "paid_fields": paid_fields,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", HOSTILE)
def test_no_body_takes_much_time_or_memory(function: str, name: str) -> None:
    call, body = FUNCTIONS[function], hostile(name)
    assert_cheap(lambda: call(body), 0.3)  # 2 to 25 ms
    tracemalloc.start()
    call(body)
    _, max_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A change copies the body; to decode it takes 30 times as much.
    assert max_bytes < 3 * BYTES


@pytest.mark.parametrize("size", [1000, fields._ALWAYS_READ_BYTES + 1000])
def test_a_large_body_is_read_like_a_small_one(size: int) -> None:
    sent = {
        "messages": [{"content": "x" * size, "model": "inner"}], "model": "m", "stream": True, "max_tokens": 5,
        "n": 2, "metadata": {"user_id": "u"}, "input": "hello",
    }  # fmt: skip
    body = json.dumps(sent).encode()
    found = peek_body(body, JSON)
    assert (found.model, found.stream, found.user) == ("m", True, "u") and model_is_plain(body, JSON, "m")
    assert estimate("chat", "openai", None, body, None) == Estimate(len(body) // 4, 5, 2)
    assert json.loads(body_with_model(body, JSON, "other", "openai")) == sent | {"model": "other"}
    changed = asking_for_usage(body)
    assert changed is not None and json.loads(changed) == sent | {"stream_options": {"include_usage": True}}
    assert json.loads(paid_fields(body))["input"] == "hello"


def test_a_body_of_millions_of_values_is_not_read_and_is_counted_by_its_size() -> None:
    body = filled(b'{"model":"m","max_tokens":5,"x":[', b"{}", b"]}")
    assert peek_body(body, JSON) == NOTHING and estimate("chat", "openai", None, body, None) == Estimate(len(body) // 4)
    assert not model_is_plain(body, JSON, "m")
    assert body_with_model(body, JSON, "other", "openai") == body and asking_for_usage(body) is None


@pytest.mark.parametrize(("size", "model"), [(1000, "m" * 1000), (65 * 1024, None)])
def test_a_field_of_more_than_64_kib_is_not_decoded(size: int, model: str | None) -> None:
    assert peek_body(json.dumps({"model": "m" * size}).encode(), JSON).model == model


@pytest.mark.parametrize("pad", [b"", b'"pad":"' + b"x" * (fields.LARGE_BYTES + 1) + b'",'], ids=["small", "large"])
@pytest.mark.parametrize(
    ("text", "model", "plain"),
    [
        (b'"model":"a"', "a", True),
        (b'"model":"a","model":"b"', "b", False),
        (b'"model":"a","model":"a"', "a", False),
        (b'"model":"a","\\u006dodel":"b"', "b", False),
        (b'"\\u006dodel":"a"', "a", True),
        (b'"model":"a","model_id":"b"', "a", False),
        (b'"model":"a","x":{"model":"b"},"y":["model"]', "a", True),
        (b'"x":{"model":"b"}', None, True),
        (b'"model":5', None, False),
        (b'"model":"a","x":"\\"model\\":1,\\u0022"', "a", True),
        (b'"a":1', None, True),
        (b'"model":"a",', None, False),
        (b'"model" "a"', None, False),
        (b'"model":"a"} {', None, False),
        (b'"model":"a","x":truex', None, False),
    ],
)
def test_a_model_is_plain_if_every_parser_finds_the_same(text: bytes, model: str | None, plain: bool, pad: bytes) -> None:
    body = b" {" + pad + text + b" }\n"
    assert peek_body(body, JSON).model == model
    assert model_is_plain(body, JSON, model) is plain


@pytest.mark.parametrize(
    ("body", "plain"),
    [
        (b"[1, 2]", True), (b'["model"]', False), (b'"text"', True), (b"[1,", False), (b"", True), (b"{}", True), (b" { } ", True), (b"{ } x", False),
        (b'\xef\xbb\xbf{"model": "a"}', False), (b'\xef\xbb\xbf{"a": "b"}', True), ('{"a": 1}'.encode("utf-16"), False),
    ],
)  # fmt: skip
def test_a_body_that_is_not_an_object_is_plain_only_if_it_cannot_name_a_model(body: bytes, plain: bool) -> None:
    assert model_is_plain(body, JSON, None) is plain


def test_the_pairs_of_an_object_are_found_in_order_with_their_bytes() -> None:
    body = b'{"a" : [1, {"b": "]"}]  ,\n"\\u0061":1.50 , "c":"\xc3\xa9\\"" ,"":{}}'
    found = pairs(body)
    assert found is not None
    assert [(name, bytes(raw)) for name, raw in found] == [("a", b'[1, {"b": "]"}]'), ("a", b"1.50"), ("c", b'"\xc3\xa9\\""'), ("", b"{}")]


def test_the_text_of_msgspecs_error_says_where_it_stopped() -> None:
    """`pairs` reads the offset from the text: a version with another text must not be installed."""
    view = memoryview(b'[1, "]"]   ,2')
    assert fields._behind_value(view, 0) == 11 and fields._behind_value(view[:5], 0) is None


def test_a_value_that_cannot_be_read_is_none() -> None:
    assert value(ABSENT) is None
    found = pairs(b'{"a":"\xff","b":' + b"[" * 5 + b"]" * 5 + b"}")
    assert found is not None and value(found[0][1]) is None and value(found[1][1]) == [[[[[]]]]]


def test_a_form_whose_lines_all_look_like_a_model_takes_linear_time() -> None:
    form = b'name="model"\r\n' * (64 * 1024 // 14)
    assert peek_body(form, "multipart/form-data; boundary=b") == NOTHING
    # This takes 4 ms; quadratic work takes 1 s.
    assert_cheap(lambda: peek_body(form, "multipart/form-data; boundary=b"), 0.2)
