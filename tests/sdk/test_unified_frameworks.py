"""Frameworks and their clients of OpenAI and Anthropic, unmodified, on `/v1`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.sdk.lazy import Lazy
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

langchain_anthropic, langchain_openai, litellm = map(Lazy, ("langchain_anthropic", "langchain_openai", "litellm"))
pydantic_ai = Lazy("pydantic_ai")
models_anthropic, models_openai = Lazy("pydantic_ai.models.anthropic"), Lazy("pydantic_ai.models.openai")
providers_anthropic, providers_openai = Lazy("pydantic_ai.providers.anthropic"), Lazy("pydantic_ai.providers.openai")

# The frameworks keep their connections for the next call, and offer no way to close them.
pytestmark = [pytest.mark.programs, pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")]

MESSAGES: Any = [{"role": "user", "content": "hi"}]
SAID = "Hello wörld"
LLAMA = Expected("groq", "llama-3.3-70b-versatile", CHAT)
GPT = Expected("openai", "gpt-5", CHAT)
CLAUDE = "claude-sonnet-5"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM would fetch its list of prices, and LangSmith would trace. LiteLLM would also put the
    placeholders of the checkout's .env into the environment of all further tests.
    """
    monkeypatch.setenv("LITELLM_MODE", "PRODUCTION")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")


@pytest.fixture
async def unified(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> Unified:
    return await start_unified(start, aiohttp_server, sqlite_setting)


# LiteLLM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "row"), [("openai/gpt-5", GPT), ("openai/fast", LLAMA), ("openai/groq/llama-3.3-70b-versatile", LLAMA)])
async def test_litellm(unified: Unified, name: str, row: Expected) -> None:
    """LiteLLM takes `openai/` off and sends the rest as the model."""
    answer = await asyncio.to_thread(litellm.completion, model=name, api_base=unified.v1, api_key=RELAY_KEY, messages=MESSAGES)
    assert answer.choices[0].message.content == SAID
    await unified.check(row)


async def test_litellm_stream(unified: Unified) -> None:
    stream = await litellm.acompletion(model="openai/fast", api_base=unified.v1, api_key=RELAY_KEY, messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]) == SAID
    await unified.check(LLAMA)


async def test_litellm_responses(unified: Unified) -> None:
    answer = await litellm.aresponses(model="openai/openai/gpt-5", api_base=unified.v1, api_key=RELAY_KEY, input="hi")
    assert answer.output[0].content[0].text == SAID
    await unified.check(Expected("openai", "gpt-5", RESPONSE))


async def test_litellm_embeddings(unified: Unified) -> None:
    model = "text-embedding-3-small"
    answer = await litellm.aembedding(model=f"openai/{model}", api_base=unified.v1, api_key=RELAY_KEY, input=["hi"])
    assert answer.data[0]["embedding"] == [0.25, -0.5]
    await unified.check(Expected("openai", model, {"input_tokens": 8}))


async def test_litellm_anthropic(unified: Unified) -> None:
    answer = await litellm.acompletion(model="anthropic/best", api_base=unified.url, api_key=RELAY_KEY, messages=MESSAGES, max_tokens=10)
    assert answer.choices[0].message.content == "Hi"
    await unified.check(Expected("anthropic", CLAUDE, MESSAGE))


async def test_litellm_reads_an_unknown_model_as_not_found(unified: Unified) -> None:
    with pytest.raises(litellm.NotFoundError, match="Did you mean 'fast'"):
        await litellm.acompletion(model="openai/fsat", api_base=unified.v1, api_key=RELAY_KEY, messages=MESSAGES)
    assert not any(unified.calls(name) for name in unified.servers)


# LangChain --------------------------------------------------------------------------------------


def _chat_openai(unified: Unified, model: str, **more: Any) -> Any:
    return langchain_openai.ChatOpenAI(model=model, base_url=unified.v1, api_key=RELAY_KEY, **more)


@pytest.mark.parametrize(("name", "row"), [("gpt-5", GPT), ("fast", LLAMA)])
async def test_langchain_openai(unified: Unified, name: str, row: Expected) -> None:
    answer = await _chat_openai(unified, name, use_responses_api=False).ainvoke("hi")
    assert answer.content == SAID and answer.usage_metadata["total_tokens"] == 29
    await unified.check(row)


async def test_langchain_openai_stream(unified: Unified) -> None:
    chunks = [chunk async for chunk in _chat_openai(unified, "fast", stream_usage=True).astream("hi")]
    assert "".join(chunk.content for chunk in chunks) == SAID
    await unified.check(LLAMA)


async def test_langchain_openai_tools(unified: Unified) -> None:
    def weather(city: str) -> str:
        """Return the weather of a city."""
        return "sunny"

    answer = await _chat_openai(unified, "fast").bind_tools([weather]).ainvoke("hi")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("weather", {"city": "Paris"})]
    await unified.check(LLAMA)


async def test_langchain_openai_responses(unified: Unified) -> None:
    answer = await _chat_openai(unified, "openai/gpt-5", use_responses_api=True).ainvoke("hi")
    assert answer.text == SAID
    await unified.check(Expected("openai", "gpt-5", RESPONSE))


@pytest.mark.parametrize("name", [CLAUDE, "best"])
async def test_langchain_anthropic(unified: Unified, name: str) -> None:
    model = langchain_anthropic.ChatAnthropic(model=name, base_url=unified.url, api_key=RELAY_KEY, max_tokens=10)
    assert (await model.ainvoke("hi")).content == "Hi"
    await unified.check(Expected("anthropic", CLAUDE, MESSAGE))


async def test_langchain_anthropic_stream(unified: Unified) -> None:
    model = langchain_anthropic.ChatAnthropic(model="best", base_url=unified.url, api_key=RELAY_KEY, max_tokens=10)
    assert "".join([chunk.text async for chunk in model.astream("hi")]) == "Hi"
    await unified.check(Expected("anthropic", CLAUDE, MESSAGE_STREAM))


# Pydantic AI ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "row"), [("gpt-5", GPT), ("fast", LLAMA)])
async def test_pydantic_ai_openai(unified: Unified, name: str, row: Expected) -> None:
    provider = providers_openai.OpenAIProvider(base_url=unified.v1, api_key=RELAY_KEY)
    result = await pydantic_ai.Agent(models_openai.OpenAIChatModel(name, provider=provider)).run("hi")
    assert result.output == SAID
    await unified.check(row)


async def test_pydantic_ai_openai_tools(unified: Unified) -> None:
    provider = providers_openai.OpenAIProvider(base_url=unified.v1, api_key=RELAY_KEY)
    agent = pydantic_ai.Agent(models_openai.OpenAIChatModel("fast", provider=provider))
    asked = []

    @agent.tool_plain  # type: ignore[untyped-decorator]
    def weather(city: str) -> str:
        asked.append(city)
        return "sunny"

    assert (await agent.run("hi")).output == SAID and asked == ["Paris"]
    await unified.check(LLAMA, LLAMA)


async def test_pydantic_ai_openai_responses(unified: Unified) -> None:
    provider = providers_openai.OpenAIProvider(base_url=unified.v1, api_key=RELAY_KEY)
    result = await pydantic_ai.Agent(models_openai.OpenAIResponsesModel("gpt-5", provider=provider)).run("hi")
    assert result.output == SAID
    await unified.check(Expected("openai", "gpt-5", RESPONSE))


@pytest.mark.parametrize(("name", "usage"), [(CLAUDE, MESSAGE_STREAM), ("best", MESSAGE)], ids=["name", "alias"])
async def test_pydantic_ai_anthropic(unified: Unified, name: str, usage: dict[str, int]) -> None:
    """Pydantic AI streams the answers of models that it knows to be long."""
    provider = providers_anthropic.AnthropicProvider(base_url=unified.url, api_key=RELAY_KEY)
    result = await pydantic_ai.Agent(models_anthropic.AnthropicModel(name, provider=provider)).run("hi")
    assert result.output == "Hi"
    await unified.check(Expected("anthropic", CLAUDE, usage))
