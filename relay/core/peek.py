"""Read the few fields of a request that the relay uses, without changing the request.

Owns the model, stream flag, user and session of a JSON or form body, the billable fields of a body,
and the kind and model of an endpoint.
"""

from __future__ import annotations

import re
from functools import lru_cache

import msgspec

from relay.core.agents import user_without_session
from relay.core.fields import (
    ABSENT,
    LARGE_BYTES,
    MAX_FIELD_BYTES,
    MAX_TEXT_BYTES,
    Reader,
    field,
    has_unicode_escapes,
    is_value,
    may_be_object,
    occurrences,
    pairs,
    value,
)
from relay.core.forms import Field as FormField
from relay.core.forms import form_fields, is_form
from relay.core.paths import query_value
from relay.core.request_fields import RequestFields, read_fields

_MODEL_IN_PATH = re.compile(r"(?:^|/)(?:models/([^/:]+)|openai/deployments/([^/:]+)/)")
_MAX_NAME_BYTES = 200
"""Maximum size of a form field's value."""
_MAX_ID_BYTES = 512
"""Maximum size of an id in JSON: OpenAI's have up to 64 characters."""

# The end of an endpoint, and the kind of its calls. The first match wins.
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
    ("moderations", "moderation"),
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


GENERATION_KINDS = frozenset(
    {
        "chat", "completion", "responses", "messages", "generate", "interactions", "embeddings",
        "rerank", "speech", "transcription", "image", "count_tokens", "moderation",
    }
)  # fmt: skip
"""Kinds of calls that are self-contained and answered at once: any provider with the same wire
format can serve them."""
_SUBMITS = re.compile(r"(?:^|/)(?:queue|async)/")
"""Endpoints that accept jobs, whose results are read later: fal's queue, Perplexity's chat."""
_STREAMS = re.compile(r":streamGenerateContent$|/sse$|/stream(?:/with-timestamps)?$")


_OBJECTS = re.compile(
    r"(?:^|/)(batches|batch/jobs|videos|operations|transcripts?|interactions|responses)(?:/|$)"
)
_OBJECT_KINDS = {
    "batches": "batch", "batch/jobs": "batch", "videos": "video", "operations": "video",
    "transcript": "transcription", "transcripts": "transcription",
    "interactions": "interactions", "responses": "responses",
}  # fmt: skip
"""Kinds of calls to objects that are created now and read later."""


ENDPOINT_KINDS = frozenset(
    {kind for _, kind in _KINDS} | {*_OBJECT_KINDS.values(), "speech", "other"}
)
"""Every kind that `kind_of` returns."""


MODEL_NAMES = ("model", "model_id")
_MODEL = b'"model'
_MODEL_MARK = re.compile(_MODEL)


class _Paid(msgspec.Struct, omit_defaults=True):
    """The fields with text for speech, which is billed if the response reports no usage."""

    input: msgspec.Raw = ABSENT
    text: msgspec.Raw = ABSENT
    transcript: msgspec.Raw = ABSENT


_paid = Reader(_Paid)


class Peek(msgspec.Struct, frozen=True):
    """The wanted fields of a body; None for a missing or unreadable one."""

    model: str | None = None
    stream: bool | None = None
    user: str | None = None
    """The end user, whatever the field's name is."""
    submits: bool = False
    """True for a job whose result is read or delivered later."""
    prompt_cache_key: str | None = None
    previous_response_id: str | None = None
    fields: RequestFields | None = None
    """All fields that the relay reads, not decoded; None of a form."""


NOTHING = Peek()


def peek_body(body: bytes, content_type: str) -> Peek:
    """Read model, stream flag and user of a request body; NOTHING if it is unreadable."""
    if is_form(content_type):
        return _peek_form(body, content_type)
    if body[:1] != b"{" and not may_be_object(body):
        return NOTHING
    wanted = read_fields(body)
    if wanted is None:
        return NOTHING
    model = value(wanted.model)
    if not isinstance(model, str):
        model = value(wanted.model_id)
    stream = value(wanted.stream)
    user = value(wanted.safety_identifier) or value(wanted.user)
    if user is None and wanted.metadata is not ABSENT:
        user = value(field(wanted.metadata, "user_id"))
        if isinstance(user, str):
            user = user_without_session(user)
    return Peek(
        model if isinstance(model, str) else None,
        stream if isinstance(stream, bool) else None,
        user if isinstance(user, str) else None,
        value(wanted.background) is True,
        _short_text(wanted.prompt_cache_key),
        _short_text(wanted.previous_response_id),
        wanted,
    )


def _short_text(raw: msgspec.Raw) -> str | None:
    """Decode a string of up to _MAX_ID_BYTES; None if it is anything else."""
    if raw is ABSENT or memoryview(raw).nbytes > _MAX_ID_BYTES:
        return None
    found = value(raw)
    return found if isinstance(found, str) else None


def _peek_form(body: bytes, content_type: str) -> Peek:
    fields = form_fields(body, content_type) or []
    model, user = _of_form(body, fields, MODEL_NAMES), _of_form(body, fields, ("user",))
    # ElevenLabs delivers the transcript to a webhook.
    return Peek(model, None, user, (_of_form(body, fields, ("webhook",)) or "").lower() == "true")


def _of_form(body: bytes, fields: list[FormField], names: tuple[str, ...]) -> str | None:
    """Return the last value of these fields, as in JSON the last field of a name counts."""
    for name, start, end in reversed(fields):
        if name.decode("latin-1") in names and end - start <= _MAX_NAME_BYTES:
            try:
                return body[start:end].decode() or None
            except UnicodeDecodeError:
                return None
    return None


def paid_fields(body: bytes) -> bytes:
    """Return a small body itself, and of a larger one an object with its billable fields only. A
    meter reads it after the call, for many calls in one turn of the event loop.
    """
    if len(body) <= MAX_FIELD_BYTES:
        return body
    paid = _paid.read(body)
    if paid is None:
        return b""
    for name in _Paid.__struct_fields__:
        if memoryview(getattr(paid, name)).nbytes > MAX_TEXT_BYTES:
            setattr(paid, name, ABSENT)
    return msgspec.json.encode(paid)


def model_is_plain(body: bytes, content_type: str, model: str | None) -> bool:
    """True if every parser of `body` finds the same model as peek_body, or none.

    Parsers differ on repeated names. A body that is neither JSON nor a form has no model; a body
    that is not readable in bounded time may have any.
    """
    if is_form(content_type):
        fields = form_fields(body, content_type)
        return fields is not None and _is_plain([f.name.decode("latin-1") for f in fields], model)
    if not body or not ("json" in content_type.lower() or may_be_object(body)):
        return True
    if (len(body) <= LARGE_BYTES or not may_be_object(body)) and is_value(body):
        is_named = occurrences(_MODEL_MARK, body) <= (model is not None)
        if is_named and not has_unicode_escapes(body):
            return True
    found = pairs(body)
    return found is not None and _is_plain([name for name, _ in found], model)


def names_one_model(body: bytes) -> bool:
    """True if no parser of this JSON text finds more than one model, as of nearly every body; False
    if model_is_plain must decide.
    """
    # The first mark is the last: found in half the time of `occurrences`, for nearly every body
    # names its model first.
    return body.find(_MODEL) == body.rfind(_MODEL) and not has_unicode_escapes(body)


def _is_plain(names: list[str], model: str | None) -> bool:
    named = sum(name in MODEL_NAMES for name in names)
    return named == 0 or (named == 1 and model is not None)


def kind_of(endpoint: str) -> str:
    """`v1/chat/completions` -> `chat`; `other` for an endpoint of unknown kind."""
    if (kind := answered_kind(endpoint)) is not None:
        return kind
    if (found := _OBJECTS.search(endpoint)) is not None:
        return _OBJECT_KINDS[found[1]]
    return "other"


def answered_kind(endpoint: str) -> str | None:
    """Return the kind of an endpoint that answers at once; None for any other."""
    for end, kind in _KINDS:
        if endpoint.endswith(end):
            return kind
    return "speech" if "text-to-speech/" in endpoint else None


@lru_cache(maxsize=1024)
def generates(method: str, endpoint: str) -> bool:
    """True for a call that any provider with the same wire format can serve; false for an upload, a
    batch, a submitted job, and a call that changes an object at the provider.
    """
    if method != "POST" or _SUBMITS.search(endpoint):
        return False
    return answered_kind(endpoint.rstrip("/")) in GENERATION_KINDS


@lru_cache(maxsize=1024)
def streams_by_path(endpoint: str) -> bool:
    """True for an endpoint whose response is always a stream."""
    return _STREAMS.search(endpoint) is not None


def model_elsewhere(format_: str, endpoint: str, raw_query: str) -> str | None:
    """Return the model from Deepgram's query, or fal's app from the path."""
    if format_ == "deepgram":
        return query_value(raw_query, "model") or None
    if format_ == "fal":
        app = endpoint.removeprefix("queue/").partition("/requests/")[0]
        return app.removesuffix("/stream") or None
    return None


def model_in_path(endpoint: str, base_path: str = "") -> str | None:
    """Return Gemini's model from the path, `v1beta/models/gemini-2.5-flash:generateContent`, or
    Azure's deployment, which may follow the path of the base URL.
    """
    if base_path.endswith(_DEPLOYMENTS) and "/" in endpoint:
        return endpoint.partition("/")[0]
    found = _MODEL_IN_PATH.search(endpoint)
    return found[1] or found[2] if found else None


_DEPLOYMENTS = "openai/deployments"
