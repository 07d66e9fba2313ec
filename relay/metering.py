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
from relay.gateway import Gateway
from relay.ledger import log

Look = Callable[[bytes], None]


def answer_look(upstream: ClientResponse, exchange: Exchange, gateway: Gateway) -> Look | None:
    """What sees this answer's chunks; None if nothing does. Its meter is the exchange's."""
    if upstream.status >= 300 or exchange.route is None:
        return None
    sent = Sent(exchange.kind, exchange.spoken, exchange.request_bytes)
    meter = answer_meter(exchange.route.provider.meter, sent, upstream.headers.get)
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
    exchange: Exchange, route: Route, gateway: Gateway
) -> tuple[Look | None, Look | None]:
    """What sees the client's messages, and the provider's."""
    meter = socket_meter(route.provider.meter, route.endpoint, exchange.model)
    if meter is None:
        return None, None
    exchange.meter = meter
    return _guarded(meter.sent, exchange, gateway), _guarded(meter.received, exchange, gateway)


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
            exchange.meter = None
            gateway.meter_failures += 1
            log.bug("meter.failed", error, id=exchange.id)

    return see
