"""Meter sessions of Gemini's Live API, whose messages are JSON in binary frames.

Owns the messages that report usage (each `usageMetadata` is that of one turn, and all are added),
and the estimate of an answer that the client did not receive to its end.
"""

from __future__ import annotations

import re

from relay.core import media
from relay.core.fields import STRING_TEXT, field
from relay.core.meters import google
from relay.core.meters.documents import Wanted
from relay.core.meters.socket_meter import (
    OpenedSession,
    Order,
    Payload,
    Readings,
    ResponseCounts,
    SocketMeter,
    compile_prefilter,
    has_escape,
    of_base64,
)
from relay.core.meters.tolerant_json import text_of
from relay.core.numbers import whole_number
from relay.core.usage import BYTES_PER_TOKEN, CallBound, Part, Parts, Usage

_reported = compile_prefilter('"(?:usageMetadata|webSearchQueries)"')
_reported_or_answer = compile_prefilter('"(?:usageMetadata|webSearchQueries|modelTurn)"')
_SEARCHED = b'"webSearchQueries"'
"""Searches are billed in addition to tokens."""
_SAMPLED = 8
_METADATA = Wanted("usageMetadata")
_OUTPUT_LIMITS = (
    "setup.generationConfig.maxOutputTokens", "setup.generation_config.max_output_tokens",
)  # fmt: skip
_LIMIT = re.compile(rb'"max(?:OutputTokens|_output_tokens)"')
"""Which of several limits Google takes is unknown."""
_SETUP = Wanted("setup.model", *_OUTPUT_LIMITS)
_MAX_TOKENS = 1 << 31
_ORDERS = r'"(?:text|client_?[cC]ontent|tool_?[rR]esponse|setup|system_?[iI]nstruction)"'
"""Messages that are no audio: a text that is answered, or that belongs to the context."""
_AUDIO = re.compile(rb'"data"\s*:\s*"([^"]*)"')
_TEXT = re.compile(rb'"text"\s*:\s*"(' + STRING_TEXT + rb')"')
_CONTENT = Wanted(
    "clientContent.turnComplete", "clientContent.turn_complete", "client_content.turnComplete",
    "client_content.turn_complete", "realtimeInput", "realtime_input", "toolResponse",
    "tool_response", "setup",
)  # fmt: skip
_ENDS_TURN = re.compile(rb"turn(?:_c|C)omplete")
_ESCAPED_LETTER = re.compile(rb"\\u00(?:[46][1-9a-fA-F]|[57][0-9aA]|5[fF])")
_TOKENS_A_SECOND = 25
_BYTES_A_SECOND_IN, _BYTES_A_SECOND_OUT = 32_000, 48_000
"""Bytes per second of 16-bit PCM at the sample rates of the Live API, which counts 25 tokens per
second."""


class GoogleLive(SocketMeter):
    """The meter of a session with Gemini's Live API."""

    __slots__ = (
        "_answer", "_context_tokens", "_heard_from", "_speaks", "_to_sample", "_turns",
        "_written_tokens",
    )  # fmt: skip

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened)
        self.sent_filter = compile_prefilter('"setup"' if opened.model is None else "")
        self.received_filter = _reported_or_answer
        self._answer = Payload(opened.provider)
        self._to_sample = _SAMPLED
        self._speaks = False
        self._context_tokens = self._heard_from = self._written_tokens = self._turns = 0
        self.order_filter = compile_prefilter(_ORDERS)

    def sent(self, data: bytes) -> None:
        """Read the model from the client's first message."""
        setups = Readings(data).of("setup")
        models = [text_of(bytes(field(setup, "model"))) for setup in setups]
        for model in filter(None, models):
            self.model = model.removeprefix("models/")
            self.requested_model = self.model
            self.sent_filter = None
            self._context_tokens = len(data) // BYTES_PER_TOKEN

    def order_of(self, data: bytes) -> Order | None:
        is_ordered = self.order_filter is not None and self.order_filter(data)
        if not is_ordered and not has_escape(data):
            return None  # audio, which _heard_tokens counts
        self._written_tokens += media.input_tokens(data, "google")
        setup = _SETUP.of(data)
        if setup and Readings(data).names == {"setup"}:
            limits = [setup[place] for place in _OUTPUT_LIMITS if place in setup]
            if limits and len(_LIMIT.findall(data)) == 1 and not has_escape(data):
                limit = limits[0].decode("ascii", "replace")
                self.output_limit = whole_number(limit, 1, _MAX_TOKENS)
            return None
        return None if _is_history(data) else Order(self.next_response, is_response=True)

    @property
    def next_response(self) -> CallBound:
        input_tokens = self._context_tokens + self._heard_tokens + self._written_tokens
        return CallBound(input_tokens, self.output_limit, may_hold_audio=True, units=1)

    @property
    def responses(self) -> ResponseCounts:
        return ResponseCounts(self._turns, 0)

    @property
    def _heard_tokens(self) -> int:
        """The tokens of the audio that the client sent since the last turn ended."""
        sent_bytes = of_base64(self.opened.client.bytes - self._heard_from)
        return sent_bytes * _TOKENS_A_SECOND // _BYTES_A_SECOND_IN

    def received(self, data: bytes) -> None:
        if _SEARCHED in data:
            self.add(Part(None, Usage(incomplete=True)), "searches")
        raw = _METADATA.of(data).get("usageMetadata")
        usage = google.usage_of(raw, self.ignored_fields) if raw is not None else None
        if usage is not None:
            self.add(Part(None, usage))
            self._context_tokens = usage.tokens
            self._heard_from, self._written_tokens = self.opened.client.bytes, 0
            self._turns += 1
            self._answer.begin()
        elif self._to_sample:
            self._sample(data)

    def _sample(self, data: bytes) -> None:
        audio = _AUDIO.search(data)
        found = audio or _TEXT.search(data)
        if found is not None:
            self._answer.sample(data, len(found[1]))
        self._speaks = audio is not None
        self._to_sample = 0 if self._speaks else self._to_sample - 1
        if not self._to_sample:
            self.received_filter = _reported

    @property
    def parts(self) -> Parts:
        made_bytes = self._answer.bytes
        if self._speaks:
            made = of_base64(made_bytes) * _TOKENS_A_SECOND // _BYTES_A_SECOND_OUT
        else:
            made = made_bytes // BYTES_PER_TOKEN
        if not made:
            return super().parts
        heard, spoken = self._heard_tokens, made if self._speaks else 0
        usage = Usage(
            self._context_tokens + heard, made, output_audio_tokens=spoken, estimated=True
        )
        return (*super().parts, Part(self.model, usage))


def _is_history(data: bytes) -> bool:
    """True for content that is not answered: more of the turn follows. It is input of the answer to
    the turn. False if the provider might read the message in another way.
    """
    is_plain = len(_ENDS_TURN.findall(data)) == 1 and _ESCAPED_LETTER.search(data) is None
    return is_plain and list(_CONTENT.of(data).values()) == [b"false"]
