"""Meters on the line: what sees an answer's chunks and a session's messages.

Owns: that a meter harms nothing. One that raises is dropped, logged and counted; what it should
have told stays unknown.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import ClientResponse

from relay.core.exchange import Exchange
from relay.core.meters.answers import AnswerMeter, answer_meter
from relay.core.meters.sent import Sent
from relay.core.meters.sessions import Opened, SocketMeter
from relay.core.meters.sockets import socket_meter
from relay.core.provider import Route
from relay.core.refusals import of_message
from relay.core.turns import HEAD_BYTES, Turns
from relay.gateway import Gateway
from relay.session import Session

_MOST_HELD_BYTES = 64 * 1024
_FIRST_MESSAGES, _MOST_EVENT_BYTES = 4, 4096
"""A provider refuses the key in one of its first messages, in one that a meter reads anyway, or in
its last, which is kept until the session ends: to search each one would cost more than to meter it.
"""
Look = Callable[[bytes], None]


def answer_look(
    upstream: ClientResponse, exchange: Exchange, gateway: Gateway, whole: bytes | None
) -> Look | None:
    """What sees this answer's chunks; None if nothing does, or where it is `whole` and the ledger
    reads it later. Its meter is the exchange's.
    """
    if upstream.status >= 300 or exchange.route is None:
        return None
    if whole and len(whole) <= _MOST_HELD_BYTES:
        exchange.answer, exchange.answer_headers = whole, upstream.headers
        return None
    meter = answer_meter(exchange.route.format, Sent.of(exchange), upstream.headers.get)
    if meter is None:
        return None
    exchange.meter = meter
    guarded = _Guarded(meter, exchange, gateway)
    exchange.look, exchange.look_past = guarded.see, guarded.see_past
    return guarded.see


def session_looks(
    session: Session, route: Route, query: str, gateway: Gateway
) -> tuple[Look | None, Look | None]:
    """What sees the client's messages, and the provider's, once they have passed. Each is one call
    of ours and a search or two in C, unless something is found.
    """
    exchange, sides = session.exchange, (session.downstream, session.upstream)
    provider = session.upstream
    opened = Opened(route.endpoint, query, exchange.model, *sides, gateway.clock)
    meter = socket_meter(route.format, opened)
    if meter is None:
        return None, None
    exchange.meter = meter
    exchange.turns = turns = Turns(route.format, exchange.started_s, *sides, gateway.clock)
    pieces, most = meter.pieces, meter.searched_bytes

    def sent(data: bytes) -> None:
        try:
            if meter.sent_hint is not None and (len(data) > most or meter.sent_hint(data)):
                meter.sent(data)
                _name_model(exchange, meter)
            if turns.sent_hint is not None and turns.sent_hint(data, 0, HEAD_BYTES):
                turns.sent(data)
        except Exception as error:  # whatever it is, the session goes on; counted
            failed(error)

    def received(data: bytes) -> None:
        try:
            if turns.under_way and data.startswith(pieces):
                return
            hint = meter.received_hint
            telling = hint is not None and (len(data) > most or hint(data))
            if telling or provider.messages <= _FIRST_MESSAGES:
                session.refused(of_message(data))
            elif len(data) <= _MOST_EVENT_BYTES:
                session.last_event = data
            if telling:
                meter.received(data)
                _name_model(exchange, meter)
            if turns.received_hint is not None and turns.received_hint(data, 0, HEAD_BYTES):
                turns.received(data)
        except Exception as error:  # likewise
            failed(error)

    def failed(error: Exception) -> None:
        for seer in (meter, turns):
            seer.sent_hint = seer.received_hint = None
        gateway.ledger.meter_failed(exchange, error)

    return sent, received


def _name_model(exchange: Exchange, meter: SocketMeter) -> None:
    """Where its URL names none, a session is of the model that its messages name first."""
    if exchange.model is None:
        exchange.model = meter.asked or meter.model


class _Guarded:
    """Shows chunks to a meter until it fails."""

    __slots__ = ("_exchange", "_gateway", "_look", "_look_past")

    def __init__(self, meter: AnswerMeter, exchange: Exchange, gateway: Gateway) -> None:
        self._look: Look = meter.feed
        self._look_past: Look = meter.feed_without_usage
        self._exchange, self._gateway = exchange, gateway

    def see(self, chunk: bytes) -> None:
        try:
            self._look(chunk)
        except Exception as error:  # whatever it is, the stream goes on; counted
            self._failed(error)

    def see_past(self, chunk: bytes) -> None:
        try:
            self._look_past(chunk)
        except Exception as error:  # likewise
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._look = self._look_past = _blind
        self._gateway.ledger.meter_failed(self._exchange, error)


def _blind(_chunk: bytes) -> None:
    pass
