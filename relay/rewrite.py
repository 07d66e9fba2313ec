"""URLs of a provider's own hosts in an answer, on their way down: they come back as the relay's.

Owns: which answers are read for that, and how far. The rules are `rewrite:` of gateway.yaml, the
text work is core/rewriting.py's. A call of a provider without rules passes none of this.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import ClientResponse, web
from multidict import CIMultiDict

from relay.call import Call
from relay.core.exchange import Exchange
from relay.core.provider import Route
from relay.core.rewriting import CHANGED_WITH_BODY, EventChanger, Rewriter
from relay.gateway import Gateway
from relay.metering import without_usage_event

_SSE = "text/event-stream"
_TEXTS = ("application/json", _SSE)
REWRITE_BYTES = 1024 * 1024
"""A JSON answer, or an SSE event, larger than this passes as it is."""


def rewriter(request: web.Request, call: Call, route: Route, gateway: Gateway) -> Rewriter | None:
    """What makes the provider's URLs in this call's answer the relay's; None if nothing is to
    be.
    """
    rewrites = route.provider.rewrites
    if rewrites is None:
        return None
    fields = rewrites.pattern(route.endpoint)
    if fields is None and not rewrites.headers:
        return None
    root = f"{gateway.public_url(request)}{call.root}{route.provider.name}/"
    return Rewriter(route.provider.homes, root, rewrites.headers, fields)


def is_rewritten(upstream: ClientResponse, exchange: Exchange) -> bool:
    """True for an answer whose listed fields hold URLs that must be the relay's."""
    rewriter = exchange.rewriter
    if rewriter is None or rewriter.fields is None or "Content-Encoding" in upstream.headers:
        return False
    return upstream.content_type in _TEXTS and upstream.status != 206


def rewritten(body: bytes, headers: CIMultiDict[str], exchange: Exchange) -> bytes:
    """The body with the relay's URLs; `headers` are made true to it."""
    assert exchange.rewriter is not None
    if len(body) > REWRITE_BYTES:
        return body
    ours = exchange.rewriter.body(body)
    if ours != body:
        headers["Content-Length"] = str(len(ours))
        for name in CHANGED_WITH_BODY:
            headers.popall(name, None)
    return ours


def bytes_to_await(upstream: ClientResponse, exchange: Exchange) -> int:
    """How much of an answer is read before its head goes down: all JSON that is rewritten, if it
    is not too large.
    """
    if exchange.rewriter is None or upstream.content_type == _SSE:
        return 0
    return REWRITE_BYTES + 1 if is_rewritten(upstream, exchange) else 0


def reader(upstream: ClientResponse, exchange: Exchange) -> Callable[[], Awaitable[bytes]]:
    """What gives the next chunk of a stream; of SSE that is changed on its way, whole events."""
    read, rewriter = upstream.content.readany, exchange.rewriter
    if takes_usage_out(upstream, exchange):
        return _Events(read, lambda events: without_usage_event(events, exchange)).next
    if rewriter is None or upstream.content_type != _SSE or not is_rewritten(upstream, exchange):
        return read
    return _Events(read, rewriter.body).next


def takes_usage_out(upstream: ClientResponse, exchange: Exchange) -> bool:
    """True for a stream whose usage was asked for on its client's behalf."""
    if not exchange.asks_usage or upstream.content_type != _SSE:
        return False
    return "Content-Encoding" not in upstream.headers


class _Events:
    """SSE read event by event, and changed. An event of more than REWRITE_BYTES is not."""

    __slots__ = ("_changer", "_read")

    def __init__(
        self, read: Callable[[], Awaitable[bytes]], change: Callable[[bytes], bytes]
    ) -> None:
        self._read, self._changer = read, EventChanger(change, REWRITE_BYTES)

    async def next(self) -> bytes:
        """The next whole events; at the end what is left; empty after it."""
        while chunk := await self._read():
            if changed := self._changer.feed(chunk):
                return changed
        return self._changer.rest()
