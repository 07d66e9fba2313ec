"""Compute the cost of usage from rates. Money is an integer: billionths of a US dollar in results,
and 10^-18 US dollars in between, so that rounding of rates does not matter.

Owns Rates, Tariff and PriceRule, the rate of each count of a Usage, and the parser of
`cf-aig-custom-cost`. prices/price_list.py finds the rates of a call.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import compress
from operator import mul
from typing import NamedTuple

from relay.core.usage import COUNTS, CallBound, Usage, counts_of

CUSTOM_COST = "cf-aig-custom-cost"
_ATTO = 10**18
_ATTO_PER_NANO = _NANO_PER_USD = 10**9
_PER_MTOK = Decimal(10**12)
"""US dollars per million tokens, in 10^-18 US dollars per token."""
_PER_HOUR = Decimal(_ATTO) / 3_600_000
_AMOUNT = re.compile(r"[0-9]{1,16}(?:\.[0-9]{0,18})?(?:[eE][+-]?[0-9]{1,2})?\Z")
MAX_USD = Decimal(1_000_000)
_MOST_PAGES = 1000
"""Pages of the largest document that Mistral reads."""
MAX_CALL_NANO_USD = 10**13
"""10,000 US dollars, the highest cost of a single call: a higher one is an error."""


@dataclass(frozen=True, slots=True)
class Rates:
    """US dollars per million tokens of each kind, per million characters, per hour of audio, per
    unit of the provider, image, web search, page and call. A part without a rate has the rate of
    its whole: cached input that of input.
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
    """Rates prepared for multiplication, in the order of COUNTS."""

    each: tuple[int, ...]
    """The amount that one unit of a count adds to the cost, in 10^-18 US dollars."""
    unpriced: tuple[bool, ...]
    """True for a count that has no price."""
    call: int
    """The price of the call itself, in 10^-18 US dollars."""
    worst: Worst

    def cost_nano_usd(self, usage: Usage) -> int | None:
        """Return the cost in billionths of a US dollar; None if a used count has no price."""
        counts = counts_of(usage)
        if any(compress(counts, self.unpriced)):
            return None
        return rounded(self.call + sum(map(mul, counts, self.each)))

    def known_nano_usd(self, usage: Usage) -> int:
        """Return the cost of the counts that have a price."""
        return rounded(self.call + sum(map(mul, counts_of(usage), self.each)))

    def bound_nano_usd(self, bound: CallBound, max_output_tokens: int) -> int | None:
        """Return the highest cost of a call; None if nothing that it can use has a price.
        `max_output_tokens` is the bound of a call that sets none.
        """
        worst = self.worst
        output = max_output_tokens if bound.output_tokens is None else bound.output_tokens
        output *= bound.answers
        input_, output_ = worst.input, worst.output
        if worst.written and bound.asks_for_cache:
            input_ += worst.written
        if (worst.input_audio > input_ or worst.output_audio > output_) and bound.asks_for_audio:
            input_, output_ = max(input_, worst.input_audio), max(output_, worst.output_audio)
        tokens = bound.input_tokens * input_ + output * output_
        if worst.has_only_tokens:
            return rounded(self.call + tokens)
        # A provider bills one of these: tokens, characters, seconds, images, its units or pages.
        atto_usd = max(
            tokens,
            bound.characters * worst.characters,
            bound.audio_ms * worst.audio_ms,
            bound.images * worst.images,
            bound.units * worst.units,
            bound.units * worst.pages,
        )
        counted = (True, bound.characters, bound.audio_ms, bound.images, bound.units, bound.units)
        if not (self.call or any(compress(worst.is_priced, counted))):
            return None
        return rounded(self.call + atto_usd)

    @property
    def plain_rates(self) -> PlainRates | None:
        """The rates that bound the cost of every call; None if that depends on more than tokens."""
        if not self.worst.is_plain:
            return None
        return PlainRates(self.call + _ATTO_PER_NANO // 2, self.worst.input, self.worst.output)


class PlainRates(NamedTuple):
    """Rates in 10^-18 US dollars: of a call, an input token and an output token."""

    call: int
    """With the half of a billionth by which a sum is rounded."""
    input: int
    output: int

    def nano_usd(self, input_tokens: int, output_tokens: int) -> int:
        """Return the highest cost of so many tokens, as Tariff.bound_nano_usd does."""
        tokens = input_tokens * self.input + output_tokens * self.output
        return (self.call + tokens) // _ATTO_PER_NANO


class Worst(NamedTuple):
    """The highest rates of a tariff, in 10^-18 US dollars."""

    input: int
    written: int
    """The most that a token adds that is written to the provider's cache."""
    input_audio: int
    output: int
    output_audio: int
    characters: int
    audio_ms: int
    images: int
    units: int
    pages: int
    """Of a whole document, whose pages only the provider counts."""
    is_priced: tuple[bool, ...]
    """Which of tokens, characters, seconds, images, units and pages have a price, which may be
    zero."""
    has_only_tokens: bool
    """True if tokens have a price, and nothing else has."""
    is_plain: bool
    """True if, besides, no token can cost more than others: most models of text."""


def _worst(rate: Mapping[str, int], unpriced: Collection[str]) -> Worst:
    written = rate["cache_write_tokens"]
    output = rate["output_tokens"] + max(0, rate["reasoning_tokens"], rate["output_image_tokens"])
    counted = ("characters", "audio_ms", "images", "units_milli", "pages")
    is_priced = (
        "input_tokens" not in unpriced or "output_tokens" not in unpriced,
        *(name not in unpriced for name in counted),
    )
    input_ = rate["input_tokens"] + max(0, rate["input_image_tokens"])
    written = max(0, written, written + rate["cache_write_1h_tokens"])
    input_audio = rate["input_tokens"] + rate["input_audio_tokens"]
    output_audio = rate["output_tokens"] + rate["output_audio_tokens"]
    has_only_tokens = is_priced[0] and not any(is_priced[1:])
    return Worst(
        input_,
        written,
        input_audio,
        output,
        output_audio,
        rate["characters"],
        rate["audio_ms"],
        rate["images"],
        rate["units_milli"] * 1000,
        rate["pages"] * _MOST_PAGES,
        is_priced,
        has_only_tokens,
        has_only_tokens and not written and input_audio <= input_ and output_audio <= output,
    )


def rounded(atto_usd: int) -> int:
    """Round to billionths, half up. Contradictory counts can give a negative cost, which is 0."""
    return max(0, (atto_usd + _ATTO_PER_NANO // 2) // _ATTO_PER_NANO)


def usd_text(nano_usd: int) -> str:
    """Format billionths of a dollar as dollars with every digit, such as `0.000384`."""
    whole, part = divmod(abs(nano_usd), _NANO_PER_USD)
    sign = "-" if nano_usd < 0 else ""
    return f"{sign}{whole}.{part:09d}".rstrip("0").rstrip(".")


def tariff(rates: Rates, *, audio_is_text: bool) -> Tariff:
    """Prepare rates. `audio_is_text`: audio input without a rate costs what text costs, as in
    Google's price list; otherwise the cost of a call with audio is unknown, for audio costs several
    times as much.
    """
    r = rates
    input_, output = r.input or Decimal(0), r.output or Decimal(0)
    cache_read = input_ if r.cache_read is None else r.cache_read
    cache_write = input_ if r.cache_write is None else r.cache_write
    cache_write_1h = cache_write if r.cache_write_1h is None else r.cache_write_1h
    input_audio = input_ if r.input_audio is None else r.input_audio
    cached_audio = r.cache_audio_read
    if cached_audio is None:
        cached_audio = min(cache_read, input_audio)
    input_image = input_ if r.input_image is None else r.input_image
    cached_image = r.cache_image_read
    if cached_image is None:
        cached_image = min(cache_read, input_image)
    adds = {
        "input_tokens": input_,
        "output_tokens": output,
        "cache_read_tokens": cache_read - input_,
        "cache_write_tokens": cache_write - input_,
        "cache_write_1h_tokens": cache_write_1h - cache_write,
        "reasoning_tokens": (output if r.reasoning is None else r.reasoning) - output,
        "input_audio_tokens": input_audio - input_,
        "output_audio_tokens": (output if r.output_audio is None else r.output_audio) - output,
        # Cached audio is subtracted twice above, as cached and as audio.
        "cache_audio_read_tokens": cached_audio - cache_read - input_audio + input_,
        "input_image_tokens": input_image - input_,
        "output_image_tokens": (output if r.output_image is None else r.output_image) - output,
        "cache_image_read_tokens": cached_image - cache_read - input_image + input_,
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
        _worst(each, unpriced),
    )


def _unpriced(r: Rates, *, audio_is_text: bool) -> set[str]:
    """Return the counts that have no price."""
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
    """The rates of some models of a provider, from `from_s` to `until_s` (seconds since 1970)."""

    models: tuple[str, ...]
    """Names, `*` is allowed; empty: all models."""
    from_s: float
    until_s: float
    tariff: Tariff
    service_tier: str = ""
    """The tier that served the call; empty: the standard one."""
    max_output_tokens: int | None = None
    """The most output of a call that sets no maximum; None: unknown."""

    def holds(self, model: str | None, unix_s: float) -> bool:
        """True if the rule applies to this model at this time."""
        if not self.from_s <= unix_s < self.until_s:
            return False
        return not self.models or (
            model is not None
            and any(fnmatch.fnmatchcase(model.lower(), name.lower()) for name in self.models)
        )


def usd_of(text: str) -> Decimal | None:
    """Parse an amount such as `20` or `0.5`, with all of its digits; None for anything else that
    Decimal accepts: signs, blanks, underscores, the digits of any script.
    """
    return Decimal(text) if _AMOUNT.match(text) else None


def custom_cost(header: str) -> Tariff | int | None:
    """Parse a client's `cf-aig-custom-cost` into rates, or into the total cost in billionths of a
    US dollar; None if it is unreadable.
    """
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
