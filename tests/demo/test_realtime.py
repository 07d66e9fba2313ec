"""Realtime sessions with the demo: its events are as the openai package declares them, in the order
of OpenAI's API.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any, get_args

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from relay.demo import realtime
from relay.demo.audio import InputAudio, tone
from relay.demo.conversation import _MAX_ITEMS, SPOKEN, Conversation, checked_item, content_after
from relay.demo.provider import application
from relay.demo.realtime_response import example_call
from tests.relays import HANG_GUARD_S
from tests.sdk.lazy import Lazy

types = Lazy("openai.types.realtime")
NOT_IN_TYPES = {"session": {"id", "object", "expires_at"}}
"""Fields that OpenAI sends and the types of events in the package lack
(RealtimeSessionCreateResponse has them)."""
WEATHER = {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
SPEECH = b"".join(tone(tenth) for tenth in range(5))
SILENCE = bytes(len(tone(0)))


def _check_type(event: dict[str, Any]) -> None:
    """Raise unless the package declares this event, has all its fields, and no other."""
    by_type = {get_args(each.model_fields["type"].annotation)[0]: each for each in get_args(get_args(types.RealtimeServerEvent)[0])}
    _refuse_extra(by_type[event["type"]].model_validate(event, strict=True), event["type"])


def _refuse_extra(model: Any, name: str) -> None:
    extra = set(model.model_extra or ()) - NOT_IN_TYPES.get(name, set())
    assert not extra, f"{name} has {extra}"
    for field in type(model).model_fields:
        value = getattr(model, field)
        for each in value if isinstance(value, list) else [value]:
            if hasattr(each, "model_fields_set"):
                _refuse_extra(each, field)


class Session:
    """A client of the demo that checks every event."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def send(self, kind: str, **fields: Any) -> None:
        await self.socket.send_json({"type": kind, **fields})

    async def until(self, kind: str) -> list[dict[str, Any]]:
        """All events up to the next one of this type."""
        events: list[dict[str, Any]] = []
        async with asyncio.timeout(HANG_GUARD_S):
            while not events or events[-1]["type"] != kind:
                events.append(await self.socket.receive_json())
                _check_type(events[-1])
        return events

    async def error(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.until("error"))[-1]["error"]
        return found

    async def update(self, **settings: Any) -> dict[str, Any]:
        await self.send("session.update", session={"type": "realtime"} | settings)
        updated: dict[str, Any] = (await self.until("session.updated"))[-1]["session"]
        return updated

    async def say(self, text: str) -> None:
        await self.send("conversation.item.create", item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]})
        await self.until("conversation.item.done")

    async def hear(self, pcm: bytes) -> None:
        await self.send("input_audio_buffer.append", audio=base64.b64encode(pcm).decode())


@pytest.fixture
async def session(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Session]:
    """A session with the demo, whose pauses between deltas are short."""
    monkeypatch.setattr(realtime, "_DELTA_PAUSE_S", 0.001)
    async with TestServer(application()) as server, aiohttp.ClientSession() as client:
        async with client.ws_connect(server.make_url("/v1/realtime?model=demo-realtime")) as socket:
            made = Session(socket)
            await made.until("session.created")
            yield made


def _kinds(events: list[dict[str, Any]]) -> list[str]:
    """The types of events, each delta once."""
    return list(dict.fromkeys(event["type"] for event in events))


async def test_a_message_in_text_is_complete(session: Session) -> None:
    await session.say("hi")
    await session.send("response.create", response={"output_modalities": ["text"]})
    events = await session.until("response.done")
    assert _kinds(events) == [
        "response.created", "response.output_item.added", "conversation.item.added", "response.content_part.added", "response.output_text.delta",
        "response.output_text.done", "response.content_part.done", "conversation.item.done", "response.output_item.done", "response.done",
    ]  # fmt: skip
    response = events[-1]["response"]
    assert response["output"][0]["content"] == [{"type": "output_text", "text": SPOKEN}]
    assert "".join(event["delta"] for event in events if "delta" in event) == SPOKEN
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] and usage["output_token_details"]["audio_tokens"] == 0


async def test_a_message_in_audio_is_complete(session: Session) -> None:
    await session.send("response.create")
    events = await session.until("response.done")
    assert _kinds(events)[4:8] == [
        "response.output_audio_transcript.delta", "response.output_audio.delta", "response.output_audio.done", "response.output_audio_transcript.done",
    ]  # fmt: skip
    assert events[-1]["response"]["output"][0]["content"] == [{"type": "output_audio", "transcript": SPOKEN}]
    tenths = [event for event in events if event["type"] == "response.output_audio.delta"]
    assert events[-1]["response"]["usage"]["output_token_details"]["audio_tokens"] == len(tenths)


async def test_a_function_is_called_and_its_output_is_said(session: Session) -> None:
    await session.update(tools=[WEATHER], output_modalities=["text"])
    await session.say("What is the weather like?")
    await session.send("response.create")
    events = await session.until("response.done")
    assert _kinds(events) == [
        "response.created", "response.output_item.added", "conversation.item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "conversation.item.done", "response.output_item.done", "response.done",
    ]  # fmt: skip
    call = events[-1]["response"]["output"][0]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "get_weather", {"city": "demo"})
    await session.send("conversation.item.create", item={"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"})
    await session.send("response.create")
    output = (await session.until("response.done"))[-1]["response"]["output"][0]
    assert output["content"][0]["text"] == "The function returned: sunny"


@pytest.mark.parametrize(("choice", "text", "calls"), [("auto", "hello", False), ("required", "hello", True), ("none", "weather", False), ({"type": "function", "name": "get_weather"}, "hello", True)])
async def test_the_choice_of_tools_decides(session: Session, choice: Any, text: str, calls: bool) -> None:
    await session.say(text)
    await session.send("response.create", response={"tools": [WEATHER], "tool_choice": choice, "output_modalities": ["text"]})
    output = (await session.until("response.done"))[-1]["response"]["output"][0]
    assert (output["type"] == "function_call") is calls


async def test_speech_is_detected_and_answered(session: Session) -> None:
    await session.update(audio={"input": {"transcription": {"model": "gpt-4o-mini-transcribe"}}})
    for part in (SILENCE, SPEECH, SILENCE * 5):
        await session.hear(part)
    events = await session.until("response.done")
    assert _kinds(events)[:6] == [
        "input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped", "input_audio_buffer.committed",
        "conversation.item.added", "conversation.item.done", "conversation.item.input_audio_transcription.completed",
    ]  # fmt: skip
    started, stopped, committed, added = events[:4]
    assert (started["audio_start_ms"], stopped["audio_end_ms"]) == (100, 1100)
    assert started["item_id"] == stopped["item_id"] == committed["item_id"] == added["item"]["id"]


async def test_without_turn_detection_the_client_commits(session: Session) -> None:
    updated = await session.update(audio={"input": {"turn_detection": None}})
    assert updated["audio"]["input"]["turn_detection"] is None and updated["audio"]["output"]["voice"] == "marin"
    await session.hear(SPEECH + SILENCE * 9)
    await session.send("input_audio_buffer.commit")
    assert _kinds(await session.until("conversation.item.done"))[0] == "input_audio_buffer.committed"
    await session.send("input_audio_buffer.commit")
    assert (await session.error())["code"] == "input_audio_buffer_commit_empty"
    await session.hear(SPEECH)
    await session.send("input_audio_buffer.clear")
    await session.until("input_audio_buffer.cleared")
    await session.send("input_audio_buffer.commit")
    assert (await session.error())["code"] == "input_audio_buffer_commit_empty"


@pytest.fixture
def endless_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    """A response that only the client can end."""
    monkeypatch.setattr(realtime, "content_after", lambda *_: "word " * 100_000)


@pytest.mark.usefixtures("endless_deltas")
async def test_a_response_is_cancelled_by_the_client(session: Session) -> None:
    await session.send("response.create")
    await session.until("response.output_audio.delta")
    await session.send("response.create")
    assert (await session.error())["code"] == "conversation_already_has_active_response"
    await session.send("response.cancel")
    response = (await session.until("response.done"))[-1]["response"]
    assert (response["status"], response["status_details"]["reason"]) == ("cancelled", "client_cancelled")
    assert response["output"][0]["status"] == "incomplete"
    await session.send("response.cancel")
    assert (await session.error())["code"] == "response_cancel_not_active"


@pytest.mark.usefixtures("endless_deltas")
async def test_a_response_is_interrupted_by_speech(session: Session) -> None:
    await session.send("response.create")
    await session.until("response.output_audio.delta")
    await session.hear(SPEECH)
    events = await session.until("response.done")
    assert "input_audio_buffer.speech_started" in _kinds(events)
    assert events[-1]["response"]["status_details"]["reason"] == "turn_detected"


async def test_items_are_retrieved_truncated_and_deleted(session: Session) -> None:
    await session.send("response.create")
    item = (await session.until("response.done"))[-1]["response"]["output"][0]
    await session.send("conversation.item.retrieve", item_id=item["id"])
    assert (await session.until("conversation.item.retrieved"))[-1]["item"] == item
    await session.send("conversation.item.truncate", item_id=item["id"], content_index=0, audio_end_ms=100)
    await session.until("conversation.item.truncated")
    await session.send("conversation.item.delete", item_id=item["id"])
    await session.until("conversation.item.deleted")
    await session.send("conversation.item.retrieve", item_id=item["id"])
    assert (await session.error())["code"] == "item_not_found"


async def test_a_response_out_of_band_stays_out_of_the_conversation(session: Session) -> None:
    await session.send("response.create", response={"conversation": "none", "metadata": {"topic": "x"}})
    events = await session.until("response.done")
    assert not {"conversation.item.added", "conversation.item.done"} & set(_kinds(events))
    response = events[-1]["response"]
    assert (response["conversation_id"], response["metadata"]) == (None, {"topic": "x"})


MALFORMED = {
    "no object": "[]", "no type": "{}", "deep": '{"type":' + "[" * 100_000, "unknown type": {"type": "no.such"},
    "session": {"type": "session.update", "session": "x"}, "session without type": {"type": "session.update", "session": {}},
    "modalities": {"type": "session.update", "session": {"type": "realtime", "output_modalities": ["smell"]}},
    "audio": {"type": "session.update", "session": {"type": "realtime", "audio": []}},
    "audio.input": {"type": "session.update", "session": {"type": "realtime", "audio": {"input": 1}}},
    "format": {"type": "session.update", "session": {"type": "realtime", "audio": {"output": {"format": {"type": "audio/pcmu"}}}}},
    "turn detection": {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": "x"}}}},
    "item": {"type": "conversation.item.create", "item": []}, "item type": {"type": "conversation.item.create", "item": {"type": "x"}},
    "role": {"type": "conversation.item.create", "item": {"type": "message", "role": ["user"], "content": []}},
    "content": {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": "x"}},
    "part": {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [{"type": "output_text"}]}},
    "call": {"type": "conversation.item.create", "item": {"type": "function_call_output", "call_id": 1}},
    "append": {"type": "input_audio_buffer.append", "audio": "***"}, "append a number": {"type": "input_audio_buffer.append", "audio": 1},
    "too deep": '{"type":"session.update","event_id":"too deep","session":{"type":"realtime","tools":' + "[" * 200 + "]" * 200 + "}}",
    "item id": {"type": "conversation.item.delete", "item_id": {}}, "response": {"type": "response.create", "response": 1},
}  # fmt: skip


async def test_malformed_events_are_refused_and_the_session_goes_on(session: Session) -> None:
    for name, event in MALFORMED.items():
        await session.socket.send_str(event if isinstance(event, str) else json.dumps(event | {"event_id": name}))
        error = await session.error()
        assert error["event_id"] in (name, None) and error["message"], name
    await session.socket.send_bytes(b"x")
    assert (await session.error())["code"] == "invalid_event"
    await session.say("still here")


def test_a_role_does_not_make_an_item_a_message() -> None:
    call = checked_item({"type": "function_call", "name": "get_weather", "arguments": "{}", "role": "user"})
    assert content_after(call, [WEATHER], "auto") == SPOKEN


def test_settings_are_those_of_the_openai_package() -> None:
    assert set(types.RealtimeSessionCreateRequest.model_fields) == realtime.SESSION_FIELDS
    assert set(types.RealtimeResponseCreateParams.model_fields) == realtime.RESPONSE_FIELDS


def test_a_conversation_forgets_its_oldest_items() -> None:
    conversation = Conversation()
    for number in range(_MAX_ITEMS + 1):
        conversation.add({"id": str(number)})
    assert len(conversation._items) == _MAX_ITEMS and "0" not in conversation._items
    for number in range(20):
        conversation.add({"id": f"large{number}", "text": "x" * 2**20})
    assert len(conversation._items) == 7 and conversation.last_id == "large19"


def test_speech_edges_are_found_within_one_append() -> None:
    assert [edge.kind for edge in InputAudio().detect_speech(SILENCE * 5 + SPEECH + SILENCE * 9 + SPEECH, 500)] == ["started", "stopped", "started"]


async def test_many_edges_of_speech_in_one_append_let_other_connections_run(session: Session) -> None:
    await session.update(audio={"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 0, "create_response": False}}})
    edges = 200
    loop, turns = asyncio.get_running_loop(), 0

    def count() -> None:
        nonlocal turns
        turns += 1
        loop.call_soon(count)

    await session.hear((tone(0) + SILENCE) * (edges // 2))
    await session.until("input_audio_buffer.speech_started")
    count()
    for _ in range(edges // 2):
        await session.until("input_audio_buffer.committed")
    assert turns >= edges // 2


@pytest.mark.parametrize("chunk_bytes", [31, 256, 4799])
def test_audio_in_chunks_has_the_length_of_the_whole(chunk_bytes: int) -> None:
    pcm = SPEECH + SILENCE * 6
    audio = InputAudio()
    chunks = [pcm[start : start + chunk_bytes] for start in range(0, len(pcm), chunk_bytes)]
    for chunk in chunks:
        audio.append(chunk)
    assert audio.buffered_ms == 1100
    heard = InputAudio()
    edges = [edge for chunk in chunks for edge in heard.detect_speech(chunk, 500)]
    assert [edge.kind for edge in edges] == ["started", "stopped"]
    assert 1000 <= edges[-1].at_ms <= 1100


@pytest.mark.parametrize("schema", [None, [], {"type": 1}, {"properties": {"a": 1}, "required": ["a", 2, "b"]}, {"type": ["string", "null"]}])
def test_an_example_call_takes_any_schema(schema: Any) -> None:
    assert isinstance(json.loads(example_call({"name": "f", "parameters": schema}).arguments), dict)


def test_an_example_call_fills_required_parameters() -> None:
    inner = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema = {"properties": {"unit": {"enum": ["C", "F"]}, "where": inner, "optional": {"type": "string"}}, "required": ["unit", "where"]}
    assert json.loads(example_call({"name": "f", "parameters": schema}).arguments) == {"unit": "C", "where": {"n": 1}}


def test_an_example_call_visits_a_parameter_once_however_often_it_is_required() -> None:
    visits = 0

    class Parameters(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            nonlocal visits
            visits += name == "properties"
            return super().get(name, default)

    schema = Parameters({"type": "string"})
    for _ in range(3):
        schema = Parameters({"type": "object", "properties": {"a": schema}, "required": ["a"] * 5})
    arguments = json.loads(example_call({"name": "f", "parameters": schema}).arguments)
    assert (arguments, visits) == ({"a": {"a": {"a": "demo"}}}, 4)


@pytest.mark.usefixtures("endless_deltas")
async def test_a_client_that_leaves_ends_its_response(session: Session) -> None:
    await session.send("response.create")
    await session.until("response.output_audio.delta")
    await session.socket.close()
    assert session.socket.close_code == 1000
