"""A client with `models`: the messages of its sessions, with the sockets of every vendor."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import WSMsgType, WSServerHandshakeError

from tests.conftest import StartRelay
from tests.relays import Relay, packaged_provider, provider
from tests.upstream.raw import RawUpstream, ok
from tests.upstream.vendors import SEEN, Seen, echo, vendor

KEY = "team-key-of-the-tests"
NAMES = ("openai", "google-ai-studio", "cartesia", "elevenlabs", "fal", "deepgram", "assemblyai", "grok")
HEADERS = {"x-relay-key": KEY}
GEMINI = "ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent"
HANG_GUARD_S = 20.0
MESSAGE = "The client 'team' may not use the model 'bad'."


class Sockets:
    """A relay in front of echoing stand-ins of the vendors."""

    def __init__(self, relay: Relay, seen: list[Seen]) -> None:
        self.relay, self.seen = relay, seen

    def connect(self, name: str, endpoint: str, headers: dict[str, str] = HEADERS) -> Any:
        return self.relay.client.ws_connect(self.relay.ws(name, endpoint), headers=headers)

    async def relayed(self) -> list[Any]:
        """The messages of the last session that reached the stand-in, once it has ended."""
        async with asyncio.timeout(HANG_GUARD_S):
            await self.seen[-1].ended.wait()
        return self.seen[-1].messages[:-1]

    async def refusal(self, name: str, endpoint: str) -> str:
        """The code with which a handshake is refused; "" if it is not."""
        try:
            async with self.connect(name, endpoint):
                return ""
        except WSServerHandshakeError as error:
            assert error.status == 403 and error.headers is not None
            return str(error.headers["x-relay-error"])


async def send(socket: aiohttp.ClientWebSocketResponse[bool], message: Any) -> None:
    if isinstance(message, bytes):
        await socket.send_bytes(message)
    else:
        await socket.send_str(message if isinstance(message, str) else json.dumps(message))


async def is_relayed(socket: aiohttp.ClientWebSocketResponse[bool], message: Any) -> bool:
    """Send a message; True if the stand-in sends it back."""
    await send(socket, message)
    answer = await socket.receive(HANG_GUARD_S)
    return answer.type in (WSMsgType.TEXT, WSMsgType.BINARY) and answer.data == (message if isinstance(message, bytes | str) else json.dumps(message))


async def ending(socket: aiohttp.ClientWebSocketResponse[bool]) -> tuple[list[Any], Any, str]:
    """(messages, close code, reason) until the session ends."""
    messages = []
    while (message := await socket.receive(HANG_GUARD_S)).type is WSMsgType.TEXT:
        messages.append(json.loads(message.data))
    assert message.type is WSMsgType.CLOSE
    return messages, message.data, str(message.extra)


@pytest.fixture
async def sockets(start: StartRelay, aiohttp_server: Any, monkeypatch: pytest.MonkeyPatch) -> Sockets:
    for name in ("ASSEMBLYAI_API_KEY", "XAI_API_KEY"):
        monkeypatch.setenv(name, "k-of-a-test")
    server = await aiohttp_server(vendor(("GET", "/{path:.*}", echo)))
    url = str(server.make_url("")).rstrip("/")
    entries = {name: packaged_provider(name, url) for name in NAMES}
    entries["assemblyai"]["websocket"]["base_url"] = url
    entries["fal"]["paths"] = {"ws/": f"{url}/ws"}
    team = {"key": KEY, "models": ["good*", "fal-ai/good*"]}
    everything = {"key": "other-key-of-the-tests", "models": ["good*"], "endpoints": ["realtime", "other"]}
    document = {"clients": {"team": team, "agents": everything}, "providers": entries}
    return Sockets(await start(document), server.app[SEEN])


AUDIO = b"\x00\x01\x7b\xff" * 800
# Provider, endpoint, a message that opens the session (None: its URL does), one that may pass, and
# one that names another model.
VENDORS: list[tuple[str, str, Any, Any, Any]] = [
    ("openai", "realtime?model=good", None, {"type": "input_audio_buffer.append", "audio": "QUJD"}, {"type": "session.update", "session": {"audio": {"input": {"transcription": {"model": "bad"}}}}}),
    ("openai", "realtime?model=good", None, {"type": "response.create"}, {"type": "response.create", "response": {"model": "bad"}}),
    ("openai", "realtime?model=good", None, {"type": "session.update", "session": {"input_audio_transcription": {"model": "good-w"}}}, {"type": "session.update", "session": {"input_audio_transcription": {"model": "bad"}}}),
    ("openai", "realtime?intent=transcription", {"type": "session.update", "session": {"audio": {"input": {"transcription": {"model": "good"}}}}}, {"type": "x"}, {"type": "session.update", "session": {"model": "bad"}}),
    ("openai", "responses", {"type": "response.create", "model": "good", "input": "a"}, {"type": "response.create", "previous_response_id": "r"}, {"type": "response.create", "model": "bad"}),
    ("openai", "responses", {"type": "response.create", "response": {"model": "good"}}, {"type": "x"}, {"type": "response.create", "model": "good", "tools": [{"type": "image_generation", "model": "bad"}]}),
    ("openai", "live/sessions", {"type": "session.start", "session": {"model": "good"}}, {"type": "x"}, {"type": "session.update", "session": {"delegation": {"responses": {"model": "bad"}}}}),
    ("grok", "realtime?model=good", None, {"type": "x"}, {"type": "session.update", "session": {"model": "bad"}}),
    ("google-ai-studio", GEMINI, {"setup": {"model": "models/good"}}, {"realtimeInput": {"text": "a"}}, {"setup": {"model": "models/bad"}}),
    ("google-ai-studio", GEMINI, b'{"setup":{"model":"models/good"}}', b'{"clientContent":{}}', b'{"setup":{"model":"models/bad"}}'),
    ("elevenlabs", "v1/text-to-speech/v/stream-input?model_id=good", None, {"text": " "}, {"text": "a", "model_id": "bad"}),
    ("elevenlabs", "v1/speech-to-text/realtime?model_id=good", None, {"message_type": "input_audio_chunk", "audio_base_64": "QUJD"}, {"model_id": "bad"}),
    ("cartesia", "tts/websocket", {"model_id": "good", "transcript": "a"}, {"context_id": "c", "cancel": True}, {"model_id": "bad", "transcript": "a"}),
    ("cartesia", "stt/websocket?model=good", None, AUDIO, {"model": "bad"}),
    ("cartesia", "stt/websocket?model=good", None, "finalize", b'{"model":"bad"}'),
    ("deepgram", "v1/listen?model=good", None, AUDIO, {"type": "Configure", "model": "bad"}),
    ("deepgram", "v1/listen?model=good", None, b'{"\x00\x01' + AUDIO, b'{"model":"bad"}'),
    ("deepgram", "v1/agent/converse", {"type": "Settings", "agent": {"think": {"provider": {"model": "good"}}, "speak": {"provider": {"model": "good-s"}}}}, AUDIO, {"type": "UpdateThink", "think": {"provider": {"model": "bad"}}}),
    ("deepgram", "v1/agent/converse", {"type": "Settings", "agent": {"think": {"provider": {"model": "good"}}}}, {"type": "KeepAlive"}, b'{"type":"UpdateSpeak","speak":{"provider":{"model":"bad"}}}'),
    ("assemblyai", "v3/ws?speech_model=good", None, AUDIO, {"type": "UpdateConfiguration", "speech_model": "bad"}),
    ("fal", "fal-ai/good/realtime", None, {"prompt": "a model"}, {"prompt": "a", "model_name": "bad"}),
    ("fal", "fal-ai/good/realtime", None, msgspec.msgpack.encode({"prompt": "a model", "image": b"\xff\xd8"}), msgspec.msgpack.encode({"prompt": "a", "model_name": "bad"})),
]  # fmt: skip


async def test_a_message_that_names_another_model_ends_the_session(sockets: Sockets) -> None:
    for name, endpoint, opening, passing, forbidden in VENDORS:
        before = [message for message in (opening, passing) if message is not None]
        async with sockets.connect(name, endpoint) as socket:
            assert [await is_relayed(socket, message) for message in before] == [True] * len(before), endpoint
            await send(socket, forbidden)
            _, code, reason = await ending(socket)
        assert (code, reason) == (1008, "model_not_allowed: bad"), endpoint
        assert len(await sockets.relayed()) == len(before), endpoint
    for event in await sockets.relay.events(count=len(VENDORS)):
        assert (event["error"], event["outcome"], event["close_code"], event["closed_by"]) == ("model_not_allowed", "refused", 1008, "relay")


async def test_no_message_passes_before_one_that_names_the_model(sockets: Sockets) -> None:
    for name, endpoint, opening, passing, _ in VENDORS:
        if opening is not None:
            async with sockets.connect(name, endpoint) as socket:
                await send(socket, passing)
                _, code, reason = await ending(socket)
            assert (code, "names no model" in reason) == (1008, True), endpoint
            assert await sockets.relayed() == [], endpoint


HANDSHAKES = [
    ("openai", "realtime?model=bad", "model_not_allowed"), ("openai", "", "model_not_allowed"), ("openai", "realtime", "model_not_allowed"), ("openai", "realtime?model=good&model=bad", "model_unknown"),
    ("openai", "realtime?model=good;Model=bad", "model_unknown"), ("openai", "realtime?call_id=c", "model_unknown"), ("openai", "realtime/translations", "model_unknown"), ("openai", "responses?model=bad", "model_not_allowed"),
    ("elevenlabs", "v1/text-to-speech/v/stream-input", "model_unknown"), ("elevenlabs", "v1/convai/conversation?agent_id=a", "endpoint_not_allowed"), ("elevenlabs", "v1/speech-to-text/realtime?model=good", "model_unknown"),
    ("cartesia", "stt/websocket?model=bad", "model_not_allowed"), ("cartesia", "agents/stream/a", "endpoint_not_allowed"), ("deepgram", "v1/listen", "model_unknown"), ("deepgram", "v2/listen?model=b%61d", "model_not_allowed"),
    ("assemblyai", "v3/ws?speech_model=bad", "model_not_allowed"), ("assemblyai", "v3/ws?speech_model=good&llm_gateway=%7B%22model%22:%22bad%22%7D", "model_not_allowed"), ("fal", "fal-ai/bad/realtime", "model_not_allowed"),
    ("fal", "ws/fal-ai/bad", "model_not_allowed"), ("grok", "", "model_not_allowed"), ("grok", "stt?model=good", "endpoint_not_allowed"),
]  # fmt: skip


async def test_a_handshake_whose_model_is_not_allowed_is_refused_before_the_provider_is_called(sockets: Sockets) -> None:
    found = [f"{await sockets.refusal(name, endpoint)} {name}/{endpoint}" for name, endpoint, _ in HANDSHAKES]
    assert found == [f"{code} {name}/{endpoint}" for name, endpoint, code in HANDSHAKES]
    assert not sockets.seen


async def test_a_page_learns_by_a_get_why_its_handshake_is_refused(sockets: Sockets) -> None:
    for endpoint, code in (("realtime?model=bad", "model_not_allowed"), ("realtime?model=good", "upgrade_required")):
        _, headers, _ = await sockets.relay.call("GET", sockets.relay.ws("openai", endpoint), headers=HEADERS)
        assert headers["x-relay-error"] == code


EVENTS = [
    ("openai", "realtime?model=good", {"type": "error", "error": {"type": "permission_error", "code": "model_not_allowed", "param": None}}),
    ("openai", "responses", {"type": "error", "status": 403, "error": {"type": "permission_error", "code": "model_not_allowed", "param": None}}),
    ("elevenlabs", "v1/text-to-speech/v/stream-input?model_id=good", {"error": "model_not_allowed", "code": 1008}), ("elevenlabs", "v1/speech-to-text/realtime?model_id=good", {"message_type": "error"}),
    ("cartesia", "tts/websocket", {"type": "error", "done": True, "status_code": 403, "error_code": "model_not_allowed"}), ("deepgram", "v1/listen?model=good", {"type": "Error", "variant": "model_not_allowed", "code": "model_not_allowed"}),
    ("deepgram", "v2/listen?model=good", {"type": "Error", "code": "model_not_allowed", "sequence_id": 0}), ("deepgram", "v1/agent/converse", {"type": "Error", "code": "model_not_allowed"}),
    ("assemblyai", "v3/ws?speech_model=good", {"type": "Error", "error_code": 1008}), ("fal", "fal-ai/good/realtime", {"type": "x-fal-error", "error": "model_not_allowed"}), ("google-ai-studio", GEMINI, None),
]  # fmt: skip


async def test_a_refusal_is_the_error_event_of_the_vendor(sockets: Sockets) -> None:
    for name, endpoint, expected in EVENTS:
        async with sockets.connect(name, endpoint) as socket:
            await send(socket, {"model": "bad"})
            events, code, _ = await ending(socket)
        assert code == 1008 and len(events) == (expected is not None), endpoint
        if expected is not None:
            [event] = events
            assert MESSAGE in json.dumps(event), endpoint
            event["error"] = {key: value for key, value in event["error"].items() if key != "message"} if isinstance(event.get("error"), dict) else event.get("error")
            assert expected.items() <= event.items(), endpoint


DISGUISED = ['{"type":"x","model":"good","model":"bad"}', '{"type":"x","mod\\u0065l":"bad"}', '\ufeff{"model":"good"}', '{"model":"good"}{"model":"bad"}', '{"x":NaN}', "[" * 5000, "hello", b'{"model":"bad"}', b"\x00\x01"]


async def test_a_disguised_message_ends_the_session(sockets: Sockets) -> None:
    for message in DISGUISED:
        async with sockets.connect("openai", "realtime?model=good") as socket:
            await send(socket, message)
            events, code, _ = await ending(socket)
        assert code == 1008 and events[0]["error"]["code"] in ("model_not_allowed", "model_unknown"), message
        assert await sockets.relayed() == [], message


async def test_the_fragments_of_a_message_are_read_as_one(sockets: Sockets) -> None:
    async with sockets.connect("openai", "responses") as socket:
        await _fragmented(socket, b'{"type":"response.create","mod', b'el":"go', b'od"}')
        assert (await socket.receive(HANG_GUARD_S)).data == '{"type":"response.create","model":"good"}'
        await _fragmented(socket, b'{"type":"response.create","mod', b'el":"b', b'ad"}')
        assert (await ending(socket))[1] == 1008
    assert await sockets.relayed() == ['{"type":"response.create","model":"good"}']


async def _fragmented(socket: aiohttp.ClientWebSocketResponse[bool], *parts: bytes) -> None:
    """Send a text message in frames, with a ping between them."""
    for number, part in enumerate(parts):
        first = (0x01 if number == 0 else 0x00) | (0x80 if number == len(parts) - 1 else 0)
        socket._writer.transport.write(bytes([first, 0x80 | len(part)]) + b"\0\0\0\0" + part)  # a mask of zeros
        await asyncio.sleep(0)
        if number < len(parts) - 1:
            await socket.ping()


async def test_text_that_is_not_utf_8_is_a_protocol_error(sockets: Sockets) -> None:
    async with sockets.connect("openai", "realtime?model=good") as socket:
        await _fragmented(socket, b'{"model":"\xff"}')
        assert (await ending(socket))[1] == 1007


async def test_a_large_image_passes(sockets: Sockets) -> None:
    async with sockets.connect("openai", "realtime?model=good") as socket:
        message = json.dumps({"type": "conversation.item.create", "item": {"content": [{"image_url": "data:" + "QUJD" * 300_000}]}})
        assert await is_relayed(socket, message)


async def test_a_listed_agent_may_run_but_may_not_be_given_another_model(sockets: Sockets) -> None:
    headers = {"x-relay-key": "other-key-of-the-tests"}
    async with sockets.connect("elevenlabs", "v1/convai/conversation?agent_id=a", headers) as socket:
        for message in ({"type": "conversation_initiation_client_data", "conversation_config_override": {"agent": {"prompt": {"llm": "good-llm"}}}}, {"user_audio_chunk": "QUJD"}, "no JSON"):
            assert await is_relayed(socket, message)
        await send(socket, {"conversation_config_override": {"agent": {"prompt": {"llm": "bad"}}}})
        assert (await ending(socket))[:2] == ([], 1008)


async def test_a_fallback_with_a_model_that_is_not_allowed_is_left_out(start: StartRelay, raw: RawUpstream, aiohttp_server: Any) -> None:
    raw.plays(ok(b"{}", status="503 Unavailable"))
    server = await aiohttp_server(vendor(("GET", "/{path:.*}", echo)))
    other = provider(str(server.make_url("")), websocket={"default_path": "realtime", "default_query": {"model": "bad"}})
    targets = [{"provider": "two", "model": "bad"}, {"provider": "two", "model": "good-2"}, {"provider": "two"}]
    one = provider(raw.url, websocket={"default_path": "realtime"}, fallback=targets)
    document = {"clients": {"team": {"key": KEY, "models": "good*"}}, "retries": {"max_attempts": 1}}
    relay = await start(document, openai=one, two=other)
    async with relay.client.ws_connect(relay.ws("openai", "realtime?model=good"), headers=HEADERS) as socket:
        assert await is_relayed(socket, {"type": "x"})
        await send(socket, {"session": {"model": "bad"}})
        assert (await ending(socket))[1] == 1008
    assert [seen.target for seen in server.app[SEEN]] == ["/realtime?model=good-2"]


async def test_a_session_without_models_is_not_checked(sockets: Sockets) -> None:
    async with sockets.connect("openai", "realtime?model=bad", {}) as socket:
        assert await is_relayed(socket, '{"model":"a","model":"b"}')
