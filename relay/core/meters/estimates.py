"""Determine the usage of a call whose response does not report it: from a header, from the request,
or by an estimate.

Owns these substitutes, and the decision which calls use something that nothing reports.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from decimal import Decimal

import msgspec

from relay.core import media
from relay.core.fields import STRING_TEXT, UNREADABLE
from relay.core.meters import speech
from relay.core.meters.sent_call import SentCall
from relay.core.usage import BYTES_PER_TOKEN, Part, Parts, Usage

Header = Callable[[str], str | None]
ESTIMATED = frozenset({"chat", "completion", "responses", "messages", "generate", "interactions"})
"""Kinds whose usage is estimated if it is not reported."""
_PAID = ESTIMATED | {"embeddings", "speech", "transcription", "image", "rerank"}
"""Kinds that always use something, reported or not."""
_PAYS = {
    "fal": re.compile(r"^(?!(?:queue|rest|ws)/)"),
    "elevenlabs": re.compile(
        r"text-to-|speech-to-|sound-generation|music|voice-changer|audio-isolation|dubbing"
    ),
    "cartesia": re.compile(r"infill/|voice-changer/"),
    "deepgram": re.compile(r"(?:^|/)(?:read|listen|speak)$"),
}
"""Endpoints of a vendor that always use something."""
_MAX_ID = 256
_CHARACTERS = {"elevenlabs": "character-cost", "deepgram": "dg-char-count"}
_DECIMAL = re.compile(r"\d{1,12}(?:\.\d{1,9})?\Z")


def _decimal(given: str | None) -> Decimal | None:
    return Decimal(given) if given is not None and _DECIMAL.match(given) else None


class _Parameters(msgspec.Struct):
    sampleCount: int | None = None


class _Images(msgspec.Struct):
    n: int | None = None
    parameters: _Parameters | None = None


_images = msgspec.json.Decoder(_Images).decode
_FORM_N = re.compile(rb'name="n"\r\n\r\n(\d{1,3})\r\n')
_FORM_PEEK_BYTES = 64 * 1024
_MAX_IMAGES = 100


def images_requested(body: bytes) -> int:
    """Return the number of images in a request: `n`, or Google's `sampleCount`; 1 by default."""
    count: int | None = None
    if body[:1] == b"{":
        with contextlib.suppress(*UNREADABLE):
            fields = _images(body)
            count = fields.n if fields.parameters is None else fields.parameters.sampleCount
    elif (found := _FORM_N.search(body, 0, _FORM_PEEK_BYTES)) is not None:
        count = int(found[1])
    return count if count is not None and 0 < count <= _MAX_IMAGES else 1


def part_from_headers(format_: str, sent: SentCall, header: Header) -> Part | None:
    """Return the usage that response headers report; None if they do not."""
    if format_ == "fal":
        units = _decimal(header("x-fal-billable-units"))
        if units is None:
            return None
        named = header("x-fal-request-id") or sent.named_id
        return Part(None, Usage(units_milli=round(units * 1000)), object_id=named[:_MAX_ID])
    name = _CHARACTERS.get(format_)
    count = _decimal(header(name)) if name is not None else None
    return Part(None, Usage(characters=round(count))) if count is not None else None


def estimate_parts(format_: str, sent: SentCall, model: str | None, made: int | None) -> Parts:
    """Return the usage of a response that reports none. `made` are estimated output tokens; None if
    they are not estimated.
    """
    if sent.kind == "speech" and (spoken := speech.characters(format_, sent)) is not None:
        return (Part(model, Usage(characters=spoken)),)
    if sent.kind == "image":
        return (Part(model, Usage(images=images_requested(sent.body), estimated=True)),)
    if sent.kind == "transcription" and (heard_ms := media.audio_ms(sent.body, sent.length)):
        return (Part(model, Usage(audio_ms=heard_ms, estimated=True)),)
    if made is not None:
        return (Part(model, Usage(sent.input_tokens, made, estimated=True)),)
    pays = _PAYS.get(format_)
    if sent.kind in _PAID or (pays is not None and pays.search(sent.endpoint)):
        return (Part(model, Usage(incomplete=True)),)
    return ()


_SAMPLED_BYTES = 32 * 1024
_REST = rb'\s*"(' + STRING_TEXT + rb")"


class TextEstimator:
    """Estimates the output tokens of a response from its chunks. `keys` are the JSON keys of its
    texts, such as `"content":`. The share of text is measured in the first bytes only.
    """

    __slots__ = ("_bytes", "_held", "_held_bytes", "_keys")

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = keys
        self._bytes = self._held_bytes = 0
        self._held: list[bytes] = []

    def feed(self, chunk: bytes) -> None:
        """Count one chunk."""
        self._bytes += len(chunk)
        if self._held_bytes < _SAMPLED_BYTES:
            self._held.append(chunk)
            self._held_bytes += len(chunk)

    @property
    def tokens(self) -> int:
        """The estimated number of tokens."""
        start = b"".join(self._held)[:_SAMPLED_BYTES]
        if not start or not self._keys:
            return 0
        pattern = b"(?:" + b"|".join(map(re.escape, self._keys)) + b")" + _REST
        text_bytes = sum(len(text) for text in re.findall(pattern, start, re.DOTALL))
        return round(text_bytes * self._bytes / len(start) / BYTES_PER_TOKEN)
