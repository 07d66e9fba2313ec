"""Text from outside is truncated and cleaned, and two long names stay different."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.metadata import as_text, parse_metadata
from relay.core.text import MAX_CHARACTERS, clean, quoted


@given(st.text(alphabet=st.characters(), max_size=600), st.integers(20, 300))
def test_any_text_is_bounded_and_safe_for_a_log_and_a_database(text: str, most: int) -> None:
    cleaned = clean(text, most)
    assert len(cleaned) <= most and clean(cleaned, most) == cleaned
    cleaned.encode("utf-8")
    assert not any(unicodedata.category(each) in ("Cc", "Cs") for each in cleaned)


@pytest.mark.parametrize("text", ["gpt-5.5", "модель", "मॉडल 👩‍💻", "a b", "", "x" * MAX_CHARACTERS])
def test_ordinary_names_are_unchanged(text: str) -> None:
    assert clean(text) == text


def test_two_long_names_with_the_same_beginning_stay_different() -> None:
    first, second = clean("m" * 5_000_000 + "1"), clean("m" * 5_000_000 + "2")
    assert first != second and len(first) == len(second) == MAX_CHARACTERS


def test_control_and_invalid_characters_are_replaced() -> None:
    assert clean("a\0b\x1b[31mc\ud800d\u202ee\nf") == "a\ufffdb\ufffd[31mc\ufffdd\ufffde\ufffdf"
    assert len(quoted("q" * 200)) == 80


def test_metadata_is_truncated_and_cleaned_when_it_is_read() -> None:
    read = parse_metadata(f'{{"n{"n" * 900}": "v{"v" * 900}", "a\\u0000": "\\u001b", "n": 18446744073709551616}}')
    assert all(len(name) <= MAX_CHARACTERS and len(as_text(value)) <= MAX_CHARACTERS for name, value in read.items())
    assert read["a\ufffd"] == "\ufffd" and as_text(read["n"]) == "18446744073709551616"
