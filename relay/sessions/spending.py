"""Reserve the money of WebSocket sessions in slices, and end a session when a budget has no more.

Owns the slices. A slice is the price of 30 seconds of audio both ways, or of one response with the
context as it is, whichever is higher. The first is reserved before the provider is connected; while
the session runs, a slice is reserved beyond what it has spent. A message that orders something (a
response, a text for speech) is relayed when the money for that is reserved. gate/spending.py
decides when a session is checked, core/meters/ what it has spent and what a message orders.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from functools import partial

from relay.core.budgets import utc_text
from relay.core.error_bodies import socket_event
from relay.core.errors import BudgetExhausted, PriceUnknown, RelayError
from relay.core.exchange import Exchange
from relay.core.meters.socket_meter import Order, SocketMeter, has_escape
from relay.core.named_models import places_of_session, socket_rule
from relay.core.usage import CallBound, Part
from relay.gateway import Gateway
from relay.prices import price_list
from relay.sessions.orders import Orders
from relay.sessions.session import Ending, Session

SLICE_S = 30
_AUDIO_TOKENS_A_SECOND = 25
"""Google's audio both ways; OpenAI's has 10 in and 20 out."""
_CHARACTERS_A_SECOND = 20
"""Of fast speech."""
_SLICE = CallBound(
    SLICE_S * _AUDIO_TOKENS_A_SECOND,
    SLICE_S * _AUDIO_TOKENS_A_SECOND,
    characters=SLICE_S * _CHARACTERS_A_SECOND,
    audio_ms=SLICE_S * 1000,
    units=1,
    may_hold_audio=True,
)
_RESPONSE = CallBound(0, None, may_hold_audio=True, units=1)
_UNCHECKED_BYTES = 64 * 1024
"""How much a client may send before its session is checked again."""
_MIN_NANO = 1
"""Reserved for a session whose first message names the model: no money at all refuses it."""


async def reserve_first_slice(exchange: Exchange, raw_query: str, gateway: Gateway) -> None:
    """Reserve the first slice of a session, if a budget applies to it. Raises BudgetExhausted,
    BudgetBusy, PriceUnknown, StoreUnavailable.
    """
    budgets, route = gateway.budgets, exchange.routing.route
    if budgets is None or route is None:
        return
    plan = budgets.plan_of(exchange.request)
    if plan is None:
        return
    model = exchange.request.model
    bounds = [_SLICE, _RESPONSE] if _has_responses(route.format, route.endpoint) else [_SLICE]
    slice_nano = budgets.price_nano(route, model, bounds)
    if slice_nano is None and model is None and _is_named_by_message(exchange, raw_query):
        slice_nano = _MIN_NANO
    if slice_nano is None:
        await budgets.reserve_some(exchange, plan, budgets.unpriced_nano(model))
    else:
        await budgets.reserve_amount(exchange, plan, slice_nano)


def _has_responses(format_: str, endpoint: str) -> bool:
    return format_ in ("openai", "google") and "live/sessions" not in endpoint


def _is_named_by_message(exchange: Exchange, raw_query: str) -> bool:
    route = exchange.routing.route
    rule = socket_rule(route.format, route.endpoint) if route is not None else None
    return rule is not None and "message " in places_of_session(rule, raw_query)


def follow_session(session: Session, gateway: Gateway) -> None:
    """Follow what a session spends, if it has budgets."""
    if session.exchange.budget is not None:
        spender = _SessionSpender(session, gateway)
        gateway.spending.follow(spender)
        session.downstream.pay = spender.pay
        session.check_spending = partial(gateway.spending.check, session.exchange)


class _SessionSpender:
    """The Spender of a session."""

    def __init__(self, session: Session, gateway: Gateway) -> None:
        self.exchange = session.exchange
        self._session, self._gateway = session, gateway
        self._began_s = gateway.clock()
        self._checked_bytes = 0
        """How much the client had sent when the session was last checked before a message."""
        self._slice_nano = session.exchange.budget.reserved_nano if session.exchange.budget else 0
        self._is_priced = self._slice_nano > _MIN_NANO
        self._costs: dict[Part, int] = {}
        self._orders = Orders()

    @property
    def _meter(self) -> SocketMeter | None:
        meter = self.exchange.usage.meter
        return meter if isinstance(meter, SocketMeter) else None

    @property
    def _model(self) -> str | None:
        meter = self._meter
        named = self.exchange.request.model
        return named or (meter.requested_model or meter.model if meter is not None else None)

    def spent_nano(self) -> int:
        """See Spender. A session whose usage no message reports is taken to spend a slice in each
        30 seconds.
        """
        meter = self._meter
        if meter is not None and not meter.is_blind:
            return price_list.known_nano_usd(self.exchange, meter.parts, time.time(), self._costs)
        lasted_s = self._gateway.clock() - self._began_s
        return self._slice_nano * int(lasted_s // SLICE_S)

    def ahead_nano(self) -> int:
        """See Spender."""
        ordered_nano = self._ordered_nano()  # which sets the price of a slice
        return max(self._slice_nano, ordered_nano)

    def step_nano(self) -> int:
        """See Spender."""
        return self._slice_nano

    def end(self, error: RelayError) -> None:
        """See Spender."""
        self._session.end(self._ending(error))

    def _update_slice(self) -> int:
        """Set the price of a slice, and return that of a response."""
        route, budgets, meter = self.exchange.routing.route, self._gateway.budgets, self._meter
        if route is None or budgets is None or meter is None:
            return 0
        response = meter.next_response
        response_nano = self._price_nano(response) or 0 if response is not None else 0
        slice_nano = self._price_nano(_SLICE)
        if slice_nano is not None:
            self._is_priced = True
            self._slice_nano = max(slice_nano, response_nano)
        elif not self._is_priced and self._model is not None:
            self._slice_nano = budgets.unpriced_nano(self._model)
            self._is_priced = True
        return response_nano

    def _price_nano(self, bound: CallBound, model: str | None = None) -> int | None:
        """Return the highest price of a bound at a model, or at each that may be the next one; None
        if none has a price. Raises PriceUnknown.
        """
        route, budgets, meter = self.exchange.routing.route, self._gateway.budgets, self._meter
        if route is None or budgets is None:
            return None
        models = {model}
        if model is None:
            models = {self._model, *(meter.next_models if meter is not None else ())}
        prices = [budgets.price_nano(route, each, (bound,)) for each in models]
        return max((price for price in prices if price is not None), default=None)

    def _ordered_nano(self) -> int:
        """Return what all responses may cost that were ordered or run."""
        response_nano, meter = self._update_slice(), self._meter
        if meter is not None:
            self._orders.update(meter.responses, response_nano, self._gateway.clock())
        return self._orders.nano

    def pay(self, data: bytes) -> Awaitable[Ending | None] | None:
        """See Leg.pay."""
        if self._session.ended.done():  # the pump is about to be cancelled
            return asyncio.shield(self._session.ended)
        meter, order = self._meter, None
        if meter is not None and meter.order_filter is not None:
            # A search for one text after another is ten times as fast as one for either.
            is_long = len(data) > meter.searched_bytes
            if is_long or meter.order_filter(data) or has_escape(data):
                order = self._order_of(meter, data)
        sent_bytes = self._session.downstream.bytes + len(data)
        if order is None and self._is_priced:
            if sent_bytes - self._checked_bytes <= _UNCHECKED_BYTES:
                return None
        self._checked_bytes = sent_bytes
        order_nano = self._price(order)
        if self._is_reserved(order_nano):
            self._note(order, order_nano)
            return None
        return self._reserve(order, order_nano)

    def _is_reserved(self, order_nano: int) -> bool:
        """True if a message may be relayed at once."""
        spending, exchange = self._gateway.spending, self.exchange
        try:
            if spending.provide_at_once(exchange, order_nano):
                return True
            return spending.was_refused(exchange) and self._has_left(order_nano)
        except PriceUnknown:
            return False

    def _note(self, order: Order | None, order_nano: int) -> None:
        if order is not None and order.is_response:
            self._orders.add(order_nano, self._gateway.clock())

    def _order_of(self, meter: SocketMeter, data: bytes) -> Order | None:
        try:
            return meter.order_of(data)
        except Exception as error:  # any exception: the session is checked by what it has spent
            self._gateway.ledger.meter_failed(self.exchange, error)
            return None

    async def _reserve(self, order: Order | None, order_nano: int) -> Ending | None:
        """Reserve what a message may cost beyond all that is ordered. Returns the Ending of the
        session if a budget has too little left.
        """
        try:
            await self._gateway.spending.provide(self.exchange, order_nano)
        except RelayError as error:
            if isinstance(error, PriceUnknown) or not self._has_left(order_nano):
                return self._ending(error)
        self._note(order, order_nano)
        return None

    def _price(self, order: Order | None) -> int:
        if order is None:
            return 0
        models = order.models or (None,)
        prices = (self._price_nano(order.bound, model) for model in models)
        return max(filter(None, prices), default=0)

    def _has_left(self, order_nano: int) -> bool:
        """True if what is reserved is enough for a message, though not for a slice after it."""
        use = self.exchange.budget
        if use is None:
            return True
        left_nano = use.reserved_nano - self.spent_nano() - self._ordered_nano()
        return left_nano >= order_nano if order_nano else left_nano > 0

    def _ending(self, error: RelayError) -> Ending:
        """Return the Ending for an error. Its reason goes to the provider too: it names no one."""
        exchange, route = self.exchange, self.exchange.routing.route
        assert route is not None
        reason = f"{error.code}: no money is left for this session"
        if isinstance(error, BudgetExhausted) and error.resets_s is not None:
            reason += f" before {utc_text(error.resets_s)}"
        event = socket_event(error, route.format, route.endpoint, exchange.id)
        return Ending(error.close_code, reason, "relay", error, event=event)
