"""Represent a WebSocket session through the relay.

Owns how messages are sent and received, and the errors for close codes. gateway.py connects.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp
from aiohttp import WSMsgType

from relay.client.errors import SessionClosed, unreachable

_CLEAN_CLOSES = (1000, 1001)
CLOSES = {
    1006: "connection_lost",
    1007: "not_utf8",
    1008: "refused",
    1009: "message_too_large",
    1011: "provider_lost",
    1012: "restarting",
    1013: "try_later",
    1014: "upstream_failed",
    4401: "access_revoked",
    4402: "budget_exhausted",
    4408: "idle_timeout",
    4409: "session_too_long",
}
"""Error codes by the close codes that the relay itself uses (docs/errors.md). Any other close code
is `session_closed`."""


class Session:
    """A WebSocket session."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    @property
    def protocol(self) -> str | None:
        """The negotiated subprotocol; None if there is none."""
        return self._socket.protocol

    async def send(self, message: dict[str, Any] | str | bytes) -> None:
        """Send one message; a dict is sent as JSON. Waits while the relay does not read."""
        try:
            if isinstance(message, bytes):
                await self._socket.send_bytes(message)
            else:
                text = message if isinstance(message, str) else json.dumps(message)
                await self._socket.send_str(text)
        except (aiohttp.ClientError, ConnectionError) as error:
            raise self._closed() from error

    async def receive(self) -> Any:
        """Return the next message: JSON text parsed, other text as str, binary as bytes. Raises
        SessionClosed.
        """
        message = await self._socket.receive()
        if message.type is WSMsgType.BINARY:
            return message.data
        if message.type is not WSMsgType.TEXT:
            raise self._closed(str(message.extra or ""))
        try:
            return json.loads(message.data)
        except ValueError:
            return message.data

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Yield messages until the session ends. Raises SessionClosed if the close code is not 1000
        or 1001.
        """
        while True:
            try:
                message = await self.receive()
            except SessionClosed as closed:
                if closed.status in _CLEAN_CLOSES:
                    return
                raise
            yield message

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the session by a closing handshake."""
        await self._socket.close(code=code, message=reason.encode())

    def _closed(self, reason: str = "") -> SessionClosed:
        code = self._socket.close_code or 1006
        stable = CLOSES.get(code, "session_closed")
        return SessionClosed(stable, reason or f"closed with {code}", code, "relay")


class Connecting(AbstractAsyncContextManager["Session"]):
    """A session that is not open yet: use `async with`, or `await` it and close the session."""

    def __init__(self, dial: Callable[[], Awaitable[aiohttp.ClientWebSocketResponse]]) -> None:
        self._dial = dial
        self._session: Session | None = None

    async def _open(self) -> Session:
        try:
            self._session = Session(await self._dial())
        except aiohttp.ClientError as error:
            raise unreachable(error) from error
        return self._session

    def __await__(self) -> Generator[Any, None, Session]:
        return self._open().__await__()

    async def __aenter__(self) -> Session:
        return await self._open()

    async def __aexit__(self, *failure: object) -> None:
        if self._session is not None:
            await self._session.close()
