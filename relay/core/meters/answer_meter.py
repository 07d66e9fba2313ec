"""Meter REST responses: observe the chunks and report the usage of the call.

Owns the choice of the reader for a response, and which of the reported usage counts. Only JSON and
server-sent events are read.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from functools import lru_cache

import msgspec

from relay.core.formats import continues_object, counting_of, makes_objects
from relay.core.meters import google, speech
from relay.core.meters.anthropic import Anthropic
from relay.core.meters.cohere import Cohere
from relay.core.meters.documents import Document, Scanner
from relay.core.meters.estimates import (
    ESTIMATED,
    Header,
    estimate_parts,
    part_from_headers,
)
from relay.core.meters.events import Events
from relay.core.meters.format_reader import FormatReader, NoReader
from relay.core.meters.inner_errors import contains_error, is_empty, is_error
from relay.core.meters.openai import OpenAI, plain
from relay.core.meters.output_estimate import Output, OutputEstimator
from relay.core.meters.sent_call import SentCall
from relay.core.meters.tolerant_json import IgnoredFields
from relay.core.meters.unpack import coding_of, unpacker
from relay.core.usage import Booking, Part, Parts, Usage

_JSON = re.compile(r"[/+](?:x-)?(?:json|ndjson|jsonl|jsonlines|json-seq)\b", re.IGNORECASE)


_LAST_CHUNKS, _LAST_BYTES = 4, 128 * 1024
"""The end of a stream, which is searched for an error: usage and `[DONE]` may follow the error."""
_READERS: dict[str, Callable[[SentCall, IgnoredFields], FormatReader]] = {
    "openai": OpenAI,
    "anthropic": Anthropic,
    "google": google.Google,
    "cohere": Cohere,
    "deepgram": speech.Deepgram,
    "assemblyai": speech.AssemblyAI,
    "elevenlabs": speech.ElevenLabs,
    "cartesia": speech.Cartesia,
}


class AnswerMeter:
    """The meter of one response: `feed` observes each chunk, `parts` is the usage of the call."""

    __slots__ = (
        "_bytes", "_format", "_has_error", "_header", "_ignored_fields", "_kind", "_last", "_mark",
        "_output", "_push", "_reader", "_sent", "_source", "_tail", "_unpack",
    )  # fmt: skip

    def __init__(self, format_: str, sent: SentCall, header: Header) -> None:
        self._format, self._sent, self._header = format_, sent, header
        self._ignored_fields = IgnoredFields()
        self._reader = _READERS.get(format_, NoReader)(sent, self._ignored_fields)
        coding = header("Content-Encoding")
        self._unpack = unpacker(coding) if coding else None
        self._kind = _kind_of(header("Content-Type")) if format_ in _READERS else ""
        self._source: Events | Scanner | None = None
        """Made with the first chunk: a complete response mostly needs none."""
        self._bytes = 0
        self._has_error = False
        # Errors end a stream. Searching every chunk for one would double the work.
        self._last: deque[bytes] = deque(maxlen=_LAST_CHUNKS)
        self._push = self._last.append
        self._output: OutputEstimator | None = None
        if self._kind and sent.kind in ESTIMATED:
            self._output = OutputEstimator(self._reader, self._kind == "events")
        self._mark = self._reader.mark
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        """Observe one chunk."""
        if not self._bytes:
            self._open()
        self._bytes += len(chunk)
        if self._unpack is not None:
            chunk = self._unpack.feed(chunk)
        self._push(chunk)
        if self._output is not None:
            self._output.feed(chunk)
        if self._mark:
            self._search_mark(chunk)
        if self._source is not None:
            for document in self._source.feed(chunk):
                self._read(document)

    def feed_without_usage(self, chunk: bytes) -> None:
        """Observe a chunk of complete events that is known to have no usage."""
        source = self._source
        if (
            self._unpack is not None
            or not isinstance(source, Events)
            or not source.seeks_usage_alone
        ):
            self.feed(chunk)
            return
        self._bytes += len(chunk)
        self._push(chunk)
        if self._output is not None:
            self._output.feed(chunk)

    def _open(self) -> None:
        if self._kind:
            wanted, needle = self._reader.wanted, self._reader.needle
            self._source = Events(wanted, needle) if self._kind == "events" else Scanner(wanted)

    def read_whole(self, body: bytes) -> None:
        """Observe a complete response, as `feed` does."""
        if (
            self._unpack is None
            and body[:1] == b"{"
            and self._kind == "json"
            and (found := self._reader.wanted.of(body))
        ):
            self._bytes += len(body)
            if self._output is not None:
                self._output.feed(body)
            if self._mark:
                self._search_mark(body)
            self._read(found)
        else:
            self.feed(body)

    def _read(self, document: Document) -> None:
        reader = self._reader
        if is_error(document):
            self._has_error = True
        reader.read(document)
        if reader.model is not None and isinstance(self._source, Events):
            self._source.named()

    def _search_mark(self, chunk: bytes) -> None:
        """Search the chunks for the reader's mark, which is empty after it was found."""
        seen = self._tail + chunk
        if self._mark in seen:
            self._mark = self._tail = b""
        else:
            self._tail = seen[1 - len(self._mark) :]

    @property
    def model(self) -> str | None:
        """The model that answered, if the response names it."""
        return self._reader.model

    @property
    def object_id(self) -> str:
        """The id of the object that answered, such as a response; empty if none is known."""
        is_stored = self._sent.counting == "stored"
        return self._reader.object_id or (self._sent.named_id if is_stored else "")

    @property
    def ignored(self) -> int:
        """Number of unreadable fields that may have usage; plus 1 if the end was not read."""
        return self._ignored_fields.count + self._gave_up

    @property
    def has_error(self) -> bool:
        """True if the response is an error, ends with one, or is a stream without events."""
        if not self._sent.generates or not self._kind:
            return False
        if self._has_error or self._kind != "events" or self._is_unread:
            return self._has_error
        last, events = b"".join(self._last)[-_LAST_BYTES:], self._source
        if contains_error(last):
            return True
        if self._bytes <= _LAST_BYTES and len(self._last) < _LAST_CHUNKS:
            return is_empty(last)  # the whole response
        return isinstance(events, Events) and not events.began and is_empty(events.rest)

    @property
    def is_readable(self) -> bool:
        """True if the usage of a response can be read while it streams."""
        return bool(self._kind) and not self._is_unread

    @property
    def _is_unread(self) -> bool:
        """True if the response has an unknown coding, or was not read to the end."""
        packed = self._unpack is None and coding_of(self._header("Content-Encoding")) != ""
        return self._gave_up or packed

    @property
    def _gave_up(self) -> bool:
        """True if the response was not read to the end."""
        unread = self._unpack is not None and self._unpack.gave_up
        return unread or (self._source is not None and self._source.gave_up)

    @property
    def is_reported_later(self) -> bool:
        """True for a new object, such as a response in background, whose usage a later read of the
        object reports.
        """
        is_new = self._sent.counting == "new" and bool(self.object_id) and bool(self._bytes)
        return is_new and self._reported() is None

    @property
    def used_nothing(self) -> bool:
        """True for a stored object that has failed, and of which no usage is reported."""
        is_stored = self._sent.counting == "stored" and bool(self._bytes) and self.is_readable
        return is_stored and not self._reader.is_paid_job and self._reported() == ()

    @property
    def parts(self) -> Parts:
        """The reported usage, or a substitute; empty for usage that the response only repeats."""
        counting = self._sent.counting
        if counting == "nothing" or not self._bytes:
            return ()
        if (known := part_from_headers(self._format, self._sent, self._header)) is not None:
            return (known,)
        reported = self._reported()
        if reported is None:
            return ()  # a later read will report it
        if counting == "stored":
            if not reported and self._reader.is_paid_job:
                reported = (Part(self.model, Usage(incomplete=True)),)
            named = self._reader.object_id or self._sent.named_id
            return tuple(part._replace(object_id=named) for part in reported)
        named = self._reader.object_id if self._sent.makes_objects else ""
        if not reported:
            made = self._made if not self._is_unread else None
            has_made = made is not None and made.tokens and not made.is_guess
            if not has_made and self.has_error:
                return ()  # no output, and no report of the input
            reported = estimate_parts(self._format, self._sent, self.model, made)
        booking: Booking = "once" if continues_object(self._sent.endpoint) or not named else "made"
        return tuple(part._replace(object_id=named, booking=booking) for part in reported)

    def _reported(self) -> Parts | None:
        """The usage that the response reports; None if the response says that it will follow."""
        reader = self._reader
        reported = tuple(reader.parts())
        if not reader.is_final:
            # A truncated stream will report no more, unless its object continues in background.
            breaks_off = self._kind == "events" and not reader.in_background
            if self._sent.counting == "stored" or not breaks_off:
                return None
        lacks_output = reader.lacks_output
        if reported and (lacks_output or (reader.reports_input_first and _is_input(reported[0]))):
            reported = (self._with_output(reported[0]), *reported[1:])
        unread = self._gave_up or (bool(reader.mark) and not self._mark)
        if unread or self._ignored_fields.count:
            reported = tuple(
                _changed(part, incomplete=True) if unread or _is_half(part.usage) else part
                for part in reported
            )
        if self._format == "google" and (tier := google.tier(self._header(google.TIER_HEADER))):
            reported = tuple(
                _changed(p, service_tier=p.usage.service_tier or tier) for p in reported
            )
        return reported

    @property
    def _made(self) -> Output | None:
        """The estimated output; None for a call whose output is not estimated."""
        return self._output.output if self._output is not None else None

    def _with_output(self, part: Part) -> Part:
        """Add an estimate of the output to a part that has none."""
        made = self._made or Output()
        if not self._reader.lacks_output and (made.is_guess or not made.tokens):
            return part  # a whole response without output
        return _changed(
            part,
            output_tokens=made.tokens,
            output_audio_tokens=made.audio_tokens,
            output_image_tokens=made.image_tokens,
            estimated=True,
        )


def _is_input(part: Part) -> bool:
    """True for tokens of the input alone."""
    return bool(part.usage.input_tokens) and not part.usage.output_tokens


def _is_half(usage: Usage) -> bool:
    """True if either input or output is missing, which an unreadable field may have reported."""
    return bool(usage.input_tokens) != bool(usage.output_tokens)


def _changed(part: Part, **fields: object) -> Part:
    return part._replace(usage=msgspec.structs.replace(part.usage, **fields))


@lru_cache(64)
def _kind_of(content_type: str | None) -> str:
    """Return `events` or `json`; empty for types that have no documents to read."""
    kind = (content_type or "application/json").partition(";")[0].strip()
    if kind.lower() == "text/event-stream":
        return "events"
    return "json" if _JSON.search(kind) else ""


def answer_meter(format_: str, sent: SentCall, header: Header) -> AnswerMeter | None:
    """Return the meter of a call's response; None if there is nothing to read."""
    is_read = sent.counting != "nothing" or sent.generates
    return AnswerMeter(format_, sent, header) if is_read else None


def read_whole(
    format_: str, sent: SentCall, header: Header, answer: bytes
) -> AnswerMeter | Plain | None:
    """Read a complete response and return its meter; None if there is nothing to read."""
    if (
        format_ == "openai"
        and _is_plain(sent.kind, sent.method, sent.endpoint)
        and not header("Content-Encoding")
        and _kind_of(header("Content-Type")) == "json"
        and (part := plain(answer)) is not None
    ):
        return Plain(part)
    made = answer_meter(format_, sent, header)
    if made is not None:
        made.read_whole(answer)
    return made


@lru_cache(1024)
def _is_plain(kind: str, method: str, endpoint: str) -> bool:
    """True for calls whose responses mostly have only a model and new usage."""
    known = kind in ("chat", "completion", "embeddings", "other")
    return known and counting_of(method, endpoint) == "new" and not makes_objects(endpoint)


class Plain:
    """The meter of a response that needed no reader (openai.plain)."""

    __slots__ = ("model", "parts")
    ignored = 0
    has_error = False

    def __init__(self, part: Part) -> None:
        self.model, self.parts = part.model, (part,)
