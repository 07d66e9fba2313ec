"""Record a response while it streams, so that the cache can replay it.

Owns the recording: the size limit, the pieces in which a body is replayed, and the rule that only a
complete response is stored. core/caching.py decides which responses are cacheable,
core/completeness.py which are complete.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from aiohttp import ClientResponse

from relay.cache.store import Cache, Entry
from relay.calls.attempt import RestAttempt
from relay.core.caching import CachePlan, is_cacheable, stored_headers
from relay.core.completeness import (
    MAX_READ_BYTES,
    READ_AT_ONCE_BYTES,
    Response,
    is_complete,
)

Observer = Callable[[bytes], None]
_PIECE_BYTES = 64 * 1024


def record_response(
    upstream: ClientResponse, pairs: list[tuple[str, str]], attempt: RestAttempt
) -> Observer | None:
    """Return the observer that records this response; None if the response may not be cached. The
    recording is stored if the exchange ends well.
    """
    exchange, gateway, rewriter = attempt.exchange, attempt.gateway, attempt.rewriter
    cache, route = exchange.cache, exchange.routing.route
    assert cache is not None and route is not None
    plan = cache.plan
    received = upstream.headers
    changed = rewriter is not None and any(name.lower() in rewriter.headers for name, _ in pairs)
    if not plan.ttl_s or route.is_alternative or route.replaced_model != plan.model or changed:
        return None
    if not is_cacheable(upstream.status, received.get):
        return None
    room, chunks = gateway.settings.cache.max_answer_bytes, list[bytes]()
    headers = tuple(stored_headers(pairs))
    streamed = "Content-Length" not in received

    def record(chunk: bytes) -> None:
        nonlocal room
        room -= len(chunk)
        if room >= 0:
            chunks.append(chunk)
        else:
            chunks.clear()

    def store() -> None:
        body = b"".join(chunks)
        if exchange.outcome.name != "relayed" or not body:
            return
        media, coding = received.get("Content-Type", ""), received.get("Content-Encoding", "")
        response = Response(route.format, route.kind, media, coding, body)
        complete = is_complete(response, READ_AT_ONCE_BYTES)
        if complete is False:
            return
        gateway.ledger.settle(exchange)
        entry = Entry(
            plan.provider, upstream.reason or "", headers, _pieces(body), streamed, time.time(),
            exchange.usage.cost_nano_usd,
        )  # fmt: skip
        if complete:
            gateway.cache.put(plan, entry)
        else:
            gateway.background(_store_if_complete(response, plan, entry, gateway.cache))

    exchange.at_end += (store,)
    return record


async def _store_if_complete(
    response: Response, plan: CachePlan, entry: Entry, cache: Cache
) -> None:
    """Store `entry` if the response is complete, which a thread decides: parsing a large response
    would block the loop.
    """
    if await asyncio.to_thread(is_complete, response, MAX_READ_BYTES):
        cache.put(plan, entry)


def _pieces(body: bytes) -> tuple[bytes, ...]:
    """Split a body into the pieces in which it is replayed, with backpressure between them."""
    if len(body) <= _PIECE_BYTES:
        return (body,)
    return tuple(body[at : at + _PIECE_BYTES] for at in range(0, len(body), _PIECE_BYTES))
