"""A wrong base URL or a misspelt provider gets 404 with the right URL, in the error shape that the
client's SDK parses.
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from tests.conftest import StartRelay
from tests.relays import Relay, _packaged_providers

PROVIDERS = ("openai", "google-ai-studio", "anthropic", "elevenlabs", "cartesia", "deepgram", "cohere", "groq")


@pytest.fixture
async def relay(start: StartRelay) -> Relay:
    """A relay with providers as they ship. Nothing here calls one."""
    return await start({"providers": {name: _packaged_providers()[name] for name in PROVIDERS}})


def _message(body: bytes) -> tuple[str, str]:
    """The message, and the format that has it where it is found."""
    answer: dict[str, Any] = json.loads(body)
    for name, own, field in (("cartesia", "error_code", "message"), ("deepgram", "err_code", "err_msg"), ("cohere", "id", "message")):
        if own in answer:
            return answer[field], name
    if "detail" in answer:
        return answer["detail"]["message"], "elevenlabs"
    if answer.get("type") == "error":
        return answer["error"]["message"], "anthropic"
    return answer["error"]["message"], "google" if "status" in answer["error"] else "openai"


WRONG = [
    ("POST", "/chat/completions", {}, "openai", "openai"),
    ("POST", "/messages", {}, "anthropic", "anthropic"),
    ("GET", "/models", {"anthropic-version": "2023-06-01"}, "anthropic", "anthropic"),
    ("POST", "/v1/files", {}, "openai", "openai"),
    ("GET", "/realtime?model=gpt-realtime", {}, "openai", "openai"),
    ("POST", "/openai/chat/completions", {}, "openai", "openai"),
    ("POST", "/openai/v1/responses", {}, "openai", "openai"),
    ("POST", "/api/v1/ai-gateway/openai/chat/completions", {}, "openai", "openai"),
    ("POST", "/api/v1/ai-gateway/provider/openai/chat/completions", {}, "openai", "openai"),
    ("POST", "/api/v1/gateway/providers/groq/openai/v1/chat/completions", {}, "groq", "openai"),
    ("POST", "/api/v1/chat/completions", {}, "openai", "openai"),
    ("POST", "/anthropic/v1/messages", {}, "anthropic", "anthropic"),
    ("POST", "/v1beta/models/gemini-2.5-flash:generateContent", {}, "google-ai-studio", "google"),
    ("POST", "/v1/models/gemini-2.5-flash:streamGenerateContent?alt=sse", {}, "google-ai-studio", "google"),
    ("POST", "/v1beta/openai/chat/completions", {}, "google-ai-studio", "openai"),
    ("POST", "/v1/text-to-speech/voice/stream", {}, "elevenlabs", "elevenlabs"),
    ("GET", "/v1/voices", {"xi-api-key": "x"}, "elevenlabs", "elevenlabs"),
    ("POST", "/tts/bytes", {}, "cartesia", "cartesia"),
    ("POST", "/v1/listen?model=nova-3", {}, "deepgram", "deepgram"),
    ("POST", "/v2/chat", {}, "cohere", "cohere"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "headers", "provider", "format_"), WRONG, ids=[f"{path} {'+'.join(headers)}" for _, path, headers, *_ in WRONG])
async def test_a_wrong_base_url_is_answered_with_the_right_one(relay: Relay, method: str, path: str, headers: dict[str, str], provider: str, format_: str) -> None:
    status, answered, body = await relay.call(method, relay.url + path, headers=headers)
    assert (status, answered["x-relay-error"], answered["x-should-retry"]) == (404, "unknown_route", "false")
    message, shape = _message(body)
    assert f"base URL of your SDK to {relay.path(provider).rstrip('/')} " in message, message
    assert shape == format_


async def test_a_wrong_base_url_of_a_socket_is_answered_too(relay: Relay) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await relay.client.ws_connect(f"{relay.url}/openai/realtime")
    assert caught.value.status == 404


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/api/v1/ai-gateway/nothing", "/login"])
async def test_any_other_path_is_answered_with_where_providers_are(relay: Relay, path: str) -> None:
    status, _, body = await relay.call("POST", relay.url + path)
    assert (status, _message(body)[0]) == (404, f"Nothing answers POST here. Providers are at {relay.path('{provider}', '{endpoint}')}.")


async def test_a_provider_that_the_file_does_not_have_is_not_recommended(start: StartRelay) -> None:
    relay = await start(groq=_packaged_providers()["groq"])
    _, _, body = await relay.call("POST", f"{relay.url}/chat/completions")
    assert "Providers are at" in _message(body)[0]


async def test_the_base_url_is_the_public_one_where_it_is_configured(start: StartRelay) -> None:
    relay = await start({"server": {"public_url": "https://ai.example.com"}}, openai=_packaged_providers()["openai"])
    _, _, body = await relay.call("POST", f"{relay.url}/chat/completions")
    assert "to https://ai.example.com/api/v1/ai-gateway/providers/openai " in _message(body)[0]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("opnai", "openai"), ("claude", "anthropic"), ("google", "google-ai-studio"), ("gemini", "google-ai-studio"), ("Anthropic", "anthropic"), ("eleven-labs", "elevenlabs")],
)
async def test_an_unknown_provider_is_answered_with_the_nearest(relay: Relay, name: str, hint: str) -> None:
    status, _, body = await relay.call("POST", relay.path(name, "v1/x"))
    assert (status, _message(body)[0]) == (404, f"There is no provider named '{name}' in gateway.yaml. Did you mean '{hint}'?")


@pytest.mark.parametrize("name", ["zzz", ""])
async def test_an_unknown_provider_unlike_any_is_answered_with_all(relay: Relay, name: str) -> None:
    _, _, body = await relay.call("POST", relay.path(name, "v1/x"))
    assert _message(body)[0] == f"There is no provider named '{name}' in gateway.yaml. It has {', '.join(sorted(PROVIDERS))}."


@pytest.mark.parametrize(("endpoint", "format_"), [("v1/messages", "anthropic"), ("v1beta/models/g:generateContent", "google"), ("chat/completions", "openai")])
async def test_an_unknown_provider_is_refused_in_the_shape_of_the_endpoint(relay: Relay, endpoint: str, format_: str) -> None:
    _, _, body = await relay.call("POST", relay.path("zzz", endpoint))
    assert _message(body)[1] == format_


async def test_a_call_that_is_refused_before_it_has_a_route_has_the_shape_of_its_provider(relay: Relay) -> None:
    status, headers, body = await relay.call("POST", relay.path("anthropic", "v1/messages"), headers={"Host": "evil.example"})
    assert (status, headers["x-relay-error"], _message(body)[1]) == (403, "host_not_allowed", "anthropic")


async def test_a_refusal_before_the_route_has_the_format_of_the_path_at_its_provider(start: StartRelay) -> None:
    entry = {"base_url": "http://127.0.0.1:9/v1", "format": "openai", "formats": {"native/*": "anthropic"}}
    relay = await start(custom=entry)
    for endpoint in ("native/x", "v1/native/x"):
        refused = await relay.call("POST", relay.path("custom", endpoint), headers={"Host": "evil.example"})
        wrong = await relay.call("POST", f"{relay.url}/custom/{endpoint}")
        assert [(each[0], _message(each[2])[1]) for each in (refused, wrong)] == [(403, "anthropic"), (404, "anthropic")]
