"""The Node SDKs of OpenAI and Anthropic and the AI SDK, unmodified, on `/v1`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.processes import output
from tests.sdk.test_node import NODE, need_packages
from tests.sdk.unified import (
    CHAT,
    MESSAGE,
    MESSAGE_STREAM,
    RELAY_KEY,
    RESPONSE,
    Expected,
    Unified,
    start_unified,
)

pytestmark = pytest.mark.programs

GPT, LLAMA = Expected("openai", "gpt-5", CHAT), Expected("groq", "llama-3.3-70b-versatile", CHAT)
GEMINI = Expected("google-ai-studio", "gemini-2.5-flash", CHAT)
GPT_RESPONSE = Expected("openai", "gpt-5", RESPONSE)
CLAUDE, CLAUDE_STREAM = Expected("anthropic", "claude-sonnet-5", MESSAGE), Expected("anthropic", "claude-sonnet-5", MESSAGE_STREAM)

# SDK, case of its script, model as the client names it, row.
CASES = [
    ("openai", "chat", "gpt-5", GPT),
    ("openai", "chat", "groq/llama-3.3-70b-versatile", LLAMA),
    ("openai", "stream", "fast", LLAMA),
    ("openai", "stream", "gemini-2.5-flash", GEMINI),
    ("openai", "responses", "openai/gpt-5", GPT_RESPONSE),
    ("openai", "models", "fast", None),
    ("openai", "unknown", "fsat", None),
    ("anthropic", "messages", "claude-sonnet-5", CLAUDE),
    ("anthropic", "messages", "anthropic/claude-sonnet-5", CLAUDE),
    ("anthropic", "stream", "best", CLAUDE_STREAM),
    ("anthropic", "count", "best", Expected("anthropic", "claude-sonnet-5", {})),
    ("anthropic", "models", "best", None),
    ("ai", "responses", "gpt-5", GPT_RESPONSE),
    ("ai", "chat", "fast", LLAMA),
    ("ai", "chat-stream", "openai/gpt-5", GPT),
    ("ai", "embed", "openai/text-embedding-3-small", Expected("openai", "text-embedding-3-small", {"input_tokens": 8})),
    ("ai", "compatible", "groq/llama-3.3-70b-versatile", LLAMA),
    ("ai", "compatible-stream", "gemini-2.5-flash", GEMINI),
    ("ai", "anthropic", "claude-sonnet-5", CLAUDE),
    ("ai", "anthropic-stream", "best", CLAUDE_STREAM),
]


@pytest.fixture
async def unified(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> Unified:
    need_packages(NODE)
    return await start_unified(start, aiohttp_server, sqlite_setting)


@pytest.mark.parametrize(("sdk", "case", "model", "row"), CASES, ids=[f"{sdk}-{case}-{model}" for sdk, case, model, _ in CASES])
async def test_a_node_sdk(unified: Unified, sdk: str, case: str, model: str, row: Expected | None) -> None:
    assert unified.relay.runner.server is not None
    before = unified.relay.runner.server.requests_count
    env = {"CLIENT_KEY": RELAY_KEY, "BASE": unified.url}
    assert await output("node", str(NODE / f"unified-{sdk}.mjs"), case, model, env=env) == "ok\n"
    assert unified.relay.runner.server.requests_count == before + 1, "nothing is sent again"
    if case != "unknown":
        await unified.check(*([row] if row else []))
    assert sum(len(unified.calls(name)) for name in unified.servers) == (row is not None)
