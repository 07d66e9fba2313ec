"""Open a WebSocket connection to a target.

Owns the options of the connection and the limit on the handshake's time. session.py, whose client
session is used, turns a refused handshake into HandshakeRefused and follows no redirect.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from aiohttp import ClientSession, ClientWebSocketResponse, ClientWSTimeout, ServerTimeoutError
from multidict import CIMultiDict
from yarl import URL

from relay.core.errors import UpstreamTimeout
from relay.core.provider import Route
from relay.upstream.send import proxy_url


class Handshake(NamedTuple):
    """What a handshake sends, and its limits."""

    url: URL
    headers: CIMultiDict[str]
    subprotocols: tuple[str, ...]
    max_message_bytes: int
    timeout_s: float


async def connect(
    session: ClientSession, route: Route, handshake: Handshake
) -> ClientWebSocketResponse[bool]:
    """Connect. Raises HandshakeRefused, UpstreamTimeout, and errors that failures.py maps."""
    try:
        async with asyncio.timeout(handshake.timeout_s):
            return await session.ws_connect(
                handshake.url,
                headers=handshake.headers,
                protocols=handshake.subprotocols,
                autoclose=False,
                autoping=False,
                decode_text=False,
                # aiohttp refuses a message of exactly its limit.
                max_msg_size=handshake.max_message_bytes + 1,
                timeout=ClientWSTimeout(ws_close=1.0),
                proxy=proxy_url(route.target.proxy),
            )
    except ServerTimeoutError:
        raise
    except TimeoutError as error:
        raise UpstreamTimeout("during the WebSocket handshake", handshake.timeout_s) from error
