"""What a call uses: as its provider counts it, and as it can be told before it is sent.

Owns: the noun Usage, and the estimate. Reading an answer is core/meters/'s.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import msgspec

from relay.core.fields import ABSENT, field, is_readable, value

BYTES_A_TOKEN = 4


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
    billed_nano_usd: int | None = None
    """What the provider itself says that it costs, in billionths of a US dollar."""
    estimated: bool = False
    """Counted here, since the provider did not say."""

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
        )


Parts = tuple[tuple[str | None, Usage], ...]
"""A usage by model; None where the model is not named."""
COUNTS = tuple(
    name for name in Usage.__struct_fields__ if name not in ("billed_nano_usd", "estimated")
)
"""The counts of a Usage, in its own order."""
_KINDS = len(COUNTS)


def counts_of(usage: Usage) -> tuple[int, ...]:
    """They, as numbers."""
    counts: tuple[int, ...] = msgspec.structs.astuple(usage)[:_KINDS]
    return counts


def total(parts: Parts) -> Usage | None:
    """All parts together; None of none."""
    whole = None
    for _, usage in parts:
        whole = usage if whole is None else whole + usage
    return whole


_MOST = 1 << 40


def believable(usage: Usage | None) -> Usage | None:
    """None of what nobody can have used in a call."""
    if usage is None:
        return None
    counts = counts_of(usage)
    return usage if min(counts) >= 0 and sum(counts) < _MOST else None


class _Bounds(msgspec.Struct):
    """The fields by which a call bounds its answer."""

    max_tokens: msgspec.Raw = ABSENT
    max_completion_tokens: msgspec.Raw = ABSENT
    max_output_tokens: msgspec.Raw = ABSENT
    generationConfig: msgspec.Raw = ABSENT
    n: msgspec.Raw = ABSENT


_NONE = _Bounds()
_bounds = msgspec.json.Decoder(_Bounds)


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


def estimate(body: bytes) -> Estimate:
    """Of a request body, at four bytes a token. One that cannot be read in bounded time names no
    bound.
    """
    try:
        asked = _bounds.decode(body) if is_readable(body) else _NONE
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        asked = _NONE
    bounds = (asked.max_completion_tokens, asked.max_tokens, asked.max_output_tokens)
    bound = next((each for raw in bounds if _is_bound(each := value(raw))), None)
    if bound is None and asked.generationConfig is not ABSENT:
        given = value(field(asked.generationConfig, "maxOutputTokens"))
        bound = given if _is_bound(given) else None
    answers = value(asked.n)
    return Estimate(len(body) // BYTES_A_TOKEN, bound, answers if _is_bound(answers) else 1)


def _is_bound(given: Any) -> TypeGuard[int]:
    return isinstance(given, int) and not isinstance(given, bool) and 0 < given < 1 << 31
