"""Set up the two aiohttp client sessions of all outbound traffic, so that nothing is added or lost.

Owns the connection pools and their options: no decompression, no cookies, no headers of aiohttp's
own, no limits but the relay's, no redirects, and no second sending that the relay does not see.
Each option is a part of the wire contract. connect.py and send.py use the sessions.
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
"""Up to twice this is read ahead of a slow client; aiohttp's default is 256 KiB."""
MAX_HEAD_LINE_BYTES = 32 * 1024
MAX_HEADERS = 256
_READING = {
    "auto_decompress": False,
    "read_bufsize": READ_BUFFER_BYTES,
    "max_line_size": MAX_HEAD_LINE_BYTES,
    "max_field_size": MAX_HEAD_LINE_BYTES,
    "max_headers": MAX_HEADERS,
}
"""aiohttp's options for reading responses."""
MAX_REFUSAL_BYTES = 64 * 1024
REFUSAL_BODY_S = 2.0
"""How long to wait for the body of a refused handshake; the status alone is an answer too."""


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
    # There is no public option for the class of the connections.
    connector._factory = partial(ProviderConnection, statuses, asyncio.get_running_loop())  # type: ignore[assignment]
    session = ClientSession(
        connector=connector,
        cookie_jar=DummyCookieJar(),
        **_READING,  # type: ignore[arg-type]
        timeout=ClientTimeout(total=None),
        **classes,
    )
    # aiohttp resends an idempotent call silently on a stale connection; no public option stops it.
    session._retry_connection = False
    return session


class _Connector(TCPConnector):
    """Distinguishes failures of a proxy from those of the provider."""

    async def _create_proxy_connection(self, *given: Any) -> tuple[Any, Any]:
        try:
            return await super()._create_proxy_connection(*given)
        except (ClientHttpProxyError, ClientConnectorError):
            raise
        except (ClientConnectionError, ClientResponseError, RelayError) as error:
            raise ProxyBroke from error


class _Handshake(RelayRequest):
    """A request of `ws_connect`. Its response is also read if the end of the connection ends the
    body, which aiohttp would not do: the body says why a handshake was refused.
    """

    async def send(self, conn: Connection) -> ClientResponse:
        """Send as RelayRequest does, and set the options of the response's parser."""
        if conn.protocol is not None:
            conn.protocol.set_response_params(read_until_eof=True, **_READING)  # type: ignore[arg-type]
        return await super().send(conn)


class _HandshakeResponse(ClientResponse):
    """A response to a handshake. aiohttp requires its first Connection line to be `upgrade`; here
    that name may be one of several.
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
    """Raise HandshakeRefused for every status but 101, before aiohttp follows a redirect or drops
    the body.
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
    """Return `headers` with the one Connection line that aiohttp accepts, and without the other
    headers that Connection named, which are hop-by-hop.
    """
    if len(headers.getall("Connection")) == 1 and headers["Connection"].lower() == "upgrade":
        return headers
    named = [name.strip() for name in (connection_of(headers) or "").split(",")]
    others = ",".join(name for name in named if name.lower() != "upgrade")
    end_to_end = CIMultiDict(without_named(list(headers.items()), others))
    end_to_end["Connection"] = "Upgrade"
    return end_to_end


async def _start_of_body(response: ClientResponse) -> tuple[bytes, bool]:
    """Read a refusal's body, up to MAX_REFUSAL_BYTES; False if that is not all of it."""
    body = b""
    try:
        async with asyncio.timeout(REFUSAL_BODY_S):
            while chunk := await response.content.readany():
                body += chunk
                if len(body) > MAX_REFUSAL_BYTES:
                    return body[:MAX_REFUSAL_BYTES], False
    except MAPPABLE_ERRORS:  # the body was cut, or was too slow (TimeoutError is an OSError)
        return body, False
    return body, True
