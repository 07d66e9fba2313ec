"""The model that a call names is replaced in the body, the path and the query, and nowhere else."""

from __future__ import annotations

import json

import pytest

from relay.core.models import (
    body_with_added_model,
    body_with_model,
    path_with_model,
    query_with_model,
)

JSON = "application/json"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{ "model" : "big",\n "n": 1.50 }\n', b'{ "model" : "new",\n "n": 1.50 }\n'),
        (b'{"model_id":"big","text":"hi"}', b'{"model_id":"new","text":"hi"}'),
        (b'{"model":"a","model":"b","model_id":"c"}', b'{"model":"new","model":"new","model_id":"new"}'),
        (b'{"\\u006dodel":"big"}', b'{"\\u006dodel":"new"}'),
        (b'{"model":null}', b'{"model":"new"}'),
        (b'{"x":{"model":"inner"},"model":"big"}', b'{"x":{"model":"inner"},"model":"new"}'),
        (b'\xef\xbb\xbf{"model":"big"}', b'\xef\xbb\xbf{"model":"new"}'),
        (b'{"t":NaN,"u":[-Infinity,Infinity],"model":"big"}', b'{"t":NaN,"u":[-Infinity,Infinity],"model":"new"}'),
        (b'{"x":"half \\ud83d","model":"big","y":"NaN"}', b'{"x":"half \\ud83d","model":"new","y":"NaN"}'),
        (b'{"x":"caf\xe9","model":"big"}', b'{"x":"caf\xe9","model":"new"}'),
        (b'{"x":"a\x01\nb","model":"big"}', b'{"x":"a\x01\nb","model":"new"}'),
    ],
)
def test_the_model_is_replaced_and_every_other_byte_stays(before: bytes, after: bytes) -> None:
    assert body_with_model(before, JSON, "new", "openai") == after


@pytest.mark.parametrize("body", [b'{"messages":[]}', b'{"model":{"provider":"x"}}', b'{"model":["a"]}', b'["model"]', b'{"model":"a"', b'{"model":"a","n":1NaN}', b"audio", b""])
def test_a_body_that_names_no_model_or_cannot_be_read_is_unchanged(body: bytes) -> None:
    assert body_with_model(body, JSON, "new", "openai") is body


def test_bodies_for_google_keep_the_prefix_and_each_request_of_a_batch_is_changed() -> None:
    batch = b'{"requests": [{"model":"models/old", "content":{"model":"x"}} , {"model":"models/old"}, 5, {"model":"tunedModels/t"}]}'
    assert body_with_model(batch, JSON, "new", "google") == batch.replace(b"models/old", b"models/new").replace(b"tunedModels/t", b"new")
    assert body_with_model(b'{"model":"models/old"}', JSON, "models/new", "google") == b'{"model":"models/new"}'
    assert body_with_model(b'{"model":"models/old","requests":[{"model":"a"}]}', JSON, "new", "openai") == b'{"model":"new","requests":[{"model":"a"}]}'


def test_a_model_is_written_as_json() -> None:
    assert json.loads(body_with_model(b'{"model":"a"}', JSON, 'q"\\é', "openai")) == {"model": 'q"\\é'}


def test_the_model_of_a_form_is_replaced_and_its_files_stay() -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        + b'name="model"\r\n\r\n' * 10_000
        + b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--b--\r\n'
    )
    assert body_with_model(form, "Multipart/Form-Data; boundary=b", "new", "openai") == form.replace(b"whisper-1", b"new")


@pytest.mark.parametrize(
    ("format_", "after"),
    [("openai", b'{"model":"new","a":1}'), ("cartesia", b'{"model_id":"new","a":1}'), ("elevenlabs", b'{"model_id":"new","a":1}'), ("google", b'{"a":1}'), ("fal", b'{"a":1}'), ("deepgram", b'{"a":1}')],
)
def test_a_model_is_added_under_the_name_that_the_format_uses(format_: str, after: bytes) -> None:
    assert body_with_added_model(b'{"a":1}', "new", format_) == after


def test_a_model_is_added_to_an_empty_object_and_to_nothing_else() -> None:
    assert body_with_added_model(b"\xef\xbb\xbf { }", "new", "openai") == b'\xef\xbb\xbf {"model":"new" }'
    assert [body_with_added_model(body, "new", "openai") for body in (b"[1]", b"{", b"")] == [b"[1]", b"{", b""]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/v1beta/models/gemini-2.5-pro:generateContent", "/v1beta/models/a%2Fb:generateContent"),
        ("/v1/projects/p/locations/l/publishers/google/models/g:streamGenerateContent", "/v1/projects/p/locations/l/publishers/google/models/a%2Fb:streamGenerateContent"),
        ("/v1beta/tunedModels/mine:generateContent", "/v1beta/models/a%2Fb:generateContent"),
        ("/openai/deployments/gpt-5/chat/completions", "/openai/deployments/a%2Fb/chat/completions"),
        ("/v1/chat/completions", None),
        ("/v1/models", None),
    ],
)
def test_the_model_in_a_path_is_replaced(before: str, after: str | None) -> None:
    assert path_with_model(before, "a/b") == after


@pytest.mark.parametrize(
    ("before", "format_", "after"),
    [
        ("a=1&model=old&b=%20", "openai", "a=1&model=n%26&b=%20"),
        ("model_id=old&model=old", "elevenlabs", "model_id=n%26&model=n%26"),
        ("m%6fdel=old", "deepgram", "m%6fdel=n%26"),
        ("submodel=x", "openai", "submodel=x"),
        ("", "openai", ""),
        ("language=en", "deepgram", "language=en&model=n%26"),
    ],
)
def test_the_model_in_a_query_is_replaced_or_added(before: str, format_: str, after: str) -> None:
    assert query_with_model(before, "n&", format_) == after
