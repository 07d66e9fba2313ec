"""Copy an answer downstream, chunk by chunk as it comes, and say plainly if it broke.

Owns: the commit point, and the truth about the end of an answer: the terminal chunk is written
after a clean end only; a cut answer reaches the client as a cut connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from aiohttp import ClientConnectionError, ClientResponse, web
from multidict import CIMultiDict

from relay.calls.observers import observe_response
from relay.calls.recording import Observer
from relay.calls.response import RelayedResponse, with_own_headers
from relay.calls.transforms import (
    bytes_to_await,
    changing,
    is_rewritten,
    redact_error,
    redacted_pairs,
    redacted_text,
    removes_usage,
    rewritten,
)
from relay.core import shapes
from relay.core.errors import ClientGone, ClientStalled, RelayError
from relay.core.exchange import Exchange, WaitingFor
from relay.core.headers import connection_of, downstream_headers
from relay.core.injection import without_usage_event
from relay.core.rewriting import CHANGED_WITH_BODY
from relay.core.sse import at_boundary
from relay.gateway import Gateway
from relay.upstream.failures import MAPPED, WITHIN_ANSWER, mapped
from relay.upstream.send import end_with_connection

_FLUSH_S = 1.0
_CLIENT_GONE = (ConnectionError, ClientConnectionError)
"""What a write to a client that left raises; the second while it waits for room."""
_DRAINED_BYTES = 64 * 1024
"""After more than this the call is over when the client has room again."""
_ENVELOPE_PEEK_BYTES = 64 * 1024
_UNTRUE_WITHOUT_USAGE = {"content-length", *(name.lower() for name in CHANGED_WITH_BODY)}


class Source(Protocol):
    """Where the rest of an answer comes from."""

    raw: Mapping[str, str]
    """The headers as the provider sent them."""
    waits_for: WaitingFor
    """What a read waits for: `nothing` where the provider is read elsewhere, or nowhere."""

    def read(self) -> Awaitable[bytes]:
        """The next chunk; empty at the end. Raises one of MAPPED, or a RelayError."""

    def rest(self) -> bytes:
        """What is here already, when reading on has failed."""

    def release(self) -> None:
        """Nothing more is read."""


class Answer(NamedTuple):
    """An answer on its way down."""

    status: int
    reason: str | None
    headers: CIMultiDict[str]
    first: bytes
    """What is here of its body."""
    source: Source | None
    """None if that is all."""
    observe: Observer | None = None
    """Sees every chunk."""


async def stream(
    upstream: ClientResponse, request: web.Request, exchange: Exchange, gateway: Gateway
) -> web.StreamResponse:
    """Relay the whole answer. Raises only before its first byte, or if the client left."""
    read, exchange.begun = bytearray(exchange.begun), b""
    whole = upstream.content.is_eof()
    # What is to be rewritten is read first, up to a limit. And of an error the beginning: whose it
    # is goes into a header, and its body tells.
    wanted_bytes = bytes_to_await(upstream, exchange)
    while not whole and (len(read) < wanted_bytes or (upstream.status >= 400 and not read)):
        read += await next_chunk(upstream.content.readany, exchange, gateway)
        whole = upstream.content.is_eof()
    if whole and not read:
        first = upstream.content.read_nowait()
    else:
        first = bytes(read + upstream.content.read_nowait() if whole else read)
    pairs = passed_headers(upstream, exchange)
    observe = observe_response(upstream, pairs, exchange, gateway, first if whole else None)
    headers = with_own_headers(pairs, upstream.headers, exchange, gateway)
    if whole and removes_usage(upstream, exchange):
        first = without_usage_event(first)
    if whole and is_rewritten(upstream, exchange):
        first = rewritten(first, headers, exchange)
    if upstream.status >= 400:
        headers["x-relay-error-source"] = error_source(exchange, first)
        first, whole = redact_error(upstream, exchange, headers, first)
    source = None
    if not whole:
        source = FromUpstream(upstream, exchange)
        first = source.begin(first)
    answer = Answer(upstream.status, reason(upstream, exchange), headers, first, source, observe)
    return await deliver(answer, request, exchange, gateway)


async def deliver(
    answer: Answer, request: web.Request, exchange: Exchange, gateway: Gateway
) -> web.StreamResponse:
    """Send an answer down. Raises only before its first byte, or if the client left."""
    response = RelayedResponse(answer.status, answer.reason, answer.headers)
    if gateway.draining:
        response.force_close()
    exchange.status = answer.status
    exchange.wait("client", gateway.clock())
    if answer.source is not None:
        response.headers["x-accel-buffering"] = "no"
        await response.prepare(request)
        exchange.committed = True
        copy = _Copy(answer.source, response, exchange, gateway.clock, answer.observe)
        return await copy.run(answer.first)
    exchange.response_bytes = len(answer.first)
    if answer.observe is not None:
        answer.observe(answer.first)
    try:
        await response.send_whole(request, answer.first)
        exchange.committed = True
        if len(answer.first) > _DRAINED_BYTES:
            await request.writer.drain()
    except _CLIENT_GONE:
        raise ClientGone from None
    exchange.finish()
    return response


async def next_chunk(
    read: Callable[[], Awaitable[bytes]], exchange: Exchange, gateway: Gateway
) -> bytes:
    """The next chunk, while nothing has gone down yet. Raises a RelayError."""
    exchange.wait("upstream", gateway.clock())
    try:
        return await read()
    except MAPPED as error:
        assert exchange.route is not None
        raise mapped(error, exchange.route, WITHIN_ANSWER) from error


class FromUpstream:
    """The rest of an answer from its provider."""

    waits_for: WaitingFor = "upstream"

    def __init__(self, upstream: ClientResponse, exchange: Exchange) -> None:
        self.raw: Mapping[str, str] = upstream.headers
        self._content = upstream.content
        self._changing = change = changing(upstream, exchange)
        self.read = upstream.content.readany if change is None else change.next
        self._forget = end_with_connection(upstream)

    def begin(self, begun: bytes) -> bytes:
        """What goes down of what is read already."""
        return begun if self._changing is None or not begun else self._changing.begin(begun)

    def rest(self) -> bytes:
        """See Source."""
        left: bytes = self._content._read_nowait(-1)
        return left if self._changing is None else self._changing.rest(left)

    def release(self) -> None:
        """See Source."""
        self._forget()
        if self._changing is not None:
            self._changing.close()


@dataclass(frozen=True, slots=True)
class _Copy:
    """One answer on its way down."""

    source: Source
    response: RelayedResponse
    exchange: Exchange
    clock: Callable[[], float]
    observe: Observer | None

    async def run(self, first: bytes) -> web.StreamResponse:
        """The loop of every stream: the copy, the stamps of what is awaited, a count, no more."""
        read, write, clock = self.source.read, self.response.write, self.clock
        observe = self.observe
        exchange, waits_for = self.exchange, self.source.waits_for
        chunk, tail = first, b""
        try:
            if not chunk:
                self.response.send_headers()
                exchange.wait(waits_for, clock())
                chunk = await read()
            while chunk:
                exchange.waiting_for = "client"
                exchange.waiting_since_s = clock()
                exchange.response_bytes += len(chunk)
                # Before the write: one that is cut short while it waits for room has written all.
                tail = chunk if len(chunk) >= 4 else tail[-4:] + chunk
                await write(chunk)
                if observe is not None:
                    observe(chunk)
                exchange.waiting_for = waits_for
                exchange.waiting_since_s = clock()
                chunk = await read()
            exchange.wait("client", clock())
            await self.response.write_eof()
            exchange.finish()
        except (*MAPPED, RelayError, asyncio.CancelledError) as error:
            await self._broke(error, tail)
        finally:
            self.source.release()
        return self.response

    async def _broke(self, error: BaseException, tail: bytes) -> None:
        """End a stream that did not end well, so that the client can tell."""
        exchange = self.exchange
        assert exchange.route is not None
        if exchange.waiting_for == "client" and isinstance(error, _CLIENT_GONE):
            failure = exchange.fail(ClientGone())
        elif isinstance(error, RelayError) or not isinstance(error, Exception):
            failure = exchange.fail(error)
        else:
            failure = exchange.fail(mapped(error, exchange.route, WITHIN_ANSWER))
            exchange.cause = error
        if isinstance(failure, ClientGone):
            most_s = exchange.route.provider.drain_s
            if most_s is not None and self.source.waits_for == "upstream":
                await drain(self.source, exchange, self.clock, most_s)
            raise failure if isinstance(error, Exception) else error
        if isinstance(error, asyncio.CancelledError):
            exchange.revived()
        if not isinstance(failure, ClientStalled):
            await self._last_words(failure, tail)
        _cut(self.response)

    async def _last_words(self, failure: RelayError, tail: bytes) -> None:
        """Pass on what came before the break, and say between two SSE events what happened."""
        exchange, given = self.exchange, self.source.raw
        assert exchange.route is not None
        rest = self.source.rest()
        exchange.response_bytes += len(rest)
        kind = given.get("Content-Type", "").partition(";")[0].strip().lower()
        is_sse = kind == "text/event-stream" and "Content-Encoding" not in given
        if is_sse and "Content-Length" not in given and at_boundary((tail + rest)[-4:]):
            rest += shapes.event(failure, exchange.error_format, exchange.kind, exchange.id)
        try:
            async with asyncio.timeout(_FLUSH_S):
                await self.response.write(rest)
        except (*_CLIENT_GONE, TimeoutError):
            return


async def drain(
    source: Source, exchange: Exchange, clock: Callable[[], float], most_s: float
) -> None:
    """Read what nobody gets any more, to learn what it used: its end tells."""
    exchange.wait("nothing", clock())
    with contextlib.suppress(TimeoutError, RelayError, *MAPPED):
        async with asyncio.timeout(most_s):
            while chunk := await source.read():
                if exchange.look is not None:
                    exchange.look(chunk)


def _cut(response: RelayedResponse) -> None:
    """Close without a terminal chunk. What was written gets a second to leave, then a reset."""
    request = response._req
    transport = request.transport if request is not None else None
    if transport is None:
        return
    if response.close_delimited:
        # For an HTTP/1.0 client a plain close would be a clean end: reset instead.
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
        return
    transport.close()
    if transport.get_write_buffer_size():
        asyncio.get_running_loop().call_later(_FLUSH_S, transport.abort)


def error_source(exchange: Exchange, start: bytes) -> str:
    """Whose error this is. Cloudflare's has an envelope: `AiGatewayError`, or v4's `success`."""
    assert exchange.route is not None
    if exchange.route.target.via == "cloudflare":
        head = start[:_ENVELOPE_PEEK_BYTES].replace(b" ", b"")
        if b'"AiGatewayError"' in head or b'"success":false' in head:
            return "cloudflare"
    return "provider"


def reason(upstream: ClientResponse, exchange: Exchange) -> str:
    """The reason phrase that goes down: an error's may quote a key too."""
    given = upstream.reason or ""
    return redacted_text(given, exchange.keys) if upstream.status >= 400 else given


def passed_headers(upstream: ClientResponse, exchange: Exchange) -> list[tuple[str, str]]:
    """The headers of an answer that go down with it."""
    given = upstream.headers
    if exchange.route is not None and exchange.route.target.via == "cloudflare":
        exchange.cloudflare_log_id = given.get("cf-aig-log-id")
    pairs = downstream_headers(given.items(), connection_of(given))
    if exchange.rewriter is not None:
        pairs = exchange.rewriter.pairs(pairs)
    credential = exchange.keys.provider
    if upstream.status >= 300 or (credential is not None and credential.place == "query"):
        pairs = redacted_pairs(pairs, exchange.keys)
    if removes_usage(upstream, exchange):
        return [pair for pair in pairs if pair[0].lower() not in _UNTRUE_WITHOUT_USAGE]
    if "Transfer-Encoding" in given and "Content-Length" in given:
        return [pair for pair in pairs if pair[0].lower() != "content-length"]
    return pairs
