"""Look into a request body for the few fields the relay wants, without changing or keeping it.

Owns: model and stream flag of a JSON or form body, the model and kind that a path tells.
"""

from __future__ import annotations

import re

import msgspec

from relay.core.fields import (
    ABSENT,
    LARGE_BYTES,
    MOST_FIELD_BYTES,
    MOST_TEXT_BYTES,
    by_name,
    field,
    is_readable,
    is_value,
    pairs,
    value,
)
from relay.core.paths import query_value

_GEMINI_MODEL = re.compile(r"(?:^|/)models/([^/:]+)")
# A part's head has a few lines; without a bound, lines that look like one take quadratic time.
_FORM_MODEL = re.compile(
    rb'name="model(?:_id)?"\r\n(?:[^\r\n]{1,1000}\r\n){0,8}\r\n([^\r\n]{1,200})\r\n'
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FORM_PEEK_BYTES = 64 * 1024

# The end of an endpoint, and what kind of call it is. Longer ends first where one is part of
# another.
_KINDS: tuple[tuple[str, str], ...] = (
    ("chat/completions", "chat"),
    ("completions", "completion"),
    ("responses", "responses"),
    ("messages", "messages"),
    ("messages/count_tokens", "count_tokens"),
    ("embeddings", "embeddings"),
    ("audio/speech", "speech"),
    ("responses/compact", "responses"),
    ("responses/input_tokens", "count_tokens"),
    ("interactions", "interactions"),
    ("rerank", "rerank"),
    ("v1/chat", "chat"),
    ("v2/chat", "chat"),
    ("embed", "embeddings"),
    ("audio/transcriptions", "transcription"),
    ("audio/translations", "transcription"),
    ("images/generations", "image"),
    ("images/edits", "image"),
    ("images/variations", "image"),
    ("models", "models"),
    (":generateContent", "generate"),
    (":streamGenerateContent", "generate"),
    (":embedContent", "embeddings"),
    (":batchEmbedContents", "embeddings"),
    (":countTokens", "count_tokens"),
    (":predict", "image"),
    ("tts/bytes", "speech"),
    ("tts/sse", "speech"),
    ("listen", "transcription"),
    ("stt", "transcription"),
    ("speech-to-text", "transcription"),
    ("speak", "speech"),
    ("realtime", "realtime"),
    ("BidiGenerateContent", "realtime"),
)


_OBJECTS = re.compile(
    r"(?:^|/)(batches|batch/jobs|videos|operations|transcripts?|interactions|responses)(?:/|$)"
)
_OBJECT_KINDS = {
    "batches": "batch", "batch/jobs": "batch", "videos": "video", "operations": "video",
    "transcript": "transcription", "transcripts": "transcription",
    "interactions": "interactions", "responses": "responses",
}  # fmt: skip
"""Kinds of what is made now and read later."""


class _Wanted(msgspec.Struct):
    """The fields looked for; everything else in the body is skipped without being built."""

    model: msgspec.Raw = ABSENT
    model_id: msgspec.Raw = ABSENT
    stream: msgspec.Raw = ABSENT
    user: msgspec.Raw = ABSENT
    safety_identifier: msgspec.Raw = ABSENT
    metadata: msgspec.Raw = ABSENT


_decoder = msgspec.json.Decoder(_Wanted)


class _Paid(msgspec.Struct, omit_defaults=True):
    """What a call is paid by where its answer tells nothing: how many images, which text."""

    n: msgspec.Raw = ABSENT
    input: msgspec.Raw = ABSENT
    text: msgspec.Raw = ABSENT
    transcript: msgspec.Raw = ABSENT
    parameters: msgspec.Raw = ABSENT


_paid_decoder = msgspec.json.Decoder(_Paid)


class Peek(msgspec.Struct, frozen=True):
    """What a body said of itself; None where it said nothing that could be read."""

    model: str | None = None
    stream: bool | None = None
    user: str | None = None
    """The end user, whatever the provider calls that."""


NOTHING = Peek()


def peek_body(body: bytes, content_type: str) -> Peek:
    """Model and stream flag of a whole request body. Anything unreadable gives NOTHING, never an
    error.
    """
    if content_type.startswith("multipart/form-data"):
        found = _FORM_MODEL.search(body, 0, _FORM_PEEK_BYTES)
        return Peek(found.group(1).decode("utf-8", "replace")) if found else NOTHING
    if body[:1] != b"{" and body.lstrip()[:1] != b"{":
        return NOTHING
    if not is_readable(body):
        return NOTHING
    try:
        wanted = _decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return NOTHING
    model = value(wanted.model)
    if not isinstance(model, str):
        model = value(wanted.model_id)
    stream = value(wanted.stream)
    user = value(wanted.safety_identifier) or value(wanted.user)
    if user is None and wanted.metadata is not ABSENT:
        user = value(field(wanted.metadata, "user_id"))
    return Peek(
        model if isinstance(model, str) else None,
        stream if isinstance(stream, bool) else None,
        user if isinstance(user, str) else None,
    )


def paid_fields(body: bytes) -> bytes:
    """The body itself if it is small; of a larger one an object with no more than what the call is
    paid by: a meter reads it when the call is over, many calls in one turn of the event loop.
    """
    if len(body) <= MOST_FIELD_BYTES:
        return body
    try:
        paid = _paid_decoder.decode(body) if is_readable(body) else _Paid()
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return b""
    for name in _Paid.__struct_fields__:
        if memoryview(getattr(paid, name)).nbytes > MOST_TEXT_BYTES:
            setattr(paid, name, ABSENT)
    return msgspec.json.encode(paid)


def with_model(body: bytes, model: str) -> bytes:
    """A JSON object with this `model`, every other value's bytes as they were. Anything else comes
    back unchanged.
    """
    fields = by_name(body)
    if fields is None:
        return body
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def model_is_plain(body: bytes, content_type: str, model: str | None) -> bool:
    """True if whoever reads `body` finds the model that peek_body found, or none.

    Readers differ on a name that comes twice. What is neither JSON nor a form names no model; a
    body that cannot be read in bounded time may name any.
    """
    if content_type.startswith("multipart/form-data"):
        return body.count(b'name="model') <= 1
    is_json = "json" in content_type or body.lstrip().startswith((b"{", _BYTE_ORDER_MARK))
    if not body or not is_json:
        return True
    text = body.removeprefix(_BYTE_ORDER_MARK)
    if len(text) <= LARGE_BYTES or not text.lstrip().startswith(b"{"):
        if not is_value(text):
            return False
        if text.count(b'"model') <= (model is not None) and b"\\u" not in text:
            return True
    found = pairs(text)
    if found is None:
        return False
    named = sum(name in ("model", "model_id") for name, _ in found)
    return named == 0 or (named == 1 and model is not None)


def kind_of(endpoint: str) -> str:
    """`v1/chat/completions` -> `chat`; `other` for an endpoint that no kind is known for."""
    for end, kind in _KINDS:
        if endpoint.endswith(end):
            return kind
    if "text-to-speech/" in endpoint:
        return "speech"
    if (found := _OBJECTS.search(endpoint)) is not None:
        return _OBJECT_KINDS[found[1]]
    return "other"


def model_elsewhere(meter: str, endpoint: str, raw_query: str) -> str | None:
    """Deepgram names the model in the query; what fal calls an app is in the path."""
    if meter == "deepgram":
        return query_value(raw_query, "model")
    if meter == "fal":
        app = endpoint.removeprefix("queue/").partition("/requests/")[0]
        return app.removesuffix("/stream") or None
    return None


def model_in_path(endpoint: str) -> str | None:
    """Gemini names the model in the path: `v1beta/models/gemini-2.5-flash:generateContent`."""
    found = _GEMINI_MODEL.search(endpoint)
    return found.group(1) if found else None
