"""The form of a made key, its expiry, and which names clients of the database may have."""

from __future__ import annotations

import re

import pytest

from relay.core.errors import BadRequest
from relay.gate.administration import MadeKey, check_new_name, expiry_s, new_secret
from relay.storage.access_rows import KeyRow

MADE = re.compile(r"rk_[A-Za-z0-9_-]{32}\Z")


@pytest.mark.parametrize(("text", "expected"), [("30d", 100 + 30 * 86400), ("1h", 3700), ("1970-01-02", 86400), ("1970-01-01T00:02:00Z", 120)])
def test_an_expiry_is_a_time_from_now_or_a_date(text: str, expected: int) -> None:
    assert expiry_s(text, 100.5) == expected


@pytest.mark.parametrize("text", ["", "-1d", "1y", "1970-01-01", "999999w1", "9999-12-31T23:59:59-24:00", "0s"])
def test_an_expiry_in_the_past_or_beyond_all_calendars_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="expires: "):
        expiry_s(text, 100.5)


@pytest.mark.parametrize("name", ["", "-a", ".a", "_a", "a/1", "a" * 65, "é", "::1", "127.0.0.1", "abcdefabcdef", "a\n"])
def test_a_name_that_could_be_taken_for_something_else_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="name: "):
        check_new_name(name)


def test_a_made_key_has_192_random_bits() -> None:
    made = [new_secret() for _ in range(100)]
    assert all(MADE.match(secret) for secret in made) and len(set(made)) == 100
    columns = list(zip(*(secret[3:] for secret in made), strict=True))
    assert min(len(set(column)) for column in columns) > 30, "a place of the key is not random"


def test_a_made_key_does_not_show_its_secret() -> None:
    secret = new_secret()
    row = KeyRow("0123456789ab", "web", bytes(32), 0, "test", None, None, 1)
    assert secret not in repr(MadeKey(row, secret))
