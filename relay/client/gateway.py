"""Connect to the relay, and make calls: `request`, `stream`, `connect` and `ticket`.

Owns the relay's URL, the connection pool, and the event loop to which they belong. answers.py,
session.py and errors.py have the results of calls, inprocess.py a relay within this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Required, TypedDict

import aiohttp
from aiohttp import ClientHandlerType, ClientRequest, ClientResponse
from typing_extensions import Unpack
from yarl import URL

from relay.client.answers import Answer, Call, Stream, options
from relay.client.errors import (
    AIGatewayError,
    RelayFailed,
    RelayUnreachable,
    RequestRefused,
    error_of,
    is_of_relay,
    unreachable,
)
from relay.client.session import Connecting
from relay.core.paths import API

if TYPE_CHECKING:
    from relay.client.inprocess import InProcess

DEFAULT_URL = "http://127.0.0.1:8787"
_REFUSAL_BYTES = 64 * 1024


class Realtime(TypedDict, total=False):
    """A WebSocket session to be opened. Without an endpoint it is the provider's realtime one."""

    provider: Required[str]
    endpoint: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    protocols: Sequence[str]


class TicketTerms(TypedDict, total=False):
    """What a web page may do with a ticket: open one session."""

    provider: Required[str]
    endpoint: str
    """The beginning of the endpoint, in whole segments; empty: any."""
    models: Sequence[str]
    origin: str
    max_session_s: float
    max_messages: int


class Ticket(TypedDict, total=False):
    """A ticket, as the relay answers and the page needs it: pass all of it on."""

    ticket: Required[str]
    expires_at: Required[int]
    """Unix time."""
    websocket_url: Required[str]
    subprotocols: Required[list[str]]
    openai_ticket: str
    """The ticket in the form that OpenAI's browser SDKs insist on."""


class AIGateway:
    """A client of one relay: at `url`, at RELAY_URL, or in this process (`from_config`).

    One event loop at a time may use it. Call `close` at the end, or use `async with`. After `close`
    the next call connects again, in any loop. A relay in this process must be closed in the loop of
    its first call, before another loop can use it.
    """

    def __init__(self, url: str | None = None, *, headers: Mapping[str, str] | None = None) -> None:
        self._url, self._headers = url, dict(headers or {})
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening: asyncio.Task[None] | None = None
        """The task that starts the relay in this process; the first calls wait for it."""
        self._inside: InProcess | None = None

    @classmethod
    def from_config(
        cls, path: str | Path = "gateway.yaml", env_file: str | Path | None = None
    ) -> AIGateway:
        """Make a relay in this process, without a server. Variables come from the environment and
        from `env_file`, by default the `.env` beside the file. Raises
        relay.registry.load.ConfigError.
        """
        from relay.client.inprocess import InProcess

        gateway = cls("http://localhost")
        gateway._inside = InProcess(Path(path), Path(env_file) if env_file else None)
        return gateway

    @property
    def url(self) -> str:
        """The URL of the relay, without the path of its API."""
        url = self._url or os.environ.get("RELAY_URL") or DEFAULT_URL
        return url.rstrip("/").removesuffix(API)

    async def request(self, **call: Unpack[Call]) -> Answer:
        """Make one call and read the whole answer.

        Raises AIGatewayError; a provider's own error is returned as an Answer.
        """
        try:
            async with await self._send(call) as response:
                body = await response.read()
        except aiohttp.ClientError as error:
            raise unreachable(error) from error
        if is_of_relay(response.headers):
            raise error_of(response.status, response.headers, body)
        return Answer(response.status, response.headers, body)

    def stream(self, **call: Unpack[Call]) -> Stream:
        """Make one call and stream the answer: use `async for`, or `async with` to see the status
        and the headers first.
        """
        return Stream(lambda: self._send(call))

    async def _send(self, call: Call) -> ClientResponse:
        session = await self._ready()
        url = _url(self.url, "providers", call["provider"], call["endpoint"])
        with _raise_if_closed(session):
            return await session.request(**options(call, url))

    async def ticket(self, **terms: Unpack[TicketTerms]) -> Ticket:
        """Get a ticket, with which a web page opens one session. The relay must know this client by
        its key: `AIGateway(headers={"x-relay-key": KEY})`. Raises AIGatewayError.
        """
        session = await self._ready()
        try:
            with _raise_if_closed(session):
                async with session.post(f"{self.url}{API}/tickets", json=terms) as response:
                    body = await response.read()
        except aiohttp.ClientError as error:
            raise unreachable(error) from error
        if response.status != 201:
            raise error_of(response.status, response.headers, body)
        ticket: Ticket = json.loads(body)
        return ticket

    def connect(self, **session: Unpack[Realtime]) -> Connecting:
        """Open a WebSocket session: `async with gateway.connect(…) as session`, or `await` it.

        Without an endpoint it is the provider's realtime one.
        """
        return Connecting(lambda: self._dial(session))

    async def _dial(self, session: Realtime) -> aiohttp.ClientWebSocketResponse:
        url = _url(self.url, "ws", session["provider"], session.get("endpoint", ""))
        client = await self._ready()
        with _raise_if_closed(client):
            return await client.ws_connect(
                url.update_query(session.get("query") or {}),
                headers=session.get("headers"),
                protocols=session.get("protocols", ()),
                max_msg_size=0,
            )

    async def close(self) -> None:
        """Close the connections. Stop a relay in this process, even while it starts.

        Raises AIGatewayError (`wrong_event_loop`) while another running event loop uses it.
        """
        if self._belongs_elsewhere():
            self._abandon_closed_loop()
            return
        if (opening := self._opening) is not None:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
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
        """Return the client session of this event loop. Raises AIGatewayError."""
        if self._belongs_elsewhere():
            if self._inside is not None:
                raise self._wrong_loop()
            self._abandon_closed_loop()
        if self._session is None:
            self._loop = asyncio.get_running_loop()
            if self._inside is None:
                self._session = self._new_session(None)
            else:
                await self._opened(self._inside)
        if self._session is None:
            raise _closed()
        return self._session

    def _new_session(self, connector: aiohttp.BaseConnector | None) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            middlewares=(_refusals_are_errors,),
        )

    async def _opened(self, inside: InProcess) -> None:
        """Wait until the relay has started, which one task does for all callers: a caller that is
        cancelled does not stop it.
        """
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(inside))
            self._opening.add_done_callback(self._end_opening)
        opening = self._opening
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if opening.cancelled() and not (task and task.cancelling()):
                raise _closed() from None
            raise

    async def _open(self, inside: InProcess) -> None:
        try:
            self._session = self._new_session(await inside.start())
        except Exception as error:
            # Any exception: each call that waits gets it as an AIGatewayError.
            why = f"the relay in this process did not start: {error or type(error).__name__}"
            raise RelayFailed("relay_not_started", why) from error

    def _end_opening(self, opening: asyncio.Task[None]) -> None:
        """Forget the task of the start; if it failed, the next call tries again."""
        self._opening = None
        if not opening.cancelled():
            opening.exception()  # retrieved, so that asyncio does not log it if no call waits

    def _belongs_elsewhere(self) -> bool:
        """True if another event loop than this one uses the client."""
        in_use = self._session is not None or self._opening is not None
        return in_use and self._loop is not asyncio.get_running_loop()

    def _abandon_closed_loop(self) -> None:
        """Drop connections and relay of an event loop that no longer runs. Raises AIGatewayError if
        that loop runs.
        """
        if self._loop is not None and self._loop.is_running():
            raise self._wrong_loop()
        if self._session is not None:
            self._session.detach()
        self._session = self._opening = None
        if self._inside is not None:
            self._inside.abandon()

    def _wrong_loop(self) -> AIGatewayError:
        closed = self._loop is not None and self._loop.is_closed()
        what = "was closed without `await gateway.close()`" if closed else "is not this one"
        return RequestRefused(
            "wrong_event_loop",
            f"this AIGateway belongs to the event loop of its first call, which {what}."
            " Close it in its own loop first, or make one AIGateway for each loop.",
        )


def _closed() -> AIGatewayError:
    return RelayUnreachable("gateway_closed", "this AIGateway was closed during the call")


@contextlib.contextmanager
def _raise_if_closed(session: aiohttp.ClientSession) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not session.closed:
            raise
        raise _closed() from error


def _url(base: str, kind: str, provider: str, endpoint: str) -> URL:
    tail = f"/{endpoint.lstrip('/')}" if endpoint else ""
    return URL(f"{base}{API}/{kind}/{provider}{tail}", encoded=True)


async def _refusals_are_errors(
    request: ClientRequest, handler: ClientHandlerType
) -> ClientResponse:
    """Raise the error of a refused handshake with its body, which aiohttp would drop."""
    response = await handler(request)
    if response.status == 101 or "Sec-WebSocket-Key" not in request.headers:
        return response
    body = await response.content.read(_REFUSAL_BYTES)
    response.close()
    raise error_of(response.status, response.headers, body)
