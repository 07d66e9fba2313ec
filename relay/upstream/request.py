"""Write the requests of all outbound calls, without headers or tasks of aiohttp's own.

Owns the bytes of a request on the wire. A small whole body is sent with its head in one write;
aiohttp would start a task for the body. RelayRequest overrides methods that aiohttp calls on its
own class: `request_class` is a public option, the methods are not documented. tests/test_rest.py
tests the resulting bytes with the pinned aiohttp.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from aiohttp import ClientRequest, ClientResponse
from aiohttp.connector import Connection
from aiohttp.http_writer import StreamWriter
from multidict import CIMultiDict

from relay.core.headers import all_ascii, head_bytes

SMALL_BODY_BYTES = 64 * 1024
"""A body up to this size is sent at once; aiohttp writes a larger one with backpressure."""

_NOT_ADDED: CIMultiDict[None] = CIMultiDict(
    (name, None) for name in ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
)


class Outgoing(NamedTuple):
    """What a request sends. It is passed as `data=`, since aiohttp's session copies `headers=` one
    by one, twice.
    """

    headers: CIMultiDict[str]
    body: bytes | AsyncIterator[bytes]


class RelayRequest(ClientRequest):
    """See the module's docstring."""

    _small: bytes = b""

    def update_headers(self, headers: Any) -> None:
        """Set Host, then `headers` with their order and duplicates."""
        host = self.url.host_port_subcomponent
        assert host is not None
        self.headers = CIMultiDict((("Host", host),))
        if headers:
            self.headers.extend(headers)

    def update_body_from_data(self, body: Any, _stacklevel: int = 3) -> None:
        """Set headers and body from an Outgoing. A small whole body is kept for `send`; aiohttp
        writes any other.
        """
        if isinstance(body, Outgoing):
            self.headers.extend(body.headers)
            body = body.body or None
        if type(body) is not bytes:
            super().update_body_from_data(body, _stacklevel)
        elif len(body) <= SMALL_BODY_BYTES:
            self._small = body
            self.headers["Content-Length"] = str(len(body))
        else:
            # As a file, since aiohttp writes files piece by piece, with backpressure.
            super().update_body_from_data(io.BytesIO(body), _stacklevel)

    def update_auto_headers(self, skip_auto_headers: Any) -> None:
        """Add no headers."""
        self._skip_auto_headers = _NOT_ADDED

    def update_cookies(self, cookies: Any) -> None:
        """Add no cookies."""

    def update_auth(self, auth: Any, trust_env: bool = False) -> None:
        """Add no credentials: the relay's are set as headers."""

    def update_content_encoding(self, data: Any) -> None:
        """Do not compress the body."""

    def update_expect_continue(self, expect: bool = False) -> None:
        """Do not wait for `100 Continue`."""

    async def send(self, conn: Connection) -> ClientResponse:
        """Write the request, with a small body in one write. Header bytes outside ASCII are sent as
        they were received.
        """
        protocol, plain = conn.protocol, all_ascii(self.headers)
        if plain and not self._small:
            return await super().send(conn)
        assert protocol is not None
        if self._small and (protocol.writing_paused or self._traces):
            super().update_body_from_data(self._small)
            self._small = b""
            return await self.send(conn)
        writer = StreamWriter(protocol, self.loop)
        # Without TLS a proxy gets the request itself, with the absolute URL as its target.
        to_proxy = self.proxy is not None and not self.is_ssl()
        target = str(self.url) if to_proxy else self.url.raw_path_qs
        first = f"{self.method} {target} HTTP/1.1"
        if plain:
            await writer.write_headers(first, self.headers)
        else:
            writer._headers_buf = head_bytes(first, self.headers)
        if self._small:
            await writer.write_eof(self._small)
        else:
            self._write_body(writer, conn)
        response_class = self.response_class
        assert response_class is not None and self._session is not None
        response = response_class(
            self.method,
            self.original_url,
            writer=self._writer,
            continue100=None,
            timer=self._timer,
            request_info=self.request_info,
            traces=self._traces,
            loop=self.loop,
            session=self._session,
            stream_writer=writer,
        )
        self.response = response  # type: ignore[assignment]
        return response

    def _write_body(self, writer: StreamWriter, conn: Connection) -> None:
        """Write a body piece by piece, or no body, as aiohttp's own `send` does."""
        protocol = conn.protocol
        assert protocol is not None
        if self.chunked is not None:
            writer.enable_chunking()
        if self.body or protocol.writing_paused:
            body = self.write_bytes(writer, conn, self._get_content_length())
            self._writer = asyncio.create_task(body)
        else:
            protocol.start_timeout()
            writer.set_eof()
