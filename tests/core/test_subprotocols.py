"""Offered subprotocols: secrets are removed, names are sorted, one is echoed."""

from __future__ import annotations

import pytest

from relay.core.subprotocols import SubprotocolUse, sort, split

OPENAI: dict[str, SubprotocolUse] = {"realtime": "pass", "openai-insecure-api-key.": "credential", "openai-beta.": "drop"}
DEEPGRAM: dict[str, SubprotocolUse] = {"token": "credential_next", "bearer": "credential_next"}


def test_headers_are_split_at_commas() -> None:
    assert split(["realtime, x", " y ,,z"]) == ("realtime", "x", "y", "z")


@pytest.mark.parametrize(
    ("offered", "passed", "credentials", "chosen", "echo"),
    [
        (["realtime", "openai-insecure-api-key.K"], ("realtime",), [("openai-insecure-api-key.", "K")], "realtime", "realtime"),
        (["realtime", "openai-insecure-api-key.K", "openai-beta.realtime-v1"], ("realtime",), [("openai-insecure-api-key.", "K")], None, "realtime"),
        (["cf-aig-authorization.T", "xi-api-key.K"], (), [("cf-aig-authorization.", "T"), ("xi-api-key.", "K")], None, "cf-aig-authorization.T"),
        (["openai-insecure-api-key.K", "unknown"], (), [("openai-insecure-api-key.", "K")], None, "unknown"),
        ([], (), [], None, None),
        (["realtime"], ("realtime",), [], "not-offered", "realtime"),
        (["XI-API-KEY.K"], (), [("xi-api-key.", "K")], None, "XI-API-KEY.K"),
    ],
)
def test_an_offer_is_sorted_into_names_and_credentials(offered: list[str], passed: tuple[str, ...], credentials: list[tuple[str, str]], chosen: str | None, echo: str | None) -> None:
    offer = sort(tuple(offered), OPENAI)
    assert offer.passed == passed
    assert list(offer.credentials) == credentials
    assert offer.echo(chosen) == echo


def test_the_item_after_a_scheme_may_be_the_secret() -> None:
    offer = sort(("token", "SECRET"), DEEPGRAM)
    assert offer.credentials == (("token ", "SECRET"),) and offer.public == ("token",)
    assert offer.echo(None) == "token"
    assert sort(("token",), DEEPGRAM).credentials == ()


def test_a_repr_shows_no_secret() -> None:
    assert "SECRET" not in repr(sort(("token", "SECRET", "xi-api-key.SECRET"), DEEPGRAM))
