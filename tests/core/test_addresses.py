"""The URL of a server on this machine."""

from __future__ import annotations

import pytest

from relay.core.addresses import local_url


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8787"),
        ("relay.lan", "http://relay.lan:8787"),
        ("0.0.0.0", "http://127.0.0.1:8787"),
        ("::1", "http://[::1]:8787"),
        ("::", "http://[::1]:8787"),
    ],
)
def test_a_server_on_all_addresses_is_reached_on_loopback(host: str, url: str) -> None:
    assert local_url("http", host, 8787) == url
