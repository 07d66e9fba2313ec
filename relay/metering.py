"""Meters on the line: what sees an answer's chunks and a session's messages.

Owns: that a meter harms nothing. One that raises is dropped, logged and counted; what it should
have told stays unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from aiohttp import ClientResponse

from relay.core.exchange import Exchange
from relay.core.meters.answers import Sent, answer_meter
from relay.core.meters.sockets import socket_meter
from relay.core.provider import Route
from relay.core.rewriting import events_with
from relay.core.turns import HEAD_BYTES, Turns
from relay.gateway import Gateway
from relay.session import Session

_MOST_HELD_BYTES = 64 * 1024
Look = Callable[[bytes], None]


def answer_look(
    upstream: ClientResponse, exchange: Exchange, gateway: Gateway, whole: bytes | None
) -> Look | None:
    """What sees this answer's chunks; None if nothing does, or where it is `whole` and the ledger
    reads it later. Its meter is the exchange's.
    """
    if upstream.status >= 300 or exchange.route is None:
        return None
    if whole and not exchange.asks_usage and len(whole) <= _MOST_HELD_BYTES:
        exchange.answer, exchange.answer_headers = whole, upstream.headers
        return None
    name, header = exchange.route.provider.meter, upstream.headers.get
    meter = answer_meter(name, Sent.of(exchange), header)
    if meter is None:
        return None
    exchange.meter = meter
    exchange.look = look = _guarded(meter.feed, exchange, gateway)
    return look


def without_usage_event(events: bytes, exchange: Exchange) -> bytes:
    """The events of a chat stream but the one that tells its usage, which has no choices: its
    client did not ask for it, and some read the first choice of every event.
    """
    kept, at = [], 0
    for start, end in events_with(b'"usage"', events):
        if _NO_CHOICES.search(events, start, end):
            kept.append(events[at:start])
            at = end
            if exchange.look is not None:
                exchange.look(events[start:end])
    return b"".join([*kept, events[at:]]) if kept else events


_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


def session_looks(
    session: Session, route: Route, gateway: Gateway
) -> tuple[Look | None, Look | None]:
    """What sees the client's messages, and the provider's, once they have passed. Each is one call
    of ours and a search or two in C, unless something is found.
    """
    exchange, clock = session.exchange, gateway.clock
    meter = socket_meter(route.provider.meter, route.endpoint, exchange.model, clock)
    if meter is None:
        return None, None
    exchange.meter = meter
    exchange.turns = turns = Turns(
        route.provider.meter, exchange.started_s, session.downstream, session.upstream, clock
    )
    pieces, most = meter.pieces, meter.searched_bytes

    def sent(data: bytes) -> None:
        try:
            if meter.sent_hint is not None and meter.sent_hint(data, 0, most):
                meter.sent(data)
            if turns.sent_hint is not None and turns.sent_hint(data, 0, HEAD_BYTES):
                turns.sent(data)
        except Exception as error:  # whatever it is, the session goes on; counted
            failed(error)

    def received(data: bytes) -> None:
        try:
            if turns.under_way and data.startswith(pieces):
                return
            if meter.received_hint is not None and meter.received_hint(data, 0, most):
                meter.received(data)
            if turns.received_hint is not None and turns.received_hint(data, 0, HEAD_BYTES):
                turns.received(data)
        except Exception as error:  # likewise
            failed(error)

    def failed(error: Exception) -> None:
        for seer in (meter, turns):
            seer.sent_hint = seer.received_hint = None
        gateway.ledger.meter_failed(exchange, error)

    return sent, received


def _guarded(look: Look, exchange: Exchange, gateway: Gateway) -> Look:
    def see(chunk: bytes) -> None:
        nonlocal look
        try:
            look(chunk)
        except Exception as error:  # whatever it is, the stream goes on; counted
            look = _blind
            gateway.ledger.meter_failed(exchange, error)

    return see


def _blind(_chunk: bytes) -> None:
    pass
