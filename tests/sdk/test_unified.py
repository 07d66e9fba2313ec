"""The official Python SDKs, unmodified, on `/v1`: one base URL, one key, and the model's name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S
from tests.sdk.lazy import Lazy
from tests.sdk.unified import (
    ALIASES,
    CHAT,
    LISTED,
    MESSAGE,
    MESSAGE_STREAM,
    RELAY_KEY,
    RESPONSE,
    Expected,
    Unified,
    start_unified,
)

anthropic, openai = Lazy("anthropic"), Lazy("openai")

pytestmark = pytest.mark.programs

MESSAGES: Any = [{"role": "user", "content": "hi"}]
WEATHER: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
SAID = "Hello wörld"
SESSION = {"input_tokens": 132, "output_tokens": 121, "cache_read_tokens": 64, "input_audio_tokens": 13, "output_audio_tokens": 91}


@pytest.fixture
async def unified(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> Unified:
    return await start_unified(start, aiohttp_server, sqlite_setting)


@pytest.fixture
async def client(unified: Unified) -> AsyncIterator[Any]:
    """OpenAI's SDK with its own retries."""
    async with openai.AsyncOpenAI(api_key=RELAY_KEY, base_url=unified.v1) as made:
        yield made


@pytest.fixture
async def claude(unified: Unified) -> AsyncIterator[Any]:
    """Anthropic's SDK with its own retries."""
    async with anthropic.AsyncAnthropic(api_key=RELAY_KEY, base_url=unified.url) as made:
        yield made


# OpenAI -----------------------------------------------------------------------------------------

NAMES = [
    ("gpt-5", "openai", "gpt-5"),
    ("openai/gpt-5", "openai", "gpt-5"),
    ("llama-3.3-70b-versatile", "groq", "llama-3.3-70b-versatile"),
    ("groq/llama-3.3-70b-versatile", "groq", "llama-3.3-70b-versatile"),
    ("fast", "groq", "llama-3.3-70b-versatile"),
    ("claude-sonnet-5", "anthropic", "claude-sonnet-5"),
    ("best", "anthropic", "claude-sonnet-5"),
    ("gemini-2.5-flash", "google-ai-studio", "gemini-2.5-flash"),
]


@pytest.mark.parametrize(("name", "provider", "model"), NAMES)
async def test_openai_chat_goes_to_the_provider_of_a_model(unified: Unified, client: Any, name: str, provider: str, model: str) -> None:
    answer = await client.chat.completions.create(model=name, messages=MESSAGES)
    assert answer.choices[0].message.content == SAID and answer.usage.total_tokens == 29
    assert unified.models_sent(provider) == [model]
    await unified.check(Expected(provider, model, CHAT))


@pytest.mark.parametrize(("name", "provider", "model"), NAMES)
async def test_openai_chat_streams_from_the_provider_of_a_model(unified: Unified, client: Any, name: str, provider: str, model: str) -> None:
    stream = await client.chat.completions.create(model=name, messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SAID
    assert chunks[-1].usage.total_tokens == 29
    await unified.check(Expected(provider, model, CHAT))


async def test_a_stream_without_usage_for_the_client_has_usage_in_the_ledger(unified: Unified, client: Any) -> None:
    stream = await client.chat.completions.create(model="gpt-5", messages=MESSAGES, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices for chunk in chunks), "the client asked for no chunk with usage"
    await unified.check(Expected("openai", "gpt-5", CHAT))


async def test_openai_tools(unified: Unified, client: Any) -> None:
    asked = await client.chat.completions.create(model="fast", messages=MESSAGES, tools=WEATHER)
    [call] = asked.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}')
    said = [*MESSAGES, asked.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = await client.chat.completions.create(model="fast", messages=said, tools=WEATHER)
    assert answer.choices[0].message.content == SAID
    row = Expected("groq", "llama-3.3-70b-versatile", CHAT)
    await unified.check(row, row)


async def test_openai_responses(unified: Unified, client: Any) -> None:
    assert (await client.responses.create(model="openai/gpt-5", input="hi")).output_text == SAID
    await unified.check(Expected("openai", "gpt-5", RESPONSE))


async def test_openai_responses_stream(unified: Unified, client: Any) -> None:
    stream = await client.responses.create(model="gpt-5", input="hi", stream=True)
    events = [event async for event in stream]
    assert events[-1].response.output_text == SAID
    await unified.check(Expected("openai", "gpt-5", RESPONSE))


async def test_openai_embeddings(unified: Unified, client: Any) -> None:
    answer = await client.embeddings.create(model="text-embedding-3-small", input="hi")
    assert answer.data[0].embedding == [0.25, -0.5]
    await unified.check(Expected("openai", "text-embedding-3-small", {"input_tokens": 8}))


async def test_openai_images(unified: Unified, client: Any) -> None:
    answer = await client.images.generate(model="gpt-image-1", prompt="a cat")
    assert answer.data[0].b64_json == "iVBORw=="
    await unified.check(Expected("openai", "gpt-image-1", {"input_tokens": 50, "output_tokens": 200, "output_image_tokens": 200}))


async def test_openai_speech(unified: Unified, client: Any) -> None:
    async with client.audio.speech.with_streaming_response.create(model="openai/tts-1", voice="alloy", input="hi") as speech:
        assert len(b"".join([piece async for piece in speech.iter_bytes()])) == 16384
    assert unified.models_sent("openai") == ["tts-1"]
    await unified.check(Expected("openai", "tts-1", {"characters": 2}))


async def test_openai_transcription(unified: Unified, client: Any) -> None:
    answer = await client.audio.transcriptions.create(model="openai/gpt-4o-transcribe", file=("a.wav", b"RIFF", "audio/wav"))
    assert answer.text == "hello world"
    [seen] = unified.calls("openai")
    assert b"\r\n\r\ngpt-4o-transcribe\r\n" in seen.body
    await unified.check(Expected("openai", "gpt-4o-transcribe", {"input_tokens": 14, "output_tokens": 45, "input_audio_tokens": 14}))


async def test_openai_moderations(unified: Unified, client: Any) -> None:
    answer = await client.moderations.create(model="omni-moderation-latest", input="hi")
    assert answer.results[0].flagged
    await unified.check(Expected("openai", "omni-moderation-latest", {}))


async def test_openai_lists_the_models_of_all_providers(unified: Unified, client: Any) -> None:
    listed = {model.id: model.owned_by async for model in client.models.list()}
    wanted = {name: provider for provider, names in LISTED.items() for model in names for name in (model, f"{provider}/{model}")}
    assert listed == wanted | {"fast": "groq", "best": "anthropic", "voice": "openai"} and set(ALIASES) < set(listed)
    for name in ("fast", "groq/llama-3.3-70b-versatile"):
        assert (await client.models.retrieve(name)).owned_by == "groq"
    await unified.check()


@pytest.mark.parametrize("name", ["gpt-realtime", "openai/gpt-realtime", "voice"])
async def test_openai_realtime(unified: Unified, client: Any, name: str) -> None:
    async with asyncio.timeout(HANG_GUARD_S), client.realtime.connect(model=name) as connection:
        await connection.response.create()
        async for event in connection:
            if event.type == "response.done":
                assert event.response.usage.total_tokens == 253
                break
    assert [seen.target for seen in unified.calls("openai")] == ["/v1/realtime?model=gpt-realtime"]
    await unified.check(Expected("openai", "gpt-realtime", SESSION))


async def test_an_unknown_model_is_not_found_and_not_sent_again(unified: Unified, client: Any) -> None:
    assert unified.relay.runner.server is not None
    before = unified.relay.runner.server.requests_count
    with pytest.raises(openai.NotFoundError) as raised:
        await client.chat.completions.create(model="fsat", messages=MESSAGES)
    assert (raised.value.code, raised.value.type) == ("model_not_found", "not_found_error")
    assert "Did you mean 'fast'?" in raised.value.message
    assert unified.relay.runner.server.requests_count == before + 1
    assert not any(unified.calls(name) for name in unified.servers)


# Anthropic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["claude-sonnet-5", "anthropic/claude-sonnet-5", "best"])
async def test_anthropic_messages(unified: Unified, claude: Any, name: str) -> None:
    message = await claude.messages.create(model=name, max_tokens=10, messages=MESSAGES)
    assert message.content[0].text == "Hi"
    assert unified.models_sent("anthropic") == ["claude-sonnet-5"]
    await unified.check(Expected("anthropic", "claude-sonnet-5", MESSAGE))


async def test_anthropic_messages_stream(unified: Unified, claude: Any) -> None:
    async with claude.messages.stream(model="best", max_tokens=10, messages=MESSAGES) as stream:
        assert "".join([text async for text in stream.text_stream]) == "Hi"
        assert (await stream.get_final_message()).usage.output_tokens == 6
    await unified.check(Expected("anthropic", "claude-sonnet-5", MESSAGE_STREAM))


async def test_anthropic_count_tokens(unified: Unified, claude: Any) -> None:
    assert (await claude.messages.count_tokens(model="best", messages=MESSAGES)).input_tokens == 12
    await unified.check(Expected("anthropic", "claude-sonnet-5", {}))


async def test_anthropic_lists_the_models(unified: Unified, claude: Any) -> None:
    listed = {model.id: model.type async for model in claude.models.list()}
    assert {"best", "claude-sonnet-5", "anthropic/claude-sonnet-5"} < set(listed) and set(listed.values()) == {"model"}
    for name in ("best", "anthropic/claude-sonnet-5"):
        assert (await claude.models.retrieve(name)).id == name
    await unified.check()


async def test_an_unknown_model_is_not_found_for_anthropic_and_not_sent_again(unified: Unified, claude: Any) -> None:
    assert unified.relay.runner.server is not None
    before = unified.relay.runner.server.requests_count
    with pytest.raises(anthropic.NotFoundError) as raised:
        await claude.messages.create(model="claude-none", max_tokens=10, messages=MESSAGES)
    assert raised.value.body["error"]["type"] == "not_found_error"
    assert unified.relay.runner.server.requests_count == before + 1
    assert not any(unified.calls(name) for name in unified.servers)
