"""Turn an error into the response that a client gets.

Owns the response: status, headers, and the choice of the format in which the client's SDK reads
errors. core/error_bodies.py encodes the bodies; core/errors.py has the errors and their messages.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from relay.calls.response import RelayedResponse, add_own_headers
from relay.calls.send import error_source
from relay.core import error_bodies, limits
from relay.core.base_urls import guess_provider
from relay.core.errors import (
    BadFraming,
    BodyTimeout,
    HandshakeRefused,
    MethodNotAllowed,
    RelayError,
    UnknownRoute,
)
from relay.core.exchange import Exchange
from relay.core.headers import connection_of, downstream_headers
from relay.gateway import EXCHANGE, GATEWAY, new_id


def answer(request: web.Request, error: RelayError) -> web.StreamResponse:
    """The response for `error`."""
    exchange = request.get(EXCHANGE)
    if isinstance(error, HandshakeRefused) and exchange is not None:
        return _refused_handshake(request, error, exchange)
    format_ = _format_of(request, error)
    response = plain(error, format_, exchange.id if exchange else new_id())
    if exchange and exchange.limit_states:
        response.headers.extend(limits.ratelimit_headers(exchange.limit_states))
    if isinstance(error, MethodNotAllowed):
        response.headers["Allow"] = ", ".join(error.allowed)
        response.force_close()
    vary(request, response)
    if request.app[GATEWAY].draining:
        response.force_close()
    return response


def _format_of(request: web.Request, error: RelayError) -> str:
    """The wire format in which the client's SDK reads errors."""
    if isinstance(error, UnknownRoute):
        return error.format
    exchange: Exchange | None = request.get(EXCHANGE)
    if exchange is None:  # such as the list of models
        return "anthropic" if "anthropic-version" in request.headers else "openai"
    if exchange.routing.route is None and exchange.request.surface_format is None:
        # Refused before it had a route: the provider may be unknown.
        path = f"{exchange.request.provider}/{exchange.request.endpoint}"
        providers = request.app[GATEWAY].registry.providers
        return guess_provider(path, request.headers, providers).format
    return exchange.error_format


def plain(error: RelayError, format_: str, request_id: str) -> web.Response:
    """The response for `error`, also for a request that reached no handler."""
    headers = error_bodies.error_headers(error, format_) | {"cf-aig-log-id": request_id}
    body = error_bodies.error_body(error, format_, request_id)
    kind = _LastResponse if isinstance(error, BadFraming | BodyTimeout) else web.Response
    return kind(status=error.status, body=body, content_type="application/json", headers=headers)


class _LastResponse(web.Response):
    """The response to a request whose end is unknown: the last one of its connection. The FIN goes
    out with it, and the server goes on reading for a while what the client still sends: a reset
    could overtake the response.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._transport: asyncio.Transport | None = None
        self.force_close()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the head."""
        self._transport = request.transport
        return await super().prepare(request)

    async def write_eof(self, data: bytes = b"") -> None:
        """Send the end of the response, and close the server's half of the connection."""
        await super().write_eof(data)
        transport = self._transport
        if transport is not None and transport.can_write_eof():
            transport.write_eof()


def vary(request: web.Request, response: web.StreamResponse) -> None:
    """Add `Vary: Origin` where the response depends on Origin: where CORS allows any."""
    if request.app[GATEWAY].lists_origins:
        response.headers.add("Vary", "Origin")


def _refused_handshake(
    request: web.Request, error: HandshakeRefused, exchange: Exchange
) -> web.StreamResponse:
    """The provider's response to a WebSocket handshake that it refused, unchanged."""
    gateway, upstream = request.app[GATEWAY], error.headers
    pairs = downstream_headers(upstream.items(), connection_of(upstream))
    headers = add_own_headers(pairs, upstream, exchange, gateway)
    headers["Content-Length"] = str(len(error.body))
    headers["x-relay-error"] = error.code
    headers["x-relay-error-source"] = error_source(exchange, error.body)
    response = Refusal(error.status, error.reason, headers)
    response.body = error.body
    if gateway.draining:
        response.force_close()
    return response


class Refusal(RelayedResponse):
    """A RelayedResponse whose body is in memory."""

    body: bytes = b""

    async def write_eof(self, data: bytes = b"") -> None:
        """Send the body, once."""
        await super().write_eof(b"" if self._must_be_empty_body else data or self.body)
