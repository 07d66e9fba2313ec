"""Open one WebSocket to its Target.

Owns: the handshake's URL, headers, subprotocols and credential. No redirect is followed; a refusal
comes out as HandshakeRefused with the provider's own status and body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
from aiohttp import ClientSession, ClientWebSocketResponse, ClientWSTimeout
from multidict import CIMultiDict
from yarl import URL

from relay.core.errors import RelayError, UpstreamTimeout
from relay.core.provider import Keys, Route
from relay.upstream.failures import BEFORE_ANSWER, MAPPABLE_ERRORS, map_failure
from relay.upstream.send import proxy_url


@dataclass(frozen=True, slots=True)
class Handshake:
    """What is asked of the provider."""

    url: URL
    headers: CIMultiDict[str]
    subprotocols: tuple[str, ...]
    max_message_bytes: int
    timeout_s: float


def offered_upstream(passed: Sequence[str], keys: Keys) -> tuple[str, ...]:
    """The client's public subprotocols that the registry passes, and our credential if it goes
    there.
    """
    credential = keys.provider
    if credential is None or credential.place != "subprotocol":
        return tuple(passed)
    return (*passed, credential.name + credential.value)


async def connect(
    session: ClientSession, route: Route, handshake: Handshake
) -> ClientWebSocketResponse[bool]:
    """Connect. Raises HandshakeRefused, UpstreamTimeout and what else can go wrong before the
    upgrade.
    """
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
    except RelayError:
        raise
    except TimeoutError as error:
        if isinstance(error, aiohttp.ServerTimeoutError):
            raise map_failure(error, route, BEFORE_ANSWER) from error
        raise UpstreamTimeout("the WebSocket handshake", handshake.timeout_s) from error
    except MAPPABLE_ERRORS as error:
        raise map_failure(error, route, BEFORE_ANSWER) from error
