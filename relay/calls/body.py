"""Read a request body from the client: hold it whole if it is small enough, else stream it.

Owns reading, the count of the memory that held bodies and decompressed bodies take, and the
`100 Continue` that asks a client for its body. How a body is changed for a target is in attempt.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.http import HttpVersion11
from aiohttp.web_exceptions import HTTPRequestEntityTooLarge
from aiohttp.web_protocol import RequestPayloadError

from relay.core.errors import BadFraming, ClientGone, RelayError
from relay.core.exchange import Exchange, Request
from relay.core.meters.unpack import CannotUnpack, CutShort, coding_of, steps
from relay.core.peek import Peek
from relay.gateway import Gateway

_STEP_BYTES = 256 * 1024
"""Bytes decompressed in one step, which takes about a millisecond."""


@dataclass(slots=True)
class Body:
    """Either `whole`, which may be empty, or a `stream` that can be sent once."""

    whole: bytes = b""
    text: bytes | None = None
    """`whole`, decompressed: what the relay may parse. None for a stream, and for a body that
    cannot be decompressed or is too large afterwards."""
    seen: Peek | None = None
    """The fields of `text`; None until they are read."""
    stream: AsyncIterator[bytes] | None = None
    length: int | None = None
    """Content-Length of the stream, if the client sent one."""
    is_decoded: bool = False
    """True if a host's server has undone the Content-Encoding."""
    error: RelayError | None = None
    """Why the stream ended early, if the client is the cause."""
    head: list[bytes] = field(default_factory=list)
    """The chunks that have been read and not been sent yet."""

    def let_go(self) -> None:
        """Free the body: the call is not sent again."""
        self.whole, self.text, self.seen = b"", None, None


def body_at_hand(request: web.Request, exchange: Exchange, gateway: Gateway) -> Body | None:
    """Return the body if all of it has arrived and it is small, as most are: without an await and
    without counting its memory.

    None if `read_body` must read it. Raises BadFraming for a framing that is not safe to relay.
    """
    _check_framing(request)
    content = request.content
    if not content.is_eof() or content.total_bytes > gateway.settings.server.buffer_bytes:
        return None
    if not request.body_exists:
        return Body(text=b"")
    if "Expect" in request.headers or "Content-Encoding" in request.headers:
        return None
    whole = content.read_nowait()
    exchange.request.body_bytes = len(whole)
    return Body(whole, whole)


async def read_body(
    request: web.Request, exchange: Exchange, gateway: Gateway, needs_model: bool = False
) -> Body:
    """Read the request's body until it ends or passes its limit. Raises BadFraming, BodyTimeout.

    The limit is `server.json_buffer_bytes` for JSON, and for a call that is routed by the model of
    its body (`needs_model`); `server.buffer_bytes` for other types; and for all of them the part of
    `server.buffer_total_bytes` that is free. A larger body becomes a stream.
    """
    if "Expect" in request.headers:
        await _send_continue(request)
    body = await _read(request, exchange, gateway, needs_model)
    body.is_decoded = gateway.mounted
    if body.stream is None:
        codings = ",".join(request.headers.getall("Content-Encoding", ()))
        plain = body.is_decoded or not coding_of(codings)
        body.text = body.whole if plain else await _unpacked(body.whole, codings, exchange, gateway)
    return body


def _check_framing(request: web.Request) -> None:
    coding = request.headers.get("Transfer-Encoding")
    if coding is not None and (
        coding.strip().lower() != "chunked" or request.version < HttpVersion11
    ):
        raise BadFraming("its Transfer-Encoding is not plain chunked")


async def _send_continue(request: web.Request) -> None:
    """Answer `Expect: 100-continue` now that the call is admitted (RFC 9110 10.1.1)."""
    expectation = request.headers["Expect"]
    if request.version < HttpVersion11:
        return
    if expectation.strip().lower() != "100-continue":
        raise BadFraming("its Expect header is not 100-continue")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0


async def _read(
    request: web.Request, exchange: Exchange, gateway: Gateway, needs_model: bool
) -> Body:
    server = gateway.settings.server
    is_larger = needs_model or request.content_type.endswith("json")
    limit = server.json_buffer_bytes if is_larger else server.buffer_bytes
    body = Body(length=request.content_length)
    if body.length is None or body.length <= limit:
        total = server.buffer_total_bytes
        while exchange.request.held_bytes <= limit and gateway.held_bytes <= total:
            chunk = await _next_chunk(request, exchange, gateway)
            if not chunk:
                body.whole = b"".join(body.head)
                body.head.clear()
                return body
            body.head.append(chunk)
            gateway.hold(exchange, len(chunk))
    body.stream = _streamed(request, exchange, gateway, body)
    return body


async def _unpacked(
    packed: bytes, codings: str, exchange: Exchange, gateway: Gateway
) -> bytes | None:
    """Decompress a body, up to `server.json_buffer_bytes`; the memory of the result is counted.
    None if that fails, or if the result is too large.

    None too for a body that is JSON before it is decompressed: a provider that ignores
    Content-Encoding would read another model from it than the relay.
    """
    server, text = gateway.settings.server, bytearray()
    if packed.lstrip().startswith((b"{", b"[")):
        return None
    try:
        pieces = steps(packed, codings, _STEP_BYTES)
        stacked = _STEP_BYTES if "," in codings else 0
        while piece := await _next_piece(pieces, len(packed) + len(text) + stacked):
            gateway.hold(exchange, len(piece))
            text += piece
            full = gateway.held_bytes > server.buffer_total_bytes
            if full or len(text) > server.json_buffer_bytes:
                raise CutShort
    except CannotUnpack:
        gateway.let_go(exchange, len(text))
        return None
    return bytes(text)


async def _next_piece(pieces: Iterator[bytes], seen_bytes: int) -> bytes:
    """Return the next piece, empty at the end. A step of more than a millisecond runs in a
    thread.
    """
    if seen_bytes <= _STEP_BYTES:
        return next(pieces, b"")
    return await asyncio.to_thread(next, pieces, b"")


async def _next_chunk(request: web.Request, exchange: Exchange, gateway: Gateway) -> bytes:
    is_timed = exchange.state != "committed"
    if is_timed:
        exchange.wait("request_body", began_s := gateway.clock())
    try:
        chunk = await request.content.readany()
    except (RequestPayloadError, HTTPRequestEntityTooLarge, ValueError) as error:
        raise BadFraming("its body is not framed correctly") from error
    exchange.request.body_bytes += len(chunk)
    if is_timed and (rate := gateway.settings.server.min_body_bytes_per_s):
        waited_s = gateway.clock() - began_s
        behind_s = exchange.waiting.body_behind_s + waited_s - len(chunk) / rate
        exchange.waiting.body_behind_s = max(0.0, behind_s)
    return chunk


async def _streamed(
    request: web.Request, exchange: Exchange, gateway: Gateway, body: Body
) -> AsyncIterator[bytes]:
    """Yield the chunks that were read already, then the rest as it arrives. While the provider
    takes a chunk, the exchange waits for "upload".

    Once the response has begun, the exchange waits for the response: an upload that goes on is not
    timed.
    """
    try:
        while body.head:
            exchange.wait("upload", gateway.clock())
            piece = body.head.pop(0)
            gateway.let_go(exchange, len(piece))
            yield piece
        while chunk := await _next_chunk(request, exchange, gateway):
            if exchange.state != "committed":
                exchange.wait("upload", gateway.clock())
            yield chunk
    except RelayError as error:
        body.error = error
        raise
    except ConnectionError:
        body.error = ClientGone()
        raise
    if exchange.state != "committed":
        exchange.wait("first_byte", gateway.clock())


def keep_start(body: Body, facts: Request, most_bytes: int) -> None:
    """Keep the beginning of a streamed body, up to `most_bytes` of its first chunk, as the billable
    input.
    """
    assert body.stream is not None
    body.stream = _keeping_start(body.stream, facts, most_bytes)


async def _keeping_start(
    stream: AsyncIterator[bytes], facts: Request, most_bytes: int
) -> AsyncIterator[bytes]:
    async for chunk in stream:
        if not facts.billable_input:
            facts.billable_input = chunk[:most_bytes]
        yield chunk
