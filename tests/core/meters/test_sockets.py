"""Usage of WebSocket sessions, read from the messages of every vendor.

The messages follow the vendors' SDK types and recordings; their fields come in any order, and
objects that only look like usage are among them.
"""

from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from relay.core.meters.socket_meter import (
    OpenedSession,
    Payload,
    SocketMeter,
    bytes_a_second,
    has_escape,
)
from relay.core.meters.socket_meters import socket_meter
from relay.core.usage import Part, Usage, total

Message = dict[str, Any] | bytes


@dataclass
class Side:
    """The counters of one direction of a session."""

    messages: int = 0
    bytes: int = 0


@dataclass
class Session:
    """A session's meter, driven as the relay drives it.

    The counters change first; then the meter gets the message if its prefilter matches.
    """

    format: str
    endpoint: str
    query: str = ""
    model: str | None = None
    now_s: float = 100.0
    client: Side = field(default_factory=Side)
    provider: Side = field(default_factory=Side)

    def __post_init__(self) -> None:
        opened = OpenedSession(self.endpoint, self.query, self.model, self.client, self.provider, lambda: self.now_s)
        meter = socket_meter(self.format, opened)
        assert meter is not None
        self.meter: SocketMeter = meter

    def up(self, *messages: Message) -> Session:
        for message in messages:
            data = _bytes(message)
            self._count(self.client, data)
            prefilter = self.meter.sent_filter
            if prefilter is not None and (len(data) > self.meter.searched_bytes or prefilter(data) or has_escape(data)):
                self.meter.sent(data)
        return self

    def down(self, *messages: Message) -> Session:
        for message in messages:
            data = _bytes(message)
            self._count(self.provider, data)
            prefilter = self.meter.received_filter
            if prefilter is not None and (len(data) > self.meter.searched_bytes or prefilter(data)):
                self.meter.received(data)
        return self

    @staticmethod
    def _count(side: Side, data: bytes) -> None:
        side.messages += 1
        side.bytes += len(data)

    @property
    def parts(self) -> list[tuple[str | None, Usage]]:
        return [(part.model, part.usage) for part in self.meter.parts]


def _bytes(message: Message) -> bytes:
    return message if isinstance(message, bytes) else json.dumps(message, separators=(",", ":")).encode()


# Objects that look like usage and are not: in text and arguments of a response, in echoed requests,
# in lists.
DECOY = {"usage": {"input_tokens": 999_999, "output_tokens": 999_999, "seconds": 9999}, "model": "decoy", "duration": 9999}
OUTPUT = [
    {"type": "message", "content": [{"type": "output_text", "text": '"usage": {"input_tokens": 5}', "annotations": []}]},
    {"type": "function_call", "arguments": json.dumps(DECOY), "usage": DECOY["usage"]},
    {"type": "image_generation_call", "svg_usage": {"model": "decoy", "input_tokens": 77, "output_tokens": 77}},
]


def token_usage(input_tokens: int, output_tokens: int, cached: int = 0, reasoning: int = 0) -> dict[str, Any]:
    return {
        "input_tokens": input_tokens, "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": output_tokens, "output_tokens_details": {"reasoning_tokens": reasoning}, "total_tokens": input_tokens + output_tokens,
    }  # fmt: skip


def response(name: str, model: str, usage: dict[str, Any] | None, status: str = "completed", **more: Any) -> dict[str, Any]:
    kind = {"completed": "response.completed", "in_progress": "response.created", "failed": "response.failed", "incomplete": "response.incomplete"}[status]
    return {
        "type": kind, "sequence_number": 7,
        "response": {"id": name, "object": "response", "status": status, "model": model, "metadata": {"usage": "5", "model": "decoy"}, "tools": [{"parameters": DECOY}], "output": OUTPUT if usage else [], "usage": usage, **more},
    }  # fmt: skip


def created(name: str, model: str) -> dict[str, Any]:
    return response(name, model, None, "in_progress", service_tier="auto")


def realtime_done(name: str, usage: dict[str, Any] | None, status: str = "completed") -> dict[str, Any]:
    return {"type": "response.done", "event_id": "e", "response": {"object": "realtime.response", "id": name, "status": status, "output": OUTPUT, "usage": usage, "metadata": DECOY}}


AUDIO = {
    "total_tokens": 253, "input_tokens": 132, "output_tokens": 121,
    "input_token_details": {"text_tokens": 119, "audio_tokens": 13, "image_tokens": 0, "cached_tokens": 64, "cached_tokens_details": {"text_tokens": 60, "audio_tokens": 4, "image_tokens": 0}},
    "output_token_details": {"text_tokens": 30, "audio_tokens": 91},
}  # fmt: skip
AUDIO_USAGE = Usage(132, 121, cache_read_tokens=64, input_audio_tokens=13, output_audio_tokens=91, cache_audio_read_tokens=4)
REALTIME = {"type": "session.created", "event_id": "e", "session": {"type": "realtime", "object": "realtime.session", "id": "sess_1", "model": "gpt-realtime-2.1", "tools": [DECOY], "audio": {"input": {"format": {"type": "audio/pcm", "rate": 24000}, "transcription": {"model": "gpt-4o-mini-transcribe"}}, "output": {"format": {"type": "audio/pcm", "rate": 24000}}}}}  # fmt: skip


def transcribed(item: str, usage: dict[str, Any]) -> dict[str, Any]:
    return {"type": "conversation.item.input_audio_transcription.completed", "event_id": "e", "item_id": item, "content_index": 0, "transcript": '{"usage": 3}', "usage": usage}


TRANSCRIBED = {"type": "tokens", "total_tokens": 35, "input_tokens": 26, "input_token_details": {"text_tokens": 0, "audio_tokens": 26}, "output_tokens": 9}
XAI_DONE = {
    "type": "response.done", "response": {"id": "r1", "status": "completed", "status_details": "unimplemented", "usage": {}}, "response_id": "r1",
    "usage": {"input_tokens": 10, "input_token_details": {"text_tokens": 10, "audio_tokens": 0, "grok_tokens": 0}, "output_tokens": 277, "output_token_details": {"text_tokens": 19, "audio_tokens": 258, "grok_tokens": 0}, "total_tokens": 287, "output_audio_seconds": 5.134, "billable_audio_seconds": 3},
}  # fmt: skip
GEMINI = {"serverContent": {"turnComplete": True, "outputTranscription": {"text": '"usageMetadata": {"promptTokenCount": 5}'}}, "usageMetadata": {"promptTokenCount": 143, "responseTokenCount": 19, "totalTokenCount": 162, "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 535}, {"modality": "AUDIO", "tokenCount": 40}], "responseTokensDetails": [{"modality": "AUDIO", "tokenCount": 19}]}}  # fmt: skip
LIVE_SESSION = {"id": "live_1", "model": "gpt-live-1", "status": "active", "expires_at": 1, "delegation": {"type": "responses", "responses": {"model": "gpt-5-mini"}}}


def live_event(inner: dict[str, Any]) -> dict[str, Any]:
    return {"type": "response.event", "event_id": "ev", "delegation_id": "d", "event": inner, "usage": {"input_tokens": 4}}


Expected = list[tuple[str | None, Usage]]
Case = tuple[Session, Sequence[tuple[str, Message]], Expected, str | None]
UP, DOWN = "up", "down"


def _openai() -> dict[str, Case]:
    web = {"tool_usage": {"web_search": {"num_requests": 2}, "image_gen": {"input_tokens": 0, "output_tokens": 0}}}
    draws = {"tool_usage": {"web_search": {"num_requests": 0}, "image_gen": {"input_tokens": 10, "output_tokens": 1000}}}
    return {
        "responses of two models at once": (
            Session("openai", "responses"),
            [
                (UP, {"type": "response.create", "model": "gpt-5-mini", "input": json.dumps(DECOY), "usage": DECOY["usage"]}),
                (UP, {"type": "response.create", "model": "gpt-5", "input": "hi"}),
                (DOWN, created("resp_1", "gpt-5-mini")), (DOWN, created("resp_2", "gpt-5")),
                (DOWN, {"type": "response.output_text.delta", "item_id": "i", "delta": '"usage": 1'}),
                (DOWN, response("resp_2", "gpt-5", token_usage(1000, 500, 200, 64))),
                (DOWN, response("resp_1", "gpt-5-mini", token_usage(36, 87))),
            ],
            [("gpt-5", Usage(1000, 500, cache_read_tokens=200, reasoning_tokens=64)), ("gpt-5-mini", Usage(36, 87))], "gpt-5-mini",
        ),
        "responses that did not complete, one of them reported twice": (
            Session("openai", "responses"),
            [(DOWN, response("a", "gpt-5", token_usage(5, 1), "incomplete")), (DOWN, response("b", "gpt-5", token_usage(6, 2), "failed")), (DOWN, response("a", "gpt-5", token_usage(5, 3), "incomplete")), (DOWN, response("c", "gpt-5", None, "failed"))],
            [("gpt-5", Usage(5, 3)), ("gpt-5", Usage(6, 2))], None,
        ),
        "a served tier, web searches and drawn images": (
            Session("openai", "v1/responses"),
            [(DOWN, created("a", "gpt-5")), (DOWN, response("a", "gpt-5", token_usage(5, 1), service_tier="priority", **web)), (DOWN, response("b", "gpt-5", token_usage(6, 2), service_tier="default", **draws))],
            [("gpt-5", Usage(5, 1, service_tier="priority", web_searches=2)), ("gpt-5", Usage(6, 2, incomplete=True))], None,
        ),
        "an error without usage": (Session("openai", "responses"), [(UP, {"type": "response.create", "model": "m"}), (DOWN, {"type": "error", "status": 400, "error": {"code": "x", "usage": {"input_tokens": 4}}})], [], "m"),
        "realtime, a response cancelled and a transcription": (
            Session("openai", "realtime", "model=gpt-realtime", "gpt-realtime"),
            [
                (DOWN, REALTIME), (UP, {"type": "input_audio_buffer.append", "audio": "AAAA"}), (DOWN, realtime_done("r1", AUDIO)),
                (DOWN, transcribed("i", TRANSCRIBED)), (DOWN, realtime_done("r2", {"input_tokens": 8, "output_tokens": 2}, "cancelled")),
                (DOWN, realtime_done("r3", None, "cancelled")), (DOWN, {"type": "rate_limits.updated", "usage": {"input_tokens": 4}}),
            ],
            [("gpt-realtime-2.1", AUDIO_USAGE), ("gpt-realtime-2.1", Usage(8, 2)), ("gpt-4o-mini-transcribe", Usage(26, 9, input_audio_tokens=26))], None,
        ),
        "a transcription session by tokens": (
            Session("openai", "realtime", "intent=transcription"),
            [(UP, {"type": "session.update", "session": {"type": "transcription", "audio": {"input": {"transcription": {"model": "gpt-4o-transcribe", "prompt": '"model": "decoy"'}}}}}), (DOWN, transcribed("i", TRANSCRIBED)), (DOWN, transcribed("j", TRANSCRIBED))],
            [("gpt-4o-transcribe", Usage(52, 18, input_audio_tokens=52))], "gpt-4o-transcribe",
        ),
        "a transcription session by seconds": (
            Session("openai", "realtime", "intent=transcription"),
            [(DOWN, {"type": "transcription_session.updated", "session": {"input_audio_transcription": {"model": "whisper-1"}}}), (DOWN, transcribed("i", {"type": "duration", "seconds": 2.5}))],
            [("whisper-1", Usage(audio_ms=2500))], None,
        ),
        "a transcription model without a name": (Session("openai", "realtime", "", "gpt-realtime"), [(DOWN, transcribed("i", {"type": "duration", "seconds": 3}))], [("input-transcription", Usage(audio_ms=3000))], None),
        "realtime without an id": (Session("openai", "realtime", "", "m"), [(DOWN, {"type": "response.done", "response": {"usage": {"input_tokens": 5, "output_tokens": 2}}})] * 3, [("m", Usage(15, 6))], None),
        "xai": (
            Session("openai", "realtime", "model=grok-voice-latest", "grok-voice-latest"), [(DOWN, XAI_DONE)],
            [("grok-voice-latest", Usage(10, 277, output_audio_tokens=258)), ("grok-voice-latest", Usage(audio_ms=3000))], None,
        ),
        "xai, where seconds grow and a frame comes twice": (
            Session("openai", "realtime", "model=grok-voice-latest", "grok-voice-latest"),
            [(DOWN, XAI_DONE), (DOWN, XAI_DONE), (DOWN, XAI_DONE | {"response": {"id": "r2", "usage": {}}, "usage": {"input_tokens": 1, "output_tokens": 2, "billable_audio_seconds": 8}})],
            [("grok-voice-latest", Usage(10, 277, output_audio_tokens=258)), ("grok-voice-latest", Usage(1, 2)), ("grok-voice-latest", Usage(audio_ms=8000, estimated=True))], None,
        ),
        "xai, where seconds fall and a text was sent": (
            Session("openai", "realtime", "model=grok-voice-latest", "grok-voice-latest"),
            [(UP, {"type": "conversation.item.create", "item": {"type": "message", "content": [{"type": "input_text", "text": "hi"}]}}), (DOWN, XAI_DONE), (DOWN, XAI_DONE | {"response": {"id": "r2", "usage": {}}, "usage": {"input_tokens": 1, "output_tokens": 2, "billable_audio_seconds": 2}})],
            [("grok-voice-latest", Usage(10, 277, output_audio_tokens=258)), ("grok-voice-latest", Usage(1, 2)), ("grok-voice-latest", Usage(audio_ms=5000, estimated=True, incomplete=True))], None,
        ),
        "live": (
            Session("openai", "live/sessions"),
            [
                (UP, {"type": "session.start", "session": {"model": "gpt-live-1", "instructions": '"model": "decoy"'}}),
                (DOWN, {"event_id": "1", "type": "session.started", "session": LIVE_SESSION}),
                (DOWN, {"event_id": "2", "type": "session.usage.updated", "usage": {"seconds": 30.5}, "context_window": {"usage_ratio": 0.9}}),
                (DOWN, live_event(created("resp_1", "gpt-5-mini"))), (DOWN, live_event(response("resp_1", "gpt-5-mini", token_usage(100, 20)))), (DOWN, live_event(response("resp_1", "gpt-5-mini", token_usage(100, 20)))),
                (DOWN, {"type": "decision.event", "event_id": "9", "trigger_id": "t1", "event": {"type": "decision.completed", "decision": {"answers": [DECOY], "model": "gpt-5-nano", "usage": token_usage(7, 1)}}}),
                (DOWN, {"type": "decision.event", "event_id": "9", "trigger_id": "t1", "event": {"type": "decision.completed", "decision": {"answers": [DECOY], "model": "gpt-5-nano", "usage": token_usage(7, 1)}}}),
                (DOWN, {"event_id": "3", "type": "session.usage.updated", "usage": {"seconds": 60}}),
                (DOWN, {"event_id": "4", "type": "session.closed", "reason": "close_requested", "usage": {"seconds": 61.25}, "session": LIVE_SESSION}),
            ],
            [("gpt-live-1", Usage(audio_ms=61_250)), ("gpt-5-mini", Usage(100, 20)), ("gpt-5-nano", Usage(7, 1))], "gpt-live-1",
        ),
        "live without a close": (
            Session("openai", "v1/live/sessions"),
            [(DOWN, {"type": "session.started", "session": LIVE_SESSION}), (DOWN, {"type": "session.usage.updated", "usage": {"seconds": 30}})],
            [("gpt-live-1", Usage(audio_ms=30_000, estimated=True))], None,
        ),
        "xai stt": (Session("openai", "stt", "encoding=pcm&sample_rate=16000"), [(UP, b"\0" * 64_000), (DOWN, {"type": "transcript.created", "id": "x"}), (DOWN, {"type": "transcript.partial", "text": "hi", "is_final": True, "duration": 9}), (DOWN, {"type": "transcript.done", "text": '"duration": 5', "duration": 2.1, "words": [DECOY]})], [(None, Usage(audio_ms=2100))], None),
        "xai tts": (Session("openai", "tts", "voice=eve"), [(UP, {"type": "text.delta", "delta": "hällo "}), (UP, {"type": "text.delta", "delta": "you"}), (UP, {"type": "text.done"}), (DOWN, {"type": "audio.delta", "delta": "AAAA"})], [(None, Usage(characters=9))], None),
    }  # fmt: skip


def _others() -> dict[str, Case]:
    results = {"type": "Results", "channel_index": [0, 1], "start": 0.0, "speech_final": False, "channel": {"alternatives": [{"transcript": '"duration": 9', "words": [{"duration": 99}]}]}, "metadata": {"request_id": "r", "duration": 77}}
    speech = {"speech_id": "s1", "audio_duration_ms": 900, "input_character_count": 14, "billable_character_count": 12, "controls_applied": {"billable_character_count": 99}}
    return {
        "gemini live": (
            Session("google", "ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent"),
            [(UP, {"setup": {"model": "models/gemini-live", "systemInstruction": {"parts": [{"text": '"setup": {"model": "decoy"}'}]}, "tools": [DECOY]}}), (DOWN, b'{"setupComplete": {}}'), (DOWN, GEMINI), (UP, {"realtimeInput": {"text": "setup"}}), (DOWN, GEMINI)],
            [("gemini-live", Usage(286, 38, input_audio_tokens=80, output_audio_tokens=38))], "gemini-live",
        ),
        "gemini live that translates": (
            Session("google", "BidiGenerateContent"),
            [(DOWN, {"usageMetadata": {"promptTokenCount": 25, "responseTokenCount": 25, "totalTokenCount": 50, "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 535}, {"modality": "AUDIO", "tokenCount": 25}, {"modality": "AUDIO"}]}})] * 2,
            [(None, Usage(50, 50, input_audio_tokens=50))], None,
        ),
        "vertex's field names, a tier and searches": (
            Session("google", "BidiGenerateContent", "", "gemini-live"),
            [(DOWN, {"usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 50, "responseTokenCount": 25, "thoughtsTokenCount": 5, "serviceTier": "priority"}}), (DOWN, {"serverContent": {"groundingMetadata": {"webSearchQueries": ["x"]}}})],
            [("gemini-live", Usage(incomplete=True)), ("gemini-live", Usage(10, 55, reasoning_tokens=5, service_tier="priority"))], None,
        ),
        "deepgram without an end": (Session("deepgram", "v1/listen", "model=nova-3", "nova-3"), [(UP, b"\1" * 99), (DOWN, results | {"duration": 2.5, "is_final": True}), (DOWN, results | {"duration": 1.0, "is_final": False})], [("nova-3", Usage(audio_ms=2500))], None),
        "deepgram with its total": (Session("deepgram", "v1/listen"), [(DOWN, results | {"duration": 2.5, "is_final": True}), (DOWN, {"type": "Metadata", "request_id": "r", "created": "c", "duration": 4.25, "channels": 1})], [(None, Usage(audio_ms=4250))], None),
        "deepgram of two channels": (Session("deepgram", "v1/listen", "multichannel=true&channels=2"), [(DOWN, results | {"duration": 2.5, "is_final": True, "channel_index": [i, 2]}) for i in (0, 1)] + [(DOWN, {"type": "Metadata", "duration": 4.0, "channels": 2})], [(None, Usage(audio_ms=8000))], None),
        "deepgram speak": (Session("deepgram", "v1/speak", "model=aura-2", "aura-2"), [(UP, {"type": "Speak", "text": "hello you"}), (UP, {"type": "Flush", "text": "no"}), (UP, {"type": "Close"}), (DOWN, b"\0\1\2")], [("aura-2", Usage(characters=9))], None),
        "deepgram flux speak, by turns": (Session("deepgram", "v2/speak"), [(UP, {"type": "Speak", "text": "hello there yo"}), (DOWN, {"type": "SpeechMetadata", **speech}), (DOWN, {"type": "SpeechMetadata", **speech}), (DOWN, {"type": "SpeechInterrupted", "audio_played_ms": 4, "metadata": speech | {"speech_id": "s2", "billable_character_count": 30}})], [(None, Usage(characters=42))], None),
        "deepgram flux speak, by the session": (Session("deepgram", "v2/speak"), [(UP, {"type": "Speak", "text": "hello there yo"}), (DOWN, {"type": "SpeechMetadata", **speech}), (DOWN, {"type": "SessionMetadata", "total_audio_duration_ms": 900, "total_input_character_count": 20, "total_billable_character_count": 18})], [(None, Usage(characters=18))], None),
        "deepgram flux speak, closed during a turn": (Session("deepgram", "v2/speak"), [(UP, {"type": "Speak", "text": "hello there yo"}), (DOWN, {"type": "SpeechMetadata", **speech}), (UP, {"type": "Speak", "text": "and"})], [(None, Usage(characters=12)), (None, Usage(characters=3, estimated=True))], None),
        "elevenlabs": (Session("elevenlabs", "v1/text-to-speech/v/stream-input", "model_id=m", "m"), [(UP, {"text": " ", "voice_settings": {"text": "no"}}), (UP, {"text": "hello "}), (UP, {"text": "you ", "flush": True}), (UP, {"text": ""}), (DOWN, {"audio": "AAAA", "text": "no", "alignment": {"chars": ["h"]}})], [("m", Usage(characters=10))], None),
        "elevenlabs in contexts": (Session("elevenlabs", "v1/text-to-speech/v/multi-stream-input", "", "m"), [(UP, {"text": "one", "context_id": "a"}), (UP, {"context_id": "b", "text": "two!"}), (UP, {"context_id": "b", "close_context": True}), (UP, {"text": None, "close_socket": True})], [("m", Usage(characters=7))], None),
        "elevenlabs dialogue": (Session("elevenlabs", "v1/text-to-dialogue/stream-input", "", "eleven_v3"), [(UP, {"voices": ["v"], "inputs": []}), (UP, {"inputs": [{"text": "hello", "voice_id": "v"}, {"voice_id": "w", "text": "you"}]}), (UP, {"close_socket": True})], [("eleven_v3", Usage(characters=8))], None),
        "cartesia of two models": (Session("cartesia", "tts/websocket"), [(UP, {"context_id": "1", "model_id": "sonic-3", "transcript": "hi there", "voice": {"mode": "id", "transcript": "no"}}), (UP, {"model_id": "sonic-turbo", "context_id": "2", "transcript": "yo", "continue": True}), (UP, {"context_id": "1", "cancel": True}), (DOWN, {"type": "chunk", "data": "AAAA", "done": False, "step_time": 12, "context_id": "1"})], [("sonic-3", Usage(characters=8)), ("sonic-turbo", Usage(characters=2))], "sonic-3"),
        "cartesia stt": (Session("cartesia", "stt/websocket", "model=ink-whisper", "ink-whisper"), [(UP, b"\0" * 32), (DOWN, {"type": "transcript", "is_final": True, "text": "duration", "duration": 1.5, "words": [DECOY]}), (DOWN, {"type": "transcript", "is_final": False, "duration": 9}), (UP, b"finalize"), (DOWN, {"type": "transcript", "is_final": True, "duration": 0.5}), (DOWN, {"type": "done", "request_id": "r"})], [("ink-whisper", Usage(audio_ms=2000))], None),
        "assemblyai": (Session("assemblyai", "v3/ws"), [(UP, b"\0" * 32), (DOWN, {"type": "Begin", "id": "s", "expires_at": 1}), (DOWN, {"type": "Turn", "turn_order": 0, "transcript": "Termination", "words": [{"end": 3}]}), (DOWN, {"type": "Termination", "audio_duration_seconds": 12, "session_duration_seconds": 15})], [(None, Usage(audio_ms=15_000))], None),
        "assemblyai that reports audio alone": (Session("assemblyai", "v3/ws"), [(DOWN, {"type": "Termination", "audio_duration_seconds": 12})], [(None, Usage(audio_ms=12_000))], None),
        "fal": (Session("fal", "fal-ai/fast-lcm-diffusion/realtime"), [(UP, b"\x81\xa6prompt\xa1a"), (DOWN, b"\x81\xa6images\x90")], [(None, Usage(incomplete=True))], None),
        "fal that never responded": (Session("fal", "fal-ai/fast-lcm-diffusion/realtime"), [(UP, b"\x81")], [], None),
    }  # fmt: skip


CASES = {**_openai(), **_others()}


def _play(name: str, change: Any) -> Session:
    template, messages, *_ = CASES[name]
    session = Session(template.format, template.endpoint, template.query, template.model)
    for side, message in messages:
        (session.up if side == UP else session.down)(change(message))
    return session


def _shuffled(value: Any, order: random.Random) -> Any:
    if isinstance(value, dict):
        items = [(key, _shuffled(inner, order)) for key, inner in value.items()]
        order.shuffle(items)
        return dict(items)
    return [_shuffled(each, order) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", CASES)
def test_the_usage_of_a_session_is_read(name: str) -> None:
    _, _, expected, requested_model = CASES[name]
    session = _play(name, lambda message: message)
    assert session.parts == expected and session.meter.requested_model == requested_model
    assert session.parts == expected, "reading the parts twice changes nothing"


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_fields_and_spaces_do_not_matter(name: str) -> None:
    _, _, expected, requested_model = CASES[name]
    for seed in range(10):
        order, indent = random.Random(seed), seed % 3 or None

        def change(message: Message, order: random.Random = order, indent: int | None = indent) -> Message:
            return message if isinstance(message, bytes) else json.dumps(_shuffled(message, order), indent=indent).encode()

        session = _play(name, change)
        assert session.parts == expected and session.meter.requested_model == requested_model


def _escaped(message: Message) -> bytes:
    """Write the first letter of all names, and of all types, as an escape."""
    if isinstance(message, bytes):
        return message
    written = json.dumps(message)
    return re.sub(r'"([a-z])(?=\w*"\s*:)|(?<="type": ")([a-z])', lambda found: ('"' if found[1] else "") + f"\\u00{ord(found[1] or found[2]):x}", written).encode()


@pytest.mark.parametrize("name", CASES)
def test_names_that_the_client_writes_with_escapes_are_read(name: str) -> None:
    template, messages, expected, requested_model = CASES[name]
    session = Session(template.format, template.endpoint, template.query, template.model)
    for side, message in messages:
        session.up(_escaped(message)) if side == UP else session.down(message)
    assert session.parts == expected and session.meter.requested_model == requested_model


@pytest.mark.parametrize("padding_bytes", [60_000, 400_000])
@pytest.mark.parametrize("name", [name for name, (session, *_) in CASES.items() if session.format != "fal"])
def test_messages_of_any_size_are_read(name: str, padding_bytes: int) -> None:
    _, _, expected, requested_model = CASES[name]
    padding = "A" * padding_bytes

    def pad(message: Message) -> Message:
        return message if isinstance(message, bytes) else {"padding": padding, **message, "more": {"nested": padding}}

    session = _play(name, pad)
    assert session.parts == expected and session.meter.requested_model == requested_model


@pytest.mark.parametrize("message", [b"not json \"usage\" duration", b'{"usage": 5, "type": "response.done"}', b'{"type": "response.done", "response": [{"usage": 4}]}', b"\xff\x00\"usage\"", b'{"type": {}, "duration": "x", "is_final": true, "usage": {"input_tokens": -4, "output_tokens": 1e99}}', b"[" * 2000 + b'"usage"'])
@pytest.mark.parametrize("place", [("openai", "realtime"), ("openai", "responses"), ("openai", "live/sessions"), ("google", "Bidi"), ("deepgram", "v1/listen"), ("deepgram", "v2/speak"), ("cartesia", "stt/websocket"), ("elevenlabs", "v1/text-to-speech/x/stream-input"), ("openai", "stt"), ("assemblyai", "v3/ws")])
def test_malformed_messages_have_no_usage(place: tuple[str, str], message: bytes) -> None:
    session = Session(*place)
    session.down(message)
    session.meter.received(message)
    session.meter.sent(message)
    assert session.meter.parts == ()


def test_a_field_of_the_wrong_type_is_counted_and_the_others_are_read() -> None:
    session = Session("openai", "responses").down(response("a", "gpt-5", {"input_tokens": 5, "output_tokens": 2, "total_tokens": {"a": 1}}))
    assert session.parts == [("gpt-5", Usage(5, 2))] and session.meter.ignored_fields.count == 1


def test_usage_that_can_be_read_again_has_an_object_id_and_other_usage_has_none() -> None:
    responses = _play("responses of two models at once", lambda message: message).meter.parts
    assert [(part.object_id, part.booking) for part in responses] == [("resp_2", "made"), ("resp_1", "made")]
    live = _play("live", lambda message: message).meter.parts
    assert [(part.object_id, part.booking) for part in live] == [("live_1", "so_far"), ("resp_1", "once"), ("live_1 t1", "once")]
    assert {part.object_id for part in _play("realtime, a response cancelled and a transcription", lambda message: message).meter.parts} == {""}
    attached = Session("openai", "realtime", "call_id=rtc_1").down(REALTIME, realtime_done("r1", AUDIO))
    assert [(part.object_id, part.booking) for part in attached.meter.parts] == [("r1", "once")]
    sideband = Session("openai", "live/sessions/live_7/attach").down({"type": "session.usage.updated", "usage": {"seconds": 4}})
    assert sideband.meter.parts == (Part(None, Usage(audio_ms=4000, estimated=True), object_id="live_7", booking="so_far"),)


def test_xai_bills_the_seconds_and_not_the_tokens() -> None:
    tokens, spoken = _play("xai", lambda message: message).meter.parts
    assert tokens.billed == Usage() and spoken.billed is None


def test_thousands_of_responses_are_added_up_in_bounded_memory() -> None:
    session = Session("openai", "responses")
    for n in range(3000):
        session.down(response(f"r{n}", "gpt-5", token_usage(2, 1)))
    assert total(session.meter.parts) == Usage(6000, 3000) and len(session.meter.parts) <= 1001


# Estimates: the deltas of a response without an end, audio without a reported length, elapsed time.

def text_delta(text: str) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "item_id": "msg_68a1", "output_index": 0, "content_index": 0, "delta": text, "sequence_number": 100, "logprobs": []}


def audio_delta(audio_bytes: int) -> dict[str, Any]:
    return {"type": "response.output_audio.delta", "event_id": "event_1", "response_id": "r1", "item_id": "i", "output_index": 0, "content_index": 0, "delta": base64.b64encode(b"\0" * audio_bytes).decode()}


def test_a_response_that_the_client_abandoned_is_estimated_from_its_deltas() -> None:
    session = Session("openai", "responses").up({"type": "response.create", "model": "gpt-5-mini", "input": "x" * 4000})
    session.down(created("r1", "gpt-5-mini"), {"type": "response.output_item.added", "item": {"content": "x" * 900}})
    session.down(*[text_delta("four")] * 400)
    [(model, usage)] = session.parts
    assert model == "gpt-5-mini" and usage.estimated and 1000 <= usage.input_tokens <= 1050 and 395 <= usage.output_tokens <= 405
    session.down({"type": "response.output_text.done", "text": "four" * 400})
    assert session.parts == [(model, usage)], "a repeated text counts once"
    session.down(response("r1", "gpt-5-mini", token_usage(7, 8)))
    assert session.parts == [("gpt-5-mini", Usage(7, 8))], "reported usage replaces the estimate"


def test_an_estimate_includes_the_response_that_the_request_continues() -> None:
    session = Session("openai", "responses").up({"type": "response.create", "model": "m"}).down(created("r1", "m"), response("r1", "m", token_usage(1000, 500)))
    session.up({"type": "response.create", "model": "m", "previous_response_id": "r1"}).down(created("r2", "m"), *[text_delta("four")] * 10)
    [_, (_, abandoned)] = session.parts
    assert abandoned.estimated and 1500 <= abandoned.input_tokens <= 1530 and 9 <= abandoned.output_tokens <= 11


def test_deltas_of_two_concurrent_responses_are_divided_between_them() -> None:
    session = Session("openai", "responses").down(created("r1", "a"), created("r2", "b"), *[text_delta("four")] * 100)
    session.down(response("r1", "a", token_usage(7, 50)), *[text_delta("four")] * 100)
    reported, (model, abandoned) = session.parts
    assert reported == ("a", Usage(7, 50)) and model == "b" and 145 <= abandoned.output_tokens <= 155


def test_a_completed_response_without_usage_is_estimated_and_a_failed_one_is_not() -> None:
    session = Session("openai", "responses").down(created("r1", "m"), *[text_delta("four")] * 50, response("r1", "m", None))
    session.down(created("r2", "m"), *[text_delta("four")] * 50, response("r2", "m", None, "failed"))
    [(_, usage)] = session.parts
    assert usage.estimated and 48 <= usage.output_tokens <= 52


def test_speech_that_the_client_abandoned_is_estimated_from_its_length() -> None:
    session = Session("openai", "realtime", "", "gpt-realtime").down(REALTIME, realtime_done("r0", AUDIO))
    append = {"type": "input_audio_buffer.append", "audio": base64.b64encode(b"\0" * 24_000).decode()}
    session.up(*[append] * 10).down({"type": "response.created", "response": {"id": "r1", "status": "in_progress", "usage": None}})
    session.down({"type": "response.output_audio_transcript.delta", "response_id": "r1", "delta": "hi"}, *[audio_delta(4800)] * 50)
    _, (model, abandoned) = session.parts
    assert model == "gpt-realtime-2.1" and abandoned.estimated
    assert 95 <= abandoned.output_tokens == abandoned.output_audio_tokens <= 105, "5 s are 100 tokens"
    assert 253 + 49 <= abandoned.input_tokens <= 253 + 53, "the conversation so far, and 5 s of audio"


def test_a_gemini_response_that_the_client_abandoned_is_estimated_from_its_length() -> None:
    session = Session("google", "BidiGenerateContent").up({"setup": {"model": "models/g"}}).down(GEMINI)
    audio = {"serverContent": {"modelTurn": {"parts": [{"inlineData": {"mimeType": "audio/pcm;rate=24000", "data": base64.b64encode(b"\0" * 9600).decode()}}]}}}
    session.down(*[audio] * 20)
    [reported, (_, abandoned)] = session.parts
    assert reported[1].estimated is False and abandoned.estimated and 98 <= abandoned.output_audio_tokens <= 102 and abandoned.input_tokens == 162
    session.down(GEMINI, {"sessionResumptionUpdate": {"newHandle": "x" * 64, "resumable": True}})
    assert len(session.parts) == 1


PCM_5_S = b"\0" * 160_000
CHUNK = {"message_type": "input_audio_chunk", "commit": False, "audio_base_64": base64.b64encode(b"\0" * 3200).decode(), "sample_rate": 16000}
STARTED = {"message_type": "session_started", "session_id": "s", "config": {"sample_rate": 16000, "audio_format": "pcm_16000", "model_id": "scribe_v2_realtime"}}
TURN_INFO = {"type": "TurnInfo", "event": "Update", "turn_index": 0, "audio_window_start": 0.0, "audio_window_end": 7.5, "transcript": '"audio_window_end": 99'}


@pytest.mark.parametrize(
    ("session", "up", "down", "audio_ms"),
    [
        (Session("deepgram", "v1/listen", "encoding=linear16&sample_rate=16000"), [PCM_5_S], [], 5000),
        (Session("deepgram", "v1/listen", "encoding=linear16&sample_rate=16000&channels=2"), [PCM_5_S], [], 2500),
        (Session("deepgram", "v1/listen", "encoding=linear16&sample_rate=16000&channels=2&multichannel=true"), [PCM_5_S], [], 5000),
        (Session("deepgram", "v1/listen", "encoding=mulaw&sample_rate=8000"), [PCM_5_S], [], 20_000),
        (Session("deepgram", "v1/listen", "encoding=opus"), [b"x" * 50], [], 60_000),
        (Session("deepgram", "v1/listen"), [b"x" * 50], [], 60_000),
        (Session("deepgram", "v2/listen", "encoding=linear16&sample_rate=16000"), [PCM_5_S], [TURN_INFO | {"audio_window_end": 4.0}], 5000),
        (Session("deepgram", "v2/listen"), [b"x" * 50], [TURN_INFO, TURN_INFO | {"audio_window_end": 3}], 7500),
        (Session("cartesia", "stt/turns/websocket", "encoding=pcm_s16le&sample_rate=16000"), [PCM_5_S], [{"type": "turn.end", "transcript": "duration"}], 5000),
        (Session("cartesia", "stt/websocket", "encoding=pcm_s16le&sample_rate=16000"), [PCM_5_S], [{"type": "done", "request_id": "r"}], 5000),
        (Session("elevenlabs", "v1/speech-to-text/realtime"), [CHUNK] * 50, [STARTED, {"message_type": "committed_transcript", "text": "hi"}], 5000),
        (Session("elevenlabs", "v1/speech-to-text/realtime", "audio_format=ulaw_8000"), [CHUNK] * 50, [], 20_000),
        (Session("elevenlabs", "v1/convai/conversation", "agent_id=a"), [], [], 60_000),
        (Session("assemblyai", "v3/ws", "sample_rate=16000&encoding=pcm_s16le"), [PCM_5_S], [{"type": "Begin", "id": "x"}], 60_000),
        (Session("openai", "realtime/translations", "model=gpt-realtime-translate", "gpt-realtime-translate"), [{"type": "session.input_audio_buffer.append", "audio": base64.b64encode(b"\0" * 9600).decode()}] * 25, [{"type": "session.output_audio.delta", "elapsed_ms": 99, "delta": "AAAA"}, {"type": "session.closed", "event_id": "e"}], 5000),
        (Session("openai", "stt", "encoding=pcm&sample_rate=16000"), [PCM_5_S], [{"type": "transcript.created"}], 5000),
        (Session("google", "ws/x.BidiGenerateMusic"), [], [], 60_000),
        (Session("deepgram", "v1/agent/converse"), [], [], 60_000),
    ],
    ids=lambda value: f"{value.format} {value.endpoint}?{value.query}" if isinstance(value, Session) else "",
)  # fmt: skip
def test_without_reported_usage_the_audio_sent_or_the_elapsed_time_is_counted(session: Session, up: list[Message], down: list[Message], audio_ms: int) -> None:
    fresh = Session(session.format, session.endpoint, session.query, session.model)
    down_first = [message for message in down if message is STARTED]
    fresh.down(*down_first).up(*up).down(*[message for message in down if message is not STARTED])
    fresh.now_s += 60
    [(_, usage)] = fresh.parts
    assert usage.estimated and abs(usage.audio_ms - audio_ms) <= 40


SPEECH = {
    "elevenlabs": (Session("elevenlabs", "v1/text-to-speech/v/stream-input"), b'"text":"%b"', b"{%b,%b}"),
    "elevenlabs dialogue": (Session("elevenlabs", "v1/text-to-dialogue/stream-input"), b'"text":"%b"', b'{"inputs":[{%b,%b}]}'),
    "elevenlabs dialogues": (Session("elevenlabs", "v1/text-to-dialogue/stream-input"), b'"inputs":[{"text":"%b"}]', b"{%b,%b}"),
    "cartesia": (Session("cartesia", "tts/websocket"), b'"transcript":"%b"', b"{%b,%b}"),
    "deepgram": (Session("deepgram", "v1/speak"), b'"text":"%b"', b'{"type":"Speak",%b,%b}'),
    "deepgram, two types": (Session("deepgram", "v1/speak"), b'"text":"%b"', b'{"type":"Speak",%b,"type":"Flush",%b}'),
    "xai": (Session("openai", "tts"), b'"delta":"%b"', b'{"type":"text.delta",%b,%b}'),
}  # fmt: skip


@pytest.mark.parametrize("name", SPEECH)
@pytest.mark.parametrize("is_first", [True, False])
def test_of_a_repeated_text_the_longest_counts(name: str, is_first: bool) -> None:
    template, field_, message = SPEECH[name]
    texts = [b"long" * 25, b"a"] if is_first else [b"a", b"long" * 25]
    data = message % tuple(field_ % each for each in texts)
    session = Session(template.format, template.endpoint).up(data)
    assert sum(usage.characters for _, usage in session.parts) == 100
    order = session.meter.order_of(data)
    assert order is not None and order.bound.characters >= 100


@pytest.mark.parametrize("endpoint", ["realtime", "responses"])
@pytest.mark.parametrize("data", [b'{"type":"response.create","type":"x"}', b'{"type":"x","type":"response.create"}', b'{"t\\u0079pe":"response\\u002ecreate","type":"x"}'])
def test_a_message_with_two_types_orders_what_either_orders(endpoint: str, data: bytes) -> None:
    order = Session("openai", endpoint, "", "m").meter.order_of(data)
    assert order is not None and order.is_response


@pytest.mark.parametrize("setups", [b'"setup":{"model":"models/m"},"setup":{}', b'"setup":{},"setup":{"model":"models/m"}', b'"setup":{"model":"models/m"},"s\\u0065tup":{}'])
def test_a_second_setup_does_not_hide_the_model(setups: bytes) -> None:
    session = Session("google", "BidiGenerateContent").up(b"{%b}" % setups)
    assert (session.meter.model, session.meter.requested_model) == ("m", "m")


def test_of_two_limits_in_a_gemini_setup_neither_counts() -> None:
    for config, limit in ((b'"maxOutputTokens":10', 10), (b'"maxOutputTokens":9000,"maxOutputTokens":10', None), (b'"max_output_tokens":9000,"maxOutputTokens":10', None)):
        data = b'{"setup":{"model":"models/m","generationConfig":{%b}}}' % config
        session = Session("google", "BidiGenerateContent")
        assert session.meter.order_of(data) is None
        assert session.meter.output_limit == limit


def test_an_order_with_two_models_may_be_of_either() -> None:
    order = Session("openai", "responses").meter.order_of(b'{"type":"response.create","model":"cheap","model":"dear","response":{"model":"other"}}')
    assert order is not None and set(order.models) == {"cheap", "dear"}
    order = Session("elevenlabs", "v1/text-to-speech/v/stream-input").meter.order_of(b'{"text":"hi","model_id":"cheap","model_id":"dear"}')
    assert order is not None and set(order.models) == {"cheap", "dear"}


def test_an_order_that_continues_two_responses_has_the_longer_input() -> None:
    session = Session("openai", "responses", "", "m")
    for name, tokens in (("short", 10), ("long", 5000)):
        session.down(created(name, "m"), response(name, "m", token_usage(tokens, 0)))
    for text in (b'"previous_response_id":"%b","previous_response_id":"%b"' % each for each in ((b"short", b"long"), (b"long", b"short"))):
        order = session.meter.order_of(b'{"type":"response.create",%b}' % text)
        assert order is not None and 5000 <= order.bound.input_tokens <= 5050


LARGE = b"A" * 300_000
SPOKEN_FORMAT = {"type": "session.created", "session": {"model": "m", "audio": {"input": {"format": {"type": "audio/pcm", "rate": 24000}}}}}
REALTIME_APPEND, GEMINI_AUDIO = b'{"type":"input_audio_buffer.append","audio":"%b"}' % LARGE, b'{"realtimeInput":{"audio":{"mimeType":"audio/pcm","data":"%b"}}}' % LARGE


def test_a_large_message_of_audio_is_counted_as_audio() -> None:
    spoken = Session("openai", "realtime", "", "m").down(SPOKEN_FORMAT)
    gemini = Session("google", "BidiGenerateContent", "", "m")
    for session, message, tokens_a_s, bytes_a_s in ((spoken, REALTIME_APPEND, 10, 48_000), (gemini, GEMINI_AUDIO, 25, 32_000)):
        before = session.meter.next_response
        assert before is not None
        assert session.meter.order_of(message) is None
        after = session.up(message).meter.next_response
        assert after is not None
        expected = len(LARGE) * 3 // 4 * tokens_a_s // bytes_a_s
        assert abs(after.input_tokens - before.input_tokens - expected) <= 1


def test_the_audio_of_an_item_is_counted_as_audio() -> None:
    session = Session("openai", "realtime", "", "m").down(SPOKEN_FORMAT)
    item = {"type": "conversation.item.create", "item": {"type": "message", "content": [{"type": "input_audio", "audio": LARGE.decode()}]}}
    data = json.dumps(item, separators=(",", ":")).encode()
    assert session.meter.order_of(data) is None
    bound = session.up(data).meter.next_response
    assert bound is not None and bound.input_tokens < 150


@pytest.mark.parametrize(
    "data",
    [b'{"realtimeInput":{"text":"%b"}}' % LARGE, b'{"clientContent":{"turns":[{"parts":[{"text":"%b"}]}]}}' % LARGE, b'{"setup":{"model":"m"},"clientContent":{"turns":[{"parts":[{"text":"%b"}]}]}}' % LARGE],
)  # fmt: skip
def test_a_large_text_for_gemini_orders_a_response(data: bytes) -> None:
    order = Session("google", "BidiGenerateContent", "", "m").meter.order_of(data)
    assert order is not None and order.bound.input_tokens >= len(LARGE) // 4


SECOND = "A" * 42_668
"""A second of 16-bit PCM at 16 kHz, in base64."""
SCRIBE = ("elevenlabs", "v1/speech-to-text/realtime", "audio_format=pcm_16000")
TRANSLATIONS = ("openai", "realtime/translations", "")


@pytest.mark.parametrize(
    "message",
    [
        b'{"audio_base_64":"%b"}', b'{"message_type":"input_audio_chunk","audio_base_64":"%b","previous_text":"' + b"x" * 90_000 + b'"}', b'{"audio_base_64":' + b" " * 90_000 + b'"%b"}',
        b'{"audio_base_64":"","audio_base_64":"%b"}', b'{"audio_base_64":"%b","audio_base_64":""}', b'{"audio_base\\u005f64":"%b"}', b'{"audio_base_64":"","audio_base\\u005f64":"%b"}', b'{"audio_base\\u005f64":"%b","audio_base_64":""}',
    ],
)  # fmt: skip
def test_the_audio_of_each_message_is_counted_from_that_message(message: bytes) -> None:
    first = Session(*SCRIBE).up(message % SECOND.encode(), *[{"audio_base_64": SECOND}] * 2)
    later = Session(*SCRIBE).up({"audio_base_64": SECOND}, *[message % SECOND.encode()] * 2)
    for session in (first, later):
        [(_, usage)] = session.parts
        assert 3000 <= usage.audio_ms <= 3010


def test_the_audio_of_a_translation_is_counted_under_a_name_with_escapes() -> None:
    plain = Session(*TRANSLATIONS).up(*[{"type": "session.input_audio_buffer.append", "audio": "A" * 64_000}] * 3)
    escaped = Session(*TRANSLATIONS).up(*[b'{"type":"session.input_audio_buffer.append","aud\\u0069o":"%b"}' % (b"A" * 64_000)] * 3)
    assert [plain.parts[0][1].audio_ms, round(escaped.parts[0][1].audio_ms, -1)] == [3000, 3000]


def test_messages_without_audio_count_no_audio() -> None:
    settings = {"type": "session.update", "session": {"audio": {"output": {"language": "de"}}, "note": "é" * 1000}}
    session = Session(*TRANSLATIONS).up({"type": "session.input_audio_buffer.append", "audio": "A" * 64_000}, *[settings] * 50)
    assert session.parts[0][1].audio_ms == 1000


@pytest.mark.parametrize("place", [("deepgram", "v1/listen"), ("deepgram", "v2/listen"), ("cartesia", "stt/websocket"), ("elevenlabs", "v1/speech-to-text/realtime"), ("openai", "realtime/translations"), ("openai", "stt"), ("openai", "realtime"), ("openai", "responses"), ("openai", "live/sessions"), ("google", "BidiGenerateContent")])
def test_a_session_in_which_nothing_was_sent_has_no_usage(place: tuple[str, str]) -> None:
    session = Session(*place)
    session.now_s += 60
    assert session.parts == []


def test_a_text_too_long_to_be_counted_makes_the_usage_incomplete() -> None:
    long = Session("cartesia", "tts/websocket", "", "m").up({"transcript": "ä" * 150_000}, {"transcript": "x" * 2_000_000})
    assert long.parts == [("m", Usage(characters=150_000)), ("m", Usage(incomplete=True))]


@pytest.mark.parametrize(
    ("encoding", "rate", "expected"),
    [
        ("linear16", "16000", 32_000), ("pcm_s16le", "44100", 88_200), ("pcm_f32le", "16000", 64_000), ("mulaw", "", 8000), ("audio/pcmu", "", 8000),
        ("pcm_24000", "", 48_000), ("ulaw_8000", "16000", 8000), ("opus", "48000", None), ("linear16", "", None), ("linear16", "1", None), ("linear16", "99999999", None),
        ("linear16", "-16000", None), ("", "16000", None), ("PCM", "16000", 32_000), ("audio/pcma", "8000", 8000),
    ],
)  # fmt: skip
def test_the_bytes_per_second_follow_from_the_declared_format(encoding: str, rate: str, expected: int | None) -> None:
    assert bytes_a_second(encoding, rate) == expected


def test_a_payload_is_the_bytes_of_its_messages_without_their_envelopes() -> None:
    side = Side()
    payload = Payload(side)
    assert payload.bytes == 0
    payload.sample(b"x" * 100, 40)
    side.messages, side.bytes = 10, 10 * 90
    assert payload.bytes == 300
    payload.leave_out(b"x" * 90)
    assert payload.bytes == 270
    payload.begin()
    assert payload.bytes == 0
