"""Ask a stream for its usage on its client's behalf, and take the event that tells it out again.

Owns both changes: `stream_options.include_usage` in the body of a chat or text completion, and the
one event of the response that it causes. No other byte of either changes, and the result does not
depend on how the response is cut.
"""

from __future__ import annotations

import re

import msgspec

from relay.core.fields import ABSENT, UNREADABLE, Span, spans, value
from relay.core.meters.events import data_of, first_end, last_end

MAX_EVENT_BYTES = 16 * 1024
"""A longer event does not tell usage alone: it is neither held nor removed."""
_MAX_REFUSALS = 1000
_MAX_NAME = 200

_INCLUDE = b'"include_usage":true'
_OPTIONS = b'{"include_usage":true}'


def can_be_asked(endpoint: str, format_: str) -> bool:
    """True for the endpoints whose streams tell their usage only if they are asked to."""
    return format_ == "openai" and (endpoint == "completions" or endpoint.endswith("/completions"))


def asking_for_usage(body: bytes) -> bytes | None:
    """A JSON object in which `stream` is true (peek_body has read it), made to ask for usage. None
    where it stays as it is: it says itself whether it wants usage, or names a field twice.
    """
    if body.count(b'"stream') == 1 and b"\\u" not in body:
        # There is `stream`, and no other name that begins so, escaped or not.
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
"""Behind its end; one search, for there may be thousands of events in a chunk."""
_WHOLE_EVENTS = (b"\n\n", b"\r\n\r\n")
_STRING = rb'"(?:[^"\\]|\\.)*+"'
_FLAT_MEMBER = _STRING + rb"\s*:\s*(?:" + _STRING + rb'|[^"\[\]{},\s]++)\s*,\s*'
_chooses = re.compile(
    rb"[\r\n]*data: ?\{\s*(?:" + _FLAT_MEMBER + rb')*+"choices"\s*:\s*\[\s*[^\]\s]'
).match


class _UsageEvent(msgspec.Struct):
    choices: msgspec.Raw = ABSENT
    usage: msgspec.Raw = ABSENT


_read_usage_event = msgspec.json.Decoder(_UsageEvent).decode


def _usage_event(text: bytes) -> tuple[int, int] | None:
    """Where the first whole event stands that has a usage object and no choices, if any."""
    floor, found = 0, _usage_object(text)
    while found is not None:
        at = found.start()
        ended = _event_end(text, at, at + MAX_EVENT_BYTES)
        if ended is None:
            after = at + MAX_EVENT_BYTES  # within an event that is too long, or not here yet
        else:
            end = ended.end()
            start = last_end(text, max(floor, at - MAX_EVENT_BYTES), at)
            if _is_usage_event(text, start, end):
                event = text[start:end]
                return end - len(event.lstrip(b"\r\n")), end  # no blank lines before it
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
    """False of an event that is too long, or has shown a choice."""
    return end - start <= MAX_EVENT_BYTES and _chooses(text, start, end) is None


def without_usage_event(events: bytes) -> bytes:
    """A whole stream without that event."""
    found = _usage_event(events)
    return events if found is None else events[: found[0]] + events[found[1] :]


class UsageEventRemover:
    """Takes that event out of a stream that comes in pieces: one event, and no other.

    A piece of whole events passes as it is. Of an event that is cut, what is here is held only
    until it shows a choice or is longer than MAX_EVENT_BYTES: then it passes before it ends.
    """

    __slots__ = ("_done", "_held", "_open", "_passing")

    def __init__(self) -> None:
        self._done = False
        self._open = False
        """In the middle of an event."""
        self._held = b""
        """What is here of one that may be it."""
        self._passing = b""
        """The last two bytes of one that passes."""

    def passes(self, chunk: bytes) -> bool:
        """True of whole events without a usage object: all that is done for nearly all chunks."""
        return not self._open and chunk.endswith(_WHOLE_EVENTS) and _usage_object(chunk) is None

    def feed(self, chunk: bytes) -> bytes:
        """What goes down now of any other; empty while all of it is held or removed."""
        if self._done:
            return chunk
        return self._go_on(chunk) if self._passing else self._begin(self._held + chunk)

    def rest(self) -> bytes:
        """What is held when the stream ends."""
        held, self._held = self._held, b""
        return held

    def _begin(self, text: bytes) -> bytes:
        """Text that begins with an event."""
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
        """Pass the rest of an event."""
        text = self._passing + chunk
        end = first_end(text) - len(self._passing)
        if end <= 0:
            self._passing = text[-2:]
            return chunk
        self._passing = b""
        return chunk[:end] + self._begin(chunk[end:])


class UsageRefusals:
    """Models of providers that refused `stream_options`; the oldest are forgotten."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], None] = {}

    def __contains__(self, model: tuple[str, str]) -> bool:
        return model in self._known

    def add(self, model: tuple[str, str]) -> None:
        """Remember `(provider, model)`."""
        if len(self._known) >= _MAX_REFUSALS:
            del self._known[next(iter(self._known))]
        self._known[model] = None


def refusal_key(provider: str, model: str | None, endpoint: str) -> tuple[str, str]:
    """The key of a call; an endpoint stands for a model that the body omits (Azure)."""
    return provider, (model or endpoint)[:_MAX_NAME]
