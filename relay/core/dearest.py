"""Read what a request asks for by the dearest reading that a provider may have: of a repeated field
the highest value, of a number its value however it is written, and a form in any spelling.

Owns the fields that multiply the price of a call: images, prompts, the text of speech, audio that
the provider fetches; and the models that may answer instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import msgspec

from relay.core.fields import MAX_FIELD_BYTES, may_be_object, pairs, text, value
from relay.core.forms import form_fields, is_form
from relay.core.meters.speech import SPOKEN
from relay.core.model_search import fold

MOST = 1 << 31
_IMAGE_COUNTS = frozenset(
    {
        "n", "numimages", "numberofimages", "samplecount", "batchsize", "numoutputs", "numsamples",
        "maximages", "imagecount",
    }
)  # fmt: skip
"""Folded names of the number of images: of OpenAI, fal, Google (Gemini and Imagen), Replicate."""
_WITHIN = frozenset({"parameters", "input", "config", "generationconfig"})
"""Folded names of the objects that vendors put it in."""
_URLENCODED = "application/x-www-form-urlencoded"


def count(raw: msgspec.Raw) -> int:
    """Return a number as the most lenient provider may read it: 20 for `20.0`, `"20"` and `"2e1"`
    too; MOST for a field that is too large to be read, 0 for what is no number above 0.
    """
    if memoryview(raw).nbytes > MAX_FIELD_BYTES:
        return MOST
    given = value(raw)
    if type(given) is int:
        return min(max(given, 0), MOST)
    if isinstance(given, str):
        return _number(given)
    if isinstance(given, bool) or not isinstance(given, float):
        return 0
    return ceil(min(given, MOST)) if given > 0 else 0


def _number(written: str) -> int:
    try:
        given = float(written)
    except ValueError:
        return 0
    return ceil(min(given, MOST)) if given > 0 else 0


def images(body: bytes, content_type: str) -> int | None:
    """Return the number of images that a body asks for, 1 by default; None if it is unreadable."""
    counts: list[int] = []
    if may_be_object(body) and not is_form(content_type):
        found = pairs(body)
        if found is None or (within := _within(found)) is None:
            return None
        counts += [count(raw) for name, raw in found + within if fold(name) in _IMAGE_COUNTS]
    elif body:
        fields = form_fields(body, content_type) if is_form(content_type) else None
        if fields is None:
            return None
        for name, start, end in fields:
            if fold(name.decode("latin-1")) in _IMAGE_COUNTS:
                is_short = end - start <= MAX_FIELD_BYTES
                counts.append(_number(body[start:end].decode("latin-1")) if is_short else MOST)
    return max(counts, default=1) or 1


_Pairs = list[tuple[str, msgspec.Raw]]


def _within(found: _Pairs) -> _Pairs | None:
    """Return the fields of the objects that may hold the number; None if one is unreadable."""
    inner: _Pairs = []
    for name, raw in found:
        if fold(name) in _WITHIN and may_be_object(inside := bytes(raw)):
            held = pairs(inside)
            if held is None:
                return None
            inner += held
    return inner


def prompts(body: bytes) -> int | None:
    """Return the number of prompts of a legacy completion, each of which gets its own answers; None
    if the body is unreadable.
    """
    found = pairs(body)
    if found is None:
        return None
    return max((_prompts(raw) for name, raw in found if name == "prompt"), default=1)


def _prompts(raw: msgspec.Raw) -> int:
    """Count the texts and the lists of tokens in an array; an array of tokens is one prompt."""
    written = bytes(raw)
    if not written.startswith(b"["):
        return 1
    if len(written) > MAX_FIELD_BYTES:
        # Too large to be built. Quotes and brackets within texts make this more than there are.
        return max(1, written.count(b'"') // 2 + written.count(b"[") - 1)
    given = value(raw)
    each = given if isinstance(given, list) else []
    tokens = sum(isinstance(one, int | float) for one in each)
    return max(1, len(each) - tokens + (tokens > 0))


def characters(format_: str, body: bytes) -> int:
    """Return the number of characters of the longest text for speech in a body; that of its bytes
    if there is none.
    """
    spoken = [text(raw) for raw in _named(SPOKEN.get(format_, ""), body)]
    lengths = [len(body) if each is None else len(each) for each in spoken]
    return max(lengths, default=len(body))


def _named(name: str, body: bytes) -> Iterator[msgspec.Raw]:
    return (raw for each, raw in pairs(body) or () if each == name)


def other_models(body: bytes) -> tuple[str, ...] | None:
    """Return the models besides `model` of which any may answer: OpenRouter's `models`, Anthropic's
    `fallbacks`. None if they are too many, or unreadable.
    """
    found: dict[str, None] = {}
    for name, raw in pairs(body) or ():
        if name in _OTHER_MODELS and bytes(raw) != b"null":
            given = value(raw)
            if given is None:
                return None
            for each in given if isinstance(given, list) else [given]:
                model = each.get("model") if isinstance(each, dict) else each
                if isinstance(model, str):
                    found[model] = None
    return tuple(found) if len(found) <= _MAX_MODELS else None


_OTHER_MODELS = ("models", "fallbacks")
_MAX_MODELS = 16
"""A body that names more is not read: each one is looked up."""


_NAMES_AUDIO = ("url", "uri", "fileid")
"""What the folded name of a form's field contains that names a recording which is not in the form:
`url`, `cloud_storage_url`, Mistral's `file_id`."""


def fetches_audio(body: bytes, content_type: str) -> bool:
    """True if the provider may fetch the audio of a transcription, by what the body names."""
    if may_be_object(body):
        return True
    if is_form(content_type):
        fields = form_fields(body, content_type)
        names = [fold(each.name.decode("latin-1")) for each in fields or ()]
        return fields is None or any(mark in name for name in names for mark in _NAMES_AUDIO)
    if content_type[: len(_URLENCODED)].lower() == _URLENCODED and len(body) <= MAX_FIELD_BYTES:
        return True
    return body.lstrip().startswith(b"--")  # a form whose type is not known
