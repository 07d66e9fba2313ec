"""Secrets are removed from bytes in every spelling, and a truncation leaves no part of one."""

from __future__ import annotations

import base64
import html
import json
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.redaction import MARK, Redactor, Secrets

PLAIN = "sk-plain_Key.0123456789~x"
ODD = 'a+b/c="q\\&<z>\' ü:%'
BASIC = base64.b64encode(b"user:pass+word").decode()


def _escape_like_net(secret: str) -> str:
    """Escape everything but letters and digits, as .NET writes JSON."""
    return "".join(each if each.isascii() and each.isalnum() else f"\\u{ord(each):04X}" for each in secret)


SPELLINGS = {
    "plain": lambda s: s, "URL": lambda s: quote(s, safe=""), "URL, lower case": lambda s: quote(s, safe="").lower() if s != PLAIN else s, "form": quote_plus,
    "JSON": lambda s: json.dumps(s)[1:-1], "JSON within JSON": lambda s: json.dumps(json.dumps(s))[3:-3], "JSON of PHP": lambda s: json.dumps(s).replace("/", "\\/")[1:-1],
    "JSON of .NET": _escape_like_net, "HTML": html.escape,
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


def test_a_secret_within_another_leaves_no_part() -> None:
    redactor = Redactor(["inner-secret", "outer-inner-secret-outer"])
    assert redactor.redact(b"(outer-inner-secret-outer inner-secret)") == b"(" + MARK + b" " + MARK + b")"


@given(st.binary(max_size=80), st.binary(max_size=80), st.integers(0, 200))
def test_no_part_of_a_secret_is_left_at_any_truncation(before: bytes, after: bytes, most: int) -> None:
    redacted = Redactor([PLAIN]).redact(before + PLAIN.encode() + after, most)
    whole = before + MARK + after
    assert redacted == (whole[:most] if most <= len(before) else before + MARK + after[: max(0, most - len(before) - len(PLAIN))])


def test_a_large_body_is_searched_to_its_end_and_across_its_pieces() -> None:
    size = 1024 * 1024
    for at in (0, size - 5, size, 2 * size - 1):
        body = bytearray(b"x" * (2 * size + 100))
        body[at : at + len(ODD.encode())] = ODD.encode()
        assert MARK in Redactor([ODD]).redact(bytes(body)) and ODD.encode() not in Redactor([ODD]).redact(bytes(body))


def test_bytes_without_a_secret_are_returned_unchanged() -> None:
    data = b"\x80\xff nothing here"
    assert Redactor([PLAIN, ODD, "abc"]).redact(data) is data
    assert Redactor(()).longest == 0


@pytest.mark.parametrize("secret", ["rk_" + "aB3_-x7Q" * 4, "rt_" + "0" * 32, "ek_rt_" + "z" * 32])
def test_keys_and_tickets_that_a_relay_made_are_found_by_their_form(secret: str) -> None:
    redactor = Secrets(frozenset({PLAIN})).redactor
    assert secret[3:] not in redactor.redact_text(f'{{"key": "{secret}"}} {PLAIN}')
    assert redactor.redact(b"-" * 90 + secret.encode(), 100) in (b"-" * 90 + MARK, b"-" * 90 + b"ek_" + MARK)
    assert redactor.redact(json.dumps(f"\n{secret}").encode()).endswith(MARK + b'"')
    assert redactor.longest >= 35 and Redactor([]).longest == 0
    for text in (b"work_" + b"a" * 32, b"rk_short", b"start_of_a_long_name_in_snake_case_x"):
        assert redactor.redact(text) == text
