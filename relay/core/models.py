"""Replace the model of a call, for a fallback with a model.

Owns the places in which vendors name the model: path, query, form and JSON body. Each place that
has a model is changed, and no other byte. core/peek.py reads the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote

import msgspec

from relay.core.fields import Span, items, spans, value
from relay.core.forms import form_fields, is_form
from relay.core.paths import join_query, query_name, query_names
from relay.core.peek import MODEL_NAMES

# Gemini and Vertex AI; Azure, whose deployments correspond to models.
_IN_PATH = re.compile(r"((?:^|/)(?:models|tunedModels|deployments)/)[^/:]+")
_GOOGLE_PREFIX = "models/"
_ADDED_NAMES = {"elevenlabs": "model_id", "cartesia": "model_id"}
"""The body's field for the model in some formats; `model` in all others."""
_NOT_IN_BODY = frozenset({"google", "fal", "deepgram"})
"""Formats that have the model in the path or the query."""


def path_with_model(path: str, model: str) -> str | None:
    """Replace the model in a raw path; None if the path has none."""
    named = quote(model.removeprefix(_GOOGLE_PREFIX), safe="")

    def replaced(found: re.Match[str]) -> str:
        return found[1].replace("tunedModels/", _GOOGLE_PREFIX) + named

    changed, count = _IN_PATH.subn(replaced, path, count=1)
    return changed if count else None


def query_names_model(raw_query: str) -> bool:
    """True if the query has a parameter for the model."""
    return not query_names(raw_query).isdisjoint(MODEL_NAMES)


def query_with_model(raw_query: str, model: str, format_: str) -> str:
    """Replace the model in a raw query; for Deepgram it is added if missing."""
    if not query_names_model(raw_query):
        added = f"model={quote(model, safe='')}" if format_ == "deepgram" else ""
        return join_query(raw_query, added)
    return "&".join(
        f"{segment.partition('=')[0]}={quote(model, safe='')}"
        if query_name(segment) in MODEL_NAMES
        else segment
        for segment in raw_query.split("&")
    )


def body_with_model(body: bytes, content_type: str, model: str, format_: str) -> bytes:
    """Replace every model in a body; return the body unchanged if it is unreadable."""
    if is_form(content_type):
        fields = form_fields(body, content_type) or ()
        places = [(f.start, f.end) for f in fields if f.name.decode("latin-1") in MODEL_NAMES]
        return _spliced(body, [(start, end, model.encode()) for start, end in places])
    found = spans(body)
    if found is None:
        return body
    changes = _changes(body, found, model, format_)
    if format_ == "google":
        changes += _changes_of_requests(body, found, model)
    return _spliced(body, sorted(changes))


def body_with_added_model(body: bytes, model: str, format_: str) -> bytes:
    """Add the model to a JSON object, for a call that has no model anywhere."""
    found = spans(body)
    if found is None or format_ in _NOT_IN_BODY:
        return body
    name = _ADDED_NAMES.get(format_, "model")
    at = body.index(b"{") + 1
    more = msgspec.json.encode(name) + b":" + msgspec.json.encode(model) + (b"," if found else b"")
    return _spliced(body, [(at, at, more)])


_Change = tuple[int, int, bytes]
"""Start and end of a text, and its replacement."""


def message_with_models(message: bytes, rename: Callable[[str], str]) -> bytes:
    """Rename the model of a socket's message, at its top or in its `response` or `session`; return
    the same object if nothing is renamed.
    """
    changes: list[_Change] = []
    for name, start, end in spans(message) or ():
        if name == "model":
            changes += _renamed(message[start:end], start, rename)
        elif name in _WITH_MODEL:
            for inner, first, last in spans(message[start:end]) or ():
                if inner == "model":
                    changes += _renamed(
                        message[start + first : start + last], start + first, rename
                    )
    return _spliced(message, changes) if changes else message


_WITH_MODEL = ("response", "session")


def _renamed(written: bytes, at: int, rename: Callable[[str], str]) -> list[_Change]:
    model = value(msgspec.Raw(written))
    if not isinstance(model, str) or (renamed := rename(model)) == model:
        return []
    return [(at, at + len(written), msgspec.json.encode(renamed))]


def _changes(body: bytes, found: list[Span], model: str, format_: str) -> list[_Change]:
    """Return the changes in one object. A `model` that is an object or a list is not a name."""
    changes = []
    for name, start, end in found:
        given = body[start : min(end, start + len(_GOOGLE_PREFIX) + 1)]
        if name in MODEL_NAMES and (given.startswith(b'"') or given == b"null"):
            qualified = format_ == "google" and given == b'"models/' and "/" not in model
            written = _GOOGLE_PREFIX + model if qualified else model
            changes.append((start, end, msgspec.json.encode(written)))
    return changes


def _changes_of_requests(body: bytes, found: list[Span], model: str) -> list[_Change]:
    """Return the changes in batchEmbedContents: each of its `requests` repeats the path's model."""
    changes: list[_Change] = []
    for name, start, end in found:
        if name == "requests":
            for at, behind in items(body[start:end]):
                request = body[start + at : start + behind]
                inner = _changes(request, spans(request) or [], model, "google")
                changes += [(start + at + a, start + at + b, new) for a, b, new in inner]
    return changes


def _spliced(body: bytes, changes: list[_Change]) -> bytes:
    if not changes:
        return body
    view, at = memoryview(body), 0
    parts: list[memoryview | bytes] = []
    for start, end, new in changes:
        parts += [view[at:start], new]
        at = end
    return b"".join([*parts, view[at:]])
