"""What sees the chunks of an answer as they pass: meter, cache, collector of bodies.

Owns: putting them together. Each looks, none touches.
"""

from __future__ import annotations

from aiohttp import ClientResponse

from relay.collecting import collector
from relay.core.exchange import Exchange
from relay.gateway import Gateway
from relay.metering import answer_look
from relay.recording import Tap, recording
from relay.rewrite import removes_usage


def tapped(
    upstream: ClientResponse,
    pairs: list[tuple[str, str]],
    exchange: Exchange,
    gateway: Gateway,
    whole: bytes | None = None,
) -> Tap | None:
    """What sees the chunks of this answer: the meter, whoever keeps it, several or nobody."""
    meter = answer_look(upstream, exchange, gateway, whole)
    if meter is not None and removes_usage(upstream, exchange):
        if whole is not None:
            meter(whole)
        meter = None  # whoever removes the usage shows it what came (relay/rewrite.py)
    if exchange.keeping is None and exchange.capture is None:
        return meter
    keeper = recording(upstream, pairs, exchange, gateway) if exchange.keeping else None
    taps = [tap for tap in (meter, keeper, collector(upstream, exchange)) if tap is not None]
    if len(taps) < 2:
        return taps[0] if taps else None

    def each(chunk: bytes) -> None:
        for tap in taps:
            tap(chunk)

    return each
