"""The base URLs of SDKs, with or without the version, map to one URL for every shipped provider."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay.registry.registry import Registry
from tests.relays import _packaged_providers, configured

CHAT = ("chat/completions", "v1/chat/completions")
FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "openai": {"https://api.openai.com/v1/chat/completions": CHAT, "https://api.openai.com/v1/responses": ("responses", "v1/responses")},
    "google-ai-studio": {
        "https://generativelanguage.googleapis.com/v1beta/models/g:generateContent": ("models/g:generateContent", "v1beta/models/g:generateContent", "v1beta/v1beta/models/g:generateContent"),
        "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions": ("openai/chat/completions", "v1beta/openai/chat/completions"),
        "https://generativelanguage.googleapis.com/v1/models/g:generateContent": ("v1/models/g:generateContent",),
        "https://generativelanguage.googleapis.com/upload/v1beta/files": ("upload/v1beta/files",),
    },
    "cartesia": {"https://api.cartesia.ai/tts/bytes": ("tts/bytes",)},
    "elevenlabs": {
        "https://api.elevenlabs.io/v1/text-to-speech/v/stream": ("text-to-speech/v/stream", "v1/text-to-speech/v/stream", "v1/v1/text-to-speech/v/stream"),
        "https://api.elevenlabs.io/v2/voices": ("v2/voices",),
    },
    "fal": {"https://fal.run/fal-ai/flux": ("fal-ai/flux",), "https://queue.fal.run/fal-ai/flux": ("queue/fal-ai/flux",)},
    "anthropic": {
        "https://api.anthropic.com/v1/messages": ("messages", "v1/messages", "v1/v1/messages"),
        "https://api.anthropic.com/v1/messages/count_tokens": ("messages/count_tokens", "v1/messages/count_tokens"),
        "https://api.anthropic.com/v1/chat/completions": CHAT,
        "https://api.anthropic.com/api/hello": ("api/hello",),
    },
    "assemblyai": {"https://api.assemblyai.com/v2/transcript/1": ("transcript/1", "v2/transcript/1")},
    "azure-openai": {"https://resource.openai.azure.com/openai/deployments/d/chat/completions": ("d/chat/completions",)},
    "cohere": {
        "https://api.cohere.com/v2/chat": ("chat", "v2/chat"), "https://api.cohere.com/v1/chat": ("v1/chat",),
        "https://api.cohere.com/compatibility/v1/chat/completions": (*CHAT, "compatibility/v1/chat/completions"),
        "https://api.cohere.com/compatibility/v1/embeddings": ("embeddings", "v1/embeddings"),
    },
    "deepgram": {"https://api.deepgram.com/v1/listen": ("listen", "v1/listen"), "https://api.deepgram.com/v2/listen": ("v2/listen",)},
    "deepseek": {"https://api.deepseek.com/chat/completions": ("chat/completions",), "https://api.deepseek.com/v1/chat/completions": ("v1/chat/completions",)},
    "grok": {"https://api.x.ai/v1/chat/completions": CHAT},
    "groq": {"https://api.groq.com/openai/v1/chat/completions": (*CHAT, "openai/v1/chat/completions", "openai/v1/openai/v1/chat/completions")},
    "mistral": {"https://api.mistral.ai/v1/chat/completions": (*CHAT, "v1/v1/chat/completions")},
    "ollama": {"http://127.0.0.1:11434/v1/chat/completions": CHAT},
    "openrouter": {
        "https://openrouter.ai/api/v1/chat/completions": (*CHAT, "api/v1/chat/completions"), "https://openrouter.ai/api/v1/messages": ("messages", "v1/messages", "api/v1/v1/messages"),
    },
    "perplexity": {"https://api.perplexity.ai/chat/completions": CHAT, "https://api.perplexity.ai/v1/responses": ("responses", "v1/responses")},
    "vllm": {"http://127.0.0.1:8000/v1/chat/completions": CHAT},
}  # fmt: skip
CASES = [(name, endpoint, url) for name, urls in FORMS.items() for url, endpoints in urls.items() for endpoint in endpoints]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with every shipped provider."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AZURE_OPENAI_RESOURCE", "resource")
        config, _ = configured(tmp_path_factory.mktemp("base-urls"), {"providers": _packaged_providers()})
    return config.registry


def test_every_shipped_provider_has_a_case(registry: Registry) -> None:
    assert set(FORMS) == set(registry.providers)


@pytest.mark.parametrize(("name", "endpoint", "url"), CASES, ids=[f"{name}/{endpoint}" for name, endpoint, _ in CASES])
def test_an_endpoint_maps_to_the_providers_url(registry: Registry, name: str, endpoint: str, url: str) -> None:
    assert registry.match_rest(name, endpoint).url("") == url


@pytest.mark.parametrize(("endpoint", "format_", "kind"), [("messages", "anthropic", "messages"), ("chat/completions", "openai", "chat")])
def test_an_endpoint_without_its_version_is_routed_like_one_with_it(registry: Registry, endpoint: str, format_: str, kind: str) -> None:
    route = registry.match_rest("anthropic", endpoint)
    assert (route.endpoint, route.format, route.kind) == (f"v1/{endpoint}", format_, kind)


def test_a_socket_endpoint_gets_the_version_that_it_lacks(registry: Registry) -> None:
    assert registry.match_websocket("deepgram", "listen").url("") == registry.match_websocket("deepgram", "").url("") == "https://api.deepgram.com/v1/listen"
    assert registry.match_websocket("deepgram", "listen").takes_sockets


def test_an_endpoint_through_cloudflare_gets_the_version_that_it_lacks(tmp_path: Path) -> None:
    entries = {name: _packaged_providers()[name] for name in ("anthropic", "google-ai-studio", "elevenlabs")}
    config, _ = configured(tmp_path, {"providers": entries, "cloudflare": {"account_id": "a", "base_url": "https://gw.example/v1"}})
    urls = {each: config.registry.match_rest(*each.split("/", 1)).url("") for each in ("anthropic/messages", "google-ai-studio/models/g:countTokens", "elevenlabs/voices")}
    assert urls == {
        "anthropic/messages": "https://gw.example/v1/a/default/anthropic/v1/messages",
        "google-ai-studio/models/g:countTokens": "https://gw.example/v1/a/default/google-ai-studio/v1beta/models/g:countTokens",
        "elevenlabs/voices": "https://gw.example/v1/a/default/elevenlabs/v1/voices",
    }
