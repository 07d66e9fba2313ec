"""Show the messages of a session to its observers, each after it was relayed.

Owns which observers a session has (the meter, the turns, the search for refused keys), and that
none of them can end a session: if one raises, the meter and the turns are dropped, logged and
counted, and the usage stays unknown.
"""

from __future__ import annotations

from collections.abc import Callable

from relay.core.exchange import Exchange
from relay.core.key_refusals import refusal_in_message
from relay.core.meters.socket_meter import OpenedSession, SocketMeter, has_escape
from relay.core.meters.socket_meters import socket_meter
from relay.core.meters.turns import HEAD_BYTES, Turns
from relay.core.provider import Route
from relay.gateway import Gateway
from relay.sessions.session import Session

_FIRST_MESSAGES, _MAX_EVENT_BYTES = 4, 4096
"""A provider refuses the key in one of its first messages, in a message that the meter reads, or in
its last message, which is kept until the session ends. Only these are searched: to search every
message would cost more than to meter it.
"""
Observer = Callable[[bytes], None]


def observe_session(
    session: Session, route: Route, query: str, gateway: Gateway
) -> tuple[Observer | None, Observer | None]:
    """Return the observers of the client's and the provider's messages. An observer costs one
    Python call and one to three searches in C for each message in which it finds nothing.
    """
    exchange, sides = session.exchange, (session.downstream, session.upstream)
    opened = OpenedSession(route.endpoint, query, exchange.request.model, *sides, gateway.clock)
    meter = socket_meter(route.format, opened)
    if meter is None:
        return None, None
    exchange.usage.meter, meter.made = meter, session.made
    session.turns = turns = Turns(route.format, exchange.request.started_s, *sides, gateway.clock)

    def failed(error: Exception) -> None:
        for observer in (meter, turns):
            observer.sent_filter = observer.received_filter = None
        gateway.ledger.meter_failed(exchange, error)

    sent = _observer_of_sent(exchange, meter, turns, failed)
    return sent, _observer_of_received(session, meter, turns, failed)


def _observer_of_sent(
    exchange: Exchange, meter: SocketMeter, turns: Turns, failed: Callable[[Exception], None]
) -> Observer:
    max_bytes = meter.searched_bytes

    def sent(data: bytes) -> None:
        try:
            prefilter = meter.sent_filter
            if prefilter is not None and (
                len(data) > max_bytes or prefilter(data) or has_escape(data)
            ):
                meter.sent(data)
                _name_model(exchange, meter)
            if turns.sent_filter is not None and turns.sent_filter(data, 0, HEAD_BYTES):
                turns.sent(data)
        except Exception as error:  # any exception: the session goes on; counted
            failed(error)

    return sent


def _observer_of_received(
    session: Session, meter: SocketMeter, turns: Turns, failed: Callable[[Exception], None]
) -> Observer:
    provider, pieces, max_bytes = session.upstream, meter.pieces, meter.searched_bytes

    def received(data: bytes) -> None:
        try:
            if turns.under_way and data.startswith(pieces):
                return
            prefilter = meter.received_filter
            is_metered = prefilter is not None and (len(data) > max_bytes or prefilter(data))
            if is_metered or provider.messages <= _FIRST_MESSAGES:
                session.refused(refusal_in_message(data))
            elif len(data) <= _MAX_EVENT_BYTES:
                session.last_event = data
            if is_metered:
                meter.received(data)
                _name_model(session.exchange, meter)
                if session.check_spending is not None:
                    session.check_spending()
            if turns.received_filter is not None and turns.received_filter(data, 0, HEAD_BYTES):
                turns.received(data)
        except Exception as error:  # any exception: the session goes on; counted
            failed(error)

    return received


def _name_model(exchange: Exchange, meter: SocketMeter) -> None:
    """Set the model of a session whose URL names none: the first that its messages name."""
    if exchange.request.model is None:
        exchange.request.model = meter.requested_model or meter.model
