"""Meter WebSockets of OpenAI and xAI that return responses: the base of Responses and Realtime, and
Responses.

Owns the messages that report usage, the response and model of each, and the estimate of a response
that did not end. openai.py reads a usage object; openai_realtime.py has Realtime.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from relay.core import media
from relay.core.meters import openai
from relay.core.meters.documents import Document, Wanted
from relay.core.meters.sent_call import SentCall
from relay.core.meters.socket_meter import (
    OpenedSession,
    Order,
    Payload,
    Readings,
    ResponseCounts,
    SocketMeter,
    compile_prefilter,
    has_escape,
)
from relay.core.meters.tolerant_json import IgnoredFields, text_of
from relay.core.numbers import whole_number
from relay.core.usage import BYTES_PER_TOKEN, Booking, CallBound, Part, Parts, Usage

_PIECES = tuple(
    f'{{"type":{space}"response.{name}.delta"'.encode()
    for space in ("", " ")
    for name in (
        "output_audio",
        "audio",
        "output_audio_transcript",
        "audio_transcript",
        "output_text",
        "text",
        "function_call_arguments",
    )
)
"""The beginnings of deltas, in the JSON of OpenAI and of Python. Deltas with another beginning are
searched like other messages."""

_RELEVANT = (
    r'"(?:usage"|error"|(?:transcription_)?session\.(?:created|started|updated|closed)"'
    r'|response\.[a-z_.]*+"'
)
_without_deltas = compile_prefilter(_RELEVANT + r'(?<!\.delta"))')
_with_deltas = compile_prefilter(_RELEVANT + ")")
"""Used while the size of a delta's payload is to be sampled."""

_MESSAGE = Wanted(
    "type", "usage", "delta", "session.model", "session.audio.input.transcription.model",
    "session.input_audio_transcription.model", "session.audio.input.format.type",
    "session.audio.input.format.rate", "session.input_audio_format",
    "session.audio.output.format.type", "session.audio.output.format.rate",
    "session.output_audio_format", "session.max_output_tokens",
    "session.max_response_output_tokens",
    "response.id", "response.model", "response.status", "response.service_tier", "response.usage",
    "response.tool_usage", "response.store", "error.code", "error.param",
)  # fmt: skip
_CREATE = Wanted(
    "model", "response.model", "max_output_tokens",
    "response.max_output_tokens", "response.max_response_output_tokens",
)  # fmt: skip
_ACTIVE = "conversation_already_has_active_response"
ENDS = frozenset({"response.done", "response.completed", "response.incomplete", "response.failed"})
_AUDIO_DELTAS = frozenset({"response.output_audio.delta", "response.audio.delta"})
_SENT = SentCall("responses", endpoint="responses")
_MAX_OPEN = 64
"""The number of responses whose usage is estimated if they do not end."""


class Open:
    """A response that was requested or created, and has not ended."""

    __slots__ = ("input_tokens", "model", "output_bytes")

    def __init__(self, model: str | None, input_tokens: int) -> None:
        self.model, self.input_tokens = model, input_tokens
        self.output_bytes = 0


class ResponseMeter(SocketMeter):
    """Each response reports its usage at its end. The usage of one without an end is estimated by
    its deltas.
    """

    booking: Booking = "once"
    sampled_deltas = 1
    __slots__ = (
        "_begun", "_deltas", "_further", "_open", "_refused", "_speaks", "_to_sample",
    )  # fmt: skip

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened)
        self.received_filter = _without_deltas
        self.pieces = _PIECES
        self._open: dict[str, Open] = {}
        self._deltas = Payload(opened.provider)
        self._to_sample = 0
        self._speaks = False
        self._begun = self._refused = 0
        self._further = 0
        """The number of responses that run and are not in `_open`."""

    @property
    def responses(self) -> ResponseCounts:
        return ResponseCounts(self._begun, len(self._open) + self._further, self._refused)

    def received(self, data: bytes) -> None:
        message = _MESSAGE.of(data)
        kind = text_of(message.get("type")) or ""
        if kind.endswith(".delta"):
            self._sample(kind, data, message)
            return
        self._deltas.leave_out(data)
        if kind == "response.created":
            self._began(message)
        elif kind in ENDS:
            self._ended(message)
        elif kind == "error":
            self._failed(message)
        else:
            self._reported(kind, message, data)

    def _reported(self, kind: str, message: Document, data: bytes) -> None:
        """Read a message that neither begins nor ends a response."""

    def _failed(self, message: Document) -> None:
        """Count an error as the end of an order only if it can be of nothing else: a client that
        brings about errors would get the money of orders back that the provider executes.
        """
        self._refused += self._is_of_order(message)

    def _is_of_order(self, message: Document) -> bool:
        code, param = text_of(message.get("error.code")), text_of(message.get("error.param"))
        return code == _ACTIVE or (param or "").startswith("response.")

    def _sample(self, kind: str, data: bytes, message: Document) -> None:
        self._to_sample -= 1
        if (delta := message.get("delta")) is not None and delta.startswith(b'"'):
            self._deltas.sample(data, len(delta) - 2)
        self._speaks = kind in _AUDIO_DELTAS
        if self._to_sample <= 0 or self._speaks:
            self.received_filter = _without_deltas

    def _began(self, message: Document) -> None:
        self._share()
        self._begun += 1
        named = text_of(message.get("response.id")) or ""
        if len(self._open) < _MAX_OPEN and named not in self._open:
            self._open[named] = self._opening(text_of(message.get("response.model")))
        elif not named or named not in self._open:
            self._further += 1
        self._to_sample, self.received_filter = self.sampled_deltas, _with_deltas

    def _opening(self, model: str | None) -> Open:
        """Return a new response with its input."""
        return Open(model, 0)

    def _ended(self, message: Document) -> None:
        self._share()
        named = text_of(message.get("response.id")) or ""
        left = self._open.pop(named, None)
        if left is None and self._further:
            self._further -= 1
        elif left is None:
            self._begun += 1
        parts = parts_of(message, self.ignored_fields)
        if (
            not parts
            and text_of(message.get("response.status")) == "completed"
            and left is not None
        ):
            parts = (self._estimate(named, left),)
        for part in parts:
            self._add(part)

    def _add(self, part: Part) -> None:
        """Add the usage of a response."""
        booked = part._replace(booking=self.booking)
        self.add(booked, f"{part.object_id} {part.model}" if part.object_id else "")

    def _share(self) -> None:
        """Divide the bytes streamed since the last call equally among the open responses."""
        streamed = self._deltas.bytes
        self._deltas.begin()
        for each in self._open.values():
            each.output_bytes += streamed // len(self._open)

    def _estimate(self, named: str, left: Open) -> Part:
        usage = Usage(left.input_tokens, left.output_bytes // BYTES_PER_TOKEN, estimated=True)
        return Part(left.model, usage, object_id=named)

    @property
    def parts(self) -> Parts:
        self._share()
        cut = (self._estimate(*each)._replace(booking=self.booking) for each in self._open.items())
        left = (part if part.model else part._replace(model=self.model) for part in cut)
        return (*super().parts, *(part for part in left if part.usage.tokens))


def parts_of(message: Document, ignored_fields: IgnoredFields) -> Parts:
    """Return the usage of a response that ended, with its id; empty if it reports none."""
    reader = openai.OpenAI(_SENT, ignored_fields)
    reader.read(message)
    named = text_of(message.get("response.id")) or ""
    return tuple(part._replace(object_id=named) for part in reader.parts())


def model_of(message: Document) -> str | None:
    """Return the model that a `response.create` names."""
    return text_of(message.get("model")) or text_of(message.get("response.model"))


def output_limit(
    message: Document, data: bytes, otherwise: int | None, places: Sequence[str]
) -> int | None:
    """Return the limit of the output that a message sets in one of `places`: `otherwise` if it sets
    none, None if it sets no limit, or one that the provider might read in another way.
    """
    if _OUTPUT_LIMIT not in data and not has_escape(data):
        return otherwise
    limits = [message[place] for place in places if place in message]
    is_plain = len(limits) == 1 and data.count(_OUTPUT_LIMIT) == 1 and not has_escape(data)
    return max_tokens_of(limits[0]) if is_plain else None


def max_tokens_of(raw: bytes) -> int | None:
    """Return a limit of tokens; None for `inf` and anything else that is no number."""
    return whole_number(raw.decode("ascii", "replace"), 1, _MAX_TOKENS)


_OUTPUT_LIMIT = b"_output_tokens"
_MAX_TOKENS = 1 << 31
OUTPUT_LIMITS = (
    "max_output_tokens", "response.max_output_tokens", "response.max_response_output_tokens",
)  # fmt: skip


class Responses(ResponseMeter):
    """The meter of a Responses socket: many responses, of several models, some concurrent, which
    can be read again by their ids.
    """

    booking = "made"
    __slots__ = ("_creates", "_errors", "_last_tokens", "_requested", "_totals")

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened)
        self.sent_filter = self.order_filter = compile_prefilter(r'"response\.create"')
        self._last_tokens = self._creates = self._errors = 0
        self._requested: deque[Open] = deque(maxlen=_MAX_OPEN)
        self._totals: dict[str, int] = {}
        """Tokens of the last responses, which are input of a response that continues them."""

    def sent(self, data: bytes) -> None:
        if "response.create" not in (read := Readings(data)).types:
            return
        message = _CREATE.of(data)
        model = model_of(message)
        self.named(model)
        self._creates += 1
        self._requested.append(Open(model, self._input_tokens(read, data, 0)))

    def _input_tokens(self, read: Readings, data: bytes, unknown: int) -> int:
        """Return the input of a requested response. `unknown` is that of an earlier response which
        this session has not made.
        """
        before = read.texts("previous_response_id")
        contexts = [self._totals.get(named, unknown) for named in before if named is not None]
        return max(contexts, default=0) + media.input_tokens(data, "openai")

    def order_of(self, data: bytes) -> Order | None:
        if (read := Readings(data)).types.isdisjoint({None, "response.create"}):
            return None
        message = _CREATE.of(data)
        input_tokens = self._input_tokens(read, data, self._last_tokens)
        limit = output_limit(message, data, None, OUTPUT_LIMITS)
        bound = CallBound(input_tokens, limit, may_hold_audio=True, units=1)
        models = dict.fromkeys((*read.texts("model"), model_of(message)))
        return Order(bound, tuple(models), is_response=True)

    @property
    def next_response(self) -> CallBound:
        return CallBound(self._last_tokens, self.output_limit, may_hold_audio=True, units=1)

    def _began(self, message: Document) -> None:
        super()._began(message)
        named = text_of(message.get("response.id"))
        if self.made is not None and named and message.get("response.store") != b"false":
            self.made(named)

    def _is_of_order(self, message: Document) -> bool:
        # Each message that is no order may have brought about one of the errors.
        self._errors += 1
        is_of_order = self._errors > self.opened.client.messages - self._creates
        if is_of_order and self._requested:
            self._requested.popleft()
        return is_of_order

    def _opening(self, model: str | None) -> Open:
        opened = self._requested.popleft() if self._requested else Open(None, 0)
        opened.model = model or opened.model
        return opened

    def _add(self, part: Part) -> None:
        super()._add(part)
        self.model = part.model or self.model
        self._last_tokens = part.usage.tokens
        if part.object_id:
            if len(self._totals) >= _MAX_OPEN:
                self._totals.pop(next(iter(self._totals)))
            self._totals[part.object_id] = part.usage.tokens
