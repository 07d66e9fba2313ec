"""Work out what a batch may cost whose requests are in the call that makes it: Anthropic's.

Owns the requests in its body. A batch whose requests are in a file reserves nothing: the relay does
not read files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec

from relay.core.bounds import CallLimits, limits_of
from relay.core.errors import LimitsUnknown, ModelUnknown
from relay.core.exchange import Exchange
from relay.core.fields import ABSENT, UNREADABLE, Reader, value
from relay.core.formats import counting_of
from relay.core.media import input_tokens
from relay.core.peek import model_is_plain, names_one_model
from relay.core.pricing import MAX_CALL_NANO_USD
from relay.core.provider import Route
from relay.core.request_fields import read_fields
from relay.core.usage import CallBound
from relay.gate.budgets import BudgetPlan, Budgets

_AT_ONCE = 200
"""Requests that are read in one turn of the loop: about 5 ms."""


class _Batch(msgspec.Struct):
    requests: msgspec.Raw = ABSENT


class _Request(msgspec.Struct):
    params: msgspec.Raw = ABSENT


_read_batch, _read_request = Reader(_Batch).read, Reader(_Request).read
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def has_requests(exchange: Exchange) -> bool:
    """True for a call about batches that makes one of the requests in its body."""
    route = exchange.routing.route
    if route is None or route.format != "anthropic":
        return False
    return counting_of(exchange.request.method, route.endpoint) == "new"


async def reserve_batch(
    exchange: Exchange, budgets: Budgets, plan: BudgetPlan, text: bytes
) -> None:
    """Reserve what the requests of a batch may cost, as Budgets.reserve does; `text` is the body of
    the call. Raises ModelUnknown and LimitsUnknown under a hard budget for requests that cannot be
    read, or not in one way only.
    """
    route = exchange.routing.route
    assert route is not None
    needed_nano = await _batch_nano(budgets, plan, route, text)
    await budgets.reserve_some(exchange, plan, min(needed_nano, MAX_CALL_NANO_USD))


async def _batch_nano(budgets: Budgets, plan: BudgetPlan, route: Route, text: bytes) -> int:
    needed_nano = 0
    for at, params in enumerate(_params(text), 1):
        fields = read_fields(params)
        named = value(fields.model) if fields is not None else None
        model = named if isinstance(named, str) else None
        if plan.is_hard and not _has_one_model(params, model):
            raise ModelUnknown
        limits = limits_of("messages", route.format, params, fields)
        if plan.is_hard and limits is not None and not limits.is_read:
            raise LimitsUnknown
        needed_nano += _request_nano(budgets, route, model, params, limits)
        if at % _AT_ONCE == 0:
            await asyncio.sleep(0)
    return needed_nano


def _has_one_model(params: bytes, model: str | None) -> bool:
    if model is None:
        return False
    return names_one_model(params) or model_is_plain(params, "application/json", model)


def _params(text: bytes) -> Iterator[bytes]:
    """Yield what each request sends; once an empty text if they cannot be read."""
    batch = _read_batch(text)
    try:
        requests = _decode_list(batch.requests if batch is not None else b"")
    except UNREADABLE:
        requests = [ABSENT]
    for request in requests:
        found = _read_request(bytes(request))
        yield bytes(found.params) if found is not None else b""


def _request_nano(
    budgets: Budgets, route: Route, model: str | None, params: bytes, limits: CallLimits | None
) -> int:
    bound = CallBound(
        input_tokens(params, route.format),
        limits.output_tokens if limits is not None else None,
        service_tiers=("batch",),
        text=params,
    )
    cost_nano = budgets.price_nano(route, model, (bound,))
    return budgets.unpriced_nano(model) if cost_nano is None else cost_nano
