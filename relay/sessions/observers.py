"""Observers of a session: they see each message once it has passed.

Owns: that an observer harms nothing. One that raises is dropped, logged and counted; what it should
have told stays unknown.
"""

from __future__ import annotations

from collections.abc import Callable

from relay.core.exchange import Exchange
from relay.core.key_refusals import refusal_in_message
from relay.core.meters.socket_meter import OpenedSession, SocketMeter
from relay.core.meters.socket_meters import socket_meter
from relay.core.meters.turns import HEAD_BYTES, Turns
from relay.core.provider import Route
from relay.gateway import Gateway
from relay.sessions.session import Session

_FIRST_MESSAGES, _MOST_EVENT_BYTES = 4, 4096
"""A provider refuses the key in one of its first messages, in one that a meter reads anyway, or in
its last, which is kept until the session ends: to search each one would cost more than to meter it.
"""
Observer = Callable[[bytes], None]


def observe_session(
    session: Session, route: Route, query: str, gateway: Gateway
) -> tuple[Observer | None, Observer | None]:
    """The observers of the client's messages, and of the provider's. Each is one call of ours and a
    search or two in C, unless something is found.
    """
    exchange, sides = session.exchange, (session.downstream, session.upstream)
    provider = session.upstream
    opened = OpenedSession(route.endpoint, query, exchange.request.model, *sides, gateway.clock)
    meter = socket_meter(route.format, opened)
    if meter is None:
        return None, None
    exchange.usage.meter = meter
    session.turns = turns = Turns(route.format, exchange.request.started_s, *sides, gateway.clock)
    pieces, most = meter.pieces, meter.searched_bytes

    def sent(data: bytes) -> None:
        try:
            if meter.sent_filter is not None and (len(data) > most or meter.sent_filter(data)):
                meter.sent(data)
                _name_model(exchange, meter)
            if turns.sent_filter is not None and turns.sent_filter(data, 0, HEAD_BYTES):
                turns.sent(data)
        except Exception as error:  # whatever it is, the session goes on; counted
            failed(error)

    def received(data: bytes) -> None:
        try:
            if turns.under_way and data.startswith(pieces):
                return
            prefilter = meter.received_filter
            telling = prefilter is not None and (len(data) > most or prefilter(data))
            if telling or provider.messages <= _FIRST_MESSAGES:
                session.refused(refusal_in_message(data))
            elif len(data) <= _MOST_EVENT_BYTES:
                session.last_event = data
            if telling:
                meter.received(data)
                _name_model(exchange, meter)
            if turns.received_filter is not None and turns.received_filter(data, 0, HEAD_BYTES):
                turns.received(data)
        except Exception as error:  # likewise
            failed(error)

    def failed(error: Exception) -> None:
        for seer in (meter, turns):
            seer.sent_filter = seer.received_filter = None
        gateway.ledger.meter_failed(exchange, error)

    return sent, received


def _name_model(exchange: Exchange, meter: SocketMeter) -> None:
    """Where its URL names none, a session is of the model that its messages name first."""
    if exchange.request.model is None:
        exchange.request.model = meter.asked or meter.model
