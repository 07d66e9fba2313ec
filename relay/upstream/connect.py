"""Open one WebSocket to its Target.

Owns: the handshake's URL, headers, subprotocols and credential. No redirect is followed; a refusal
comes out as HandshakeRefused with the provider's own status and body, our credentials taken out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import aiohttp
from aiohttp import ClientSession, ClientWebSocketResponse, ClientWSTimeout
from multidict import CIMultiDict
from yarl import URL

from relay.core.errors import HandshakeRefused, RelayError, UpstreamTimeout
from relay.core.provider import Keys, Route
from relay.upstream.failures import BEFORE_ANSWER, MAPPED, mapped
from relay.upstream.send import proxy_url


@dataclass(frozen=True, slots=True)
class Handshake:
    """What is asked of the provider."""

    url: URL
    headers: CIMultiDict[str]
    subprotocols: tuple[str, ...]
    max_message_bytes: int
    timeout_s: float
    keys: Keys = field(repr=False)
    """The credentials that stand in it."""


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
    except HandshakeRefused as refusal:
        _redact(refusal, handshake.keys)
        raise
    except RelayError:
        raise
    except TimeoutError as error:
        if isinstance(error, aiohttp.ServerTimeoutError):
            raise mapped(error, route, BEFORE_ANSWER) from error
        raise UpstreamTimeout("the WebSocket handshake", handshake.timeout_s) from error
    except MAPPED as error:
        raise mapped(error, route, BEFORE_ANSWER) from error


def _redact(refusal: HandshakeRefused, keys: Keys) -> None:
    """Take our credentials out of a refusal: a Location, or a page that quotes the URL, repeats one
    that stands in the query.
    """
    values = [credential.value for credential in keys if credential is not None]
    secrets = {value.rpartition(" ")[2] for value in values} - {""}
    secrets |= {quote(secret, safe="") for secret in secrets}
    for secret in secrets:
        refusal.body = refusal.body.replace(secret.encode(), _REDACTED.encode())
    if any(secret in value for secret in secrets for value in refusal.headers.values()):
        headers = CIMultiDict[str]()
        for name, value in refusal.headers.items():
            for secret in secrets:
                value = value.replace(secret, _REDACTED)
            headers.add(name, value)
        refusal.headers = headers


_REDACTED = "[redacted]"
