"""The key of a client on /v1: in every place of every provider, and sent to none of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.relays import KEYS, Relay, provider
from tests.upstream.raw import RawUpstream, ok

pytestmark = pytest.mark.usefixtures("no_lists")

KEY = "sk-local-keys-of-unified-0123456789"
BODY = {"model": "openai/gpt-5", "messages": []}


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream) -> Relay:
    """A relay whose provider gets the client's own credentials."""
    raw.scripts[:] = [(ok(b"{}"),)]
    entry = provider(raw.url, client_credentials="allow", query_credentials=["token"])
    other = {"base_url": raw.url, "auth": {"header": "x-vendor-key", "value": "${OPENAI_API_KEY}"}}
    return await start({"access": {"mode": "required"}, "clients": {"web": {"key": KEY}}, "providers": {"openai": entry, "other": other}})


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"Authorization": f"Bearer {KEY}"}, ""), ({"x-api-key": KEY}, ""), ({"x-goog-api-key": KEY}, ""),
        ({"xi-api-key": KEY}, ""), ({}, f"?token={KEY}"), ({"x-relay-key": KEY, "Authorization": f"Bearer {KEY}"}, f"?token={KEY}"),
    ],
)  # fmt: skip
async def test_a_client_key_is_found_in_every_place_and_reaches_no_provider(relay: Relay, raw: RawUpstream, headers: dict[str, str], query: str) -> None:
    status, _, _ = await relay.call("POST", f"{relay.url}/v1/chat/completions{query}", json=BODY, headers=headers)
    assert status == 200
    [arrived] = raw.arrived
    assert arrived.header("Authorization") == [f"Bearer {KEYS['OPENAI_API_KEY']}"]
    assert KEY.encode() not in arrived.head


async def test_the_header_of_one_provider_is_no_place_of_a_key(relay: Relay, raw: RawUpstream) -> None:
    """It would be forwarded to any other provider."""
    status, _, _ = await relay.call("POST", f"{relay.url}/v1/chat/completions", json=BODY, headers={"x-vendor-key": KEY})
    assert status == 401 and not raw.arrived


async def test_the_clients_own_credential_beside_its_key_reaches_a_provider_that_allows_it(relay: Relay, raw: RawUpstream) -> None:
    headers = {"x-relay-key": KEY, "Authorization": "Bearer sk-of-the-client"}
    await relay.call("POST", f"{relay.url}/v1/chat/completions", json=BODY, headers=headers)
    assert raw.arrived[0].header("Authorization") == ["Bearer sk-of-the-client"]


@pytest.mark.parametrize("path", ["/api/hello", "/v1/api/hello"])
async def test_claude_codes_probe_is_answered_for_a_valid_key(relay: Relay, path: str) -> None:
    async def probe(**headers: Any) -> int:
        return (await relay.call("HEAD", relay.url + path, headers=headers))[0]

    assert await probe(Authorization=f"Bearer {KEY}") == 200
    assert await probe(Authorization="Bearer rk_" + "x" * 32) == 401
