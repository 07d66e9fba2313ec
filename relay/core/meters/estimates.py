"""Determine the usage of a call whose response does not report it: from a header, from the request,
or by an estimate.

Owns these substitutes, and the decision which calls use something that nothing reports.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from relay.core import media
from relay.core.dearest import images
from relay.core.meters import speech
from relay.core.meters.output_estimate import Output
from relay.core.meters.sent_call import SentCall
from relay.core.usage import Part, Parts, Usage

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


_MAX_IMAGES = 100
"""A request for more is a mistake, which no vendor serves."""


def images_requested(body: bytes) -> int:
    """Return the number of images that a JSON request asks for, 1 by default."""
    asked = images(body, "application/json") or 1
    return asked if asked <= _MAX_IMAGES else 1


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


def estimate_parts(format_: str, sent: SentCall, model: str | None, output: Output | None) -> Parts:
    """Return the usage of a response that reports none. `output` is None if it is not estimated."""
    if sent.kind == "speech" and (spoken := speech.characters(format_, sent)) is not None:
        return (Part(model, Usage(characters=spoken)),)
    if sent.kind == "image":
        return (Part(model, Usage(images=images_requested(sent.body), estimated=True)),)
    if sent.kind == "transcription" and (heard_ms := media.audio_ms(sent.body, sent.length)):
        return (Part(model, Usage(audio_ms=heard_ms, estimated=True)),)
    if output is not None:
        return (Part(model, output.usage(sent.input_tokens)),)
    pays = _PAYS.get(format_)
    if sent.kind in _PAID or (pays is not None and pays.search(sent.endpoint)):
        return (Part(model, Usage(incomplete=True)),)
    return ()
