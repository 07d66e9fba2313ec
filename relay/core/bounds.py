"""Bound what a call can use before it is sent, so that a limit can reserve its tokens, and a budget
its price.

Owns the fields by which a call limits its response, and the substitutes for calls that set no
limit. The input is estimated (core/media.py); a response that is not streamed may cost more than
its bound, once.
"""

from __future__ import annotations

import re
from math import ceil
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec

from relay.core.fields import ABSENT, has_unicode_escapes, occurrences, pairs, value
from relay.core.meters import speech
from relay.core.meters.estimates import images_requested
from relay.core.meters.sent_call import SentCall
from relay.core.request_fields import RequestFields, read_fields
from relay.core.usage import BYTES_PER_TOKEN, CallBound, Estimate

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
_NONE = RequestFields()
_STANDARD_TIERS = frozenset({"", "auto", "default", "standard", "standard_only"})


_BOUNDS: dict[str, tuple[str, ...]] = {
    "responses": ("max_output_tokens",),
    "messages": ("max_tokens",),
    "generate": (),
    "interactions": ("max_output_tokens",),
}
_OTHER_BOUNDS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_tokens_to_sample")
_ANSWERS = ("n", "best_of", "num_generations")
_CONFIGS = ("generationConfig", "generation_config")
_BOUNDS_WITHIN = ("maxOutputTokens", "max_output_tokens")
_ANSWERS_WITHIN = ("candidateCount", "candidate_count")
_TIERS = ("service_tier", "speed")
_MARKS = {
    **dict.fromkeys(_OTHER_BOUNDS, re.compile(b"max_")),
    "n": re.compile(b'"n"'),
    "best_of": re.compile(b"best_of"),
    **dict.fromkeys(("num_generations", *_CONFIGS), re.compile(b"enerat")),
    "service_tier": re.compile(b"service_tier"),
    "speed": re.compile(b'"speed"'),
}
"""The fields by which a call limits its response, or changes its price. A body in which the mark of
a field occurs once has that field once, unless a name in it has escapes.
"""
_values_of = attrgetter(*_MARKS)
_NO_VALUES = _values_of(_NONE)


def bound_of(
    sent: SentCall, format_: str, body: bytes, length: int, fields: RequestFields | None = None
) -> CallBound:
    """Return what a call can use at most. `body` is its text as far as it is known, `length` the
    size of the whole, `fields` those of the text if they have been read.
    """
    if sent.kind in WITHOUT_TEXT:
        return _bound_without_text(sent, format_, body, length)
    output, answers, tier = limits_of(sent.kind, body, fields) or (None, 1, "")
    return CallBound(sent.input_tokens, output, answers, units=1, service_tier=tier, text=body)


def estimate(
    kind: str, input_tokens: int | None, body: bytes, fields: RequestFields | None
) -> Estimate:
    """Estimate the tokens of a call; without `input_tokens`, four bytes of the body are one."""
    if input_tokens is None:
        input_tokens = len(body) // BYTES_PER_TOKEN
    limits = limits_of(kind, body, fields)
    if limits is None:
        return Estimate(input_tokens)
    return Estimate(input_tokens, limits.output_tokens, limits.answers)


class CallLimits(NamedTuple):
    """How a call limits its response, or changes its price."""

    output_tokens: int | None
    """Of each answer; None: what the model can answer at most."""
    answers: int
    service_tier: str
    """Empty for the standard one."""

    def tokens(self, most: int) -> int:
        """Return the output tokens of all answers. `most` is the bound of an answer without one."""
        return (most if self.output_tokens is None else self.output_tokens) * self.answers


def limits_of(kind: str, body: bytes, fields: RequestFields | None) -> CallLimits | None:
    """Return the limits of a call; None if it sets none. `fields` are those of its body if they
    have been read.
    """
    if fields is None:
        fields = read_fields(body) or _NONE
    values = _values_of(fields)
    if values == _NO_VALUES:
        return None
    given = [(name, raw) for name, raw in zip(_MARKS, values, strict=True) if raw is not ABSENT]
    is_repeated = has_unicode_escapes(body)
    for mark in {_MARKS[name] for name, _ in given}:
        is_repeated = is_repeated or occurrences(mark, body) > 1
    if is_repeated:
        # Of a repeated field, the provider may read another one than this parser.
        given += pairs(body) or ()
    names = _BOUNDS.get(kind, _OTHER_BOUNDS)
    bounds, answers, tier = [0], [0], ""
    for name, raw in given:
        if name in names:
            bounds.append(_count(raw))
        elif name in _ANSWERS:
            answers.append(_count(raw))
        elif name in _TIERS:
            tier = tier or _tier(name, value(raw))
        elif name in _CONFIGS:
            for inner, held in pairs(bytes(raw)) or ():
                if inner in _BOUNDS_WITHIN:
                    bounds.append(_count(held))
                elif inner in _ANSWERS_WITHIN:
                    answers.append(_count(held))
    return CallLimits(max(bounds) or None, max(answers) or 1, tier)


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


def _count(raw: msgspec.Raw) -> int:
    """Return a number as the most lenient provider may read it: 20 for `20.0` and `"20"` too; 0 for
    what is no number above 0.
    """
    given = value(raw)
    if type(given) is int:
        return min(max(given, 0), _MAX)
    if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < _MAX_DIGITS:
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, int | float):
        return 0
    return ceil(min(given, _MAX)) if given > 0 else 0


def _tier(name: str, given: Any) -> str:
    """Return the service tier that a field asks for; empty for the standard one."""
    if name == "speed":
        return "fast" if given == "fast" else ""
    return given if isinstance(given, str) and given not in _STANDARD_TIERS else ""
