"""Request the usage of a stream on behalf of its client, and remove the event that reports it.

Owns both changes: `stream_options.include_usage` in the body of a chat or text completion, and the
one event of the response that it causes. No other byte changes, and the result does not depend on
the chunk boundaries of the response.
"""

from __future__ import annotations

import re

import msgspec

from relay.core.fields import (
    ABSENT,
    STRING,
    UNREADABLE,
    Span,
    has_unicode_escapes,
    occurrences,
    spans,
    value,
)
from relay.core.meters.events import data_of, first_end, last_end

MAX_EVENT_BYTES = 16 * 1024
"""A longer event has more than usage: it is neither buffered nor removed."""
_MAX_REFUSALS = 1000
_MAX_NAME = 200

_INCLUDE = b'"include_usage":true'
_OPTIONS = b'{"include_usage":true}'
_STREAM_MARK = re.compile(rb'"stream')


def can_be_asked(endpoint: str, format_: str) -> bool:
    """True for the endpoints whose streams report their usage only on request."""
    return format_ == "openai" and (endpoint == "completions" or endpoint.endswith("/completions"))


def asking_for_usage(body: bytes) -> bytes | None:
    """Return a body that requests usage, for a JSON object in which `stream` is true (peek_body has
    read it). None if the body must stay unchanged, because it has `include_usage` or a repeated
    field.
    """
    if occurrences(_STREAM_MARK, body) == 1 and not has_unicode_escapes(body):
        # The body has `stream`, and no other name with this prefix, escaped or not.
        return _with(body, body.rfind(b"}"), b',"stream_options":' + _OPTIONS)
    fields = spans(body)
    if fields is None:
        return None
    stream = [each for each in fields if each.name == "stream"]
    options = [each for each in fields if each.name == "stream_options"]
    if len(stream) != 1 or body[stream[0].start : stream[0].end] != b"true" or len(options) > 1:
        return None
    if not options:
        return _with(body, body.rfind(b"}"), b',"stream_options":' + _OPTIONS)
    return _in_options(body, options[0])


def _in_options(body: bytes, options: Span) -> bytes | None:
    given = body[options.start : options.end]
    if given == b"null":
        return body[: options.start] + _OPTIONS + body[options.end :]
    fields = spans(given)
    if fields is None or any(each.name == "include_usage" for each in fields):
        return None
    return _with(body, options.start + given.rfind(b"}"), b"," + _INCLUDE if fields else _INCLUDE)


def _with(body: bytes, at: int, more: bytes) -> bytes:
    view = memoryview(body)
    return b"".join((view[:at], more, view[at:]))


_usage_object = re.compile(rb'"usage"\s*:\s*\{').search
_event_end = re.compile(rb"\n\r?\n|\r\r").search
"""Its match ends after the event. One search, because a chunk may have thousands of events."""
_WHOLE_EVENTS = (b"\n\n", b"\r\n\r\n")
_FLAT_MEMBER = STRING + rb"\s*:\s*(?:" + STRING + rb'|[^"\[\]{},\s]++)\s*,\s*'
_chooses = re.compile(
    rb"[\r\n]*data: ?\{\s*(?>" + _FLAT_MEMBER + rb')*+"choices"\s*:\s*\[\s*[^\]\s]'
).match


class _UsageEvent(msgspec.Struct):
    choices: msgspec.Raw = ABSENT
    usage: msgspec.Raw = ABSENT


_read_usage_event = msgspec.json.Decoder(_UsageEvent).decode


def _usage_event(text: bytes) -> tuple[int, int] | None:
    """Return the start and end of the first complete event with a usage object and no choices."""
    floor, found = 0, _usage_object(text)
    while found is not None:
        at = found.start()
        ended = _event_end(text, at, at + MAX_EVENT_BYTES)
        if ended is None:
            after = at + MAX_EVENT_BYTES  # in an event that is too long, or incomplete
        else:
            end = ended.end()
            start = last_end(text, max(floor, at - MAX_EVENT_BYTES), at)
            if _is_usage_event(text, start, end):
                event = text[start:end]
                return end - len(event.lstrip(b"\r\n")), end  # without blank lines before it
            floor = after = end
        found = _usage_object(text, after)
    return None


def _is_usage_event(text: bytes, start: int, end: int) -> bool:
    if text.find(b'"choices"', start, end) < 0 or not _may_be_usage_event(text, start, end):
        return False
    try:
        event = _read_usage_event(data_of(text[start:end]))
    except UNREADABLE:
        return False
    return value(event.choices) == [] and bytes(event.usage).startswith(b"{")


def _may_be_usage_event(text: bytes, start: int, end: int) -> bool:
    """False for an event that is too long, or has a choice in the part received so far."""
    return end - start <= MAX_EVENT_BYTES and _chooses(text, start, end) is None


def without_usage_event(events: bytes) -> bytes:
    """Return a complete stream without the usage event."""
    found = _usage_event(events)
    return events if found is None else events[: found[0]] + events[found[1] :]


class UsageEventRemover:
    """Removes the usage event from a stream in chunks.

    A chunk of complete events passes unchanged. The part of an incomplete event is buffered until
    it has a choice or exceeds MAX_EVENT_BYTES, and then passes before the event ends.
    """

    __slots__ = ("_done", "_held", "_open", "_passing")

    def __init__(self) -> None:
        self._done = False
        self._open = False
        """True in the middle of an event."""
        self._held = b""
        """The received part of an event that may be the usage event."""
        self._passing = b""
        """The last two bytes of an incomplete event that is not the usage event."""

    def passes(self, chunk: bytes) -> bool:
        """True for complete events without a usage object, as nearly all chunks are."""
        return not self._open and chunk.endswith(_WHOLE_EVENTS) and _usage_object(chunk) is None

    def feed(self, chunk: bytes) -> bytes:
        """Return the bytes to send now; empty while everything is buffered or removed."""
        if self._done:
            return chunk
        return self._go_on(chunk) if self._passing else self._begin(self._held + chunk)

    def rest(self) -> bytes:
        """Return the buffered bytes at the end of the stream."""
        held, self._held = self._held, b""
        return held

    def _begin(self, text: bytes) -> bytes:
        """Read text that starts at an event boundary."""
        self._held, self._open = b"", False
        found = _usage_event(text)
        if found is not None:
            self._done = True
            return text[: found[0]] + text[found[1] :]
        end = last_end(text)
        self._open = end < len(text)
        if self._open and _may_be_usage_event(text, end, len(text)):
            self._held = text[end:]
            return text[:end]
        if self._open:
            self._passing = text[-2:]
        return text

    def _go_on(self, chunk: bytes) -> bytes:
        """Pass the rest of an incomplete event."""
        text = self._passing + chunk
        end = first_end(text) - len(self._passing)
        if end <= 0:
            self._passing = text[-2:]
            return chunk
        self._passing = b""
        return chunk[:end] + self._begin(chunk[end:])


class UsageRefusals:
    """The models that refused `stream_options`, in a bounded set: the oldest are evicted."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], None] = {}

    def __contains__(self, model: tuple[str, str]) -> bool:
        return model in self._known

    def add(self, model: tuple[str, str]) -> None:
        """Add `(provider, model)`."""
        if len(self._known) >= _MAX_REFUSALS:
            del self._known[next(iter(self._known))]
        self._known[model] = None


def refusal_key(provider: str, model: str | None, endpoint: str) -> tuple[str, str]:
    """Return the key of a call; the endpoint replaces a model that the body omits (Azure)."""
    return provider, (model or endpoint)[:_MAX_NAME]
