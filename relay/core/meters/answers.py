"""Meters of REST answers: each sees the chunks as they pass, and tells what the call used.

Owns: which meter reads which answer. Where a provider says nothing, characters of the request are
counted, or tokens are estimated from what passed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from relay.core.exchange import Exchange
from relay.core.fields import field, text, value
from relay.core.meters import formats
from relay.core.meters.scan import Needle, Scan, unpacker
from relay.core.numbers import decimal_number, whole_number
from relay.core.usage import BYTES_A_TOKEN, Parts, Usage

_USAGE, _METADATA = Needle("usage"), Needle("usageMetadata")
_MODEL = re.compile(rb'"model(?:Version)?"\s*:\s*"([^"\\]{1,200})"')
_MODEL_WITHIN_BYTES = 64 * 1024
_MOST_SECONDS, _MOST_UNITS = 10**7, 10**9
"""What says more is no measure of one call."""
_OF_TOKENS = frozenset({"chat", "completion", "responses", "messages", "generate"})
"""Kinds whose usage is estimated where it is not told."""
_TEXTS = {"openai": "input", "elevenlabs": "text", "cartesia": "transcript", "deepgram": "text"}
"""The field of a request whose characters are spoken."""

_SECONDS = rb'"%b"\s*:\s*(\d{1,9}(?:\.\d{1,30})?)(?=[^\d.])'

Header = Callable[[str], str | None]


class Sent(msgspec.Struct, frozen=True):
    """The call, as far as meters look at it."""

    kind: str
    body: bytes
    body_bytes: int

    @classmethod
    def of(cls, exchange: Exchange) -> Sent:
        """What an exchange sent."""
        return cls(exchange.kind, exchange.spoken, exchange.request_bytes)


class _Metered(Protocol):
    """What an answer came to: it is of one model."""

    @property
    def model(self) -> str | None:
        """The one that answered, if the answer names it."""

    @property
    def usage(self) -> Usage | None:
        """None if nothing is known."""


class _OneModel:
    """An answer is of one model: its usage by model has one part."""

    __slots__ = ()

    @property
    def parts(self: _Metered) -> Parts:
        """The usage, by model."""
        usage = self.usage
        return ((self.model, usage),) if usage is not None else ()


class AnswerMeter(_OneModel):
    """`feed` sees each chunk; `usage` is what it came to, None if nothing is known."""

    __slots__ = (
        "_at", "_end", "_estimates", "_held", "_scan", "_sent", "_unpack", "events", "model",
        "told",
    )  # fmt: skip

    def __init__(self, sent: Sent, needle: Needle, content_encoding: str) -> None:
        self._sent = sent
        self._scan = Scan(needle)
        self._unpack = unpacker(content_encoding) if content_encoding else None
        self._at = 0
        self._held = b""
        self._estimates = sent.kind in _OF_TOKENS
        self._end = b"\n"
        self.events = 0
        """Server-sent events that passed."""
        self.model: str | None = None
        """The one that answered, if the answer names it."""
        self.told: Usage | None = None

    def feed(self, chunk: bytes) -> None:
        """Look at one chunk."""
        if self._unpack is not None:
            chunk = self._unpack.feed(chunk)
        if found_objects := self._scan.feed(chunk):
            self.read(found_objects)
        if self.model is None and self._at < _MODEL_WITHIN_BYTES:
            self._look_for_model(chunk)
        self._at += len(chunk)
        if self._estimates and self.told is None:
            self.events += (self._end + chunk).count(b"\ndata:")
            self._end = chunk[-5:] if len(chunk) >= 5 else (self._end + chunk)[-5:]

    def read(self, found: Sequence[bytes]) -> None:
        """Take what objects tell: the last one holds."""
        told = formats.openai(found[-1])
        if told is not None:
            self._hear(told)

    def _hear(self, told: Usage) -> None:
        if self._sent.kind == "image" and not told.output_image_tokens:
            # What images are made of, where the answer has no details.
            told = msgspec.structs.replace(told, output_image_tokens=told.output_tokens)
        self.told = told

    @property
    def usage(self) -> Usage | None:
        """As told, or as estimated."""
        return self.told or self._estimated()

    def _look_for_model(self, chunk: bytes) -> None:
        if not self._held and b'"model' not in chunk and chunk.endswith(b"\n"):
            return
        passed = self._held + chunk if self._held else chunk
        found = _MODEL.search(passed)
        if found is not None:
            self.model, self._held = found[1].decode("utf-8", "replace"), b""
        else:
            self._held = passed[-256:]

    def _estimated(self) -> Usage | None:
        if self._sent.kind == "image" and self._at:
            asked = value(field(self._sent.body, "n"))
            return Usage(images=asked if type(asked) is int and asked > 0 else 1, estimated=True)
        if not self._estimates or not self._at:
            return None
        # An event is about a token; of what is no stream, four bytes are.
        output = self.events or self._at // BYTES_A_TOKEN
        return Usage(self._sent.body_bytes // BYTES_A_TOKEN, output, estimated=True)


class Anthropic(AnswerMeter):
    """The start tells the input, later events overwrite what they name; nothing is added up."""

    __slots__ = ("_said",)

    def __init__(self, sent: Sent, needle: Needle, content_encoding: str) -> None:
        super().__init__(sent, needle, content_encoding)
        self._said: dict[str, Any] = {}

    def read(self, found: Sequence[bytes]) -> None:
        """See AnswerMeter."""
        for each in found:
            said = formats.fields(each)
            self._said |= {k: v for k in formats.ANTHROPIC if (v := said.get(k)) is not None}
        self.told = formats.anthropic(self._said)


class Google(AnswerMeter):
    """Every chunk tells the whole so far: the last one holds."""

    __slots__ = ()

    def read(self, found: Sequence[bytes]) -> None:
        """See AnswerMeter."""
        self.told = formats.google(found[-1]) or self.told


class Seconds(_OneModel):
    """Seconds of audio that stand in the answer: the last number holds."""

    __slots__ = ("_held", "_needle", "_unpack", "_value_ms", "model")

    def __init__(self, key: str, content_encoding: str) -> None:
        self._needle = re.compile(_SECONDS % key.encode())
        self._held = b""
        self._unpack = unpacker(content_encoding)
        self._value_ms: int | None = None
        self.model: str | None = None

    def feed(self, chunk: bytes) -> None:
        """Look at one chunk."""
        passed = self._held + (chunk if self._unpack is None else self._unpack.feed(chunk))
        for told in reversed(self._needle.findall(passed)):
            seconds = decimal_number(told.decode(), 0, _MOST_SECONDS)
            if seconds is not None:
                self._value_ms = round(seconds * 1000)
                break
        self._held = passed[-64:]

    @property
    def usage(self) -> Usage | None:
        """None if it was not there."""
        return None if self._value_ms is None else Usage(audio_ms=self._value_ms)


class Known(_OneModel):
    """What is known already: nothing more is looked at."""

    __slots__ = ("model", "usage")

    def __init__(self, usage: Usage, model: str | None = None) -> None:
        self.usage: Usage | None = usage
        self.model = model

    def feed(self, chunk: bytes) -> None:
        """Nothing to see."""


Meter = AnswerMeter | Seconds | Known


def read_whole(meter: str, sent: Sent, header: Header, answer: bytes) -> Meter | None:
    """What has read an answer that is all here, as `answer_meter` and `feed` do."""
    if meter == "openai" and answer[:1] == b"{" and sent.kind not in ("speech", "image"):
        if (found := formats.openai_answer(answer)) is not None:
            return Known(*found)
    made = answer_meter(meter, sent, header)
    if made is not None:
        made.feed(answer)
    return made


def answer_meter(meter: str, sent: Sent, header: Header) -> Meter | None:
    """What reads the answer of a call to a provider that speaks `meter`; None if nothing does."""
    coding = header("Content-Encoding") or ""
    if meter == "openai" and sent.kind != "speech":
        return AnswerMeter(sent, _USAGE, coding)
    if meter == "fal":
        return _units(header("x-fal-billable-units"))
    if sent.kind == "speech" and meter in _TEXTS:
        return _spoken(meter, sent, header, coding)
    if meter == "deepgram":
        return Seconds("duration", coding)
    if meter == "assemblyai":
        return Seconds("audio_duration", coding)
    if meter == "cartesia" and sent.kind == "transcription":
        return Seconds("duration", coding)
    if meter == "anthropic":
        return Anthropic(sent, _USAGE, coding)
    if meter == "google":
        return Google(sent, _METADATA, coding)
    return None


def _units(given: str | None) -> Known | None:
    units = decimal_number(given or "", 0, _MOST_UNITS)
    return None if units is None else Known(Usage(units_milli=round(units * 1000)))


def _spoken(meter: str, sent: Sent, header: Header, coding: str) -> Meter | None:
    """Speech is billed by characters; ElevenLabs says how many it billed."""
    characters = whole_number(header("character-cost") or "", 0, _MOST_UNITS)
    if characters is not None:
        return Known(Usage(characters=characters))
    spoken = text(field(sent.body, _TEXTS[meter]))
    if spoken is None:
        return AnswerMeter(sent, _USAGE, coding) if meter == "openai" else None
    return Known(Usage(characters=len(spoken)))
