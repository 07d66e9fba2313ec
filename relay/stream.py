"""Copy an upstream answer downstream, chunk by chunk as it comes, and say plainly if it broke.

Owns: the commit point, the framing of the answer, and the truth about its end: the terminal chunk
is written after a clean upstream end only; a cut answer reaches the client as a cut connection.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import ClientConnectionError, ClientResponse, hdrs, web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import HttpVersion10, HttpVersion11
from multidict import CIMultiDict

from relay.core import shapes
from relay.core.errors import ClientGone, ClientStalled, RelayError, UpstreamProtocolError
from relay.core.exchange import Exchange
from relay.core.headers import downstream_headers
from relay.core.limits import headers as limit_headers
from relay.core.sse import at_boundary
from relay.core.usage import TokenMeter
from relay.gateway import Gateway
from relay.rewrite import bytes_to_await, is_rewritten, reader, rewritten
from relay.upstream.failures import MAPPED, WITHIN_ANSWER, mapped
from relay.upstream.send import end_with_connection

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
_FLUSH_S = 1.0
_CLIENT_GONE = (ConnectionError, ClientConnectionError)
"""What a write to a client that left raises; the second while it waits for room."""
_ENVELOPE_PEEK_BYTES = 64 * 1024


class RelayedResponse(web.StreamResponse):
    """A StreamResponse that adds nothing: no Content-Type, no Server, no length but the upstream's.

    It overrides two private methods of aiohttp's, since no public one lets a response go without
    them; tests/test_stream.py holds each promise against the aiohttp that is locked.
    """

    _send_headers_immediately = False

    def __init__(self, status: int, reason: str | None, headers: CIMultiDict[str]) -> None:
        super().__init__(status=status, reason=reason or "", _real_headers=headers)

    def send_headers(self) -> None:
        """Send the head now: the body is not here yet."""
        writer = self._payload_writer
        assert writer is not None
        writer.send_headers()

    @property
    def close_delimited(self) -> bool:
        """True if only the end of the connection ends this body (HTTP/1.0 without a length)."""
        writer = self._payload_writer
        return writer is not None and not writer.chunked and writer.length is None  # type: ignore[attr-defined]

    async def _prepare_headers(self) -> None:
        request, writer, headers = self._req, self._payload_writer, self._headers
        assert request is not None and writer is not None
        version = request.version
        keep_alive = request.keep_alive if self._keep_alive is None else self._keep_alive
        if self._must_be_empty_body:
            if self.status == 204 or self.status < 200:
                headers.pop(hdrs.CONTENT_LENGTH, None)
        elif (length := headers.get(hdrs.CONTENT_LENGTH)) is not None:
            writer.length = int(length)
        elif version >= HttpVersion11:
            writer.enable_chunking()
            headers[hdrs.TRANSFER_ENCODING] = "chunked"
        else:
            keep_alive = False
        self._keep_alive = keep_alive
        if hdrs.DATE not in headers:
            headers[hdrs.DATE] = rfc822_formatted_time()
        if not keep_alive:
            headers[hdrs.CONNECTION] = "close"
        elif version == HttpVersion10:
            headers[hdrs.CONNECTION] = "keep-alive"

    async def _write_headers(self) -> None:
        try:
            await super()._write_headers()
        except ValueError as error:
            # Nothing is written yet: put the writer back, so that an error can be answered instead.
            writer = self._payload_writer
            writer.chunked, writer.length = False, None  # type: ignore[union-attr]
            raise UpstreamProtocolError(
                "a header of it holds bytes that cannot be passed on"
            ) from error


async def stream(
    upstream: ClientResponse, request: web.Request, exchange: Exchange, gateway: Gateway
) -> web.StreamResponse:
    """Relay the whole answer. Raises only before its first byte, or if the client left."""
    first = b""
    whole = upstream.content.is_eof()
    # What is to be rewritten is read first, up to a limit. And of an error the beginning: whose it
    # is goes into a header, and its body tells.
    wanted_bytes = bytes_to_await(upstream, exchange)
    while not whole and (len(first) < wanted_bytes or (upstream.status >= 400 and not first)):
        first += await _next_chunk(upstream, exchange, gateway)
        whole = upstream.content.is_eof()
    if whole:
        first += upstream.content.read_nowait()
    if exchange.metered:
        exchange.meter = TokenMeter(upstream.headers.get("Content-Encoding", ""))
    headers = _headers(upstream, exchange, gateway)
    if whole and is_rewritten(upstream, exchange):
        first = rewritten(first, headers, exchange)
    response = RelayedResponse(upstream.status, upstream.reason, headers)
    if upstream.status >= 400:
        response.headers["x-relay-error-source"] = _source(exchange, first)
    if gateway.draining:
        response.force_close()
    exchange.status = upstream.status
    exchange.wait("client", gateway.clock())
    if whole:
        await response.prepare(request)
        exchange.committed = True
        exchange.response_bytes = len(first)
        if exchange.meter is not None:
            exchange.meter.feed(first)
        try:
            await response.write_eof(first)
        except _CLIENT_GONE:
            raise ClientGone from None
        exchange.finish()
        return response
    response.headers["x-accel-buffering"] = "no"
    await response.prepare(request)
    exchange.committed = True
    return await _Copy(upstream, response, exchange, gateway.clock).run(first)


async def _next_chunk(upstream: ClientResponse, exchange: Exchange, gateway: Gateway) -> bytes:
    exchange.wait("upstream", gateway.clock())
    try:
        return await upstream.content.readany()
    except MAPPED as error:
        assert exchange.route is not None
        raise mapped(error, exchange.route, WITHIN_ANSWER) from error


@dataclass(frozen=True, slots=True)
class _Copy:
    """One answer on its way down."""

    upstream: ClientResponse
    response: RelayedResponse
    exchange: Exchange
    clock: Callable[[], float]

    async def run(self, first: bytes) -> web.StreamResponse:
        """The loop of every stream: the copy, the stamps of what is awaited, a count, no more."""
        read, write, clock = reader(self.upstream, self.exchange), self.response.write, self.clock
        exchange = self.exchange
        meter = exchange.meter
        chunk, tail = first, b""
        release = end_with_connection(self.upstream)
        try:
            if not chunk:
                self.response.send_headers()
                exchange.wait("upstream", clock())
                chunk = await read()
            while chunk:
                exchange.waiting_for = "client"
                exchange.waiting_since_s = clock()
                exchange.response_bytes += len(chunk)
                await write(chunk)
                if meter is not None:
                    meter.feed(chunk)
                tail = chunk if len(chunk) >= 4 else tail[-4:] + chunk
                exchange.waiting_for = "upstream"
                exchange.waiting_since_s = clock()
                chunk = await read()
            exchange.wait("client", clock())
            await self.response.write_eof()
            exchange.finish()
        except (*MAPPED, asyncio.CancelledError) as error:
            await self._broke(error, tail)
        finally:
            release()
        return self.response

    async def _broke(self, error: BaseException, tail: bytes) -> None:
        """End a stream that did not end well, so that the client can tell."""
        exchange = self.exchange
        assert exchange.route is not None
        if exchange.waiting_for == "client" and isinstance(error, _CLIENT_GONE):
            failure = exchange.fail(ClientGone())
        elif isinstance(error, Exception):
            failure = exchange.fail(mapped(error, exchange.route, WITHIN_ANSWER))
            exchange.cause = error
        else:
            failure = exchange.fail(error)
        if isinstance(failure, ClientGone):
            raise failure if isinstance(error, Exception) else error
        if isinstance(error, asyncio.CancelledError):
            exchange.revived()
        if not isinstance(failure, ClientStalled):
            await self._last_words(failure, tail)
        _cut(self.response)

    async def _last_words(self, failure: RelayError, tail: bytes) -> None:
        """Pass on what came before the break, and say between two SSE events what happened."""
        exchange, upstream = self.exchange, self.upstream
        assert exchange.route is not None
        rest = upstream.content._read_nowait(-1)
        exchange.response_bytes += len(rest)
        given = upstream.headers
        is_sse = upstream.content_type == "text/event-stream" and "Content-Encoding" not in given
        if is_sse and "Content-Length" not in given and at_boundary((tail + rest)[-4:]):
            meter = exchange.route.provider.meter
            rest += shapes.event(failure, meter, exchange.kind, exchange.id)
        try:
            async with asyncio.timeout(_FLUSH_S):
                await self.response.write(rest)
        except (*_CLIENT_GONE, TimeoutError):
            return


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


def _source(exchange: Exchange, start: bytes) -> str:
    """Whose error this is. Cloudflare's has an envelope: `AiGatewayError`, or v4's `success`."""
    assert exchange.route is not None
    if exchange.route.target.via == "cloudflare":
        head = start[:_ENVELOPE_PEEK_BYTES].replace(b" ", b"")
        if b'"AiGatewayError"' in head or b'"success":false' in head:
            return "cloudflare"
    return "provider"


def _headers(upstream: ClientResponse, exchange: Exchange, gateway: Gateway) -> CIMultiDict[str]:
    given = upstream.headers
    pairs = downstream_headers(given.items(), given.get("Connection"))
    if exchange.rewriter is not None:
        pairs = exchange.rewriter.pairs(pairs)
    pairs.append(("cf-aig-log-id", exchange.id))
    if _SANE_REQUEST_ID.match(exchange.request_id) and "x-request-id" not in given:
        pairs.append(("x-request-id", exchange.request_id))
    if exchange.standings:
        pairs += limit_headers(exchange.standings)
    if exchange.steps > 1:
        pairs.append(("cf-aig-step", str(exchange.step)))
    now, waited = gateway.clock(), exchange.first_byte_s - exchange.sent_s
    own = now - exchange.started_s - waited
    pairs.append(("server-timing", f"relay;dur={own * 1e3:.2f}, upstream;dur={waited * 1e3:.2f}"))
    if gateway.access.origins:
        pairs.append(("Vary", "Origin"))
    headers = CIMultiDict(pairs)
    if upstream.status == 205:
        headers["Content-Length"] = "0"
    elif "Transfer-Encoding" in given:
        headers.pop("Content-Length", None)
    return headers
