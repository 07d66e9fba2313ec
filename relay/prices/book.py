"""What calls cost: by gateway.yaml's own `pricing:`, or by the public list of genai-prices.

Owns: whose rates hold for a call. The list comes with the relay and never calls home. A lookup in
it takes as long as a whole call does, so what it says is kept for a quarter of an hour: some of
its prices depend on the time of day.
"""

from __future__ import annotations

import datetime
from bisect import bisect_left
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec

from relay.core.exchange import Exchange
from relay.core.pricing import CUSTOM_COST, Rates, Tariff, custom_cost, tariff
from relay.core.provider import Provider
from relay.core.text import clean
from relay.core.usage import Parts, Usage, believable, total

_KEPT_S = 900
_MOST_KEPT = 2000
_MOST_NANO_USD = 10**13
"""Ten thousand dollars: nothing that a single call can cost."""
_LISTED_AS: Mapping[str, str] = {
    "google-ai-studio": "google",
    "grok": "x-ai",
    "azure-openai": "azure",
}
"""Where the list calls a provider by another name."""
_LISTED: Mapping[str, tuple[str, ...]] = {
    "input": ("input_mtok",),
    "output": ("output_mtok",),
    "cache_read": ("cache_read_mtok",),
    "cache_write": ("cache_write_mtok", "cache_write_5m_mtok"),
    "cache_write_1h": ("cache_write_1h_mtok",),
    "reasoning": ("output_reasoning_mtok",),
    "input_audio": ("input_audio_mtok",),
    "output_audio": ("output_audio_mtok",),
    "cache_audio_read": ("cache_audio_read_mtok",),
    "input_image": ("input_image_mtok",),
    "output_image": ("output_image_mtok",),
    "cache_image_read": ("cache_image_read_mtok",),
    "characters": ("input_mchars",),
    "audio_hour": ("input_audio_hours", "audio_hours"),
}


_LISTED_BY_THOUSAND: Mapping[str, str] = {
    "call": "requests_kcount",
    "web_search": "web_searches_kcount",
    "page": "input_document_kpages",
}


class _Tiers(NamedTuple):
    """Tariffs by how long the input is: the one at `bisect_left(starts, input_tokens)` holds."""

    starts: tuple[int, ...]
    tariffs: tuple[Tariff, ...]
    least_audio_ms: int = 0


class Prices:
    """What is known of prices, for one process."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, str, int], _Tiers | None] = {}

    def settle(self, exchange: Exchange, unix_s: float) -> None:
        """Write down what an exchange cost."""
        meter, route = exchange.meter, exchange.route
        if exchange.cached:
            exchange.cost_nano_usd = 0
        elif meter is not None and route is not None:
            parts = exchange.parts
            exchange.used, exchange.cost_nano_usd = believable(total(parts)), None
            if exchange.used is None:
                return
            cost = self._cost(exchange, parts, route.provider, unix_s)
            exchange.cost_nano_usd = cost if cost is None or cost < _MOST_NANO_USD else None

    def _cost(
        self, exchange: Exchange, parts: Parts, provider: Provider, unix_s: float
    ) -> int | None:
        custom = exchange.headers.get(CUSTOM_COST) if exchange.headers is not None else None
        own = custom_cost(custom) if custom else None
        if isinstance(own, int):
            return own
        asked = exchange.route.replaced_model if exchange.route else None
        named = asked or exchange.model
        whole = None
        for part in parts:
            usage, billed = part.usage, part.billed or part.usage
            if usage.billed_nano_usd is not None:
                cost: int | None = usage.billed_nano_usd
            elif usage.incomplete:
                cost = None
            elif own is not None:
                cost = own.cost_nano_usd(billed)
            else:
                # Names from outside: the list's cache holds what it was asked for.
                models = tuple(clean(name) if name else None for name in (part.model, named))
                cost = self.cost_nano_usd(provider, models, billed, unix_s)
            if cost is None:
                return None
            whole = cost + (whole or 0)
        return whole

    def cost_nano_usd(
        self, provider: Provider, models: tuple[str | None, ...], usage: Usage, unix_s: float
    ) -> int | None:
        """By the first of `models` that has a price; None if none has."""
        for rule in provider.pricing:
            if rule.service_tier == usage.service_tier and any(
                rule.holds(model, unix_s) for model in models
            ):
                return rule.tariff.cost_nano_usd(usage)
        name = provider.priced_as or _LISTED_AS.get(provider.name, provider.name)
        for model in models:
            if not model:
                continue
            tiers = self._listed(name, model, usage.service_tier, unix_s)
            if tiers is not None:
                at = bisect_left(tiers.starts, usage.input_tokens) if tiers.starts else 0
                if tiers.least_audio_ms > usage.audio_ms > 0:
                    usage = msgspec.structs.replace(usage, audio_ms=tiers.least_audio_ms)
                return tiers.tariffs[at].cost_nano_usd(usage)
        return None

    def _listed(
        self, provider: str, model: str, service_tier: str, unix_s: float
    ) -> _Tiers | None:
        key = (provider, model, service_tier, int(unix_s // _KEPT_S))
        try:
            return self._kept[key]
        except KeyError:
            pass
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        found = self._kept[key] = _look_up(provider, model, service_tier, unix_s)
        return found


def _context(service_tier: str, model: Any) -> dict[str, str] | None:
    """What the list calls a service tier of a model; None if it has no prices of it."""
    listed = [each.when for each in model.price_variants or ()]
    for context in ({"service_tier": service_tier}, *_CONTEXTS.get(service_tier, ())):
        if context in listed:
            return context
    return None


_CONTEXTS: Mapping[str, tuple[dict[str, str], ...]] = {
    "batch": ({"processing": "batch"},),
    "fast": ({"speed": "fast"},),  # Anthropic's; OpenAI's is a tier
}
_LEAST_AUDIO_MS = {
    ("groq", "whisper-large-v3"): 10_000,
    ("groq", "whisper-large-v3-turbo"): 10_000,
}
"""What a call is billed for at the least."""


def _look_up(provider: str, model: str, service_tier: str, unix_s: float) -> _Tiers | None:
    # Imported with the first price asked for: its list takes a quarter of a second to load.
    from genai_prices.data_snapshot import get_snapshot

    when = datetime.datetime.fromtimestamp(unix_s, datetime.UTC)
    try:
        _, found = get_snapshot().find_provider_model(model, None, provider, None)
    except LookupError:
        return None
    context = _context(service_tier, found) if service_tier else None
    if service_tier and context is None:
        return None  # the list would say the standard price
    listed = found.get_prices(when, context)
    starts: set[int] = set()
    for names in _LISTED.values():
        for name in names:
            starts |= {tier.start for tier in getattr(_own(listed, name), "tiers", ())}
    ordered = tuple(sorted(starts))
    tariffs = tuple(
        tariff(_rates(listed, above), audio_is_text=provider == "google") for above in (0, *ordered)
    )
    return _Tiers(ordered, tariffs, _LEAST_AUDIO_MS.get((provider, found.id), 0))


def _own(listed: Any, name: str) -> Any:
    return listed.__dict__.get(name)


def _rates(listed: Any, above: int) -> Rates:
    """The rates that hold for more than so many tokens of input."""
    found: dict[str, Decimal] = {}
    for field, names in _LISTED.items():
        price: Any = next((p for name in names if (p := _own(listed, name)) is not None), None)
        tiers = getattr(price, "tiers", None)
        if tiers is not None:
            tier = next((t for t in reversed(tiers) if above >= t.start and above), None)
            price = tier.price if tier is not None else price.base
        if price is not None:
            found[field] = price
    for rate, name in _LISTED_BY_THOUSAND.items():
        if isinstance(price := _own(listed, name), Decimal):
            found[rate] = price / 1000
    return Rates(**found)
