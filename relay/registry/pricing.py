"""What gateway.yaml says of prices, made rules.

Owns: the meaning of a provider's `pricing`.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from relay.core.pricing import PriceRule, Rates, tariff
from relay.registry.entries import Pricing

_ENDINGS = ("_per_mtok", "_per_million")
_NAMES = {
    "audio_per_hour": "audio_hour", "per_unit": "unit", "per_image": "image", "per_call": "call",
    "per_web_search": "web_search", "per_page": "page",
}  # fmt: skip


def price_rules(listed: Sequence[Pricing], format_: str) -> tuple[PriceRule, ...]:
    """In the order of the file: the first that holds is taken."""
    return tuple(
        PriceRule(
            tuple(rule.models),
            -math.inf if rule.since is None else _midnight(rule.since),
            math.inf if rule.until is None else _midnight(rule.until),
            tariff(_rates(rule), audio_is_text=format_ == "google"),
            rule.service_tier,
        )
        for rule in listed
    )


def _rates(rule: Pricing) -> Rates:
    given: dict[str, Any] = rule.model_dump(exclude={"models", "since", "until", "service_tier"})
    return Rates(**{_name(key): usd for key, usd in given.items() if isinstance(usd, Decimal)})


def _name(key: str) -> str:
    for ending in _ENDINGS:
        key = key.removesuffix(ending)
    return _NAMES.get(key, key)


def _midnight(day: datetime.date) -> float:
    return datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()
