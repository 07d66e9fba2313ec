"""The two aiohttp sessions that all outbound traffic goes through, set up so that nothing is added
or lost.

Owns: connection pools and their options. A reader who changes one breaks a promise of the wire:
no decompression, no cookies kept, no headers of aiohttp's own, no limit but ours, no redirect
followed, no silent second sending.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container
from functools import partial
from typing import Any

from aiohttp import (
    ClientConnectionError,
    ClientConnectorError,
    ClientHandlerType,
    ClientHttpProxyError,
    ClientRequest,
    ClientResponse,
    ClientResponseError,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
)
from aiohttp.connector import Connection
from multidict import CIMultiDict, CIMultiDictProxy

from relay.core.errors import HandshakeRefused, RelayError
from relay.core.headers import connection_of, upgrades, without_named
from relay.upstream.failures import MAPPABLE_ERRORS, ProxyBroke
from relay.upstream.protocol import FINAL_STATUSES, ProviderConnection
from relay.upstream.request import RelayRequest

READ_BUFFER_BYTES = 64 * 1024
"""Twice this is read ahead of a slow client; aiohttp takes 256 KiB."""
MAX_HEAD_LINE_BYTES = 32 * 1024
MAX_HEADERS = 256
_READING = {
    "auto_decompress": False,
    "read_bufsize": READ_BUFFER_BYTES,
    "max_line_size": MAX_HEAD_LINE_BYTES,
    "max_field_size": MAX_HEAD_LINE_BYTES,
    "max_headers": MAX_HEADERS,
}
"""How every answer is read."""
MAX_REFUSAL_BYTES = 64 * 1024
REFUSAL_BODY_S = 2.0
"""How long the body of a refusal is waited for: its status is what counts."""


class UpstreamSessions:
    """`rest` for calls, `sockets` for WebSocket handshakes. Close with `close`."""

    def __init__(self) -> None:
        self.rest = _session(FINAL_STATUSES, request_class=RelayRequest)
        statuses = frozenset({101, *FINAL_STATUSES})
        self.sockets = _session(
            statuses,
            request_class=_Handshake,
            response_class=_HandshakeResponse,
            middlewares=(_refusals_are_errors,),
        )

    async def close(self) -> None:
        """Close both pools."""
        await self.rest.close()
        await self.sockets.close()


def _session(statuses: Container[int], **classes: Any) -> ClientSession:
    connector = _Connector(limit=0, keepalive_timeout=30)
    # It has no public switch for the class of its connections.
    connector._factory = partial(ProviderConnection, statuses, asyncio.get_running_loop())  # type: ignore[assignment]
    session = ClientSession(
        connector=connector,
        cookie_jar=DummyCookieJar(),
        **_READING,  # type: ignore[arg-type]
        timeout=ClientTimeout(total=None),
        **classes,
    )
    # aiohttp sends an idempotent call again on a stale connection, unseen. It has no public switch.
    session._retry_connection = False
    return session


class _Connector(TCPConnector):
    """Tells what a proxy does wrong from what the provider does."""

    async def _create_proxy_connection(self, *given: Any) -> tuple[Any, Any]:
        try:
            return await super()._create_proxy_connection(*given)
        except (ClientHttpProxyError, ClientConnectorError):
            raise
        except (ClientConnectionError, ClientResponseError, RelayError) as error:
            raise ProxyBroke from error


class _Handshake(RelayRequest):
    """A request of `ws_connect`, which reads no body that only the end of the connection ends:
    here it is read, since it says why a handshake is refused.
    """

    async def send(self, conn: Connection) -> ClientResponse:
        """As RelayRequest does; the answer is read by a parser of our own making."""
        if conn.protocol is not None:
            conn.protocol.set_response_params(read_until_eof=True, **_READING)  # type: ignore[arg-type]
        return await super().send(conn)


class _HandshakeResponse(ClientResponse):
    """A response to a handshake. aiohttp compares its first Connection line with `upgrade`, which
    may be one name of several there.
    """

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        given = super().headers
        if self.status != 101 or not upgrades(given):
            return given
        return CIMultiDictProxy(_upgrading(CIMultiDict(given)))


async def _refusals_are_errors(
    request: ClientRequest, handler: ClientHandlerType
) -> ClientResponse:
    """Raise HandshakeRefused on anything but 101, before aiohttp follows a redirect or drops the
    body.
    """
    response = await handler(request)
    if response.status == 101:
        return response
    headers = CIMultiDict(response.headers)
    try:
        body, whole = await _start_of_body(response)
    finally:
        response.close()
    if not whole and "Content-Encoding" in headers:
        del headers["Content-Encoding"]
        body = b""  # the beginning of a compressed body cannot be read
    raise HandshakeRefused(response.status, response.reason or "", headers, body)


def _upgrading(headers: CIMultiDict[str]) -> CIMultiDict[str]:
    """`headers` with the one Connection line that aiohttp takes; what else was named in it is gone,
    as it may not pass.
    """
    if len(headers.getall("Connection")) == 1 and headers["Connection"].lower() == "upgrade":
        return headers
    named = [name.strip() for name in (connection_of(headers) or "").split(",")]
    others = ",".join(name for name in named if name.lower() != "upgrade")
    kept = CIMultiDict(without_named(list(headers.items()), others))
    kept["Connection"] = "Upgrade"
    return kept


async def _start_of_body(response: ClientResponse) -> tuple[bytes, bool]:
    """What comes of a refusal's body, up to MAX_REFUSAL_BYTES, and whether that is all of it."""
    body = b""
    try:
        async with asyncio.timeout(REFUSAL_BODY_S):
            while chunk := await response.content.readany():
                body += chunk
                if len(body) > MAX_REFUSAL_BYTES:
                    return body[:MAX_REFUSAL_BYTES], False
    except MAPPABLE_ERRORS:  # it broke off, or came too slowly (TimeoutError is an OSError)
        return body, False
    return body, True
