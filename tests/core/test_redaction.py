"""Secrets are taken out of bytes, in every spelling that stands for them, and no part of one is left at a cut."""

from __future__ import annotations

import base64
import html
import json
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.redaction import MARK, Redactor

PLAIN = "sk-plain_Key.0123456789~x"
ODD = 'a+b/c="q\\&<z>\' ü:%'
BASIC = base64.b64encode(b"user:pass+word").decode()


def _net(secret: str) -> str:
    """As .NET writes JSON: everything but letters and digits escaped."""
    return "".join(each if each.isascii() and each.isalnum() else f"\\u{ord(each):04X}" for each in secret)


SPELLINGS = {
    "as it is": lambda s: s, "URL": lambda s: quote(s, safe=""), "URL, lower case": lambda s: quote(s, safe="").lower() if s != PLAIN else s, "form": quote_plus,
    "JSON": lambda s: json.dumps(s)[1:-1], "JSON within JSON": lambda s: json.dumps(json.dumps(s))[3:-3], "JSON of PHP": lambda s: json.dumps(s).replace("/", "\\/")[1:-1],
    "JSON of .NET": _net, "HTML": html.escape,
}  # fmt: skip


@pytest.mark.parametrize("secret", [PLAIN, ODD])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_found(secret: str, spelling: str) -> None:
    if spelling == "JSON of .NET" and secret == PLAIN:
        secret = PLAIN.replace(".", "").replace("-", "").replace("_", "").replace("~", "")
    spelled = SPELLINGS[spelling](secret).encode()
    redactor = Redactor([secret])
    assert redactor.redact(b"\xff<" + spelled + b">\x00" + spelled) == b"\xff<" + MARK + b">\x00" + MARK
    assert len(spelled) <= redactor.longest


def test_basic_credentials_are_found_encoded_and_decoded() -> None:
    redactor = Redactor([f"Basic {BASIC}", BASIC])
    for text in (f"Basic {BASIC}", BASIC, "user:pass+word", "pass+word", "pass%2Bword"):
        assert b"pass" not in redactor.redact(text.encode()) and BASIC.encode() not in redactor.redact(text.encode())


def test_one_secret_within_another_leaves_nothing() -> None:
    redactor = Redactor(["inner-secret", "outer-inner-secret-outer"])
    assert redactor.redact(b"(outer-inner-secret-outer inner-secret)") == b"(" + MARK + b" " + MARK + b")"


@given(st.binary(max_size=80), st.binary(max_size=80), st.integers(0, 200))
def test_no_part_of_a_key_is_left_at_any_cut(before: bytes, after: bytes, most: int) -> None:
    kept = Redactor([PLAIN]).redact(before + PLAIN.encode() + after, most)
    whole = before + MARK + after
    assert kept == (whole[:most] if most <= len(before) else before + MARK + after[: max(0, most - len(before) - len(PLAIN))])


def test_a_large_body_is_searched_to_its_end_and_across_the_pieces_of_the_search() -> None:
    size = 1024 * 1024
    for at in (0, size - 5, size, 2 * size - 1):
        body = bytearray(b"x" * (2 * size + 100))
        body[at : at + len(ODD.encode())] = ODD.encode()
        assert MARK in Redactor([ODD]).redact(bytes(body)) and ODD.encode() not in Redactor([ODD]).redact(bytes(body))


def test_nothing_to_find_gives_the_same_bytes_back() -> None:
    data = b"\x80\xff nothing here"
    assert Redactor([PLAIN, ODD, "abc"]).redact(data) is data
    assert Redactor(()).longest == 0
