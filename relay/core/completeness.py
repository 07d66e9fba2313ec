"""Decide whether a response is complete, by the wire format of its path. Only complete responses
are cached.

Owns how each format ends a response of each kind, and which documents inside a 200 are errors.
Which responses are cacheable is decided in caching.py. Time is bounded: documents are decoded field
by field in C, compressed responses are decompressed up to a limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from relay.core.fields import (
    ABSENT,
    BYTE_ORDER_MARK,
    MAX_FIELD_BYTES,
    UNREADABLE,
    field,
    is_readable,
    is_value,
    value,
)
from relay.core.meters.events import DONE, data_of, split_events
from relay.core.meters.unpack import coding_of, unpack

READ_AT_ONCE_BYTES = 512 * 1024
"""Size of a stream of documents, or of a compressed response, that is read in some milliseconds."""
MAX_READ_BYTES = 32 * 1024 * 1024
"""Larger responses are not read, even in a thread."""
_BYTES_A_PART = 32
"""If documents or lines are shorter than this on average, their number determines the time."""


class Response(NamedTuple):
    """A response with status 200, as the client got it."""

    format: str
    """The wire format of the path (formats.py)."""
    kind: str
    """The kind of the call (peek.kind_of)."""
    content_type: str
    content_encoding: str
    body: bytes


def is_complete(response: Response, max_bytes: int) -> bool | None:
    """True if the response is complete and no error; None if reading it takes decompressing, or
    decoding, more than `max_bytes`.
    """
    body: bytes = response.body
    if coding := coding_of(response.content_encoding):
        unpacked = unpack(body, coding, max_bytes)
        if unpacked is None:
            return False
        body, whole = unpacked
        if not whole:
            return None if len(body) >= max_bytes else False
    media, allowed = _media(response.content_type), _MEDIA_OF_KIND.get(response.kind, _ALL_MEDIA)
    if media == "text" and allowed is _DOCUMENTS:
        media = "json"  # some providers send JSON as text
    if not body or media not in allowed:
        return False
    if media == "json":
        return _read_json(body, response, max_bytes)
    if media == "events":
        return None if _is_long(body, b"\n", max_bytes) else _read_events(body, response)
    return _is_media(body) if media in ("audio", "image") else _read_text(body)


def _is_long(body: bytes, mark: bytes, max_bytes: int) -> bool:
    return len(body) > max_bytes or body.count(mark) > max_bytes // _BYTES_A_PART


Media = Literal["events", "json", "audio", "image", "text"]
_ALL_MEDIA: frozenset[Media] = frozenset({"events", "json", "audio", "image", "text"})
_DOCUMENTS: frozenset[Media] = frozenset({"events", "json"})
_MEDIA_OF_KIND: dict[str, frozenset[Media]] = {
    "chat": _DOCUMENTS, "completion": _DOCUMENTS, "responses": _DOCUMENTS, "messages": _DOCUMENTS,
    "generate": _DOCUMENTS, "interactions": _DOCUMENTS, "count_tokens": _DOCUMENTS,
    "embeddings": _DOCUMENTS, "rerank": _DOCUMENTS, "models": _DOCUMENTS,
    "speech": _DOCUMENTS | {"audio"}, "image": _DOCUMENTS | {"image"},
}  # fmt: skip
"""Media types of the responses to a kind of call. Any other comes from a proxy or a captive portal
on the way."""


def _media(content_type: str) -> Media:
    name = content_type.partition(";")[0].strip().lower()
    if name == "text/event-stream":
        return "events"
    if "json" in name:
        return "json"
    if name.startswith("audio/"):
        return "audio"
    return "image" if name.startswith("image/") else "text"


class _Document(msgspec.Struct):
    """The fields that show whether a document is the last one, or an error."""

    type: msgspec.Raw = ABSENT
    event_type: msgspec.Raw = ABSENT
    object: msgspec.Raw = ABSENT
    status: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT
    success: msgspec.Raw = ABSENT
    done: msgspec.Raw = ABSENT
    choices: msgspec.Raw = ABSENT
    candidates: msgspec.Raw = ABSENT
    stop_reason: msgspec.Raw = ABSENT
    finish_reason: msgspec.Raw = ABSENT
    delta: msgspec.Raw = ABSENT
    usage: msgspec.Raw = ABSENT


class _Choice(msgspec.Struct):
    """A choice in OpenAI's format, or a candidate in Gemini's."""

    index: int = 0
    finish_reason: str | None = None
    finishReason: str | None = None


_document = msgspec.json.Decoder(_Document).decode
_documents = msgspec.json.Decoder(list[_Document]).decode
_choices = msgspec.json.Decoder(list[_Choice]).decode

_ERROR_TYPES = frozenset(
    {"error", "response.failed", "response.incomplete", "response.error", "interaction.failed"}
)
_ERROR_STATUSES = frozenset({"failed", "incomplete", "cancelled", "error"})
_UNFINISHED_STATUSES = frozenset(
    {
        "in_progress", "queued", "in_queue", "pending", "processing", "running", "starting",
        "validating", "finalizing", "cancelling",
    }
)  # fmt: skip
"""Statuses of a job that still runs: its next read returns something else."""
_ERROR_REASONS = frozenset(
    {
        "error", "error_limit", "error_toxic", "insufficient_system_resource",
        "finish_reason_unspecified",
    }
)  # fmt: skip
"""Finish reasons, in lower case, that mean that the response is incomplete."""
_NULL = b"null"


class _Seen:
    """The state of a response after the documents read so far."""

    __slots__ = (
        "choices", "closed", "documents", "done", "failed", "object", "reason", "status", "types",
        "usage_is_last",
    )  # fmt: skip

    def __init__(self) -> None:
        self.documents = 0
        self.failed = False
        self.closed = False
        """True after OpenAI's `[DONE]`."""
        self.types: set[str] = set()
        self.object = self.status = ""
        self.choices: dict[int, bool] = {}
        """Index of each choice, or candidate, to whether it is finished."""
        self.usage_is_last = False
        """True if usage came with the last finish reason, or after it."""
        self.reason: bool | None = None
        """True if a document has a finish reason at its top; None if none has such a field."""
        self.done: bool | None = None
        """The `done` of the last document that has one."""

    def count_plain(self) -> None:
        """Count an event that only continues the first choice."""
        self.documents += 1
        self.choices.setdefault(0, False)

    def read(self, document: _Document) -> None:
        """Read one document."""
        self.documents += 1
        for raw in (document.type, document.event_type):
            if raw is not ABSENT and (name := _name(raw)):
                self.types.add(name)
                self.failed = self.failed or name in _ERROR_TYPES
        if document.object is not ABSENT:
            self.object = _name(document.object)
        if document.status is not ABSENT:
            self.status = _name(document.status).lower()
            self.failed = self.failed or self.status in _ERROR_STATUSES
        if _is_error(document.error) or _is(document.success, b"false"):
            self.failed = True
        if document.done is not ABSENT:
            self.done = _is(document.done, b"true")
        usage = document.usage is not ABSENT and not _is(document.usage, _NULL)
        self.usage_is_last = self.usage_is_last or usage
        for raw in (document.choices, document.candidates):
            if raw is not ABSENT and not _is(raw, _NULL) and self._read_choices(raw):
                self.usage_is_last = usage
        self._read_reason(document)

    def _read_choices(self, raw: msgspec.Raw) -> bool:
        """Read the choices of a document; True if it finishes one of them."""
        try:
            choices = _choices(raw)
        except UNREADABLE:
            self.failed = True
            return False
        finishes = False
        for choice in choices:
            reason = choice.finish_reason or choice.finishReason or ""
            self.failed = self.failed or reason.lower() in _ERROR_REASONS
            self.choices[choice.index] = self.choices.get(choice.index, False) or bool(reason)
            finishes = finishes or bool(reason)
        return finishes

    def _read_reason(self, document: _Document) -> None:
        reasons = [document.stop_reason, document.finish_reason]
        if document.delta is not ABSENT and "message-end" in self.types:  # Cohere's
            reasons.append(field(document.delta, "finish_reason"))
        for raw in reasons:
            if raw is not ABSENT:
                reason = _name(raw)
                self.reason = self.reason or bool(reason)
                self.failed = self.failed or reason.lower() in _ERROR_REASONS


def _is(raw: msgspec.Raw, text: bytes) -> bool:
    return raw is not ABSENT and memoryview(raw) == text


def _name(raw: msgspec.Raw) -> str:
    """Decode a string; anything else is empty."""
    found = value(raw)
    return found if isinstance(found, str) else ""


def _is_error(raw: msgspec.Raw) -> bool:
    return raw is not ABSENT and (memoryview(raw).nbytes > MAX_FIELD_BYTES or bool(value(raw)))


def _read_events(body: bytes, response: Response) -> bool:
    ends, is_plain = _STREAM_ENDS.get((response.format, response.kind), _UNKNOWN_STREAM)
    seen = _Seen()
    *events, rest = split_events(body)
    for event in events:
        if is_plain(event):
            seen.count_plain()
        elif event:
            _read_event(event, seen)
    # Without an empty line at its end it is no event, but some servers omit that of the last one.
    if rest.strip() and not _read_event(rest, seen):
        return False
    return not seen.failed and (seen.documents > 0 or seen.closed) and ends(seen)


_ERROR_EVENT = re.compile(rb"^event:[ \t]*error[ \t]*\r?$", re.MULTILINE)


def _read_event(event: bytes, seen: _Seen) -> bool:
    """Read one event; False if its data is neither a JSON document nor `[DONE]`."""
    if event.startswith(b"data: ") and b"\n" not in event:
        data = event[6:]
    else:
        if b"error" in event and _ERROR_EVENT.search(event) is not None:
            seen.failed = True
        data = data_of(event)
        if not data:
            return True
    try:
        seen.read(_document(data))
    except UNREADABLE:
        if data.strip() == DONE:
            seen.closed = True
            return True
        is_json = is_value(data)
        seen.documents += is_json
        return is_json
    return True


def _read_json(body: bytes, response: Response, max_bytes: int) -> bool | None:
    text = body.removeprefix(BYTE_ORDER_MARK)
    if not is_readable(text):
        return False
    seen, key = _Seen(), (response.format, response.kind)
    try:
        seen.read(_document(text))
    except msgspec.ValidationError:  # JSON, but no object
        if text.lstrip()[:1] != b"[":
            return key not in _WHOLE_ENDS and is_value(text)
        read, mark = _read_array, b"{"
    except UNREADABLE:
        read, mark = _read_lines, b"\n"
    else:
        is_over = not seen.failed and seen.status not in _UNFINISHED_STATUSES
        return is_over and _WHOLE_ENDS.get(key, _ends_as_it_began)(seen)
    if _is_long(text, mark, max_bytes):
        return None
    ends = _STREAM_ENDS.get(key, _UNKNOWN_STREAM).ends
    return read(text, seen) and not seen.failed and ends(seen)


def _read_array(text: bytes, seen: _Seen) -> bool:
    """Read the documents of an array, as Gemini streams them without `alt=sse`."""
    try:
        documents = _documents(text)
    except UNREADABLE:
        return is_value(text)  # an array of something else
    for document in documents:
        seen.read(document)
    return True


def _read_lines(text: bytes, seen: _Seen) -> bool:
    """Read lines with a document each, as some vendors stream them."""
    for line in text.split(b"\n"):
        if not line.strip():
            continue
        try:
            seen.read(_document(line))
        except UNREADABLE:
            return False
    return True


_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*+(?><!--[^>]{0,500}>\s*+)?+<(?:!doctype\s+html|html|head|body)\b",
    re.IGNORECASE,
)


def _is_media(body: bytes) -> bool:
    """False for an HTML page or a JSON object, which are errors. Audio and images end where HTTP
    framing says.
    """
    return _PAGE.match(body) is None and not (body.lstrip()[:1] == b"{" and is_value(body))


def _read_text(body: bytes) -> bool:
    if _PAGE.match(body) is not None:
        return False
    if body.lstrip()[:1] != b"{" or not is_readable(body):
        return True
    seen = _Seen()
    try:
        seen.read(_document(body))
    except UNREADABLE:
        return True
    return not seen.failed


Ends = Callable[[_Seen], bool]


def _all_finished(seen: _Seen) -> bool:
    return bool(seen.choices) and all(seen.choices.values())


def _chat_ends(seen: _Seen) -> bool:
    """`[DONE]` follows the finish reasons. Vendors that send no `[DONE]` send the usage last."""
    return _all_finished(seen) and (seen.closed or seen.usage_is_last)


def _by_type(*names: str) -> Ends:
    wanted = frozenset(names)
    return lambda seen: not wanted.isdisjoint(seen.types)


def _has_reason(seen: _Seen) -> bool:
    return seen.reason is True


def _is_done(seen: _Seen) -> bool:
    return seen.done is True or "done" in seen.types


def _response_ends(seen: _Seen) -> bool:
    return seen.status == "completed" or seen.object == "response.compaction"


def _interaction_ends(seen: _Seen) -> bool:
    return seen.status in ("completed", "requires_action")


def _ends_as_it_began(seen: _Seen) -> bool:
    """The end of a response of an unknown kind: its documents show which format they have."""
    if seen.choices:
        return _chat_ends(seen) if seen.documents > 1 else _all_finished(seen)
    if "message_start" in seen.types:
        return "message_stop" in seen.types
    if any(name.startswith("response.") for name in seen.types):
        return "response.completed" in seen.types
    return seen.reason is not False and seen.done is not False


class _Stream(NamedTuple):
    """How the streams of a format and kind end."""

    ends: Ends
    is_plain: Callable[[bytes], bool]
    """True for an event that has neither an end nor an error, found without decoding: most of
    thousands of events are such. A quoted name cannot occur in a text, where quotes are escaped.
    """


def _decode_all(_event: bytes) -> bool:
    return False


def _is_plain_chunk(event: bytes) -> bool:
    """True for a delta of choice 0 that does not finish it."""
    return (
        b'"finish_reason":null' in event
        and b'"index":0' in event
        and event.count(b'"index"') == 1
        and b'"error"' not in event
    )


def _is_plain_message(event: bytes) -> bool:
    return b"error" not in event and b"message_stop" not in event


def _is_plain_response(event: bytes) -> bool:
    return b'"response.' in event and b'_text.delta"' in event and b'"error"' not in event


_UNKNOWN_STREAM = _Stream(_ends_as_it_began, _decode_all)
_STREAM_ENDS: dict[tuple[str, str], _Stream] = {
    ("openai", "chat"): _Stream(_chat_ends, _is_plain_chunk),
    ("openai", "completion"): _Stream(_chat_ends, _is_plain_chunk),
    ("openai", "responses"): _Stream(_by_type("response.completed"), _is_plain_response),
    ("openai", "speech"): _Stream(_by_type("speech.audio.done"), _decode_all),
    ("openai", "transcription"): _Stream(_by_type("transcript.text.done"), _decode_all),
    ("openai", "image"): _Stream(
        _by_type("image_generation.completed", "image_edit.completed"), _decode_all
    ),
    ("anthropic", "messages"): _Stream(_by_type("message_stop"), _is_plain_message),
    ("google", "generate"): _Stream(_all_finished, _decode_all),
    ("google", "interactions"): _Stream(
        _by_type("interaction.completed", "interaction.complete"), _decode_all
    ),
    ("cohere", "chat"): _Stream(_by_type("message-end", "stream-end"), _decode_all),
    ("cartesia", "speech"): _Stream(_is_done, _decode_all),
}
_WHOLE_ENDS: dict[tuple[str, str], Ends] = {
    ("openai", "chat"): _all_finished,
    ("openai", "completion"): _all_finished,
    ("openai", "responses"): _response_ends,
    ("anthropic", "messages"): _has_reason,
    ("google", "generate"): _all_finished,
    ("google", "interactions"): _interaction_ends,
    ("cohere", "chat"): _has_reason,
}
