"""Open one WebSocket to its target.

Owns the connecting: no redirect is followed, and a refusal comes out as HandshakeRefused with the
provider's own status and body.
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
    """What is asked of the provider."""

    url: URL
    headers: CIMultiDict[str]
    subprotocols: tuple[str, ...]
    max_message_bytes: int
    timeout_s: float


async def connect(
    session: ClientSession, route: Route, handshake: Handshake
) -> ClientWebSocketResponse[bool]:
    """Connect. Raises HandshakeRefused, UpstreamTimeout, and what failures.py maps."""
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
        raise UpstreamTimeout("the WebSocket handshake", handshake.timeout_s) from error
