"""Copy a response downstream, chunk by chunk as it arrives, so that a client sees if it was cut.

Owns the commit point, and how a response ends: the terminal chunk is written only after a clean
end; a response that was cut reaches the client as a cut connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from aiohttp import ClientConnectionError, web

from relay.calls.attempt import SSE
from relay.calls.keepalive import Keepalive
from relay.calls.response import RelayedResponse, add_own_headers
from relay.calls.send import Answer, Source
from relay.core import error_bodies
from relay.core.errors import (
    BudgetBusy,
    BudgetExhausted,
    ClientGone,
    ClientStalled,
    RelayError,
    StoreUnavailable,
)
from relay.core.exchange import Exchange
from relay.core.meters.events import last_end
from relay.core.sse import at_boundary
from relay.gateway import Gateway
from relay.upstream.failures import MAPPABLE_ERRORS, WITHIN_ANSWER, map_failure

_FLUSH_S = 1.0
_MAX_EVENT_BYTES = 256 * 1024
ENDS_AT_EVENT = (BudgetExhausted, BudgetBusy, StoreUnavailable)
"""What ends a stream though its provider sends on: it ends between two events."""
_CLIENT_GONE = (ConnectionError, ClientConnectionError)
"""What a write raises if the client has disconnected; the second while the write waits for room."""
_DRAINED_BYTES = 64 * 1024
"""A call with a larger body than this ends only when the client has taken most of it."""


async def deliver(
    answer: Answer, request: web.Request, exchange: Exchange, gateway: Gateway
) -> web.StreamResponse:
    """Send an answer downstream. Raises only before the first byte, or if the client has left."""
    headers = add_own_headers(answer.pairs, answer.raw, exchange, gateway)
    response = RelayedResponse(answer.status, answer.reason, headers)
    if gateway.draining:
        response.force_close()
    exchange.response.status = answer.status
    exchange.wait("client", gateway.clock())
    if answer.source is not None:
        response.headers["x-accel-buffering"] = "no"
        await response.prepare(request)
        exchange.move_to("committed")
        copy = _Copy(answer, answer.source, response, exchange, gateway.clock)
        assert exchange.routing.route is not None
        keepalive_s = exchange.routing.route.provider.keepalive_s
        if keepalive_s is None or not _has_plain_events(answer):
            return await copy.run()
        return await _run_with_keepalives(copy, gateway, keepalive_s)
    exchange.response.body_bytes = len(answer.first)
    if answer.observe is not None:
        answer.observe(answer.first)
    try:
        await response.send_whole(request, answer.first)
        exchange.move_to("committed")
        if len(answer.first) > _DRAINED_BYTES:
            await request.writer.drain()
    except _CLIENT_GONE:
        raise ClientGone from None
    exchange.finish()
    return response


@dataclass(frozen=True, slots=True)
class _Copy:
    """The copy of one response."""

    answer: Answer
    source: Source
    response: RelayedResponse
    exchange: Exchange
    clock: Callable[[], float]

    async def run(self) -> web.StreamResponse:
        """Copy the stream. The loop only copies, stamps what it waits for, and counts bytes."""
        read, write, clock = self.source.read, self.response.write, self.clock
        observe = self.answer.observe
        exchange, waits_for = self.exchange, self.source.waits_for
        waiting, sent = exchange.waiting, exchange.response
        chunk, tail = self.answer.first, b""
        try:
            if not chunk:
                self.response.send_headers()
                exchange.wait(waits_for, clock())
                chunk = await read()
            while chunk:
                waiting.for_ = "client"
                waiting.since_s = clock()
                sent.body_bytes += len(chunk)
                # Before the write: a write that is cancelled while it waits for room has written
                # the whole chunk.
                tail = chunk if len(chunk) >= 4 else tail[-4:] + chunk
                await write(chunk)
                if observe is not None:
                    observe(chunk)
                waiting.for_ = waits_for
                waiting.since_s = clock()
                chunk = await read()
            exchange.wait("client", clock())
            await self.response.write_eof()
            exchange.finish()
        except (*MAPPABLE_ERRORS, RelayError, asyncio.CancelledError) as error:
            await self._end_broken(error, tail)
        return self.response

    async def _end_broken(self, error: BaseException, tail: bytes) -> None:
        """End a stream that failed so that the client sees the failure. `tail` are the last bytes
        that were written. Raises if the client has left.
        """
        exchange = self.exchange
        assert exchange.routing.route is not None
        failure: RelayError
        is_client_gone = exchange.waiting.for_ == "client" and isinstance(error, _CLIENT_GONE)
        if is_client_gone:
            failure = ClientGone()
        elif isinstance(error, RelayError) or not isinstance(error, Exception):
            failure = exchange.failure_of(error)
        else:
            failure = map_failure(error, exchange.routing.route, WITHIN_ANSWER)
        exchange.fail(failure, None if is_client_gone else error)
        if isinstance(failure, ClientGone):
            most_s = exchange.routing.route.provider.drain_s
            if most_s is not None and self.source.waits_for == "upstream":
                await drain(self.source, exchange, self.clock, most_s)
            raise failure if isinstance(error, Exception) else error
        if isinstance(error, asyncio.CancelledError):
            exchange.take_expiry()
        if isinstance(failure, ENDS_AT_EVENT):
            await self._send_error_event(failure, tail, await finish_event(self.answer, tail))
        elif not isinstance(failure, ClientStalled):
            await self._send_error_event(failure, tail, self.source.rest())
        _cut(self.response)

    async def _send_error_event(self, failure: RelayError, tail: bytes, rest: bytes) -> None:
        """Send `rest`, received before the failure, and an error event if that ends between two SSE
        events.
        """
        exchange = self.exchange
        exchange.response.body_bytes += len(rest)
        if _has_plain_events(self.answer) and at_boundary((tail + rest)[-4:]):
            rest += error_bodies.error_event(
                failure, exchange.error_format, exchange.request.kind, exchange.id
            )
        try:
            async with asyncio.timeout(_FLUSH_S):
                await self.response.write(rest)
        except (*_CLIENT_GONE, TimeoutError):
            return


def _has_plain_events(answer: Answer) -> bool:
    """True for server-sent events that are not compressed and not of a length known before."""
    headers = answer.raw
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return kind == SSE and "Content-Encoding" not in headers and "Content-Length" not in headers


async def _run_with_keepalives(copy: _Copy, gateway: Gateway, after_s: float) -> web.StreamResponse:
    """Copy the stream, and let the sweep write keepalives into it while it is silent."""
    waits_for, observe = copy.source.waits_for, copy.answer.observe
    keepalive = Keepalive(copy.response, copy.exchange, waits_for, after_s)
    answer = copy.answer._replace(observe=keepalive.following(observe))
    gateway.keepalives.add(keepalive)
    try:
        return await replace(copy, answer=answer).run()
    finally:
        gateway.keepalives.discard(keepalive)


async def finish_event(answer: Answer, tail: bytes) -> bytes:
    """Read on to the end of the event within which a stream is to end; `tail` are the last bytes
    that were sent. Returns what is to be sent yet, within a second.
    """
    source, rest = answer.source, b""
    if source is None or not _has_plain_events(answer):
        return rest
    with contextlib.suppress(TimeoutError, RelayError, *MAPPABLE_ERRORS):
        async with asyncio.timeout(_FLUSH_S):
            while not at_boundary((tail + rest)[-4:]) and len(rest) < _MAX_EVENT_BYTES:
                if not (chunk := await source.read()):
                    break
                rest += chunk
                if (end := last_end(tail + rest) - len(tail)) > 0:
                    rest = rest[:end]
    return rest


async def drain(
    source: Source, exchange: Exchange, clock: Callable[[], float], most_s: float
) -> None:
    """Read the rest of a response whose client has left, for at most `most_s`: providers report
    usage at the end.
    """
    exchange.wait("nothing", clock())
    observer = exchange.response.meter_observer
    with contextlib.suppress(TimeoutError, RelayError, *MAPPABLE_ERRORS):
        async with asyncio.timeout(most_s):
            while chunk := await source.read():
                if observer is not None:
                    observer.see(chunk)


def _cut(response: RelayedResponse) -> None:
    """Close the connection without a terminal chunk, and reset it if its buffered bytes are not
    sent within a second.
    """
    transport = response.transport
    if transport is None:
        return
    if response.close_delimited:
        # To an HTTP/1.0 client a normal close is a clean end: reset the connection instead.
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
        return
    transport.close()
    if transport.get_write_buffer_size():
        asyncio.get_running_loop().call_later(_FLUSH_S, transport.abort)
