"""A budget that is spent, in official SDKs: the refusal is read as such, and not sent again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.relays import Relay, packaged_provider
from tests.sdk.lazy import Lazy
from tests.upstream.raw import RawUpstream

anthropic, openai, groq = map(Lazy, ("anthropic", "openai", "groq"))
genai, types = Lazy("google.genai"), Lazy("google.genai.types")

pytestmark = pytest.mark.programs

MESSAGES = [{"role": "user", "content": "hi"}]
PROVIDERS = ("openai", "anthropic", "google-ai-studio", "groq")


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> Relay:
    """A relay whose budget has room for no call."""
    budgets = {"rules": [{"usd": 0.000000001, "period": "day", "name": "tiny"}]}
    providers = {name: packaged_provider(name, raw.url) | {"pricing": [{"input_per_mtok": 1000, "output_per_mtok": 1000}]} for name in PROVIDERS}
    return await start({"database": str(tmp_path / "relay.db"), "budgets": budgets, "providers": providers})


async def _openai(base: str) -> Any:
    async with openai.AsyncOpenAI(api_key="any", base_url=base) as client:
        await client.chat.completions.create(model="gpt-5", messages=MESSAGES)


async def _openai_stream(base: str) -> Any:
    async with openai.AsyncOpenAI(api_key="any", base_url=base) as client:
        async for _ in await client.responses.create(model="gpt-5", input="hi", stream=True):
            pass


async def _anthropic(base: str) -> Any:
    async with anthropic.AsyncAnthropic(api_key="any", base_url=base) as client:
        await client.messages.create(model="claude-x", max_tokens=10, messages=MESSAGES)


async def _anthropic_stream(base: str) -> Any:
    async with anthropic.AsyncAnthropic(api_key="any", base_url=base) as client:
        async with client.messages.stream(model="claude-x", max_tokens=10, messages=MESSAGES) as stream:
            await stream.get_final_message()


async def _groq(base: str) -> Any:
    async with groq.AsyncGroq(api_key="any", base_url=base.removesuffix("/openai/v1")) as client:
        await client.chat.completions.create(model="llama", messages=MESSAGES)


async def _google(base: str) -> Any:
    client = genai.Client(api_key="any", http_options=types.HttpOptions(base_url=base))
    try:
        await client.aio.models.generate_content(model="gemini-2.5-flash", contents="hi")
    finally:
        await client.aio.aclose()


async def _google_stream(base: str) -> Any:
    client = genai.Client(api_key="any", http_options=types.HttpOptions(base_url=base))
    try:
        pieces: AsyncIterator[Any] = await client.aio.models.generate_content_stream(model="gemini-2.5-flash", contents="hi")
        async for _ in pieces:
            pass
    finally:
        await client.aio.aclose()


CALLS: dict[str, tuple[str, Callable[[str], Awaitable[Any]]]] = {
    "openai": ("openai", _openai),
    "openai stream": ("openai", _openai_stream),
    "anthropic": ("anthropic", _anthropic),
    "anthropic stream": ("anthropic", _anthropic_stream),
    "google": ("google-ai-studio", _google),
    "google stream": ("google-ai-studio", _google_stream),
    "groq": ("groq", _groq),
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_spent_budget_is_read_by_the_sdk_and_the_call_is_not_sent_again(relay: Relay, raw: RawUpstream, name: str) -> None:
    provider, call = CALLS[name]
    with pytest.raises(Exception) as raised:
        await call(relay.path(provider).rstrip("/"))
    error = raised.value
    assert (getattr(error, "status_code", None) or getattr(error, "code", None)) == 429, error
    assert "The budget 'tiny'" in str(error) and "It resets at " in str(error)
    if provider == "openai":
        assert isinstance(error, openai.RateLimitError) and (error.type, error.code) == ("insufficient_quota", "insufficient_quota")
    if provider == "anthropic":
        assert error.body["error"]["type"] == "billing_error"
    if provider == "google-ai-studio":
        assert error.status == "RESOURCE_EXHAUSTED"
    assert relay.runner.server is not None
    assert relay.runner.server.requests_count == 1 and raw.connections == 0
