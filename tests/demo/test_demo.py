"""The built-in provider through the relay, as a new user's first calls use it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relay.demo.provider import REPLY, Demo
from tests.relays import CLIENT_KEY, Relay, start_relay, stop_relay
from tests.sdk.lazy import Lazy

openai = Lazy("openai")


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[Relay]:
    """A relay in front of the running demo."""
    built_in = Demo.bind()
    async with built_in.running():
        socket = {"default_path": "realtime", "default_query": {"model": "demo-realtime"}, "subprotocols": {"realtime": "pass", "openai-beta.": "drop"}}
        relay = await start_relay(tmp_path, {"providers": {"demo": {"base_url": built_in.url, "websocket": socket}}})
        yield relay
        await stop_relay(relay)


def _client(relay: Relay) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key=CLIENT_KEY, base_url=relay.path("demo").rstrip("/"), max_retries=0)


async def test_chat_streams_word_by_word_with_usage(demo: Relay) -> None:
    async with _client(demo) as client:
        stream = await client.chat.completions.create(model="demo-chat", stream=True, stream_options={"include_usage": True}, messages=[{"role": "user", "content": "hi"}])
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 20
        whole = await client.chat.completions.create(model="demo-chat", messages=[{"role": "user", "content": "hi"}])
        assert whole.choices[0].message.content == REPLY and whole.usage is not None


async def test_responses_embeddings_models_and_speech(demo: Relay) -> None:
    async with _client(demo) as client:
        stream = await client.responses.create(model="demo-chat", input="hi", stream=True)
        events = [event async for event in stream]
        assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
        assert events[-1].response.usage.total_tokens > 20  # type: ignore[union-attr]
        assert (await client.responses.create(model="demo-chat", input="hi")).output_text == REPLY
        assert len((await client.embeddings.create(model="demo-embedding", input=["a", "b"])).data[1].embedding) == 8
        assert "demo-chat" in [model.id async for model in client.models.list()]
        async with client.audio.speech.with_streaming_response.create(model="demo-speech", input="say this", voice="alloy") as audio:
            assert len(await audio.read()) % 2 == 0


async def test_outdated_and_unknown_fields_are_refused_as_by_openai(demo: Relay) -> None:
    async with _client(demo) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="m", messages=[], extra_body={"max_toknes": 1})
        assert (caught.value.code, caught.value.param) == ("unknown_parameter", "max_toknes")
    status, headers, _ = await demo.call("POST", demo.path("demo", "chat/completions"), data=b"{")
    assert (status, headers["x-relay-error-source"]) == (400, "provider")
    assert (await demo.call("GET", demo.path("demo", "nothing")))[0] == 404


async def test_odd_input_of_the_demo_is_answered_without_an_internal_error(demo: Relay) -> None:
    asked = {"model": "m", "messages": [], "stream": True, "stream_options": "x"}
    status, _, body = await demo.call("POST", demo.path("demo", "chat/completions"), data=json.dumps(asked).encode())
    assert (status, json.loads(body)["error"]["param"]) == (400, "stream_options")
    surrogate = rb'{"model": "m", "input": "\ud800"}'
    assert (await demo.call("POST", demo.path("demo", "embeddings"), data=surrogate))[0] == 200


async def test_realtime_speaks_text_and_audio_with_usage(demo: Relay) -> None:
    async with demo.client.ws_connect(demo.ws("demo"), protocols=["realtime"]) as socket, asyncio.timeout(20):
        assert (await socket.receive_json())["type"] == "session.created"
        for modality, delta in (("text", "response.output_text.delta"), ("audio", "response.output_audio.delta")):
            await socket.send_json({"type": "response.create", "response": {"output_modalities": [modality]}})
            kinds = []
            while (event := await socket.receive_json())["type"] != "response.done":
                kinds.append(event["type"])
            assert delta in kinds and event["response"]["usage"]["total_tokens"] > 0


async def test_realtime_refuses_the_shapes_of_the_beta(demo: Relay) -> None:
    async with demo.client.ws_connect(demo.ws("demo")) as socket, asyncio.timeout(20):
        await socket.receive_json()
        await socket.send_json({"type": "response.create", "event_id": "e", "response": {"modalities": ["text"]}})
        error = (await socket.receive_json())["error"]
        assert (error["code"], error["param"], error["event_id"]) == ("unknown_parameter", "response.modalities", "e")
        await socket.send_str("not json")
        assert (await socket.receive_json())["error"]["code"] == "invalid_json"
    async with demo.client.ws_connect(demo.ws("demo"), headers={"OpenAI-Beta": "realtime=v1"}) as socket, asyncio.timeout(20):
        assert json.loads((await socket.receive()).data)["error"]["code"] == "beta_api_shape_disabled"
        await socket.receive()
        assert socket.close_code == 4000
