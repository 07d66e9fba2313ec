"""What a call uses: as its provider counts it, and as it can be told before it is sent.

Owns: the noun Usage, and the estimate. Reading an answer is core/meters/'s.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeGuard

import msgspec

from relay.core.fields import ABSENT, Reader, field, value

BYTES_PER_TOKEN = 4
"""Of text in UTF-8: English has about four; other scripts have more bytes and fewer tokens a
character."""


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was used, in whole units; kinds of tokens are kept apart where the provider does.

    Each `input` and `output` count holds its parts: what was read from a cache, written to one,
    reasoning, audio and images.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    """Of those, what is kept for an hour instead of minutes."""
    reasoning_tokens: int = 0
    input_audio_tokens: int = 0
    output_audio_tokens: int = 0
    cache_audio_read_tokens: int = 0
    input_image_tokens: int = 0
    output_image_tokens: int = 0
    cache_image_read_tokens: int = 0
    characters: int = 0
    """Of text made speech."""
    audio_ms: int = 0
    """Of speech made text, or of a spoken session."""
    units_milli: int = 0
    """Thousandths of a provider's own unit, such as fal's."""
    images: int = 0
    """Made, where nothing else is told of them."""
    web_searches: int = 0
    """Billed beside the tokens, each."""
    pages: int = 0
    """Of documents read."""
    billed_nano_usd: int | None = None
    """What the provider itself says that it costs, in billionths of a US dollar."""
    estimated: bool = False
    """Counted here, since the provider did not say."""
    service_tier: str = ""
    """The tier that served it where that is not the standard one: flex, priority, batch, …"""
    incomplete: bool = False
    """Something else is billed that these counts do not hold: the cost is unknown."""

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
"""How the usage of a provider's object is counted: unless it was counted before; by all means,
since this call made the object; or as much of a growing count as was not counted before."""


class Part(NamedTuple):
    """What one model used."""

    model: str | None
    """None where it is not named."""
    usage: Usage
    billed: Usage | None = None
    """What is charged for, where the provider bills other counts than it used (Cohere)."""
    object_id: str = ""
    """The provider's id of what it was used for, where that can be read again: its usage counts
    once, however often the provider repeats it."""
    booking: Booking = "once"


Parts = tuple[Part, ...]
_NO_COUNTS = frozenset({"billed_nano_usd", "estimated", "service_tier", "incomplete"})
COUNTS = tuple(name for name in Usage.__struct_fields__ if name not in _NO_COUNTS)
"""The counts of a Usage, in its own order."""
_KINDS = len(COUNTS)


def counts_of(usage: Usage) -> tuple[int, ...]:
    """They, as numbers."""
    counts: tuple[int, ...] = msgspec.structs.astuple(usage)[:_KINDS]
    return counts


def total(parts: Parts) -> Usage | None:
    """All parts together; None of none."""
    whole = None
    for part in parts:
        whole = part.usage if whole is None else whole + part.usage
    return whole


def clamped(usage: Usage) -> Usage:
    """No part larger than its whole: vendors' details contradict their sums now and then."""
    given, made = usage.input_tokens, usage.output_tokens
    if (
        usage.cache_read_tokens + usage.cache_write_tokens <= given
        and usage.cache_write_1h_tokens <= usage.cache_write_tokens
        and usage.reasoning_tokens <= made
        and usage.input_audio_tokens + usage.input_image_tokens <= given
        and usage.output_audio_tokens + usage.output_image_tokens <= made
        and usage.cache_audio_read_tokens + usage.cache_image_read_tokens <= usage.cache_read_tokens
    ):
        return usage
    read = min(usage.cache_read_tokens, given)
    wrote = min(usage.cache_write_tokens, given - read)
    input_audio = min(usage.input_audio_tokens, given)
    output_audio = min(usage.output_audio_tokens, made)
    cached_audio = min(usage.cache_audio_read_tokens, read)
    return msgspec.structs.replace(
        usage,
        cache_read_tokens=read,
        cache_write_tokens=wrote,
        cache_write_1h_tokens=min(usage.cache_write_1h_tokens, wrote),
        reasoning_tokens=min(usage.reasoning_tokens, made),
        input_audio_tokens=input_audio,
        input_image_tokens=min(usage.input_image_tokens, given - input_audio),
        output_audio_tokens=output_audio,
        output_image_tokens=min(usage.output_image_tokens, made - output_audio),
        cache_audio_read_tokens=cached_audio,
        cache_image_read_tokens=min(usage.cache_image_read_tokens, read - cached_audio),
    )


_MAX_COUNT = 1 << 40


def believable(usage: Usage | None) -> Usage | None:
    """None of what nobody can have used in a call."""
    if usage is None:
        return None
    counts = counts_of(usage)
    return usage if min(counts) >= 0 and sum(counts) < _MAX_COUNT else None


class _Bounds(msgspec.Struct):
    """The fields by which a call bounds its answer."""

    max_tokens: msgspec.Raw = ABSENT
    max_completion_tokens: msgspec.Raw = ABSENT
    max_output_tokens: msgspec.Raw = ABSENT
    generationConfig: msgspec.Raw = ABSENT
    n: msgspec.Raw = ABSENT


_NONE = _Bounds()
_bounds = Reader(_Bounds)


class Estimate(NamedTuple):
    """What a call may use, before it is sent."""

    input_tokens: int = 0
    bound: int | None = None
    """Of each answer, if the call names one."""
    answers: int = 1

    def tokens(self, answer_tokens: int) -> int:
        """All of it; `answer_tokens` stands for the bound of a call that names none."""
        bound = answer_tokens if self.bound is None else self.bound
        return self.input_tokens + bound * self.answers


def estimate(body: bytes, input_tokens: int | None = None) -> Estimate:
    """Of a request body; without `input_tokens` at four bytes a token."""
    asked = _bounds.read(body) or _NONE
    bounds = (asked.max_completion_tokens, asked.max_tokens, asked.max_output_tokens)
    bound = next((each for raw in bounds if _is_bound(each := value(raw))), None)
    if bound is None and asked.generationConfig is not ABSENT:
        most = value(field(asked.generationConfig, "maxOutputTokens"))
        bound = most if _is_bound(most) else None
    answers = value(asked.n)
    given = len(body) // BYTES_PER_TOKEN if input_tokens is None else input_tokens
    return Estimate(given, bound, answers if _is_bound(answers) else 1)


def _is_bound(given: Any) -> TypeGuard[int]:
    return isinstance(given, int) and not isinstance(given, bool) and 0 < given < 1 << 31
