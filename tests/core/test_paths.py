"""Which paths are relayed, and that none leaves the prefix of its provider."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from relay.core import paths
from relay.core.errors import BadPath

GOOD = [
    "/", "/a", "/a/b?x=1", "/v1/models/gemini-2.5-flash:generateContent", "/fal-ai/flux/schnell", "/a%20b", "/a%2Fb",
    "/a..b/c...d", "/%E2%82%AC", "/a?x=../..", "/a?x=%2e%2e", "/@cf/meta/llama", "/a?u=http://x/y", "/...x", "/a/...",
]  # fmt: skip
BAD = [
    "", "a", "//evil.com/x", "///x", "http://evil.com/x", "*", "evil.com:443", "/a/../b", "/..", "/.", "/a/.", "/./a",
    "/%2e%2e/b", "/%2E%2e/b", "/.%2e/b", "/a/%2e/b", "/%252e%252e/b", "/%25252e%25252e/b", "/..%2fb", "/a%2f..%2fb",
    "/..;/b", "/a;/../b", "/..%3b/b", "/..\\b", "/a\\..\\b", "/%5c..%5c", "/a%5cb", "/a%00b", "/a%0d%0aX: 1", "/a\r\nb",
    "/a b", "/a#b", "/a%zz", "/a%2", "/a\x7fb", "/ü", "/a%7f", "/a?x=1#y", "/a?x=\\y", "/a?x= y", "/%25252525252e%2e/",
    "/a/..?x=1", "/%2e", "/a/%2e%2e", "/%c0%ae%c0%ae\\/",
]  # fmt: skip


@pytest.mark.parametrize("target", GOOD)
def test_plain_targets_are_accepted(target: str) -> None:
    paths.check_target(target)


@pytest.mark.parametrize("target", BAD)
def test_targets_with_traversal_or_ambiguous_characters_are_refused(target: str) -> None:
    with pytest.raises(BadPath):
        paths.check_target(target)


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ("v1/chat/completions", "v1/chat/completions"),
        ("v1beta/%6Dodels/gemini-2.5-pr%6f%3AgenerateContent", "v1beta/models/gemini-2.5-pro:generateContent"),
        ("%2D%2e%5F%7E%30%41%5a%61%7A", "-._~0AZaz"),
        ("a%2Fb%25%32%46%20%3B%C3%A9", "a%2Fb%252F%20%3B%C3%A9"),
    ],
)
def test_a_path_is_read_without_needless_escapes(raw: str, read: str) -> None:
    assert paths.readable(raw) == read


_PIECES = st.sampled_from([
    "..", ".", "%2e", "%2E%2e", "%252e", "..;", "%2f", "%2F", "\\", "/", "//", "@evil", "%00", "%0d%0a", "a", "v1", "models",
    "http:", "%5c", ";x=1", "%25", "%c0%af", "~", ":", "?", "#", "\t", " ", "é", "%E9",
])  # fmt: skip


@given(st.lists(_PIECES, max_size=8).map("".join))
def test_an_accepted_target_stays_below_the_prefix(tail: str) -> None:
    """The reference is a parser that normalises: yarl without `encoded=True`."""
    target = "/" + tail
    try:
        paths.check_target(target)
    except BadPath:
        return
    raw = URL(f"https://api.example.com/base/v1{target}", encoded=True)
    tidy = URL(f"https://api.example.com/base/v1{target}")
    for url in (raw, tidy):
        assert (url.scheme, url.raw_host, url.port, url.raw_user) == ("https", "api.example.com", 443, None)
        assert url.raw_path.startswith("/base/v1/")


@given(st.text(max_size=60))
def test_any_text_is_accepted_or_refused_with_a_message(target: str) -> None:
    try:
        paths.check_target(target)
    except BadPath as error:
        assert error.message
    else:
        assert target.isascii() and target.startswith("/")


def test_the_fast_path_accepts_nothing_that_the_full_check_refuses() -> None:
    for target in BAD:
        assert not paths._PLAIN.match(target), target


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("openai/v1/models?x=1", ("openai", "v1/models", "x=1")), ("openai", ("openai", "", "")),
        ("openai/", ("openai", "", "")), ("g//ws//x", ("g", "ws/x", "")), ("o/x?a=//b", ("o", "x", "a=//b")),
        ("o/x/?", ("o", "x/", "")),
    ],
)  # fmt: skip
def test_a_tail_is_split_without_decoding_and_double_slashes_are_merged(tail: str, expected: tuple[str, str, str]) -> None:
    assert paths.split_endpoint(tail) == expected


@pytest.mark.parametrize(
    ("endpoint", "base", "expected"),
    [
        ("v1/chat/completions", "/v1", "chat/completions"), ("chat/completions", "/v1", "chat/completions"),
        ("openai/v1/x", "/openai/v1", "x"), ("v1/x", "/openai/v1", "x"), ("api/v1/x", "/api/v1", "x"),
        ("v1/v1/x", "/v1", "x"), ("v1/v1/v1/x", "/v1", "v1/x"), ("v1/messages", "", "v1/messages"), ("v1beta/x", "/v1", "v1beta/x"),
        ("deployments/x", "/openai/deployments", "deployments/x"), ("v1", "/v1", "v1"),
        ("api/v1/v1/x", "/api/v1", "x"), ("api/v1/api/v1/x", "/api/v1", "x"), ("v1/api/v1/x", "/api/v1", "x"),
    ],
)  # fmt: skip
def test_a_version_that_repeats_the_end_of_the_base_url_is_dropped(endpoint: str, base: str, expected: str) -> None:
    assert paths.drop_version(endpoint, base) == expected


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("key=1&a=2", "a=2"), ("KEY=1&k%65y=2&key&a=%2F+b", "a=%2F+b"), ("a=1&b=2", "a=1&b=2"), ("", ""),
        ("monkey=1&key_=2", "monkey=1&key_=2"), ("key=1", ""), ("a;b=1&&c", "a;b=1&&c"),
    ],
)  # fmt: skip
def test_credentials_are_removed_from_a_query_and_the_rest_is_unchanged(query: str, expected: str) -> None:
    assert paths.cut_query(query, frozenset({"key"})) == expected


def test_query_values_are_decoded() -> None:
    assert paths.query_value("a=1&model=gpt%2D5+x&model=2", "model") == "gpt-5 x"
    assert paths.query_value("a=1", "model") == ""


RULES = (paths.VersionRule("api/*", ""), paths.VersionRule("chat", "v2"), paths.VersionRule("*", "v1"))


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("messages", "v1/messages"), ("v1/messages", "v1/messages"), ("v1beta/models", "v1beta/models"), ("chat", "v2/chat"),
        ("v1/v1/messages", "v1/messages"), ("v1/v10/x", "v1/v10/x"), ("v1/v1", "v1/v1"), ("api/hello", "api/hello"), ("voices/x", "v1/voices/x"), ("", ""),
    ],
)  # fmt: skip
def test_a_version_that_the_client_left_out_is_added(endpoint: str, expected: str) -> None:
    assert paths.put_version(endpoint, RULES) == expected


def test_a_version_of_several_segments_is_added_once() -> None:
    rules = (paths.VersionRule("*", "api/v2"),)
    assert [paths.put_version(each, rules) for each in ("chat", "api/v2/chat")] == ["api/v2/chat"] * 2


def test_without_rules_no_version_is_added() -> None:
    assert paths.put_version("messages", ()) == "messages"
