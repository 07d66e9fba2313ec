"""Bound what a call can use before it is sent, so that a budget can reserve its price.

Owns the fields by which a call limits its response, and the substitutes for calls that set no
limit. The input is estimated (core/media.py); a response that is not streamed may cost more than
its bound, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any

import msgspec

from relay.core.fields import ABSENT, Reader, field, pairs, value
from relay.core.meters import speech
from relay.core.meters.estimates import images_requested
from relay.core.meters.sent_call import SentCall
from relay.core.usage import CallBound

_IMAGE_TOKENS = 6240
"""Output tokens of the largest image (OpenAI's gpt-image-1, high quality)."""
_SPEECH_TOKENS = 2
"""Tokens of speech for a character of text, where speech is billed in tokens."""
_AUDIO_BYTES_PER_S = 4000
"""Audio of 32 kbit/s, about the lowest rate that people upload."""
_AUDIO_TOKENS_PER_S = 10
_TRANSCRIPT_TOKENS_PER_S = 5
_REMOTE_AUDIO_MS = 3_600_000
"""Audio that the provider fetches from a URL: its length is unknown here."""
WITHOUT_TEXT = frozenset(
    {"speech", "transcription", "image", "embeddings", "rerank", "moderation", "count_tokens"}
)
"""Kinds of calls whose response is no generated text."""
_MAX, _MAX_DIGITS = 1 << 31, 20
_STANDARD_TIERS = frozenset({"", "auto", "default", "standard", "standard_only"})


class _Limits(msgspec.Struct):
    """The fields by which a call limits its response, or changes its price."""

    max_tokens: msgspec.Raw = ABSENT
    max_completion_tokens: msgspec.Raw = ABSENT
    max_output_tokens: msgspec.Raw = ABSENT
    max_tokens_to_sample: msgspec.Raw = ABSENT
    generationConfig: msgspec.Raw = ABSENT
    generation_config: msgspec.Raw = ABSENT
    n: msgspec.Raw = ABSENT
    best_of: msgspec.Raw = ABSENT
    num_generations: msgspec.Raw = ABSENT
    service_tier: msgspec.Raw = ABSENT
    speed: msgspec.Raw = ABSENT


_limits = Reader(_Limits)
_NONE = _Limits()
_BOUNDS: dict[str, tuple[str, ...]] = {
    "responses": ("max_output_tokens",),
    "messages": ("max_tokens",),
    "generate": (),
    "interactions": ("max_output_tokens",),
}
_OTHER_BOUNDS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_tokens_to_sample")
_ANSWERS = ("n", "best_of", "num_generations")
_MARKS = (
    b"max_", b"maxOut", b'"n"', b"best_of", b"num_gen", b"andidate", b"service_tier", b"speed",
    b"\\u",
)  # fmt: skip
"""A body without any of these has none of the fields of _Limits, and needs no parser: only `\\u`
writes a letter of a name in another way."""
_SMALL_BYTES = 16 * 1024
_REPEATED = (b"max_", b"maxOutputTokens", b'"n"', b"candidate")


def bound_of(sent: SentCall, format_: str, body: bytes, length: int) -> CallBound:
    """Return what a call can use at most. `body` is its text as far as it is known, `length` the
    size of the whole.
    """
    if sent.kind in WITHOUT_TEXT:
        return _bound_without_text(sent, format_, body, length)
    return bound_of_text(sent.kind, sent.input_tokens, body)


def bound_of_text(kind: str, input_tokens: int, body: bytes) -> CallBound:
    """Return what a call of any other kind can use at most."""
    # A parser reads a small body faster than it can be searched for each of the marks.
    is_read = len(body) <= _SMALL_BYTES or any(mark in body for mark in _MARKS)
    fields = _limits.read(body) if is_read else None
    if fields is None or fields == _NONE:
        return CallBound(input_tokens, None, units=1, text=body)
    names = _BOUNDS.get(kind, _OTHER_BOUNDS)
    found, answers = _values(fields, names), _values(fields, _ANSWERS)
    for config in (fields.generationConfig, fields.generation_config):
        if config is not ABSENT:
            found += _within(config, ("maxOutputTokens", "max_output_tokens"))
            answers += _within(config, ("candidateCount", "candidate_count"))
    if any(body.count(mark) > 1 for mark in _REPEATED):
        # Of a repeated field, the provider may read another one than this parser.
        repeated = pairs(body) or []
        found += [value(raw) for name, raw in repeated if name in names]
        answers += [value(raw) for name, raw in repeated if name in _ANSWERS]
    return CallBound(
        input_tokens,
        max(_counts(found), default=None),
        max(_counts(answers), default=1),
        units=1,
        service_tier=_tier(fields),
        text=body,
    )


def _bound_without_text(sent: SentCall, format_: str, body: bytes, length: int) -> CallBound:
    if sent.kind == "speech":
        spoken = speech.characters(format_, sent)
        characters = len(body) if spoken is None else spoken
        tokens = characters * _SPEECH_TOKENS
        return CallBound(characters, tokens, characters=characters, units=1, may_hold_audio=True)
    if sent.kind == "transcription":
        is_remote = body[:1] == b"{"
        audio_ms = _REMOTE_AUDIO_MS if is_remote else length * 1000 // _AUDIO_BYTES_PER_S
        seconds = audio_ms // 1000 + 1
        tokens = seconds * _TRANSCRIPT_TOKENS_PER_S
        return CallBound(
            seconds * _AUDIO_TOKENS_PER_S, tokens, audio_ms=audio_ms, units=1, may_hold_audio=True
        )
    if sent.kind == "image":
        images = images_requested(sent.body)
        return CallBound(sent.input_tokens, _IMAGE_TOKENS, images, images=images, units=images)
    return CallBound(sent.input_tokens, units=1)


def _values(fields: _Limits, names: Iterable[str]) -> list[Any]:
    """Decode those of some fields that the body has: most have one."""
    return [value(raw) for name in names if (raw := getattr(fields, name)) is not ABSENT]


def _within(config: msgspec.Raw, names: Iterable[str]) -> list[Any]:
    return [value(field(config, name)) for name in names]


def _counts(given: Iterable[Any]) -> list[int]:
    return [count for each in given if (count := _count(each)) is not None]


def _count(given: Any) -> int | None:
    """Return a number as the most lenient provider may read it: 20 for `20.0` and `"20"` too."""
    if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < _MAX_DIGITS:
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, int | float):
        return None
    return ceil(min(given, _MAX)) if given > 0 else None


def _tier(fields: _Limits) -> str:
    """Return the service tier that a call asks for; empty for the standard one."""
    if fields.speed is not ABSENT and value(fields.speed) == "fast":
        return "fast"
    tier = "" if fields.service_tier is ABSENT else value(fields.service_tier)
    return tier if isinstance(tier, str) and tier not in _STANDARD_TIERS else ""
