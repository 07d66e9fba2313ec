"""How the relay is reached: its URL, one connection pool, and the three ways to call.

Owns: that. Answers, sessions and errors are their modules'.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Required, TypedDict

import aiohttp
from aiohttp import ClientHandlerType, ClientRequest, ClientResponse
from typing_extensions import Unpack
from yarl import URL

from relay.client.answers import Answer, Call, Stream, options
from relay.client.errors import error_of, unreachable
from relay.client.session import Connecting

if TYPE_CHECKING:
    from relay.inprocess import InProcess

DEFAULT_URL = "http://127.0.0.1:8787"
API = "/api/v1/ai-gateway"
_REFUSAL_BYTES = 64 * 1024


class Realtime(TypedDict, total=False):
    """A WebSocket session to be opened. Without an endpoint it is the provider's realtime one."""

    provider: Required[str]
    endpoint: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    protocols: Sequence[str]


class AIGateway:
    """One relay, at `url`, at RELAY_URL, or in this process (`from_config`).

    Use it as it is, in one event loop or one after another; `close` it, or use it with `async
    with`.
    """

    def __init__(self, url: str | None = None, *, headers: Mapping[str, str] | None = None) -> None:
        self._url, self._headers = url, dict(headers or {})
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inside: InProcess | None = None

    @classmethod
    def from_config(
        cls, path: str | Path = "gateway.yaml", env_file: str | Path | None = None
    ) -> AIGateway:
        """A relay in this process, without a server; variables come from the environment and from
        `env_file`, by default the `.env` beside the file. Raises relay.registry.load.ConfigError.
        """
        from relay.inprocess import InProcess

        made = cls("http://localhost")
        made._inside = InProcess(Path(path), Path(env_file) if env_file else None)
        return made

    @property
    def url(self) -> str:
        """Where the relay is, without the path of its API."""
        given = self._url or os.environ.get("RELAY_URL") or DEFAULT_URL
        return given.rstrip("/").removesuffix(API)

    async def request(self, **call: Unpack[Call]) -> Answer:
        """Make one call and read the whole answer.

        Raises AIGatewayError, but for a provider's own error, which is an Answer.
        """
        try:
            async with await self._send(call) as response:
                body = await response.read()
        except aiohttp.ClientError as error:
            raise unreachable(error) from error
        if "x-relay-error" in response.headers:
            raise error_of(response.status, response.headers, body)
        return Answer(response.status, response.headers, body)

    def stream(self, **call: Unpack[Call]) -> Stream:
        """The same, the answer as it comes: `async for`, or `async with` to see its head first."""
        return Stream(lambda: self._send(call))

    async def _send(self, call: Call) -> ClientResponse:
        session = await self._ready()
        return await session.request(
            **options(call, _url(self.url, "providers", call["provider"], call["endpoint"]))
        )

    def connect(self, **session: Unpack[Realtime]) -> Connecting:
        """A WebSocket session: `async with gateway.connect(…) as session`, or `await` it.

        Without an endpoint it is the provider's realtime one.
        """
        return Connecting(lambda: self._dial(session))

    async def _dial(self, session: Realtime) -> aiohttp.ClientWebSocketResponse:
        url = _url(self.url, "ws", session["provider"], session.get("endpoint", ""))
        client = await self._ready()
        return await client.ws_connect(
            url.update_query(session.get("query") or {}),
            headers=session.get("headers"),
            protocols=session.get("protocols", ()),
            max_msg_size=0,
        )

    async def close(self) -> None:
        """Close connections; end the relay if it runs in this process."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
            if self._inside is not None:
                await self._inside.stop()

    async def __aenter__(self) -> AIGateway:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.close()

    async def _ready(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is not None and self._loop is not loop:
            # The loop that it belonged to is over.
            self._session.detach()
            self._session = None
        if self._session is None:
            connector = await self._inside.start() if self._inside else None
            self._loop = loop
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                middlewares=(_refusals_are_errors,),
            )
        return self._session


def _url(base: str, surface: str, provider: str, endpoint: str) -> URL:
    tail = f"/{endpoint.lstrip('/')}" if endpoint else ""
    return URL(f"{base}{API}/{surface}/{provider}{tail}", encoded=True)


async def _refusals_are_errors(
    request: ClientRequest, handler: ClientHandlerType
) -> ClientResponse:
    """A refused handshake with its body: aiohttp would drop it."""
    response = await handler(request)
    if response.status == 101 or "Sec-WebSocket-Key" not in request.headers:
        return response
    body = await response.content.read(_REFUSAL_BYTES)
    response.close()
    raise error_of(response.status, response.headers, body)
