"""A form is read only if every parser would read it in the same way."""

from __future__ import annotations

import pytest

from relay.core.forms import form_fields
from relay.core.peek import model_is_plain, peek_body
from tests.core.cost import assert_cheap

TYPE = "multipart/form-data; boundary=b"


def part(value: bytes, *headers: bytes) -> bytes:
    return b"--b\r\n" + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + value + b"\r\n"


def named(name: bytes, value: bytes = b"m", more: bytes = b"") -> bytes:
    return part(value, b'Content-Disposition: form-data; name="' + name + b'"' + more)


END = b"--b--"


@pytest.mark.parametrize("boundary", ["b", '"b"', "b; charset=utf-8"])
def test_fields_are_found_with_the_offsets_of_their_values(boundary: str) -> None:
    body = named(b"file", b"\x00--b\r\n--c", b'; filename="a;name=b"') + part(b"", b"content-disposition:form-data; name=model_id") + END
    fields = form_fields(b"before it\r\n" + body, f"multipart/form-data; boundary={boundary}")
    assert fields is not None and [f.name for f in fields] == [b"file", b"model_id"]
    assert [(b"before it\r\n" + body)[f.start : f.end] for f in fields] == [b"\x00--b\r\n--c", b""]


@pytest.mark.parametrize(
    "body",
    [
        named(b"model"),  # no end
        b"",
        named(b"a") + b"--bx\r\n" + END,
        b'--b\nContent-Disposition: form-data; name="model"\n\nm\n--b--',
        part(b"m", b'Content-Disposition: form-data; name="a"; name="model"') + END,
        part(b"m", b'Content-Disposition: form-data; name="a"', b'Content-Disposition: form-data; name="model"') + END,
        part(b"m", b"Content-Disposition: form-data; name=a; name*=utf-8''model") + END,
        part(b"m", b"Content-Disposition: form-data;", b' name="model"') + END,
        part(b"bQ==", b'Content-Disposition: form-data; name="model"', b"Content-Transfer-Encoding: base64") + END,
        part(b"m", b'Content-Disposition: form-data; name="mo\\del"') + END,
        part(b"m") + END,
        b"--b\r\n" + b"X: " + b"x" * 9000 + b"\r\n\r\nm\r\n" + END,
        named(b"x") * 1001 + END,
    ],
)  # fmt: skip
def test_an_ambiguous_form_is_not_read(body: bytes) -> None:
    assert form_fields(body, TYPE) is None
    assert not model_is_plain(body, TYPE, None) and peek_body(body, TYPE).model is None


def test_a_form_without_a_boundary_is_not_read() -> None:
    assert form_fields(named(b"model") + END, "multipart/form-data") is None


@pytest.mark.parametrize(("media_type", "boundary"), [("multipart/form-data", b"b"), ("Multipart/Form-DATA", b"----WebKitFormBoundaryAbC")])
def test_a_model_after_a_large_file_is_found(media_type: str, boundary: bytes) -> None:
    content_type = f"{media_type}; boundary={boundary.decode()}"
    body = (named(b"file", b"x" * 100_000) + named(b"model", b"whisper-1") + END).replace(b"--b", b"--" + boundary)
    assert peek_body(body, content_type).model == "whisper-1" and model_is_plain(body, content_type, "whisper-1")


def test_a_form_that_names_two_models_is_not_plain() -> None:
    for twice in (named(b"model") + named(b"model", b"n"), named(b"model") + named(b"model_id", b"n")):
        assert not model_is_plain(twice + END, TYPE, "m")
    assert model_is_plain(named(b"models") + END, TYPE, None)


def test_a_form_of_delimiters_alone_takes_linear_time() -> None:
    for unit in (b"--b\r\n", b"\r\n--b", b"--b\r\n\r\n\r\n"):
        body = unit * 1_000_000
        assert_cheap(lambda body=body: form_fields(body, TYPE), 0.3)  # 10 ms
