"""Who may manage, decided from the peer's address and the headers."""

from __future__ import annotations

import pytest

from relay.core.errors import CrossSiteRequest, ManagementNotLocal, OriginNotAllowed, RelayError
from relay.gate.local import require_local

LOCAL = {"Host": "127.0.0.1:8787"}


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("headers", [LOCAL, {"Host": "localhost"}, {"Host": "[::1]:1", "Origin": "http://[::1]:1"}, LOCAL | {"Sec-Fetch-Site": "none"}])
def test_a_program_or_own_page_of_this_machine_may_manage(peer: str, headers: dict[str, str]) -> None:
    require_local(peer, headers)


@pytest.mark.parametrize(
    ("peer", "headers", "error", "why"),
    [
        ("192.0.2.1", LOCAL, ManagementNotLocal, "another machine"),
        ("", LOCAL, ManagementNotLocal, "another machine"),
        (None, LOCAL, ManagementNotLocal, "another machine"),
        ("127.0.0.1", {}, ManagementNotLocal, "not a loopback name"),
        ("127.0.0.1", {"Host": "relay.example.com"}, ManagementNotLocal, "not a loopback name"),
        ("127.0.0.1", LOCAL | {"X-Forwarded-For": "127.0.0.1"}, ManagementNotLocal, "'X-Forwarded-For'"),
        ("127.0.0.1", LOCAL | {"Origin": "http://evil.example"}, OriginNotAllowed, "evil.example"),
        ("127.0.0.1", LOCAL | {"Sec-Fetch-Site": "cross-site"}, CrossSiteRequest, "cross-site"),
    ],
)  # fmt: skip
def test_management_is_refused_to_everybody_else(peer: str | None, headers: dict[str, str], error: type[RelayError], why: str) -> None:
    with pytest.raises(error) as raised:
        require_local(peer, headers)
    assert why in raised.value.message


def test_a_header_is_quoted_in_bounds() -> None:
    with pytest.raises(ManagementNotLocal) as raised:
        require_local("127.0.0.1", LOCAL | {f"X-Forwarded-{'x' * 1000}": "1"})
    assert len(raised.value.message) < 300
