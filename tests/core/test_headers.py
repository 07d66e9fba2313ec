"""Which headers are forwarded, and that order, duplicates and case survive."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relay.core import headers
from relay.core.credential_headers import CREDENTIAL_HEADERS

_NAMES = st.sampled_from([
    "X-A", "x-a", "Accept", "Connection", "Keep-Alive", "TE", "Transfer-Encoding", "Upgrade", "Host", "Cookie",
    "Authorization", "X_Api_Key", "X-API-KEY", "Origin", "X-Forwarded-For", "x_forwarded_host", "cf-aig-metadata",
    "Sec-WebSocket-Key", "Content-Type", "Content-Encoding", "anthropic-version", "x-fal-target-url", "X-Fal-Object",
])  # fmt: skip
_PAIRS = st.lists(st.tuples(_NAMES, st.text("abc, ", max_size=5)), max_size=12)


@given(_PAIRS, st.one_of(st.none(), st.sampled_from(["close", "keep-alive", "x-a", "X-A, accept", "upgrade, content_type"])))
def test_headers_for_the_provider_are_a_subsequence_without_forbidden_names(pairs: list[tuple[str, str]], connection: str | None) -> None:
    named = {headers.normal(item.strip()) for item in (connection or "").split(",")}
    forwarded = headers.headers_for_provider(pairs, connection)
    rest = iter(pairs)
    assert all(pair in rest for pair in forwarded), "order and duplicates are kept"
    for name, _ in forwarded:
        lower = headers.normal(name)
        assert lower not in headers.HOP_BY_HOP.union(CREDENTIAL_HEADERS) | (named - {"close", "keep-alive", "upgrade"})
        assert not lower.startswith(("x-forwarded-", "sec-websocket-", "cf-aig-"))
    allowed = {"content-encoding", "anthropic-version", "x-fal-object"} - named
    assert [p for p in pairs if p[0].lower() in allowed] == [p for p in forwarded if p[0].lower() in allowed]


def test_cloudflare_gets_its_controls_and_a_provider_does_not() -> None:
    pairs = [("cf-aig-metadata", "{}"), ("cf-aig-authorization", "Bearer x"), ("X-A", "1")]
    assert headers.headers_for_cloudflare(pairs, None) == [("cf-aig-metadata", "{}"), ("X-A", "1")]
    assert headers.headers_for_provider(pairs, None) == [("X-A", "1")]


def test_response_headers_of_cloudflare_are_renamed() -> None:
    pairs = [("CF-AIG-Cache-Status", "HIT"), ("X-A", "1"), ("X-A", "2")]
    assert headers.downstream_headers(pairs, None) == [("x-cloudflare-aig-cache-status", "HIT"), ("X-A", "1"), ("X-A", "2")]


def test_more_header_names_than_the_memo_holds_are_judged_correctly() -> None:
    pairs = [(f"X-{number}", "") for number in range(3000)] + [("Set-Cookie", "a"), ("Connection", "b")]
    for _ in range(2):
        assert headers.downstream_headers(pairs, None) == pairs[:3000]
    assert len(headers._names_downstream) <= 1024
