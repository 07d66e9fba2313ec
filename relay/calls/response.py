"""Send a response to the client without the headers that aiohttp adds by itself.

Owns the framing of the response, and the headers that the relay adds to each one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from aiohttp import hdrs, web
from aiohttp.helpers import must_be_empty_body, rfc822_formatted_time
from aiohttp.http import HttpVersion10, HttpVersion11
from aiohttp.http_writer import _serialize_headers
from multidict import CIMultiDict

from relay.core.budget_headers import warning_headers
from relay.core.errors import UpstreamProtocolError
from relay.core.exchange import Exchange
from relay.core.headers import all_ascii, head_bytes
from relay.core.limits import ratelimit_headers
from relay.gateway import Gateway

_UNFIT_HEADER = "one of its headers contains bytes that HTTP does not allow"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


class _OwnHead(web.StreamResponse):
    """Writes header bytes outside ASCII as they were received."""

    def _first_line(self) -> str:
        assert self._req is not None
        version = self._req.version
        return f"HTTP/{version[0]}.{version[1]} {self.status} {self.reason}"

    async def _write_headers(self) -> None:
        writer = self._payload_writer
        if all_ascii(self.headers) and self.reason.isascii():
            await super()._write_headers()
            return
        assert writer is not None
        writer._headers_buf = head_bytes(self._first_line(), self.headers)  # type: ignore[attr-defined]
        if self._send_headers_immediately:
            writer.send_headers()


class RelayedResponse(_OwnHead):
    """A StreamResponse that adds no Content-Type, no Server, and no length but the provider's.

    It uses private parts of aiohttp, since no public part can send a response without additions;
    tests/calls/test_stream.py tests each of these properties with the pinned aiohttp.
    """

    _send_headers_immediately = False

    def __init__(self, status: int, reason: str | None, headers: CIMultiDict[str]) -> None:
        super().__init__(status=status, reason=reason or "", _real_headers=headers)

    def send_headers(self) -> None:
        """Send the head now, before the first chunk of the body arrives."""
        writer = self._payload_writer
        assert writer is not None
        writer.send_headers()

    @property
    def transport(self) -> asyncio.Transport | None:
        """The client's connection; None before `prepare`, and after the response has ended."""
        return self._req.transport if self._req is not None else None

    @property
    def close_delimited(self) -> bool:
        """True if the end of the connection ends the body (HTTP/1.0 without a length)."""
        writer = self._payload_writer
        return writer is not None and not writer.chunked and writer.length is None  # type: ignore[attr-defined]

    def write_if_empty(self, data: bytes) -> None:
        """Write a part of the body without waiting, after the head, unless the client has still to
        take bytes that were written before. Raises ConnectionError if the client has left.
        """
        writer, transport = self._payload_writer, self.transport
        if writer is None or transport is None or transport.get_write_buffer_size():
            return
        if writer.chunked:  # type: ignore[attr-defined]
            data = b"%x\r\n%b\r\n" % (len(data), data)
        elif not self.close_delimited:
            return
        writer._write(data)  # type: ignore[attr-defined]

    async def send_whole(self, request: web.Request, body: bytes) -> None:
        """Send head and body in one write, with the result of `prepare` and `write_eof`. Raises
        UpstreamProtocolError before the first byte, and ConnectionError.
        """
        self._must_be_empty_body = must_be_empty_body(request.method, self.status)
        self._req = request
        writer = self._payload_writer = request.writer
        self._frame()
        matched = request._match_info
        # `match_info.apps` has the same items, but builds a dictionary and a tuple each time.
        for app in matched._apps if matched is not None else ():
            await app.on_response_prepare.send(request, self)
        first = self._first_line()
        plain = all_ascii(self.headers) and first.isascii()
        try:
            head = (_serialize_headers if plain else head_bytes)(first, self.headers)
        except ValueError as error:
            raise self._unsent() from error
        if self._must_be_empty_body:
            body = b""
        elif writer.chunked:  # type: ignore[attr-defined]
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        writer._write(head + body)  # type: ignore[attr-defined]
        self._eof_sent, self._req, self._payload_writer = True, None, None

    async def _prepare_headers(self) -> None:
        self._frame()

    def _frame(self) -> None:
        request, writer, headers = self._req, self._payload_writer, self.headers
        assert request is not None and writer is not None
        version = request.version
        keep_alive = request.keep_alive if self._keep_alive is None else self._keep_alive
        if self.status == 205:
            self._must_be_empty_body = True
            headers[hdrs.CONTENT_LENGTH] = "0"
        if self._must_be_empty_body:
            writer.length = 0  # the writer drops every byte of the body
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
            raise self._unsent() from error

    def _unsent(self) -> UpstreamProtocolError:
        """Reset the writer, to which nothing has been written, so that an error can be sent."""
        writer = self._payload_writer
        writer.chunked, writer.length = False, None  # type: ignore[union-attr]
        return UpstreamProtocolError(_UNFIT_HEADER)


class RelayedWebSocket(_OwnHead, web.WebSocketResponse[bool]):
    """A WebSocketResponse whose 101 has the provider's headers, and of aiohttp's own headers only
    those that the handshake needs.
    """

    def take_headers(
        self,
        pairs: list[tuple[str, str]],
        given: Mapping[str, str],
        exchange: Exchange,
        gateway: Gateway,
    ) -> None:
        """Set the provider's headers (`pairs`) and the relay's own, which replace those of the same
        name.
        """
        own = add_own_headers([], given, exchange, gateway)
        self.headers.extend(pair for pair in pairs if pair[0] not in own)
        self.headers.extend(own)
        for name in _NOT_IN_101:
            self.headers.popall(name, None)

    async def _prepare_headers(self) -> None:
        server = self.headers.getall(hdrs.SERVER, ())
        await super()._prepare_headers()
        self.headers.pop(hdrs.CONTENT_TYPE, None)
        if not server:
            del self.headers[hdrs.SERVER]

    async def _write_headers(self) -> None:
        try:
            await super()._write_headers()
        except ValueError as error:
            raise UpstreamProtocolError(_UNFIT_HEADER) from error


_NOT_IN_101 = (hdrs.CONTENT_LENGTH, hdrs.CONTENT_TYPE)
"""Headers that describe a body; a 101 has none (RFC 9110 8.6)."""


def add_own_headers(
    pairs: list[tuple[str, str]], given: Mapping[str, str], exchange: Exchange, gateway: Gateway
) -> CIMultiDict[str]:
    """Add the relay's own headers to those of the response, and set `overhead_s` to the relay's own
    time up to now. `given` are the response headers as the provider sent them.
    """
    pairs.append(("cf-aig-log-id", exchange.id))
    request_id = exchange.request.request_id
    if request_id and _SANE_REQUEST_ID.match(request_id) and "x-request-id" not in given:
        pairs.append(("x-request-id", request_id))
    if exchange.limit_states:
        pairs += ratelimit_headers(exchange.limit_states)
    if exchange.budget is not None and exchange.budget.is_near_limit:
        pairs += warning_headers(exchange.budget, given, exchange.error_format)
    if (cache := exchange.cache) is not None:
        pairs.append(("cf-aig-cache-status", cache.status))
        pairs.append(("x-relay-cache-key", cache.plan.key))
    if exchange.routing.step is not None:
        pairs.append(("cf-aig-step", str(exchange.routing.step)))
    now, waited = gateway.clock(), exchange.response.first_byte_s - exchange.routing.sent_s
    exchange.response.overhead_s = spent = now - exchange.request.started_s - waited
    pairs.append(("server-timing", f"relay;dur={spent * 1e3:.2f}, upstream;dur={waited * 1e3:.2f}"))
    if gateway.lists_origins:
        pairs.append(("Vary", "Origin"))
    return CIMultiDict(pairs)
