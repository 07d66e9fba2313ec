"""Represent a REST call and its answer: read whole, or streamed.

Owns the Answer and the Stream that callers get. gateway.py connects to the relay.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Required, TypedDict

import aiohttp
from aiohttp import ClientResponse
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from relay.client.errors import error_of, unreachable
from relay.core.sse import Event, EventParser

_ERROR_BYTES = 1024 * 1024


class Call(TypedDict, total=False):
    """The arguments of a call.

    `data` is sent as JSON if it is a dict or list, else as a body that aiohttp accepts (bytes,
    FormData, an async iterator). `method` is POST by default with data, GET without.
    """

    provider: Required[str]
    endpoint: Required[str]
    data: Any
    method: str
    headers: Mapping[str, str]
    query: Mapping[str, str]


def options(call: Call, url: URL) -> dict[str, Any]:
    """Return the arguments of `aiohttp.ClientSession.request` for a call."""
    headers = CIMultiDict(call.get("headers") or {})
    body = call.get("data")
    method = call.get("method") or ("GET" if body is None else "POST")
    if isinstance(body, dict | list):
        body = json.dumps(body).encode()
        headers.setdefault("Content-Type", "application/json")
    url = url.update_query(call.get("query") or {})
    return {"method": method, "url": url, "data": body, "headers": headers}


async def _beginning(response: ClientResponse) -> bytes:
    """Read an error's body up to _ERROR_BYTES, and close the response."""
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) >= _ERROR_BYTES:
            break
    response.close()
    return body[:_ERROR_BYTES]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response whose body was read."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes = field(repr=False)

    @property
    def ok(self) -> bool:
        """True for a status below 400."""
        return self.status < 400

    def bytes(self) -> bytes:
        """The body."""
        return self.body

    def text(self) -> str:
        """The body as UTF-8."""
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body as JSON. Raises ValueError if it is not JSON."""
        return json.loads(self.body)

    def raise_for_status(self) -> Answer:
        """Return the answer itself; raise ProviderError for a provider's error."""
        if not self.ok:
            raise error_of(self.status, self.headers, self.body)
        return self


class Stream(AbstractAsyncContextManager["Stream"]):
    """A streamed response. Iterate for its SSE events, or for chunks of bytes of any other type."""

    def __init__(self, send: Callable[[], Awaitable[ClientResponse]]) -> None:
        self._send = send
        self._response: ClientResponse | None = None

    @property
    def status(self) -> int:
        """The HTTP status, once the stream is open."""
        return self._opened.status

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        """The response headers, once the stream is open."""
        return self._opened.headers

    @property
    def _opened(self) -> ClientResponse:
        if self._response is None:
            raise RuntimeError("the stream is not open yet: use `async with`, or iterate")
        return self._response

    async def __aenter__(self) -> Stream:
        """Send the call. Raises AIGatewayError, a provider's own error included."""
        try:
            response = await self._send()
            if response.status >= 400:
                body = await _beginning(response)
                raise error_of(response.status, response.headers, body)
        except aiohttp.ClientError as error:
            raise unreachable(error) from error
        self._response = response
        return self

    async def __aexit__(self, *failure: object) -> None:
        if self._response is not None:
            self._response.close()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body in chunks as they arrive. Raises RelayUnreachable if it is cut."""
        try:
            async for chunk in self._opened.content.iter_any():
                yield chunk
        except aiohttp.ClientError as error:
            raise unreachable(error) from error

    async def events(self) -> AsyncIterator[Event]:
        """Yield the SSE events."""
        parser = EventParser()
        async for chunk in self.chunks():
            for event in parser.feed(chunk):
                yield event

    async def __aiter__(self) -> AsyncIterator[Any]:
        async with contextlib.nullcontext() if self._response is not None else self:
            is_sse = self._opened.content_type == "text/event-stream"
            async for item in self.events() if is_sse else self.chunks():
                yield item
