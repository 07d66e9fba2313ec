"""401 and 403 of calls: in the format of the call, with what is missing, and not to be retried."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.relays import Relay, _packaged_providers, canary, packaged_provider
from tests.upstream.raw import RawUpstream

KEY = canary("refused-calls")
SHIPPED = sorted(name for name in _packaged_providers() if name not in ("azure-openai", "ollama", "vllm"))
SOCKET = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
CASES = {
    "no key": ({}, 401, "client_key_missing", "requires a client key"),
    "an unknown key": ({"x-relay-key": "rk_" + "x" * 32}, 401, "client_key_invalid", "not valid"),
    "a key of the provider's form": ({"Authorization": "Bearer sk-1234567890"}, 401, "client_key_invalid", "not valid"),
    "a key for another provider": ({"x-relay-key": KEY}, 403, "provider_not_allowed", "'web' may not call the provider"),
}  # fmt: skip


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream) -> Relay:
    """Every provider that ships, and a client that may call none of them."""
    providers = {name: packaged_provider(name, raw.url) for name in SHIPPED}
    providers["other"] = {"base_url": "https://other.example.com"}
    return await start({"access": {"mode": "required"}, "clients": {"web": {"key": KEY, "providers": ["other"]}}, "providers": providers})


FLAT = {
    "cohere": ("code", "message"), "cartesia": ("error_code", "message"), "fal": ("error_type", "detail"), "deepgram": ("err_code", "err_msg"), "assemblyai": ("code", "error"),
}  # fmt: skip
"""The fields of code and message in errors without an inner object."""


def read(body: bytes, format_: str) -> tuple[str, str]:
    """The code and message of an error where the SDK of the format reads them."""
    answer: Any = json.loads(body)
    if format_ == "google":
        return answer["error"]["details"][0]["reason"], answer["error"]["message"]
    if format_ == "elevenlabs":
        return answer["detail"]["status"], answer["detail"]["message"]
    if format_ in FLAT:
        code, message = FLAT[format_]
        return answer[code], answer[message]
    assert format_ != "anthropic" or answer["type"] == "error"
    return answer["error"]["code"], answer["error"]["message"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_a_refusal_has_the_format_of_the_call_and_is_not_to_be_retried(relay: Relay, raw: RawUpstream, case: tuple[dict[str, str], int, str, str]) -> None:
    sent, expected, code, words = case
    for name, provider in relay.gateway.registry.providers.items():
        if name == "other":
            continue
        for url, more in ((relay.path(name, "x"), {}), (relay.path(name, "x"), SOCKET), (relay.ws(name), SOCKET), (relay.ws(name), {})):
            if more and url == relay.ws(name) and provider.websocket_rules is None:
                continue
            status, headers, body = await relay.call("GET", url, headers=sent | more)
            assert (status, headers["x-relay-error"], headers["x-should-retry"]) == (expected, code, "false"), (name, url, body)
            assert ("www-authenticate" in headers) == (status == 401) and "retry-after" not in headers
            format_ = provider.format if url == relay.path(name, "x") or more else "openai"
            assert read(body, format_)[0] == code and words in read(body, format_)[1], (name, url, body)
        relay.gateway.keys.wrong_tries._windows.clear()
    assert raw.connections == 0


async def test_a_refused_call_is_refused_before_its_body_is_read(relay: Relay, raw: RawUpstream) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"POST /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 401 ") and b"client_key_missing" in head
    writer.close()
    assert raw.connections == 0
