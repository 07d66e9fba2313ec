"""Follow what a streamed response costs, and end it when a budget has no more money.

Owns what a stream has cost so far: by its meter, or by its bytes if no meter can read it. A
response that is not streamed is made before it is sent, so to end it would save nothing.
"""

from __future__ import annotations

import time

from aiohttp import ClientResponse

from relay.calls.attempt import is_stream
from relay.core.errors import RelayError
from relay.core.exchange import Exchange
from relay.core.formats import counting_of
from relay.core.meters.answer_meter import AnswerMeter
from relay.core.meters.estimates import ESTIMATED
from relay.core.meters.sent_call import SentCall
from relay.core.peek import streams_by_path
from relay.core.usage import CallBound
from relay.gateway import Gateway
from relay.prices import price_list

_STEPS = 4
"""A stream that has spent its reservation takes a quarter of it, again and again."""
_BYTES_PER_TOKEN = 64
"""Of a stream that no meter can read: server-sent events have more, compressed ones fewer."""


def follow_stream(exchange: Exchange, upstream: ClientResponse, gateway: Gateway) -> None:
    """Follow what a response costs, if it is streamed and has budgets."""
    facts, use, route = exchange.request, exchange.budget, exchange.routing.route
    assert route is not None
    if use is None or facts.kind not in ESTIMATED:
        return
    if not use.reserved_nano and counting_of(facts.method, route.endpoint) != "new":
        return  # a stored response is not made for this call
    if upstream.status >= 300:
        return
    by_path = streams_by_path(route.endpoint)
    if is_stream(upstream) or facts.stream or by_path:
        gateway.spending.follow(_Stream(exchange, gateway, use.reserved_nano))


class _Stream:
    """The Spender of a streamed response."""

    def __init__(self, exchange: Exchange, gateway: Gateway, reserved_nano: int) -> None:
        self.exchange = exchange
        self._gateway, self._step_nano = gateway, max(1, reserved_nano // _STEPS)

    def spent_nano(self) -> int:
        """See Spender."""
        exchange, gateway = self.exchange, self._gateway
        meter = exchange.usage.meter
        if isinstance(meter, AnswerMeter) and meter.is_readable:
            return price_list.known_nano_usd(exchange, meter.parts, time.time(), {})
        route, budgets = exchange.routing.route, gateway.budgets
        if route is None or budgets is None:
            return 0
        made = exchange.response.body_bytes // _BYTES_PER_TOKEN
        bound = CallBound(SentCall.of(exchange).input_tokens, made)
        return budgets.price_nano(route, exchange.request.model, (bound,)) or 0

    def ahead_nano(self) -> int:
        """See Spender. What it has reserved is enough until it has spent all of that."""
        return 0

    def step_nano(self) -> int:
        """See Spender."""
        return self._step_nano

    def end(self, error: RelayError) -> None:
        """See Spender."""
        self.exchange.expire(error)
