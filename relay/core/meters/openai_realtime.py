"""Meter Realtime sessions of OpenAI and xAI, spoken ones and transcriptions.

Owns the models of a session, and what is billed in addition to responses: transcriptions of the
input, xAI's seconds. openai_responses_socket.py reads the usage of responses.
"""

from __future__ import annotations

import re

import msgspec

from relay.core import media
from relay.core.meters import openai
from relay.core.meters.documents import Document, Wanted
from relay.core.meters.openai_responses_socket import (
    OUTPUT_LIMITS,
    Open,
    ResponseMeter,
    max_tokens_of,
    output_limit,
)
from relay.core.meters.socket_meter import (
    MAX_PARTS,
    OpenedSession,
    Order,
    Readings,
    bytes_a_second,
    compile_prefilter,
    of_base64,
)
from relay.core.meters.tolerant_json import Reader, Seconds, text_of
from relay.core.usage import BYTES_PER_TOKEN, CallBound, Part, Parts, Usage

_SENT = Wanted(
    "type", "session.model", "session.audio.input.transcription.model",
    "session.input_audio_transcription.model",
)  # fmt: skip
_TRANSCRIBERS = (
    "session.input_audio_transcription.model", "session.audio.input.transcription.model",
)  # fmt: skip
_SESSION_LIMITS = ("session.max_output_tokens", "session.max_response_output_tokens")
_ORDERED = Wanted("session.model", *OUTPUT_LIMITS, *_SESSION_LIMITS)
_MAX_MODELS = 4
_INPUT_AUDIO_TOKENS_A_SECOND = 10
_OUTPUT_AUDIO_TOKENS_A_SECOND = 20
"""OpenAI counts one token for 100 ms of the user's audio, and for 50 ms of its own."""


class _Voice(msgspec.Struct):
    """The field of `usage` that xAI adds to the tokens."""

    billable_audio_seconds: Seconds | None = None


_voice = Reader(_Voice)


class Realtime(ResponseMeter):
    """The meter of a Realtime session: every response, and every transcription of the input under
    the model that made it.

    xAI bills seconds of audio instead of tokens, and texts from the client, whose price is unknown.
    By its documentation the seconds are cumulative. They are read as such while they grow, and
    otherwise as seconds of each response; with more than one response this is an estimate.
    """

    sampled_deltas = 8
    """More than one, because transcripts precede the audio."""
    __slots__ = (
        "_attached", "_context_tokens", "_heard_from", "_input_bytes_a_s", "_output_bytes_a_s",
        "_transcriber", "_updated_limit", "_updated_models", "_updates", "_voice_s",
        "_written_tokens", "_wrote",
    )  # fmt: skip

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened)
        # All clients that attach to a call get the same responses. Others cannot be read again.
        self._attached = bool(opened.parameter("call_id"))
        self._transcriber: str | None = None
        self._context_tokens = 0
        self._heard_from = 0
        self._input_bytes_a_s = self._output_bytes_a_s = 0
        self._voice_s: dict[str, float] = {}
        self._wrote = False
        self._written_tokens = 0
        """Of the texts and images that the client sent since the last response ended."""
        self._updates = 0
        """The number of `session.update` that the provider has not confirmed."""
        self._updated_limit: int | None = 0
        self._updated_models: tuple[str, ...] = ()
        """What these set: the highest maximum of the output (None: unlimited), and the models."""
        self.order_filter = compile_prefilter(_ORDERS)
        if opened.model is None:
            self.sent_filter = compile_prefilter('"session"')
        self._watch_texts()

    def sent(self, data: bytes) -> None:
        message = _SENT.of(data)
        if text_of(message.get("type")) == "conversation.item.create":
            self._wrote = True
            return
        model, transcriber = text_of(message.get("session.model")), _transcriber(message)
        if model is None and self.opened.parameter("intent") == "transcription":
            model = transcriber
        self._transcriber = self._transcriber or transcriber
        if model is not None:
            self.named(model)
            self.sent_filter = None
            self._watch_texts()

    def _watch_texts(self) -> None:
        model = self.model or self.requested_model or ""
        if self.sent_filter is None and model.startswith("grok"):
            self.sent_filter = compile_prefilter(r'"conversation\.item\.create"')

    def _reported(self, kind: str, message: Document, data: bytes) -> None:
        if kind == _TRANSCRIBED:
            usage = openai.usage_of(message.get("usage"), self.ignored_fields)
            if usage is not None:
                self.add(Part(self._transcriber or _TRANSCRIBER, usage))
        elif "session." in kind:
            self._session(kind, message, len(data))

    def _session(self, kind: str, message: Document, session_bytes: int) -> None:
        self.model = text_of(message.get("session.model")) or self.model
        self._transcriber = _transcriber(message) or self._transcriber
        self._context_tokens = self._context_tokens or session_bytes // BYTES_PER_TOKEN
        if kind == "session.created" and self.opened.model:
            self.first_model = self.first_model or self.model
        if kind.endswith("session.updated"):
            self._answered_update()
        limits = [message[place] for place in _SESSION_LIMITS if place in message]
        self.output_limit = max_tokens_of(limits[0]) if limits else self.output_limit
        self._input_bytes_a_s = _audio(message, "input") or self._input_bytes_a_s
        self._output_bytes_a_s = _audio(message, "output") or self._output_bytes_a_s
        if self.model is not None and not self._wrote:
            self.sent_filter = None
            self._watch_texts()

    def _opening(self, model: str | None) -> Open:
        """Return a new response, whose input is the conversation so far, and the audio since."""
        return Open(model, self._context_tokens + self._heard_tokens)

    @property
    def _heard_tokens(self) -> int:
        """The tokens of the audio that the client sent since the last response ended."""
        if not self._input_bytes_a_s:
            return 0
        audio_bytes = of_base64(self.opened.client.bytes - self._heard_from)
        return audio_bytes * _INPUT_AUDIO_TOKENS_A_SECOND // self._input_bytes_a_s

    def order_of(self, data: bytes) -> Order | None:
        kinds = Readings(data).types
        if kinds.isdisjoint(_TEXTUAL):
            return None  # audio, which _heard_tokens counts
        self._written_tokens += media.input_tokens(_AUDIO.sub(b"", data), "openai")
        message = _ORDERED.of(data)
        if not kinds.isdisjoint(_UPDATES):
            self._ordered_update(message, data)
        if kinds.isdisjoint(_CREATES):
            return None
        limit = output_limit(message, data, self._next_limit, OUTPUT_LIMITS)
        bound = msgspec.structs.replace(self.next_response, output_tokens=limit)
        return Order(bound, is_response=True)

    def _ordered_update(self, message: Document, data: bytes) -> None:
        """Note what the client sets, which may hold before the provider confirms it."""
        limit = output_limit(message, data, self.output_limit, _SESSION_LIMITS)
        self._updated_limit = _higher(self._updated_limit, limit) if self._updates else limit
        self._updates += 1
        model = text_of(message.get("session.model"))
        if model is not None and model not in self._updated_models:
            self._updated_models = (*self._updated_models[-_MAX_MODELS:], model)

    def _answered_update(self) -> None:
        self._updates = max(0, self._updates - 1)
        if not self._updates:
            self._updated_models = ()

    def _failed(self, message: Document) -> None:
        super()._failed(message)
        if (text_of(message.get("error.param")) or "").startswith("session."):
            self._answered_update()

    @property
    def _next_limit(self) -> int | None:
        """The highest maximum of the output that the next response may have."""
        if not self._updates:
            return self.output_limit
        return _higher(self.output_limit, self._updated_limit)

    @property
    def next_models(self) -> tuple[str, ...]:
        return (*super().next_models, *self._updated_models)

    @property
    def next_response(self) -> CallBound:
        input_tokens = self._context_tokens + self._heard_tokens + self._written_tokens
        return CallBound(input_tokens, self._next_limit, may_hold_audio=True, units=1)

    def _ended(self, message: Document) -> None:
        if (usage := message.get("usage")) is not None:  # xAI's is outside the response
            message = {**message, "response.usage": usage}
            seconds = _voice(usage, self.ignored_fields).billable_audio_seconds
            if seconds is not None and len(self._voice_s) < MAX_PARTS:
                named = text_of(message.get("response.id")) or str(len(self._voice_s))
                self._voice_s[named] = seconds
        super()._ended(message)

    def _add(self, part: Part) -> None:
        self._context_tokens = part.usage.tokens or self._context_tokens
        self._heard_from, self._written_tokens = self.opened.client.bytes, 0
        self.add(self._bookable(part), part.object_id)

    def _bookable(self, part: Part) -> Part:
        return part if self._attached else part._replace(object_id="")

    def _estimate(self, named: str, left: Open) -> Part:
        if not (self._speaks and self._output_bytes_a_s):
            return self._bookable(super()._estimate(named, left))
        audio_bytes = of_base64(left.output_bytes)
        made = audio_bytes * _OUTPUT_AUDIO_TOKENS_A_SECOND // self._output_bytes_a_s
        usage = Usage(left.input_tokens, made, output_audio_tokens=made, estimated=True)
        return self._bookable(Part(left.model, usage, object_id=named))

    @property
    def parts(self) -> Parts:
        parts, reported = super().parts, list(self._voice_s.values())
        if not reported:
            return parts
        grew = reported == sorted(reported)
        usage = Usage(
            audio_ms=round((reported[-1] if grew else sum(reported)) * 1000),
            estimated=len(reported) > 1,
            incomplete=self._wrote,
        )
        return (*(part._replace(billed=Usage()) for part in parts), Part(self.model, usage))


def _higher(one: int | None, other: int | None) -> int | None:
    """Return the higher of two maxima; None is no maximum."""
    return None if one is None or other is None else max(one, other)


def _transcriber(message: Document) -> str | None:
    return next((model for place in _TRANSCRIBERS if (model := text_of(message.get(place)))), None)


_CREATES = frozenset({"response.create", None})
_UPDATES = frozenset({"session.update", None})
_TEXTUAL = _CREATES | _UPDATES | {"conversation.item.create"}
"""Types of messages that belong to the input of a response. None: the type is unreadable."""
_AUDIO = re.compile(rb'(?<="audio":)\s*"[A-Za-z0-9+/=]{1024,}+"')
"""Audio in an item of the conversation, which _heard_tokens counts."""
_ORDERS = r'"(?:conversation\.item\.create|session\.update|response\.create)"'
_TRANSCRIBED = "conversation.item.input_audio_transcription.completed"
_TRANSCRIBER = "input-transcription"
"""Replaces the name of an unknown transcription model. It has no price."""


def _audio(message: Document, side: str) -> int | None:
    """Return the bytes per second of one side's audio, by the formats in a session object."""
    format_ = f"session.audio.{side}.format"
    named = message.get(f"{format_}.type") or message.get(f"session.{side}_audio_format")
    if (encoding := text_of(named)) is None:
        return None
    rate_hz = (message.get(f"{format_}.rate") or b"").decode("ascii", "replace")
    if not rate_hz and encoding in ("pcm16", "audio/pcm"):
        rate_hz = _PCM_HZ
    return bytes_a_second(encoding, rate_hz)


_PCM_HZ = "24000"
"""The rate of PCM in a session object without one."""
