"""Find every model that a REST call or a WebSocket message names.

Owns the places where a vendor reads the model of a call or session (elsewhere a name is checked,
but it does not choose the model), and the endpoints whose model the relay reads. model_search.py
has the rule for the fields of a body. docs/models-per-client.md lists the fields that the vendors
document; every row of it is tested.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote, unquote_plus

from relay.core.forms import form_fields, is_form
from relay.core.model_search import (
    Found,
    Named,
    Unreadable,
    Where,
    fold,
    named,
    search,
    search_json,
    sorter,
)
from relay.core.msgpack import LONG_TEXT, MAX_TEXT_BYTES, BadMessagePack, parse_msgpack
from relay.core.peek import GENERATION_KINDS, answered_kind, model_elsewhere
from relay.core.text import quoted

# REST ---------------------------------------------------------------------------------------------


class CallText(NamedTuple):
    """The parts of a REST call that can name a model."""

    format: str
    path: str
    """The raw path, with that of the provider's base URL."""
    query: str
    content_types: Sequence[str]
    """All values of Content-Type."""
    body: bytes | None
    """Decompressed; None if the relay cannot read it, or does not hold it."""


_PLACES: Mapping[str, str] = {
    "openai": r"path .*|(?:body|form) model",
    "anthropic": r"body (?:model|requests\.params\.model)",
    "google": r"path .*",
    "cohere": r"body model",
    "elevenlabs": r"(?:body|form) model_id",
    "cartesia": r"(?:body|form) (?:model_id|model)",
    "deepgram": r"query model",
    "assemblyai": r"body (?:speech_model|speech_models)",
    "fal": r"path .*",
}
"""The places where the vendors of a wire format read the model of a REST call."""
_MORE_PLACES: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("google", re.compile(r"(?:^|/)interactions$"), r"body (?:model|agent)"),
    ("openai", re.compile(r"(?:^|/)async/chat/completions$"), r"body request\.model"),  # Perplexity
    ("openai", re.compile(r"(?:^|/)(?:completions|responses)$"), r"body models"),  # OpenRouter
)
"""More such places, at some endpoints of a wire format."""

_NAMING = re.compile(
    r"(?:^|/)(?:v2/transcript|messages/batches|videos|sound-generation|music|text-to-dialogue"
    r"|speech-to-speech/[^/]+)(?:/stream)?$"
    r"|:(?:batchGenerateContent|predictLongRunning)$"
)
"""POSTs whose requests name their models, beside those of GENERATION_KINDS."""
_LISTS_MODELS = re.compile(r"(?:^|/)models(?:/[^/]+)?$")


@lru_cache(1024)
def reads_model(method: str, format_: str, endpoint: str) -> bool:
    """True for a REST call whose model the relay reads: one that generates, and every call of an
    app of fal; and for one that only lists models.
    """
    if format_ == "fal":
        return endpoint != "" and not endpoint.startswith("rest/")
    endpoint = endpoint.rstrip("/")
    if method in ("POST", "PUT", "PATCH"):
        return answered_kind(endpoint) in GENERATION_KINDS or _NAMING.search(endpoint) is not None
    return method == "GET" and _LISTS_MODELS.search(endpoint) is not None


@lru_cache(1024)
def places_of_call(method: str, format_: str, endpoint: str) -> str:
    """Return the places where the model of a call is read; empty for one that needs none."""
    if method == "GET" and format_ != "fal":
        return ""
    places = [_PLACES.get(format_, _PLACES["openai"])]
    places += [more for of, at, more in _MORE_PLACES if of == format_ and at.search(endpoint)]
    return "|".join(places)


def is_named_at(places: str, models: Sequence[Named]) -> bool:
    """True if one of these models is named at one of `places`."""
    pattern = _compiled(places)
    return any(pattern.fullmatch(f"{each.where} {each.field}") for each in models)


_compiled = lru_cache(64)(re.compile)


def models_of_call(call: CallText) -> Found:
    """Return every model that a REST call names."""
    found = list(models_in_path(call.format, call.path))
    for more in (models_in_query(call.format, call.query), _models_in_body(call)):
        if isinstance(more, Unreadable):
            return more
        found += more
    return tuple(found)


_BEFORE_MODEL = frozenset({"models", "tunedModels", "deployments", "engines"})
"""Segments of a path that a model follows. Azure's deployments correspond to models."""
_FAL_SOCKET = re.compile(r"/(?:realtime|ws)$")


def models_in_path(format_: str, path: str) -> Iterator[Named]:
    """Yield the models in a raw path: those of Gemini and Azure, or fal's app."""
    if format_ == "fal":
        app = model_elsewhere("fal", path.strip("/").removeprefix("ws/"), "")
        if app is not None:
            yield Named("path", "app", unquote(_FAL_SOCKET.sub("", app)))
        return
    segments = [unquote(each) for each in path.split("/")]
    for at, segment in enumerate(segments[:-1]):
        if segment in _BEFORE_MODEL:
            model, colon, verb = segments[at + 1].rpartition(":")
            model = model if colon else verb
            before = "/".join(segments[max(at - 2, 0) : at])
            if segment == "tunedModels":
                model = f"tunedModels/{model}"
            elif before.startswith("publishers/") and before != "publishers/google":
                model = f"{before}/models/{model}"
            if model:
                yield Named("path", segment, model)


def models_in_query(format_: str, raw_query: str) -> Found:
    """Return the models in a raw query."""
    return _models_of_fields("query", format_, query_fields(raw_query)) if raw_query else ()


def query_fields(raw: str) -> list[tuple[str, str]]:
    """Return the decoded names and values of a raw query. Some servers separate at `;` too."""
    parts = (part.partition("=") for part in re.split("[&;]", raw))
    return [(unquote_plus(name).strip(), unquote_plus(value)) for name, _, value in parts]


_CHARSET = re.compile(r"charset[^=]*=\s*[\"']?([^\s\"';,]*)", re.IGNORECASE)
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_URLENCODED = "application/x-www-form-urlencoded"
_NOT_ONLY_JSON = frozenset({"deepgram"})
"""Formats with audio or plain text as bodies, and the model in the query."""
_BEFORE_JSON = b" \t\n\r\x00\xef\xbb\xbf\xfe\xff"
_MAX_VALUE_BYTES = 64 * 1024


def _models_in_body(call: CallText) -> Found:
    body, types = call.body, call.content_types
    if body is None:
        return Unreadable("the relay cannot decompress its body, or it is too large to be held")
    if not body:
        return ()
    type_ = types[0] if types else ""
    charsets = {each.lower() for each in _CHARSET.findall(type_)}
    if len(types) > 1 or not charsets <= _CHARSETS or type_.lower().count("boundary") > 1:
        return Unreadable("its Content-Type is ambiguous, or its encoding is not UTF-8")
    # Some servers read JSON whatever the Content-Type, and ignore what follows it.
    may_be_json = body.lstrip(_BEFORE_JSON).startswith((b"{", b"["))
    is_urlencoded = type_[: len(_URLENCODED)].lower() == _URLENCODED
    if (is_urlencoded or is_form(type_)) and may_be_json:
        return Unreadable("its body is not of its Content-Type")
    if is_form(type_):
        return _models_in_form(call.format, body, type_)
    if is_urlencoded:
        return _models_of_fields("form", call.format, query_fields(body.decode("utf-8", "replace")))
    if call.format in _NOT_ONLY_JSON and "json" not in type_.lower():
        return ()
    return search_json("body", call.format, body)


def _models_in_form(format_: str, body: bytes, content_type: str) -> Found:
    fields = form_fields(body, content_type)
    if fields is None:
        return Unreadable("its form is malformed, or can be read in more than one way")
    texts = []
    for name, start, end in fields:
        may_be_json = body[start : start + 1] in (b"{", b"[")
        is_short = end - start <= (_MAX_VALUE_BYTES if may_be_json else MAX_TEXT_BYTES)
        value = body[start:end].decode("utf-8", "replace") if is_short else LONG_TEXT
        texts.append((name.decode("utf-8", "replace"), value))
    return _models_of_fields("form", format_, texts)


def _models_of_fields(where: Where, format_: str, fields: Sequence[tuple[str, str]]) -> Found:
    """Return the models of the fields of a query or form. A value that is JSON is searched too."""
    sort, found, seen = sorter(format_).sort, list[Named](), set[str]()
    for full_name, value in fields:
        # `models[0]` and `session[model]`, as some servers write lists and objects.
        parts = [each for each in re.split(r"[\[\].]+", full_name) if each and not each.isdigit()]
        name = ".".join(parts)
        if any(sort(each) == "name" for each in parts):
            if (folded := fold(name)) in seen:
                return Unreadable(f"it has the field '{quoted(name)}' twice")
            seen.add(folded)
            for each in value.split(",") if folded.endswith("s") else (value,):
                found += named(where, name, each.strip(), format_)
        if value[:1] in ("{", "["):
            inner = search_json(where, format_, value.encode())
            if not isinstance(inner, Unreadable):  # otherwise it is text that begins like JSON
                found += [each._replace(field=f"{name}.{each.field}") for each in inner]
    return tuple(found)


# WebSockets ---------------------------------------------------------------------------------------


class SocketRule(NamedTuple):
    """How the sessions of an endpoint name their models."""

    endpoint: str
    """A regular expression, searched for in the endpoint."""
    places: str
    """The places where the vendor reads the model of the session."""
    audio: bool = False
    """True if binary messages are audio; otherwise they are read like text."""
    words: frozenset[bytes] = frozenset()
    """Texts that are commands, and not JSON."""


_REALTIME = "query model"
_TRANSCRIPTION = (
    r"message session\.(?:audio\.input\.transcription|input_audio_transcription)\.model"
)
_CARTESIA_COMMANDS = frozenset({b"finalize", b"done", b"close"})
_SOCKETS: Mapping[str, tuple[SocketRule, ...]] = {
    "openai": (
        SocketRule(r"(?:^|/)responses$", r"message (?:response\.)?model"),
        SocketRule(r"(?:^|/)live/", r"message session\.model"),
        SocketRule(r"(?:^|/)realtime(?:/translations)?$", _REALTIME),
    ),
    "google": (SocketRule(r"\.Bidi(?:GenerateContent|GenerateMusic)$", r"message setup\.model"),),
    "elevenlabs": (
        SocketRule(r"(?:^|/)text-to-(?:speech|dialogue)/", "query model_id"),
        SocketRule(r"(?:^|/)speech-to-text/realtime$", "query model_id"),
    ),
    "cartesia": (
        SocketRule(r"(?:^|/)tts/websocket$", "message model_id"),
        SocketRule(r"(?:^|/)stt/", "query model", True, _CARTESIA_COMMANDS),
    ),
    "deepgram": (
        SocketRule(r"(?:^|/)listen$", "query model", True),
        SocketRule(r"(?:^|/)speak$", "query model"),
        SocketRule(r"(?:^|/)agent/converse$", r"message agent\.think\.provider\.model", True),
    ),
    "assemblyai": (SocketRule(r"(?:^|/)v3/ws$", "query speech_model", True),),
    "fal": (SocketRule("", "path .*"),),
}


@lru_cache(1024)
def socket_rule(format_: str, endpoint: str) -> SocketRule | None:
    """Return how the sessions of an endpoint name their models; None if the relay does not read it:
    an agent has the model that is configured at the vendor.
    """
    rules = _SOCKETS.get(format_, ())
    return next((rule for rule in rules if re.search(rule.endpoint, endpoint)), None)


def places_of_session(rule: SocketRule, raw_query: str) -> str:
    """Return the places where the model of a session with this URL is read."""
    if rule.places == _REALTIME and ("intent", "transcription") in query_fields(raw_query):
        return f"{_REALTIME}|{_TRANSCRIPTION}"
    return rule.places


def models_of_handshake(format_: str, path: str, raw_query: str) -> Found:
    """Return the models that the URL of a session names."""
    in_query = models_in_query(format_, raw_query)
    if isinstance(in_query, Unreadable):
        return in_query
    return (*models_in_path(format_, path), *in_query)


def models_of_message(format_: str, data: bytes) -> Found:
    """Return the models that a client's message names: JSON, or MessagePack for fal."""
    if format_ == "fal" and not data.startswith(b"{"):
        try:
            return search("message", format_, parse_msgpack(data))
        except BadMessagePack:
            return Unreadable("it is neither JSON nor MessagePack, or has too many values")
    return search_json("message", format_, data)
