"""Send one call to its Target: the URL, the headers and the credential that the provider gets.

Owns: what leaves the relay. The host comes from the registry alone and is checked once more here.
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
    """The headers that go up: the client's end-to-end ones, the registry's defaults, our
    credentials.
    """
    select = headers_for_cloudflare if route.target.via == "cloudflare" else headers_for_provider
    headers = CIMultiDict(select(pairs, connection))
    if route.target.via == "cloudflare":
        does = route.provider.delegation
        for names, who in ((RETRY_HEADERS, does.retries), (CACHE_HEADERS, does.cache)):
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
    """The URL that is called. Raises BadPath if it would leave the registry's prefix."""
    credential = keys.provider
    query = paths.cut_query(raw_query, route.provider.query_credentials)
    if credential is not None and credential.place == "query":
        query = paths.join_query(query, f"{credential.name}={quote(credential.value, safe='')}")
    return _checked(route.url(query), route.target.origin, route.target.prefix)


@lru_cache(maxsize=2048)
def _checked(raw_url: str, origin: str, prefix: str) -> URL:
    """`raw_url` parsed, and held once more against where the registry says it must lead."""
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
    """Send one call; await it for the head of the answer, which the caller must close.

    Awaiting it raises what failures.py maps. It is no coroutine of its own: one frame less.
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
    """As aiohttp takes it."""
    return None if proxy is None else _parsed(proxy.url)


_parsed = lru_cache(maxsize=64)(URL)


def end_with_connection(response: ClientResponse) -> Callable[[], None]:
    """Let a reader of `response` hear that its connection is gone; call the result when done.

    aiohttp (3.14) drops a connection on bytes that cannot be parsed without telling whoever reads
    the body: the reader would wait for its whole idle time.
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
    """Only the connection is timed here; periodic.py ends every other wait."""
    return ClientTimeout(total=None, connect=connect_s)
