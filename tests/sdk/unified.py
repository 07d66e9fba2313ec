"""Run a relay whose `/v1` has several stand-in providers at once, for unmodified clients.

Owns the check that each call went to one provider, with its credential, and has one row.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.conftest import StartRelay
from tests.ledger.test_ledger import rows
from tests.relays import HANG_GUARD_S, KEYS, Relay, packaged_provider
from tests.upstream.vendors import (
    OPENAI_CHAT_USAGE,
    SEEN,
    WORDS,
    Handler,
    Seen,
    _sse,
    anthropic_messages,
    note,
    noted,
    openai_chat,
    openai_embeddings,
    openai_realtime,
    openai_responses,
    openai_speech,
    vendor,
)

RELAY_KEY = "sk-local-unified-sdks-0123456789abcdef"
ALIASES = {"fast": "groq/llama-3.3-70b-versatile", "best": ["anthropic/claude-sonnet-5", "openai/gpt-5"], "voice": "openai/gpt-realtime"}
LISTED = {
    "openai": [
        "gpt-5", "gpt-realtime", "text-embedding-3-small", "gpt-image-1", "tts-1", "gpt-4o-transcribe",
        "omni-moderation-latest",
    ],
    "anthropic": ["claude-sonnet-5"],
    "groq": ["llama-3.3-70b-versatile"],
    "google-ai-studio": ["gemini-2.5-flash"],
}  # fmt: skip
CREDENTIALS = {
    "openai": ("Authorization", f"Bearer {KEYS['OPENAI_API_KEY']}"),
    "anthropic": ("x-api-key", KEYS["ANTHROPIC_API_KEY"]),
    "groq": ("Authorization", f"Bearer {KEYS['GROQ_API_KEY']}"),
    "google-ai-studio": ("x-goog-api-key", KEYS["GOOGLE_AI_API_KEY"]),
}
# Dollars for a million tokens, input and output. All differ, so a cost shows whose price it is.
PRICES = {"openai": (1, 10), "anthropic": (2, 20), "groq": (3, 30), "google-ai-studio": (4, 40)}

# What the stand-ins report, as the ledger has it.
CHAT = {"input_tokens": 19, "output_tokens": 10, "cache_read_tokens": 4}
RESPONSE = {"input_tokens": 36, "output_tokens": 87, "reasoning_tokens": 11}
MESSAGE = {"input_tokens": 12, "output_tokens": 1}
MESSAGE_STREAM = {"input_tokens": 12, "output_tokens": 6}


@dataclass(frozen=True)
class Expected:
    """What the row of a call has; its cost is that of PRICES."""

    provider: str
    model: str
    usage: dict[str, int]


@dataclass
class Unified:
    """The relay, the URL of its `/v1`, and the stand-ins by provider."""

    relay: Relay
    servers: dict[str, Any]

    @property
    def url(self) -> str:
        """The base URL of Anthropic's clients."""
        return self.relay.url

    @property
    def v1(self) -> str:
        """The base URL of OpenAI's clients."""
        return f"{self.relay.url}/v1"

    def calls(self, provider: str) -> list[Seen]:
        """The calls that arrived at a provider, without those for its list of models."""
        return [seen for seen in self.servers[provider].app[SEEN] if not seen.target.partition("?")[0].endswith("/models")]

    async def check(self, *expected: Expected) -> None:
        """Check that exactly these calls arrived, each at its provider, and have one row each."""
        found = await rows(self.relay)
        have = [Expected(row["provider"], row["model"], row.get("usage") or {}) for row in found]
        assert have == list(expected), have
        costs = [None if row["cost_usd"] is None else float(bytes(row["cost_usd"])) for row in found]
        assert costs == [_cost(each) for each in expected], costs
        for row in found:
            assert (row["surface"], row["client"]) == ("unified", "web")
            # An SDK that has read [DONE] may disconnect before the end of the stream arrives.
            assert row["outcome"] in ("relayed", "client_gone")
        assert {name: len(self.calls(name)) for name in self.servers} == dict.fromkeys(self.servers, 0) | Counter(each.provider for each in expected)
        for name, (header, value) in CREDENTIALS.items():
            for seen in self.calls(name):
                assert seen.header(header) == value, name
                assert RELAY_KEY not in f"{seen.target} {seen.headers}", name

    def models_sent(self, provider: str) -> list[str]:
        """The models in the bodies that arrived at a provider."""
        return [json.loads(seen.body)["model"] for seen in self.calls(provider)]


def _cost(call: Expected) -> float | None:
    if "input_tokens" not in call.usage or "input_audio_tokens" in call.usage:
        return None  # PRICES has none for characters and audio
    price_in, price_out = PRICES[call.provider]
    return (call.usage["input_tokens"] * price_in + call.usage.get("output_tokens", 0) * price_out) / 1_000_000


async def start_unified(start: StartRelay, server: Any, database: str) -> Unified:
    """Start a relay that requires a key, and wait until it has the lists of all stand-ins."""
    servers = {name: await server(make()) for name, make in APPS.items()}
    entries = {}
    for name, each in servers.items():
        price_in, price_out = PRICES[name]
        entries[name] = packaged_provider(name, str(each.make_url("/")).rstrip("/"))
        entries[name]["pricing"] = [{"input_per_mtok": price_in, "output_per_mtok": price_out}]
    relay = await start(
        {"access": {"mode": "required"}, "clients": {"web": {"key": RELAY_KEY}}, "models": ALIASES, "providers": entries, "database": database}
    )
    lists = relay.gateway.model_lists
    lists.refresh(relay.gateway.unified.providers)
    async with asyncio.timeout(HANG_GUARD_S):
        while lists.version < len(entries):
            await asyncio.sleep(0.01)
    return Unified(relay, servers)


# Stand-ins --------------------------------------------------------------------------------------


async def chat(request: web.Request) -> web.StreamResponse:
    """Call the first tool of a request, if it has tools and no result of one yet."""
    sent = await request.json()
    if sent.get("stream"):
        return await _chat_stream(request)
    if not sent.get("tools") or sent["messages"][-1]["role"] == "tool":
        return await openai_chat(request)
    await noted(request)
    function = {"name": sent["tools"][0]["function"]["name"], "arguments": '{"city": "Paris"}'}
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}
    return web.json_response({"id": "chatcmpl-2", "object": "chat.completion", "created": 1, "model": sent["model"], "choices": [choice], "usage": OPENAI_CHAT_USAGE})


async def _chat_stream(request: web.Request) -> web.StreamResponse:
    """Stream with a `finish_reason`, without which some clients take a stream for broken off."""
    _, sent = await noted(request)
    head = {"id": "chatcmpl-3", "object": "chat.completion.chunk", "created": 1, "model": sent["model"]}
    choices = [*({"index": 0, "delta": {"content": word}, "finish_reason": None} for word in WORDS), {"index": 0, "delta": {}, "finish_reason": "stop"}]
    events: list[tuple[str | None, Any]] = [(None, head | {"choices": [choice]}) for choice in choices]
    if (sent.get("stream_options") or {}).get("include_usage"):
        events.append((None, head | {"choices": [], "usage": OPENAI_CHAT_USAGE}))
    return await _sse(request, [*events, (None, "[DONE]")])


async def _images(request: web.Request) -> web.StreamResponse:
    await noted(request)
    usage = {"input_tokens": 50, "output_tokens": 200, "total_tokens": 250, "input_tokens_details": {"text_tokens": 50, "image_tokens": 0}}
    return web.json_response({"created": 1, "data": [{"b64_json": "iVBORw=="}], "usage": usage})


async def _transcription(request: web.Request) -> web.StreamResponse:
    note(request, await request.read())
    usage = {"type": "tokens", "input_tokens": 14, "output_tokens": 45, "total_tokens": 59, "input_token_details": {"text_tokens": 0, "audio_tokens": 14}}
    return web.json_response({"text": "hello world", "usage": usage})


async def _moderation(request: web.Request) -> web.StreamResponse:
    _, sent = await noted(request)
    result = {"flagged": True, "categories": {"violence": True}, "category_scores": {"violence": 0.9}, "category_applied_input_types": {}}
    return web.json_response({"id": "modr-1", "model": sent["model"], "results": [result]})


async def _count_tokens(request: web.Request) -> web.StreamResponse:
    await noted(request)
    return web.json_response({"input_tokens": 12})


def _models(name: str) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        note(request)
        if name == "google-ai-studio":
            return web.json_response({"models": [{"name": f"models/{each}"} for each in LISTED[name]]})
        return web.json_response({"object": "list", "data": [{"id": each, "object": "model", "created": 1, "owned_by": name} for each in LISTED[name]]})

    return answer


def _openai() -> web.Application:
    return vendor(
        ("POST", "/v1/chat/completions", chat), ("*", "/v1/responses", openai_responses), ("POST", "/v1/embeddings", openai_embeddings),
        ("POST", "/v1/images/generations", _images), ("POST", "/v1/audio/speech", openai_speech),
        ("POST", "/v1/audio/transcriptions", _transcription), ("POST", "/v1/moderations", _moderation),
        ("GET", "/v1/realtime", openai_realtime), ("GET", "/v1/models", _models("openai")),
    )  # fmt: skip


def _anthropic() -> web.Application:
    return vendor(
        ("POST", "/v1/messages", anthropic_messages), ("POST", "/v1/messages/count_tokens", _count_tokens),
        ("POST", "/v1/chat/completions", chat), ("GET", "/v1/models", _models("anthropic")),
    )  # fmt: skip


def _groq() -> web.Application:
    return vendor(("POST", "/openai/v1/chat/completions", chat), ("GET", "/openai/v1/models", _models("groq")))


def _google() -> web.Application:
    return vendor(("POST", "/v1beta/openai/chat/completions", chat), ("GET", "/v1beta/models", _models("google-ai-studio")))


APPS: dict[str, Callable[[], web.Application]] = {"openai": _openai, "anthropic": _anthropic, "groq": _groq, "google-ai-studio": _google}
