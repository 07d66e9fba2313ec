"""Bound what a call can use before it is sent, so that a limit can reserve its tokens, and a budget
its price.

Owns the fields by which a call limits its response, and the substitutes for calls that set no
limit. The input is estimated (core/media.py); a response that is not streamed may cost more than
its bound, once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
from msgspec import structs

from relay.core.dearest import characters, count, fetches_audio, images, prompts
from relay.core.fields import (
    ABSENT,
    has_unicode_escapes,
    may_be_object,
    occurrences,
    pairs,
    value,
)
from relay.core.meters.estimates import ESTIMATED
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
"""Audio whose length is unknown here: the provider fetches it from a URL, or it is a stream."""
WITHOUT_TEXT = frozenset(
    {"speech", "transcription", "image", "embeddings", "rerank", "moderation", "count_tokens"}
)
"""Kinds of calls whose response is no generated text."""
_TAKE_TOKENS = frozenset({"completion", "embeddings"})
"""Kinds of calls whose input may be tokens instead of text."""
_SPEAKS = frozenset({"elevenlabs", "cartesia"})
"""Formats of vendors that bill the characters of other calls than speech too: dialogues, sounds."""
_NONE = RequestFields()
_STANDARD_TIERS = frozenset({"", "auto", "default", "standard", "standard_only"})
_MAX_TIERS = 8
"""A body that names more is not read: each one is looked up."""
_UNREAD_IMAGES = 10
"""The most that OpenAI makes in one call."""


_CHAT_BOUNDS = ("max_completion_tokens", "max_tokens")
_BOUNDS: dict[str, tuple[str, ...]] = {
    "chat": _CHAT_BOUNDS,
    "completion": ("max_tokens",),
    "responses": ("max_output_tokens",),
    "messages": ("max_tokens",),
    "interactions": ("max_output_tokens",),
}
_MORE_BOUNDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("chat", "cohere"): ("max_tokens",),
    ("other", "openai"): _CHAT_BOUNDS,  # such as runs of an assistant
    ("other", "anthropic"): ("max_tokens", "max_tokens_to_sample"),
    ("other", "cohere"): ("max_tokens",),
}
"""The fields that limit the output of a kind of calls, and of a kind in one wire format. A field
that the vendor does not read there limits nothing. If it may read several, the highest counts."""
_CONFIGURED = frozenset({"generate", "interactions"})
"""Kinds with their limits in one of `_CONFIGS`, as other calls in Google's format."""
_ANSWERS = ("n", "best_of", "num_generations")
_CONFIGS = ("generationConfig", "generation_config")
_BOUNDS_WITHIN = ("maxOutputTokens", "max_output_tokens")
_ANSWERS_WITHIN = ("candidateCount", "candidate_count")
_TIERS = ("service_tier", "speed")
_MARKS = {
    **dict.fromkeys(
        ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_tokens_to_sample"),
        re.compile(b"max_"),
    ),
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
    sent: SentCall,
    format_: str,
    body: bytes | None,
    fields: RequestFields | None = None,
    content_type: str = "",
) -> CallBound:
    """Return what a call can use at most. `body` is its text, None if the relay does not hold it,
    `fields` those of the text if they have been read.
    """
    if sent.kind in WITHOUT_TEXT:
        bound = _bound_without_text(sent, format_, body, content_type)
    else:
        limits = limits_of(sent.kind, format_, body or b"", fields) or _NO_LIMITS
        spoken = max(sent.length, len(body or b"")) if format_ in _SPEAKS else 0
        bound = CallBound(
            _input_tokens(sent, body), limits.output_tokens, limits.answers,
            characters=spoken, units=1,
            service_tiers=limits.service_tiers, text=body or b"",
            is_read=limits.is_read and (body is not None or sent.kind not in ESTIMATED),
        )  # fmt: skip
    is_app = format_ == "fal" and not sent.endpoint.startswith("rest/")
    return _bound_of_app(bound, body, content_type) if is_app else bound


def _input_tokens(sent: SentCall, body: bytes | None) -> int:
    """Return the input tokens of a call. Where the input may be an array of tokens, a comma follows
    each one.
    """
    if body is None or sent.kind not in _TAKE_TOKENS:
        return sent.input_tokens
    return max(sent.input_tokens, body.count(b",") + 1)


def _bound_of_app(bound: CallBound, body: bytes | None, content_type: str) -> CallBound:
    """Return the bound of a call to an app of fal, whose units are mostly images."""
    if body is None:
        return structs.replace(bound, is_read=False)
    made = images(body, content_type) if may_be_object(body) else 1
    return structs.replace(bound, units=made or _UNREAD_IMAGES, is_read=made is not None)


def estimate(
    kind: str, format_: str, input_tokens: int | None, body: bytes, fields: RequestFields | None
) -> Estimate:
    """Estimate the tokens of a call; without `input_tokens`, four bytes of the body are one."""
    if input_tokens is None:
        input_tokens = len(body) // BYTES_PER_TOKEN
    limits = limits_of(kind, format_, body, fields)
    if limits is None:
        return Estimate(input_tokens)
    return Estimate(input_tokens, limits.output_tokens, limits.answers)


class CallLimits(NamedTuple):
    """How a call limits its response, or changes its price."""

    output_tokens: int | None
    """Of each answer; None: what the model can answer at most."""
    answers: int
    service_tiers: tuple[str, ...]
    """All that the body names besides the standard one."""
    is_read: bool = True
    """False if the body may set other limits, which the relay cannot read."""

    def tokens(self, most: int) -> int:
        """Return the output tokens of all answers. `most` is the bound of an answer without one."""
        return (most if self.output_tokens is None else self.output_tokens) * self.answers


_NO_LIMITS = CallLimits(None, 1, ())
_UNREAD = CallLimits(None, 1, (), is_read=False)


def limits_of(
    kind: str, format_: str, body: bytes, fields: RequestFields | None
) -> CallLimits | None:
    """Return the limits of a call; None if it sets none. `fields` are those of its body if they
    have been read.
    """
    if fields is None:
        fields = read_fields(body)
        if fields is None:
            return _UNREAD if body and kind in ESTIMATED else None
    values = _values_of(fields)
    if values == _NO_VALUES and kind != "completion":
        return None
    given = [(name, raw) for name, raw in zip(_MARKS, values, strict=True) if raw is not ABSENT]
    is_repeated = has_unicode_escapes(body)
    for mark in {_MARKS[name] for name, _ in given}:
        is_repeated = is_repeated or occurrences(mark, body) > 1
    if is_repeated:
        # Of a repeated field, the provider may read another one than this parser.
        found = pairs(body)
        if found is None:
            return _UNREAD
        given += found
    asked = prompts(body) if kind == "completion" else 1
    limits = _limits(kind, format_, given)
    if asked is None or limits is None:
        return _UNREAD
    return limits if asked == 1 else limits._replace(answers=limits.answers * asked)


def _limits(kind: str, format_: str, given: Sequence[tuple[str, msgspec.Raw]]) -> CallLimits | None:
    """Return the highest limits of these fields; None if one of them is unreadable."""
    names = _MORE_BOUNDS.get((kind, format_)) or _BOUNDS.get(kind, ())
    bounds, answers, tiers = [0], [0], dict[str, None]()
    for name, raw in given:
        if name in names:
            bounds.append(count(raw))
        elif name in _ANSWERS:
            answers.append(count(raw))
        elif name in _TIERS:
            tiers[_tier(name, value(raw))] = None
        elif name in _CONFIGS and (kind in _CONFIGURED or format_ == "google"):
            config = bytes(raw)
            if (within := pairs(config)) is None:
                if may_be_object(config):
                    return None
                continue
            bounds += [count(held) for inner, held in within if inner in _BOUNDS_WITHIN]
            answers += [count(held) for inner, held in within if inner in _ANSWERS_WITHIN]
    tiers.pop("", None)
    if len(tiers) > _MAX_TIERS:
        return None
    return CallLimits(max(bounds) or None, max(answers) or 1, tuple(tiers))


def _bound_without_text(
    sent: SentCall, format_: str, body: bytes | None, content_type: str
) -> CallBound:
    is_read = body is not None
    if sent.kind == "speech":
        spoken = characters(format_, body) if body is not None else sent.length
        tokens = spoken * _SPEECH_TOKENS
        return CallBound(
            spoken, tokens, characters=spoken, units=1, may_hold_audio=True, is_read=is_read
        )
    if sent.kind == "transcription":
        # A body that is compressed is as long as its text, or of unknown length.
        audio_ms = max(sent.length, len(body or b"")) * 1000 // _AUDIO_BYTES_PER_S
        if body is None or fetches_audio(body, content_type):
            audio_ms = max(audio_ms, _REMOTE_AUDIO_MS)
        seconds = audio_ms // 1000 + 1
        tokens = seconds * _TRANSCRIPT_TOKENS_PER_S
        return CallBound(
            seconds * _AUDIO_TOKENS_PER_S, tokens, audio_ms=audio_ms, units=1, may_hold_audio=True
        )
    if sent.kind == "image":
        asked = images(body, content_type) if body is not None else None
        made = asked or _UNREAD_IMAGES
        return CallBound(
            sent.input_tokens, _IMAGE_TOKENS, made, images=made, units=made,
            is_read=asked is not None,
        )  # fmt: skip
    return CallBound(_input_tokens(sent, body), units=1, is_read=is_read)


def _tier(name: str, given: Any) -> str:
    """Return the service tier that a field asks for; empty for the standard one."""
    if name == "speed":
        return "fast" if given == "fast" else ""
    return given if isinstance(given, str) and given not in _STANDARD_TIERS else ""
