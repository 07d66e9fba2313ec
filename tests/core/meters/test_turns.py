"""Turns of voice sessions: the wait for the first audio or text, and interruptions."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from relay.core.meters import turns
from relay.core.meters.turns import HEAD_BYTES, MAX_TURNS, Turns

SENT, RECEIVED = "sent", "received"
Step = tuple[float, str, Any]

AUDIO = "UklGRg" * 20
OPENAI_AUDIO = {"type": "response.output_audio.delta", "event_id": "e", "delta": AUDIO}
GEMINI_AUDIO = {"serverContent": {"modelTurn": {"parts": [{"inlineData": {"mimeType": "audio/pcm", "data": AUDIO}}]}}}

CONVERSATIONS: dict[str, tuple[str, list[Step], list[tuple[float, float, str, bool]], int]] = {
    "openai, the provider detects the end of speech": (
        "openai",
        [
            (1.0, SENT, {"type": "input_audio_buffer.append", "audio": AUDIO}), (2.0, RECEIVED, {"type": "input_audio_buffer.speech_stopped"}),
            (2.1, RECEIVED, {"type": "response.created"}), (2.5, RECEIVED, OPENAI_AUDIO), (2.6, RECEIVED, OPENAI_AUDIO), (3.0, RECEIVED, {"type": "response.done"}),
        ],
        [(2000, 500, "audio", False)], 0,
    ),
    "openai, the client commits and requests a response": (
        "openai",
        [
            (1.0, SENT, {"type": "input_audio_buffer.commit"}), (1.01, SENT, {"type": "response.create"}),
            (1.3, RECEIVED, {"type": "response.output_text.delta", "delta": "hi"}), (1.5, RECEIVED, {"type": "response.done"}),
            (2.0, SENT, {"type": "response.create"}), (2.4, RECEIVED, {"type": "response.audio.delta", "delta": AUDIO}),
        ],
        [(1000, 300, "text", False), (2000, 400, "audio", False)], 0,
    ),
    "openai, the user speaks during the response": (
        "openai",
        [
            (1.0, RECEIVED, {"type": "input_audio_buffer.speech_stopped"}), (1.4, RECEIVED, OPENAI_AUDIO), (1.6, RECEIVED, {"type": "input_audio_buffer.speech_started"}),
            (2.0, RECEIVED, {"type": "response.done", "response": {"status": "cancelled"}}), (3.0, RECEIVED, {"type": "input_audio_buffer.speech_stopped"}), (3.2, RECEIVED, OPENAI_AUDIO),
        ],
        [(1000, 400, "audio", True), (3000, 200, "audio", False)], 1,
    ),
    "openai, the client cancels": (
        "openai", [(1.0, SENT, {"type": "response.create"}), (1.4, RECEIVED, OPENAI_AUDIO), (1.5, SENT, {"type": "response.cancel"})], [(1000, 400, "audio", True)], 1,
    ),
    "openai, speech without a response": (
        "openai",
        [
            (1.0, RECEIVED, {"type": "input_audio_buffer.speech_stopped"}), (5.0, RECEIVED, {"type": "input_audio_buffer.speech_started"}),
            (6.0, RECEIVED, {"type": "input_audio_buffer.speech_stopped"}), (6.1, RECEIVED, OPENAI_AUDIO),
        ],
        [(6000, 100, "audio", False)], 0,
    ),
    "gemini, a text message": (
        "google",
        [(1.0, SENT, {"clientContent": {"turns": [], "turnComplete": True}}), (1.7, RECEIVED, GEMINI_AUDIO), (2.0, RECEIVED, {"serverContent": {"turnComplete": True}})],
        [(1000, 700, "audio", False)], 0,
    ),
    "gemini, the end of activity, text, an interruption": (
        "google",
        [
            (1.0, SENT, {"realtimeInput": {"activityEnd": {}}}), (1.2, RECEIVED, {"serverContent": {"modelTurn": {"parts": [{"text": "hi"}]}}}),
            (1.4, RECEIVED, {"serverContent": {"interrupted": True}}),
        ],
        [(1000, 200, "text", True)], 1,
    ),
    "gemini, the input transcription marks the end of speech": (
        "google", [(1.0, RECEIVED, {"serverContent": {"inputTranscription": {"text": "hello"}}}), (1.5, RECEIVED, GEMINI_AUDIO)], [(1000, 500, "audio", False)], 0,
    ),
    "elevenlabs, an agent": (
        "elevenlabs",
        [
            (1.0, RECEIVED, {"user_transcription_event": {"user_transcript": "hi"}, "type": "user_transcript"}), (1.3, RECEIVED, {"agent_response_event": {}, "type": "agent_response"}),
            (1.4, RECEIVED, {"audio_event": {"event_id": 1}, "type": "audio"}), (1.9, RECEIVED, {"interruption_event": {"event_id": 1}, "type": "interruption"}),
        ],
        [(1000, 300, "text", True)], 1,
    ),
    "elevenlabs, speech from text": (
        "elevenlabs",
        [(0.5, SENT, {"text": " ", "voice_settings": {}}), (1.0, SENT, {"text": "Hello "}), (1.1, SENT, {"text": "you "}), (1.4, RECEIVED, {"audio": AUDIO}), (2.0, RECEIVED, {"isFinal": True})],
        [(1000, 400, "audio", False)], 0,
    ),
    "cartesia, two sentences, one cancelled": (
        "cartesia",
        [
            (1.0, SENT, {"transcript": "Hello", "context_id": "a"}), (1.2, RECEIVED, {"type": "chunk", "data": AUDIO}), (1.9, RECEIVED, {"type": "done"}),
            (3.0, SENT, {"transcript": "Again", "context_id": "b"}), (3.1, RECEIVED, {"type": "chunk", "data": AUDIO}), (3.2, SENT, {"context_id": "b", "cancel": True}),
        ],
        [(1000, 200, "audio", False), (3000, 100, "audio", True)], 1,
    ),
    "deepgram, an agent": (
        "deepgram",
        [
            (1.0, RECEIVED, {"type": "ConversationText", "role": "user", "content": "hi"}), (1.3, RECEIVED, {"type": "ConversationText", "role": "assistant", "content": "hello"}),
            (1.6, RECEIVED, b"\x00\x01\x02\x03"), (1.8, RECEIVED, {"type": "UserStartedSpeaking"}),
        ],
        [(1000, 600, "audio", True)], 1,
    ),
    "deepgram, speech from text": ("deepgram", [(1.0, SENT, {"type": "Speak", "text": "hi"}), (1.5, RECEIVED, b"\xff\xf3\x00"), (2.0, RECEIVED, {"type": "Flushed"})], [(1000, 500, "audio", False)], 0),
    "fal, binary messages": ("fal", [(1.0, SENT, b"\x81\xa6prompt"), (1.05, RECEIVED, b"\x81\xa6images")], [(1000, 50, "audio", False)], 0),
    "an unknown wire format": ("assemblyai", [(1.0, SENT, {"type": "x"}), (1.5, RECEIVED, {"type": "Turn"})], [], 0),
}  # fmt: skip


class Talk:
    """A session whose messages arrive at given times and are forwarded 2 ms later."""

    def __init__(self, format_: str) -> None:
        self.client, self.provider = SimpleNamespace(message_s=0.0), SimpleNamespace(message_s=0.0)
        self.turns = Turns(format_, 0.0, self.client, self.provider, lambda: self.provider.message_s + 0.002)

    def sent(self, at_s: float, data: bytes) -> None:
        self.client.message_s = at_s
        if self.turns.sent_filter is not None and self.turns.sent_filter(data, 0, HEAD_BYTES):
            self.turns.sent(data)

    def received(self, at_s: float, data: bytes) -> None:
        self.provider.message_s = at_s
        if self.turns.received_filter is not None and self.turns.received_filter(data, 0, HEAD_BYTES):
            self.turns.received(data)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_turn_lasts_from_the_end_of_speech_to_the_first_audio_or_text(name: str) -> None:
    format_, steps, expected, interruptions = CONVERSATIONS[name]
    talk = Talk(format_)
    for at_s, direction, message in steps:
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        (talk.sent if direction == SENT else talk.received)(at_s, data)
    turns = talk.turns
    assert [(turn.at_ms, turn.wait_ms, turn.first, turn.interrupted) for turn in turns.found] == expected
    assert turns.interruptions == interruptions and all(turn.overhead_ms == 2 for turn in turns.found)


def test_only_the_beginning_of_a_message_is_searched() -> None:
    talk = Talk("openai")
    talk.sent(1.0, b'{"type":"response.create"}')
    talk.received(2.0, b'{"delta":"' + b"x" * 1000 + b'","type":"response.audio.delta"}')
    assert talk.turns.found == []


@pytest.mark.parametrize("format_", ["cartesia", "deepgram"])
def test_audio_in_a_binary_frame_may_begin_with_any_byte_that_json_does_not(format_: str) -> None:
    missed = []
    for first in set(range(256)) - set(b"{ \t\r\n"):
        talk = Talk(format_)
        talk.sent(1.0, b'{"type":"Speak","transcript":"hi"}')
        talk.received(1.5, bytes([first, 0, 1, 2]))
        if [turn.first for turn in talk.turns.found] != ["audio"]:
            missed.append(first)
    assert missed == []


def test_a_session_records_a_limited_number_of_turns() -> None:
    talk = Talk("fal")
    for at in range(MAX_TURNS + 50):
        talk.sent(at, b"x")
        talk.received(at + 0.5, b"y")
    assert len(talk.turns.found) == MAX_TURNS


KINDS = [
    *(("openai", SENT, {"type": name}, kind) for name, kind in (("input_audio_buffer.commit", "asks"), ("response.create", "asks"), ("response.cancel", "cuts"), ("input_audio_buffer.append", None))),
    *(("openai", RECEIVED, {"event_id": "e", "type": f"response.{name}"}, "ends") for name in ("done", "completed", "incomplete", "failed")),
    *(("openai", RECEIVED, {"type": f"response.{name}.delta"}, kind) for name, kind in (("audio", "audio"), ("output_audio", "audio"), ("text", "text"), ("output_text", "text"), ("output_audio_transcript", None))),
    ("openai", RECEIVED, {"type": "input_audio_buffer.speech_started"}, "began"), ("openai", RECEIVED, {"type": "input_audio_buffer.speech_stopped"}, "asks"),
    *(("google", SENT, {name: {}}, "asks") for name in ("activityEnd", "audioStreamEnd", "clientContent", "client_content")),
    ("google", SENT, {"realtimeInput": {"audio": {}}}, None), ("google", RECEIVED, {"serverContent": {"turnComplete": True}}, "ends"),
    ("elevenlabs", SENT, {"type": "user_message"}, "asks"), ("elevenlabs", SENT, {"text": " "}, None), ("elevenlabs", RECEIVED, {"type": "agent_response_complete"}, "ends"),
    ("elevenlabs", RECEIVED, {"audio": AUDIO}, "audio"), ("elevenlabs", RECEIVED, {"audio": None, "isFinal": True}, "ends"),
    ("cartesia", SENT, {"cancel": True}, "cuts"), ("cartesia", RECEIVED, {"type": "done"}, "ends"), ("cartesia", RECEIVED, {"type": "timestamps"}, None),
    ("deepgram", SENT, {"type": "InjectUserMessage"}, "asks"), ("deepgram", SENT, {"type": "Clear"}, "cuts"), ("deepgram", RECEIVED, {"type": "AgentStartedSpeaking"}, "audio"),
    ("deepgram", RECEIVED, {"type": "UserStartedSpeaking"}, "began"), ("deepgram", RECEIVED, {"type": "AgentAudioDone"}, "ends"), ("deepgram", RECEIVED, {"type": "Results"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "direction", "message", "kind"), KINDS, ids=str)
@pytest.mark.parametrize("spaces", [(", ", ": "), (",", ":")])
def test_every_marker_is_found_with_and_without_spaces(format_: str, direction: str, message: Any, kind: str | None, spaces: tuple[str, str]) -> None:
    table = turns._SENT if direction == SENT else turns._RECEIVED
    marks, data = table[format_], json.dumps(message, separators=spaces).encode()
    assert marks.of(data) == kind
    assert kind is None or (marks.prefilter is not None and marks.prefilter(data, 0, HEAD_BYTES))
    assert kind in (None, "asks", "audio", "text") or (marks.between is not None and marks.between(data, 0, HEAD_BYTES))
