"""Take down an answer as it passes, so that it can be given again.

Owns: what is taken down, and that only a complete answer is kept. What may be kept at all is
core/caching.py's to say, what is complete core/completeness.py's, where it is kept
cache/store.py's.
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
    """Record this response if it may be cached: what takes its chunks, else None. It is cached when
    the exchange ends well.
    """
    exchange, gateway, rewriter = attempt.exchange, attempt.gateway, attempt.rewriter
    cache, route = exchange.cache, exchange.routing.route
    assert cache is not None and route is not None
    plan = cache.plan
    given = upstream.headers
    changed = rewriter is not None and any(name.lower() in rewriter.headers for name, _ in pairs)
    if not plan.ttl_s or route.is_alternative or route.replaced_model is not None or changed:
        return None
    if not is_cacheable(upstream.status, given.get):
        return None
    recorder = _Recorder(gateway.settings.cache.max_answer_bytes)
    headers = tuple(stored_headers(pairs))
    streamed = "Content-Length" not in given

    def settle() -> None:
        body = recorder.body()
        if exchange.outcome.name != "relayed" or not body:
            return
        media, coding = given.get("Content-Type", ""), given.get("Content-Encoding", "")
        response = Response(route.format, route.kind, media, coding, body)
        verdict = is_complete(response, READ_AT_ONCE_BYTES)
        if verdict is False:
            return
        gateway.ledger.settle(exchange)
        entry = Entry(
            plan.provider, upstream.reason or "", headers, _pieces(body), streamed, time.time(),
            exchange.usage.cost_nano_usd,
        )  # fmt: skip
        if verdict:
            gateway.cache.keep(plan, entry)
        else:
            gateway.background(_keep_if_complete(response, plan, entry, gateway.cache))

    exchange.at_end += (settle,)
    return recorder.feed


async def _keep_if_complete(
    response: Response, plan: CachePlan, entry: Entry, cache: Cache
) -> None:
    """Decide in a thread: to read a long response would hold up all calls."""
    if await asyncio.to_thread(is_complete, response, MAX_READ_BYTES):
        cache.keep(plan, entry)


def _pieces(body: bytes) -> tuple[bytes, ...]:
    """A body as it is given again: with backpressure between its pieces."""
    if len(body) <= _PIECE_BYTES:
        return (body,)
    return tuple(body[at : at + _PIECE_BYTES] for at in range(0, len(body), _PIECE_BYTES))


class _Recorder:
    """Holds what passed, up to a limit."""

    def __init__(self, max_bytes: int) -> None:
        self._most_bytes, self._bytes = max_bytes, 0
        self._chunks: list[bytes] | None = []

    def feed(self, chunk: bytes) -> None:
        """Take one chunk."""
        if self._chunks is None:
            return
        self._bytes += len(chunk)
        if self._bytes > self._most_bytes:
            self._chunks = None
            return
        self._chunks.append(chunk)

    def body(self) -> bytes | None:
        """All of it; None if it was too large."""
        return None if self._chunks is None else b"".join(self._chunks)
