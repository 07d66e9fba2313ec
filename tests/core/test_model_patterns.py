"""Patterns of models."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.model_patterns import allowed


@pytest.mark.parametrize(
    ("pattern", "model", "expected"),
    [
        ("gpt-5", "gpt-5", True), ("gpt-5", "gpt-5\n", False), ("gpt-5", "GPT-5", False), ("gpt-5", "gpt-5-mini", False), ("gpt-5*", "gpt-5-mini", True), ("gpt-5*", "gpt-5", True), ("*mini", "gpt-5-mini", True),
        ("*mini", "gpt-5-mini-x", False), ("gpt-?", "gpt-5", True), ("gpt-?", "gpt-", False), ("gpt-?", "gpt-55", False), ("*", "any/thing", True), ("*", "", True), ("a*b*c", "a1b2bc", True), ("a*b*c", "acb", False),
        ("*a*a", "aa", True), ("*a*a", "a", False), ("*ab", "aab", True), ("a.c", "abc", False), ("[a]", "a", False), ("[a]", "[a]", True), ("a**c", "abc", True), ("?*", "", False), ("*?", "x", True), ("a*", "a\nb", True), ("", "", True), ("", "a", False),
    ],
)  # fmt: skip
def test_a_star_matches_any_text_and_a_question_mark_one_character(pattern: str, model: str, expected: bool) -> None:
    assert allowed((pattern,), model) is expected


def test_one_of_several_patterns_is_enough_and_none_allows_nothing() -> None:
    assert allowed(("a", "b*"), "bc") and not allowed(("a", "b*"), "c") and not allowed((), "a")


def test_a_name_of_more_than_256_characters_matches_nothing() -> None:
    assert allowed(("*",), "a" * 256) and not allowed(("*",), "a" * 257)


@given(st.text("ab?*", max_size=8), st.text("abc", max_size=10))
def test_patterns_match_as_a_backtracking_expression_does(pattern: str, model: str) -> None:
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    assert allowed((pattern,), model) == (re.fullmatch(expression, model) is not None)


def test_a_pattern_of_many_stars_takes_no_exponential_time() -> None:
    began = time.process_time()
    assert not allowed(("*a" * 60 + "b",), "a" * 256)
    assert time.process_time() - began < 2.0
