"""What usage costs: rates, and the arithmetic. Money is whole numbers: billionths of a US dollar at
the end, and on the way units so small that no rate is rounded to be felt.

Owns: the nouns Rates and PriceRule, what of a Usage is charged at which rate, and the reading of
`cf-aig-custom-cost`. Where rates come from is prices/price_list.py's.
"""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass
from decimal import Decimal
from itertools import compress
from operator import mul
from typing import NamedTuple

from relay.core.usage import COUNTS, Usage, counts_of

CUSTOM_COST = "cf-aig-custom-cost"
_ATTO = 10**18
_TO_NANO = 10**9
_PER_MTOK = Decimal(10**12)
"""US dollars a million tokens, in 10^-18 dollars a token."""
_PER_HOUR = Decimal(_ATTO) / 3_600_000
MAX_USD = Decimal(1_000_000)


@dataclass(frozen=True, slots=True)
class Rates:
    """US dollars: for a million tokens of each kind and a million characters, for an hour of audio,
    for one of the provider's own units, for a call. What has no rate of its own costs what its
    whole costs: cached input as input.
    """

    input: Decimal | None = None
    output: Decimal | None = None
    cache_read: Decimal | None = None
    cache_write: Decimal | None = None
    cache_write_1h: Decimal | None = None
    reasoning: Decimal | None = None
    input_audio: Decimal | None = None
    output_audio: Decimal | None = None
    cache_audio_read: Decimal | None = None
    input_image: Decimal | None = None
    output_image: Decimal | None = None
    cache_image_read: Decimal | None = None
    characters: Decimal | None = None
    audio_hour: Decimal | None = None
    unit: Decimal | None = None
    image: Decimal | None = None
    web_search: Decimal | None = None
    page: Decimal | None = None
    call: Decimal | None = None


class Tariff(NamedTuple):
    """Rates made ready, in the order of a Usage's COUNTS."""

    each: tuple[int, ...]
    """What one of a count adds, in 10^-18 US dollars."""
    unpriced: tuple[bool, ...]
    """True for a count that has no price."""
    call: int

    def cost_nano_usd(self, usage: Usage) -> int | None:
        """None if something was used that has no price."""
        counts = counts_of(usage)
        if any(compress(counts, self.unpriced)):
            return None
        return rounded(self.call + sum(map(mul, counts, self.each)))


def rounded(atto_usd: int) -> int:
    """To billionths, half up. Never below nothing: counts that contradict each other happen."""
    return max(0, (atto_usd + _TO_NANO // 2) // _TO_NANO)


def tariff(rates: Rates, *, audio_is_text: bool) -> Tariff:
    """`audio_is_text`: audio input without a rate costs what text costs, as Google has it; where it
    is false such a call is not priced, for audio costs several times as much.
    """
    r = rates
    given, made = r.input or Decimal(0), r.output or Decimal(0)
    read = given if r.cache_read is None else r.cache_read
    wrote = given if r.cache_write is None else r.cache_write
    heard = given if r.input_audio is None else r.input_audio
    heard_again = min(read, heard) if r.cache_audio_read is None else r.cache_audio_read
    seen = given if r.input_image is None else r.input_image
    seen_again = min(read, seen) if r.cache_image_read is None else r.cache_image_read
    adds = {
        "input_tokens": given,
        "output_tokens": made,
        "cache_read_tokens": read - given,
        "cache_write_tokens": wrote - given,
        "cache_write_1h_tokens": (wrote if r.cache_write_1h is None else r.cache_write_1h) - wrote,
        "reasoning_tokens": (made if r.reasoning is None else r.reasoning) - made,
        "input_audio_tokens": heard - given,
        "output_audio_tokens": (made if r.output_audio is None else r.output_audio) - made,
        # What was read from the cache and is audio, was taken off twice.
        "cache_audio_read_tokens": heard_again - read - heard + given,
        "input_image_tokens": seen - given,
        "output_image_tokens": (made if r.output_image is None else r.output_image) - made,
        "cache_image_read_tokens": seen_again - read - seen + given,
    }
    each = {name: int(usd * _PER_MTOK) for name, usd in adds.items()}
    each |= {
        "characters": int((r.characters or Decimal(0)) * _PER_MTOK),
        "audio_ms": round((r.audio_hour or Decimal(0)) * _PER_HOUR),
        "units_milli": int((r.unit or Decimal(0)) * _ATTO / 1000),
        "images": int((r.image or Decimal(0)) * _ATTO),
        "web_searches": int((r.web_search or Decimal(0)) * _ATTO),
        "pages": int((r.page or Decimal(0)) * _ATTO),
    }
    unpriced = _unpriced(rates, audio_is_text=audio_is_text)
    return Tariff(
        tuple(each[name] for name in COUNTS),
        tuple(name in unpriced for name in COUNTS),
        int((r.call or Decimal(0)) * _ATTO),
    )


def _unpriced(r: Rates, *, audio_is_text: bool) -> set[str]:
    """What of a Usage has no price."""
    needed = {
        "input_tokens": r.input,
        "output_tokens": r.output,
        "output_audio_tokens": r.output_audio,
        "characters": r.characters,
        "audio_ms": r.audio_hour,
        "units_milli": r.unit,
        "images": r.image,
        "web_searches": r.web_search,
        "pages": r.page,
    }
    if not audio_is_text:
        needed["input_audio_tokens"] = r.input_audio
    return {name for name, rate in needed.items() if rate is None}


@dataclass(frozen=True, slots=True)
class PriceRule:
    """Rates of a provider's models, from one day until another, both in seconds since 1970."""

    models: tuple[str, ...]
    """Names, `*` is allowed; empty is all."""
    from_s: float
    until_s: float
    tariff: Tariff
    service_tier: str = ""
    """Of calls that this tier served; empty is the standard one."""

    def holds(self, model: str | None, unix_s: float) -> bool:
        """True if it is for this model, at this time."""
        if not self.from_s <= unix_s < self.until_s:
            return False
        return not self.models or (
            model is not None
            and any(fnmatch.fnmatchcase(model.lower(), name.lower()) for name in self.models)
        )


def custom_cost(header: str) -> Tariff | int | None:
    """A client's own rates, or its whole cost in billionths of a US dollar; None if unreadable."""
    try:
        given = json.loads(header, parse_float=Decimal, parse_int=Decimal)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict):
        return None
    rate = {name: _usd(given.get(name)) for name in _CUSTOM}
    total, each_in, each_out = rate["total_cost"], rate["per_token_in"], rate["per_token_out"]
    if total is not None:
        return round(total * 10**9)
    if each_in is None or each_out is None:
        return None
    read, wrote = rate["per_cache_read_token"], rate["per_cache_write_token"]
    million = 1_000_000
    return tariff(
        Rates(
            each_in * million,
            each_out * million,
            cache_read=None if read is None else read * million,
            cache_write=None if wrote is None else wrote * million,
            output_audio=each_out * million,
        ),
        audio_is_text=True,
    )


_CUSTOM = (
    "total_cost", "per_token_in", "per_token_out", "per_cache_read_token", "per_cache_write_token",
)  # fmt: skip


def _usd(given: object) -> Decimal | None:
    if isinstance(given, Decimal) and given.is_finite() and 0 <= given <= MAX_USD:
        return given
    return None
