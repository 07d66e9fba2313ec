"""Determine the cost of calls: by `pricing:` in gateway.yaml, or by the public list genai-prices.

Owns the choice of the rates for a call. The list is a Python package, and makes no network
requests. A lookup in it takes as long as a whole call, so the result is cached for 15 minutes.
"""

from __future__ import annotations

import datetime
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from relay.core.exchange import Exchange
from relay.core.meters.socket_meter import SocketMeter
from relay.core.pricing import (
    CUSTOM_COST,
    MAX_CALL_NANO_USD,
    PriceRule,
    Rates,
    Tariff,
    custom_cost,
    tariff,
)
from relay.core.provider import Provider, Route
from relay.core.text import clean
from relay.core.usage import CallBound, Part, Parts, Usage, believable, total

_PERIOD_S = 900
"""How long a price of the list is cached; some prices depend on the time of day."""
_VERSION = re.compile(r"[-@](?:\d{2,8}|\d{4}-\d\d-\d\d|\d\d-\d{2,4}|v\d{1,3}(?::\d)?)")
_MAX_COSTS = 2000
"""The costs of how many parts of a session are kept."""
_LISTED_AS: Mapping[str, str] = {
    "google-ai-studio": "google",
    "grok": "x-ai",
    "azure-openai": "azure",
}
"""Names of providers to their names in the list, if they differ."""
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
    """Tariffs by the number of input tokens: `tariffs[bisect_left(starts, input_tokens)]`."""

    starts: tuple[int, ...]
    tariffs: tuple[Tariff, ...]
    min_audio_ms: int = 0


def set_cost(exchange: Exchange, unix_s: float) -> None:
    """Set the usage and the cost of an exchange."""
    usage, route = exchange.usage, exchange.routing.route
    if exchange.cache is not None and exchange.cache.is_hit:
        usage.cost_nano_usd = 0
    elif usage.meter is not None and route is not None:
        parts = usage.parts
        usage.used, usage.cost_nano_usd, usage.least_nano_usd = believable(total(parts)), None, 0
        if usage.used is None:
            return
        cost = _cost(exchange, parts, route.provider, unix_s)
        usage.cost_nano_usd = cost if cost is None or cost < MAX_CALL_NANO_USD else None
        if cost is None:
            least = known_nano_usd(exchange, parts, unix_s, {})
            usage.least_nano_usd = least if least < MAX_CALL_NANO_USD else 0


def _cost(exchange: Exchange, parts: Parts, provider: Provider, unix_s: float) -> int | None:
    custom = exchange.request.headers.get(CUSTOM_COST)
    # A budget does not take its client's word for the price.
    own = custom_cost(custom) if custom and exchange.budget is None else None
    if isinstance(own, int):
        return own
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
            models, are_one = _models_of(part, exchange)
            cost = cost_nano_usd(provider, models, billed, unix_s, are_one=are_one)
        if cost is None:
            return None
        whole = cost + (whole or 0)
    return whole


def _models_of(part: Part, exchange: Exchange) -> tuple[tuple[str | None, ...], bool]:
    """Return the model of a part and the requested one, and True if both name one model: a name of
    the owner, such as that of a deployment, is requested, and the provider's name answers. A tool
    of a response and a later response of a session have models of their own.
    """
    route = exchange.routing.route
    requested = (route.replaced_model if route is not None else None) or exchange.request.model
    # Names from outside are cleaned, because they become keys of the lookup's cache.
    model = clean(part.model) if part.model else None
    requested = clean(requested) if requested else None
    if model is None or requested is None or model == requested:
        return (model or requested,), True
    meter = exchange.usage.meter
    if isinstance(meter, SocketMeter):
        answers = part.model == meter.first_model
    else:
        answers = meter is not None and part.model == meter.model
    return (model, requested), answers or _is_version(model, requested)


def _is_version(model: str, requested: str) -> bool:
    """True for a dated or numbered name of the requested model: `gpt-5-2025-08-07` of `gpt-5`."""
    base = requested.removesuffix("-latest")
    return model.startswith(base) and _VERSION.fullmatch(model, len(base)) is not None


def cost_nano_usd(
    provider: Provider, models: Sequence[str | None], usage: Usage, unix_s: float, *,
    are_one: bool = True,
) -> int | None:  # fmt: skip
    """Return the cost by the first of `models` that has a price; None if none has. See `_rated`."""
    found = _rated(provider, models, usage, unix_s, are_one=are_one)
    return found[0].cost_nano_usd(found[1]) if found is not None else None


def _rated(
    provider: Provider, models: Sequence[str | None], usage: Usage, unix_s: float, *,
    are_one: bool,
) -> tuple[Tariff, Usage] | None:  # fmt: skip
    """Return the tariff of the first of `models` that has one, and the usage that it bills. If they
    are names of one model, the rules for any of them come before the list.
    """
    if provider.pricing and are_one:
        rule = None
        for model in models:
            rule = _rule(provider, model, usage.service_tier, unix_s)
            if rule is not None and rule.models:
                break  # a rule for all models knows no model by its name
        if rule is not None:
            return rule.tariff, usage
    name = listed_name(provider)
    for model in models:
        if provider.pricing and not are_one:
            rule = _rule(provider, model, usage.service_tier, unix_s)
            if rule is not None:
                return rule.tariff, usage
        if not model:
            continue
        tiers = _listed(name, model, usage.service_tier, int(unix_s // _PERIOD_S))
        if tiers is not None:
            at = bisect_left(tiers.starts, usage.input_tokens) if tiers.starts else 0
            if tiers.min_audio_ms > usage.audio_ms > 0:
                usage = msgspec.structs.replace(usage, audio_ms=tiers.min_audio_ms)
            return tiers.tariffs[at], usage
    return None


def _rule(
    provider: Provider, model: str | None, service_tier: str, unix_s: float
) -> PriceRule | None:
    """Return the first rule of a provider that has the model in a service tier."""
    for rule in provider.pricing:
        if rule.service_tier == service_tier and rule.holds(model, unix_s):
            return rule
    return None


def known_nano_usd(exchange: Exchange, parts: Parts, unix_s: float, costs: dict[Part, int]) -> int:
    """Return what the parts of a call have cost, as far as their usage has a price. `costs` keeps
    the costs of the parts, of which a long session has a thousand, for the next call.
    """
    route = exchange.routing.route
    if route is None:
        return 0
    whole_nano = 0
    for part in parts:
        cost_nano = costs.get(part)
        if cost_nano is None:
            cost_nano = _known_nano_usd(part, exchange, route.provider, unix_s)
            if not part.usage.estimated and len(costs) < _MAX_COSTS:
                costs[part] = cost_nano
        whole_nano += cost_nano
    return min(whole_nano, MAX_CALL_NANO_USD)


def _known_nano_usd(part: Part, exchange: Exchange, provider: Provider, unix_s: float) -> int:
    usage = part.billed or part.usage
    if part.usage.billed_nano_usd is not None:
        return max(0, part.usage.billed_nano_usd)
    if believable(usage) is None:
        return 0
    models, are_one = _models_of(part, exchange)
    found = _rated(provider, models, usage, unix_s, are_one=are_one)
    return found[0].known_nano_usd(found[1]) if found is not None else 0


class TargetCost(NamedTuple):
    """What a call may cost at one of its targets."""

    model: str | None
    """The model that the target is asked for."""
    nano_usd: int | None
    """None: it has no price."""


def bound_costs(
    route: Route, model: str | None, bounds: Iterable[CallBound], default_output_tokens: int,
    unix_s: float,
) -> list[TargetCost]:  # fmt: skip
    """Return the highest cost of any of `bounds` at each target of a call."""
    found, bounds = [], tuple(bounds)
    for each in (route, *route.alternatives):
        named = each.replaced_model or model
        highest: int | None = None
        for bound in bounds:
            cost = _bound_nano_usd(each.provider, named, bound, default_output_tokens, unix_s)
            highest = _higher(highest, cost)
        found.append(TargetCost(named, highest))
    return found


def _bound_nano_usd(
    provider: Provider, model: str | None, bound: CallBound, default_output_tokens: int,
    unix_s: float,
) -> int | None:  # fmt: skip
    """Return the highest cost of a call; None if it has no price."""
    model, highest = clean(model) if model else None, None
    # A call that asks for a dearer tier may get the standard one, and the other way round.
    for tier in (*bound.service_tiers, ""):
        found = _tariff(provider, model, tier, bound.input_tokens, unix_s)
        if found is not None:
            tariff_, output_tokens = found
            cost = tariff_.bound_nano_usd(bound, output_tokens or default_output_tokens)
            highest = _higher(highest, cost)
            if tier == "batch":
                break  # a batch is never served in another tier
    return highest


def one_tariff(route: Route, model: str | None, unix_s: float) -> tuple[Tariff | None, float]:
    """Return the tariff of the calls of a model on a route in the standard tier, and until which
    Unix time it holds; None if their price depends on more: the target, the number of input tokens,
    `pricing`.
    """
    period = int(unix_s // _PERIOD_S)
    tariff_ = None
    named = route.replaced_model or model
    if named and not (route.alternatives or route.provider.pricing):
        tiers = _listed(listed_name(route.provider), clean(named), "", period)
        if tiers is not None and not tiers.starts:
            tariff_ = tiers.tariffs[0]
    return tariff_, (period + 1) * _PERIOD_S


def _higher(one: int | None, other: int | None) -> int | None:
    return other if one is None or (other is not None and other > one) else one


def _tariff(
    provider: Provider, model: str | None, tier: str, input_tokens: int, unix_s: float
) -> tuple[Tariff, int | None] | None:
    """Return the tariff of a model in a service tier, and its maximum output if that is known."""
    if (rule := _rule(provider, model, tier, unix_s)) is not None:
        return rule.tariff, rule.max_output_tokens
    if model is None:
        return None
    tiers = _listed(listed_name(provider), model, tier, int(unix_s // _PERIOD_S))
    if tiers is None:
        return None
    return tiers.tariffs[bisect_left(tiers.starts, input_tokens)], None


def listed_name(provider: Provider) -> str:
    """Return the name of a provider in the public price list."""
    return provider.priced_as or _LISTED_AS.get(provider.name, provider.name)


def has_price(provider: Provider, model: str, unix_s: float) -> bool:
    """True if a provider's prices or the public price list have this model."""
    model = clean(model)
    if any(rule.models and rule.holds(model, unix_s) for rule in provider.pricing):
        return True
    return _listed(listed_name(provider), model, "", int(unix_s // _PERIOD_S)) is not None


@lru_cache(maxsize=256)
def models_of(name: str) -> tuple[str, ...]:
    """Return the ids of the models of a provider in the public price list, by its name there."""
    from genai_prices.data_snapshot import get_snapshot

    for provider in get_snapshot().providers:
        if provider.id == name:
            ids = (model.id for model in provider.models if not model.deprecated)
            return tuple(id for id in ids if not id.endswith("-"))
    return ()


def _context(service_tier: str, model: Any) -> dict[str, str] | None:
    """Return the list's variant for a service tier of a model; None if it has no prices for it."""
    listed = [each.when for each in model.price_variants or ()]
    for context in ({"service_tier": service_tier}, *_CONTEXTS.get(service_tier, ())):
        if context in listed:
            return context
    return None


_CONTEXTS: Mapping[str, tuple[dict[str, str], ...]] = {
    "batch": ({"processing": "batch"},),
    "fast": ({"speed": "fast"},),  # Anthropic; OpenAI's `fast` is a service tier
}
_MIN_AUDIO_MS = {
    ("groq", "whisper-large-v3"): 10_000,
    ("groq", "whisper-large-v3-turbo"): 10_000,
}
"""Minimum billed audio of a call."""


@lru_cache(maxsize=2000)
def _listed(provider: str, model: str, service_tier: str, period: int) -> _Tiers | None:
    # Imported at the first lookup: loading the list takes a quarter of a second.
    from genai_prices.data_snapshot import get_snapshot

    when = datetime.datetime.fromtimestamp(period * _PERIOD_S, datetime.UTC)
    try:
        _, found = get_snapshot().find_provider_model(model, None, provider, None)
    except LookupError:
        return None
    context = _context(service_tier, found) if service_tier else None
    if service_tier and context is None:
        return None  # the list would return the standard price
    listed = found.get_prices(when, context)
    starts: set[int] = set()
    for names in _LISTED.values():
        for name in names:
            starts |= {tier.start for tier in getattr(_own(listed, name), "tiers", ())}
    ordered = tuple(sorted(starts))
    tariffs = tuple(
        tariff(_rates(listed, above), audio_is_text=provider == "google") for above in (0, *ordered)
    )
    return _Tiers(ordered, tariffs, _MIN_AUDIO_MS.get((provider, found.id), 0))


def _own(listed: Any, name: str) -> Any:
    return listed.__dict__.get(name)


def _rates(listed: Any, above: int) -> Rates:
    """Return the rates for more than `above` input tokens."""
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
