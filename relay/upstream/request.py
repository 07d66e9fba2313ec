"""The aiohttp request that all outbound calls are made with: it adds no header and no task of its
own.

Owns: how a call is put on the wire. A small whole body leaves with its head in one write; aiohttp
would start a task for it. It overrides what aiohttp calls on its own class (`request_class` is a
public option, these methods are not documented): tests/test_rest.py holds the bytes that come out
against the aiohttp that is locked.
"""

from __future__ import annotations

import io
from typing import Any

from aiohttp import ClientRequest, ClientResponse
from aiohttp.connector import Connection
from aiohttp.http_writer import StreamWriter
from multidict import CIMultiDict

SMALL_BODY_BYTES = 64 * 1024
"""Up to here a body goes out at once; a larger one is written by aiohttp as the connection takes
it.
"""

_NOT_ADDED: CIMultiDict[None] = CIMultiDict(
    (name, None) for name in ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
)


class RelayRequest(ClientRequest):
    """See the module."""

    _small: bytes = b""

    def update_headers(self, headers: Any) -> None:
        """Host, then what was given, order and duplicates kept."""
        host = self.url.host_port_subcomponent
        assert host is not None
        self.headers = CIMultiDict((("Host", host),))
        self.headers.extend(headers)

    def update_auto_headers(self, skip_auto_headers: Any) -> None:
        """Add none, whatever is missing."""
        self._skip_auto_headers = _NOT_ADDED

    def update_body_from_data(self, body: Any, _stacklevel: int = 3) -> None:
        """Keep a small whole body as it is; hand any other to aiohttp."""
        if type(body) is bytes and len(body) <= SMALL_BODY_BYTES:
            self._body = None
            self._small = body
            self.headers["Content-Length"] = str(len(body))
        else:
            # As a file, so that it is written piece by piece as the connection takes it.
            body = io.BytesIO(body) if type(body) is bytes else body
            super().update_body_from_data(body, _stacklevel)

    async def send(self, conn: Connection) -> ClientResponse:
        """Write the request; with a small body in one go."""
        protocol = conn.protocol
        if not self._small:
            return await super().send(conn)
        if protocol is None or protocol.writing_paused or self._traces:
            super().update_body_from_data(self._small)
            return await super().send(conn)
        writer = StreamWriter(protocol, self.loop)
        await writer.write_headers(f"{self.method} {self.url.raw_path_qs} HTTP/1.1", self.headers)
        await writer.write_eof(self._small)
        response_class = self.response_class
        assert response_class is not None and self._session is not None
        response = response_class(
            self.method,
            self.original_url,
            writer=None,
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
