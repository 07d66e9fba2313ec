"""The usage of a call: as its provider reports it, and as estimated before the call is sent.

Owns Usage, Part, Estimate and CallBound. core/meters/ reads usage from responses.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import msgspec

BYTES_PER_TOKEN = 4
"""For text in UTF-8: English has about four; other scripts have more bytes and fewer tokens per
character."""
# Serializers escape other scripts, and of ASCII only quotes, controls and what HTML reserves.
_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Counts in whole units, with the kinds of tokens that the provider reports.

    Each `input` and `output` count includes its parts: tokens read from a cache and written to one,
    reasoning, audio and images.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    """The part of cache_write_tokens that is kept for an hour instead of minutes."""
    reasoning_tokens: int = 0
    input_audio_tokens: int = 0
    output_audio_tokens: int = 0
    cache_audio_read_tokens: int = 0
    input_image_tokens: int = 0
    output_image_tokens: int = 0
    cache_image_read_tokens: int = 0
    characters: int = 0
    """Characters of text turned into speech."""
    audio_ms: int = 0
    """Audio that was transcribed, or the length of a spoken session."""
    units_milli: int = 0
    """Thousandths of a provider's own unit, such as fal's."""
    images: int = 0
    """Generated images whose tokens are not reported."""
    web_searches: int = 0
    """Web searches, which are billed in addition to tokens."""
    pages: int = 0
    """Pages of documents that were read."""
    billed_nano_usd: int | None = None
    """The cost that the provider reports, in billionths of a US dollar."""
    estimated: bool = False
    """True if the relay estimated a count that the provider did not report."""
    service_tier: str = ""
    """The service tier if it is not the standard one: flex, priority, batch, …"""
    incomplete: bool = False
    """True if something is billed that these counts do not include: the cost is unknown."""

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        sums = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        bills = [bill for bill in (self.billed_nano_usd, other.billed_nano_usd) if bill is not None]
        return Usage(
            **sums,
            billed_nano_usd=sum(bills) if bills else None,
            estimated=self.estimated or other.estimated,
            service_tier=self.service_tier if self.service_tier == other.service_tier else "",
            incomplete=self.incomplete or other.incomplete,
        )


Booking = Literal["once", "made", "so_far"]
"""How the usage of a provider's object is counted. once: unless it was counted before; made:
always, because this call created the object; so_far: the part of a growing count that is new."""


class Part(NamedTuple):
    """The usage of one model."""

    model: str | None
    """None if the response does not name it."""
    usage: Usage
    billed: Usage | None = None
    """The billed counts, if they differ from the used ones (Cohere)."""
    object_id: str = ""
    """The provider's id of the object that the usage belongs to, if the object can be read again.
    Its usage counts once, however often the provider repeats it."""
    booking: Booking = "once"


Parts = tuple[Part, ...]
_NO_COUNTS = frozenset({"billed_nano_usd", "estimated", "service_tier", "incomplete"})
COUNTS = tuple(name for name in Usage.__struct_fields__ if name not in _NO_COUNTS)
"""The names of the counts, in the order of Usage."""
_KINDS = len(COUNTS)


def counts_of(usage: Usage) -> tuple[int, ...]:
    """Return the counts of a Usage, in the order of COUNTS."""
    counts: tuple[int, ...] = msgspec.structs.astuple(usage)[:_KINDS]
    return counts


def total(parts: Parts) -> Usage | None:
    """Return the sum of all parts; None if there are none."""
    whole = None
    for part in parts:
        whole = part.usage if whole is None else whole + part.usage
    return whole


def clamped(usage: Usage) -> Usage:
    """Limit each part to its whole: details of some vendors contradict their sums."""
    input_tokens, output_tokens = usage.input_tokens, usage.output_tokens
    if (
        usage.cache_read_tokens + usage.cache_write_tokens <= input_tokens
        and usage.cache_write_1h_tokens <= usage.cache_write_tokens
        and usage.reasoning_tokens <= output_tokens
        and usage.input_audio_tokens + usage.input_image_tokens <= input_tokens
        and usage.output_audio_tokens + usage.output_image_tokens <= output_tokens
        and usage.cache_audio_read_tokens + usage.cache_image_read_tokens <= usage.cache_read_tokens
    ):
        return usage
    cache_read = min(usage.cache_read_tokens, input_tokens)
    cache_write = min(usage.cache_write_tokens, input_tokens - cache_read)
    input_audio = min(usage.input_audio_tokens, input_tokens)
    output_audio = min(usage.output_audio_tokens, output_tokens)
    cached_audio = min(usage.cache_audio_read_tokens, cache_read)
    return msgspec.structs.replace(
        usage,
        cache_read_tokens=cache_read,
        cache_write_tokens=cache_write,
        cache_write_1h_tokens=min(usage.cache_write_1h_tokens, cache_write),
        reasoning_tokens=min(usage.reasoning_tokens, output_tokens),
        input_audio_tokens=input_audio,
        input_image_tokens=min(usage.input_image_tokens, input_tokens - input_audio),
        output_audio_tokens=output_audio,
        output_image_tokens=min(usage.output_image_tokens, output_tokens - output_audio),
        cache_audio_read_tokens=cached_audio,
        cache_image_read_tokens=min(usage.cache_image_read_tokens, cache_read - cached_audio),
    )


_MAX_COUNT = 1 << 40


def believable(usage: Usage | None) -> Usage | None:
    """Return None instead of a usage that is negative or impossibly large."""
    if usage is None:
        return None
    counts = counts_of(usage)
    return usage if min(counts) >= 0 and sum(counts) < _MAX_COUNT else None


class CallBound(msgspec.Struct, frozen=True, gc=False):
    """What a call can use at most."""

    input_tokens: int = 0
    output_tokens: int | None = 0
    """Of each answer; None: what the model can answer at most."""
    answers: int = 1
    characters: int = 0
    images: int = 0
    audio_ms: int = 0
    units: int = 0
    """The provider's own units, such as fal's and Cohere's."""
    may_hold_audio: bool = False
    """True if tokens may be billed as audio, whatever `text` says."""
    service_tiers: tuple[str, ...] = ()
    """Those besides the standard one that may serve the call."""
    text: bytes = b""
    """The body of a call. It is searched only where a price depends on what it asks for."""
    is_read: bool = True
    """False if the body may ask for more than this: the relay cannot read it."""

    @property
    def asks_for_audio(self) -> bool:
        """True if tokens may be billed as audio."""
        # A media type may be written in any case.
        return self.may_hold_audio or b"audio" in self.text.lower() or self._hides_words

    @property
    def asks_for_cache(self) -> bool:
        """True if input may be billed as written to the provider's cache."""
        return b"cache" in self.text or self._hides_words

    @property
    def _hides_words(self) -> bool:
        """True if the text has escapes of ASCII letters, with which any word may be spelled."""
        return b"\\" in self.text and _ESCAPED_LETTER.search(self.text) is not None


class Estimate(NamedTuple):
    """Estimated tokens of a call before it is sent."""

    input_tokens: int = 0
    bound: int | None = None
    """Maximum output tokens of each answer; None if the call sets none."""
    answers: int = 1

    def tokens(self, answer_tokens: int) -> int:
        """Return input and output tokens. `answer_tokens` is the bound of a call without one."""
        bound = answer_tokens if self.bound is None else self.bound
        return self.input_tokens + bound * self.answers
