"""The two aiohttp sessions that all outbound traffic goes through, set up so that nothing is added
or lost.

Owns: connection pools and their options. A reader who changes one breaks a promise of the wire:
no decompression, no cookies kept, no headers of aiohttp's own, no limit but ours, no redirect
followed, no silent second sending.
"""

from __future__ import annotations

import asyncio

from aiohttp import (
    ClientHandlerType,
    ClientRequest,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
)

from relay.core.errors import HandshakeRefused, UpstreamTimeout
from relay.upstream.request import RelayRequest

READ_BUFFER_BYTES = 64 * 1024
"""Twice this is read ahead of a slow client; aiohttp takes 256 KiB."""
MAX_HEAD_LINE_BYTES = 32 * 1024
MAX_HEADERS = 256
MAX_REFUSAL_BYTES = 64 * 1024
REFUSAL_TIMEOUT_S = 10.0


class UpstreamSessions:
    """`rest` for calls, `sockets` for WebSocket handshakes. Close with `close`."""

    def __init__(self) -> None:
        self.rest = _session(())
        self.sockets = _session((_refusals_are_errors,))

    async def close(self) -> None:
        """Close both pools."""
        await self.rest.close()
        await self.sockets.close()


def _session(middlewares: tuple[object, ...]) -> ClientSession:
    session = ClientSession(
        connector=TCPConnector(limit=0, keepalive_timeout=30),
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        request_class=RelayRequest,
        timeout=ClientTimeout(total=None),
        read_bufsize=READ_BUFFER_BYTES,
        max_line_size=MAX_HEAD_LINE_BYTES,
        max_field_size=MAX_HEAD_LINE_BYTES,
        max_headers=MAX_HEADERS,
        middlewares=middlewares,  # type: ignore[arg-type]
    )
    # aiohttp sends an idempotent call again on a stale connection, unseen. It has no public switch.
    session._retry_connection = False
    return session


async def _refusals_are_errors(
    request: ClientRequest, handler: ClientHandlerType
) -> ClientResponse:
    """Raise HandshakeRefused on anything but 101, before aiohttp follows a redirect or drops the
    body.
    """
    response = await handler(request)
    if response.status == 101:
        return response
    try:
        async with asyncio.timeout(REFUSAL_TIMEOUT_S):
            body = await _at_most(response, MAX_REFUSAL_BYTES)
    except TimeoutError:
        raise UpstreamTimeout("refusing the WebSocket handshake", REFUSAL_TIMEOUT_S) from None
    finally:
        response.close()
    raise HandshakeRefused(response.status, response.reason or "", response.headers, body)


async def _at_most(response: ClientResponse, limit_bytes: int) -> bytes:
    body = b""
    while len(body) < limit_bytes and (chunk := await response.content.readany()):
        body += chunk
    return body[:limit_bytes]
