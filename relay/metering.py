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
from relay.core.rewriting import split_events
from relay.core.turns import Turns
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
    if b'"usage"' not in events:
        return events
    kept = []
    for event in split_events(events):
        if b'"usage"' in event and _NO_CHOICES.search(event):
            if exchange.look is not None:
                exchange.look(event)
        else:
            kept.append(event)
    return b"".join(kept)


_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


def session_looks(
    session: Session, route: Route, gateway: Gateway
) -> tuple[Look | None, Look | None]:
    """What sees the client's messages, and the provider's, once they have passed."""
    exchange, clock = session.exchange, gateway.clock
    meter = socket_meter(route.provider.meter, route.endpoint, exchange.model, clock)
    if meter is None:
        return None, None
    exchange.meter = meter
    exchange.turns = turns = Turns(route.provider.meter, exchange.started_s)
    client, provider = session.downstream, session.upstream

    def sent(data: bytes) -> None:
        meter.sent(data)
        turns.sent(data, client.message_s)

    def received(data: bytes) -> None:
        meter.received(data)
        turns.received(data, provider.message_s, clock)

    return _guarded(sent, exchange, gateway), _guarded(received, exchange, gateway)


def _guarded(look: Look, exchange: Exchange, gateway: Gateway) -> Look:
    failed = False

    def see(data: bytes) -> None:
        nonlocal failed
        if failed:
            return
        try:
            look(data)
        except Exception as error:  # whatever it is, the stream goes on; counted
            failed = True
            gateway.ledger.meter_failed(exchange, error)

    return see
