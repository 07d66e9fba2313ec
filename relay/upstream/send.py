"""Send one call to its Target: build the URL, the headers and the credential, and send them.

Owns what a provider receives. The host comes from the registry alone and is checked again here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import lru_cache
from urllib.parse import quote

from aiohttp import ClientPayloadError, ClientResponse, ClientSession, ClientTimeout
from multidict import CIMultiDict
from yarl import URL

from relay.core import paths
from relay.core.caching import CACHE_HEADERS
from relay.core.credential_headers import CREDENTIAL_HEADERS
from relay.core.errors import BadPath
from relay.core.headers import (
    Pairs,
    headers_for_cloudflare,
    headers_for_provider,
    normal,
)
from relay.core.provider import Keys, Proxy, Route
from relay.core.retry_policy import RETRY_HEADERS
from relay.upstream.request import Outgoing


def upstream_headers(
    route: Route, pairs: Pairs, connection: str | None, keys: Keys
) -> CIMultiDict[str]:
    """Build the headers of a call: the client's end-to-end headers, the registry's defaults, and
    the credentials.
    """
    select = headers_for_cloudflare if route.target.via == "cloudflare" else headers_for_provider
    headers = CIMultiDict(select(pairs, connection))
    if route.target.via == "cloudflare":
        delegation = route.provider.delegation
        for names, who in ((RETRY_HEADERS, delegation.retries), (CACHE_HEADERS, delegation.cache)):
            if who != "cloudflare":
                for name in names:
                    headers.popall(name, None)
    for name, value in route.provider.headers:
        if name not in headers:
            headers[name] = value
    if keys.provider is not None and keys.provider.place == "header":
        _put(headers, keys.provider.name, keys.provider.value)
        for name, value in keys.provider.beside:
            _put(headers, name, value)
    if keys.gateway is not None:
        _put(headers, keys.gateway.name, keys.gateway.value)
    return headers


def _put(headers: CIMultiDict[str], name: str, value: str) -> None:
    """Set a credential's header, and remove other spellings of it that the client sent."""
    lower = normal(name)
    if lower not in CREDENTIAL_HEADERS:
        for spelling in [each for each in headers if normal(each) == lower]:
            headers.popall(spelling, None)
    headers[name] = value


def upstream_url(route: Route, raw_query: str, keys: Keys) -> URL:
    """Build the URL of a call. Raises BadPath if it is not below the registry's base URL."""
    credential = keys.provider
    query = paths.cut_query(raw_query, route.provider.query_credentials)
    if credential is not None and credential.place == "query":
        query = paths.join_query(query, f"{credential.name}={quote(credential.value, safe='')}")
    return _checked(route.url(query), route.target.origin, route.target.prefix)


@lru_cache(maxsize=2048)
def _checked(raw_url: str, origin: str, prefix: str) -> URL:
    """Parse `raw_url`, and check it against the origin and the prefix of the registry."""
    url = URL(raw_url, encoded=True)
    allowed = URL(origin, encoded=True)
    if (
        (url.scheme, url.raw_host, url.port) != (allowed.scheme, allowed.raw_host, allowed.port)
        or not url.raw_path.startswith(prefix or "/")
        or url.raw_user is not None
    ):
        raise BadPath("it leaves the provider's base URL")
    return url


def send(
    session: ClientSession, route: Route, method: str, url: URL, outgoing: Outgoing
) -> Awaitable[ClientResponse]:
    """Send one call; the result is awaited for the response, which the caller must close.

    Awaiting it raises errors that failures.py maps. Not a coroutine itself, to save a frame.
    """
    return session.request(
        method,
        url,
        data=outgoing,
        allow_redirects=False,
        timeout=_timeout(route.provider.connect_timeout_s),
        proxy=proxy_url(route.target.proxy),
    )


def proxy_url(proxy: Proxy | None) -> URL | None:
    """Return the URL of a proxy in the type that aiohttp takes."""
    return None if proxy is None else _parsed(proxy.url)


_parsed = lru_cache(maxsize=64)(URL)


def end_with_connection(response: ClientResponse) -> Callable[[], None]:
    """Fail the reader of `response` when its connection is lost. The caller calls the result when
    it has finished reading.

    aiohttp (3.14) drops a connection on bytes that it cannot parse, and does not fail the reader of
    the body, which would wait until its idle timeout.
    """
    connection, content = response.connection, response.content
    protocol = connection.protocol if connection is not None else None
    closed = protocol.closed if protocol is not None else None
    if closed is None:
        return lambda: None

    def fail(future: asyncio.Future[None]) -> None:
        future.exception()
        if not content.is_eof() and content.exception() is None:
            content.set_exception(ClientPayloadError("the connection was dropped within the body"))

    def forget() -> None:
        closed.remove_done_callback(fail)

    closed.add_done_callback(fail)
    return forget


@lru_cache(maxsize=64)
def _timeout(connect_s: float) -> ClientTimeout:
    """Return aiohttp's timeouts: for the connection alone, since periodic.py ends other waits."""
    return ClientTimeout(total=None, connect=connect_s)
