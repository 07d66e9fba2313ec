"""aiohttp's client errors, mapped once to the relay's own. Their texts hold URLs, so none is
quoted.
"""

from __future__ import annotations

import errno
import os

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from relay.core.errors import (
    BadPath,
    BadRequest,
    RelayError,
    UpstreamDisconnected,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamTlsFailed,
    UpstreamUnreachable,
)
from relay.core.provider import Proxy, Route
from relay.core.text import quoted

NO_NAME = "the name does not resolve"
BEFORE_ANSWER = "before its answer began"
WITHIN_ANSWER = "in the middle of its answer"


class ProxyBroke(aiohttp.ClientConnectionError):
    """A proxy ended the connection, or answered what is no HTTP, instead of opening a tunnel."""


MAPPABLE_ERRORS = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError)
"""What `map_failure` takes."""


def map_failure(error: Exception, route: Route, phase: str) -> RelayError:
    """The RelayError that a failure of the upstream leg is. `phase` is BEFORE_ANSWER or
    WITHIN_ANSWER. Nobody prints the traceback of such a failure: it is dropped.
    """
    _drop_tracebacks(error)
    name, address, proxy = route.provider.name, _address(route), route.target.proxy
    if proxy is not None and (failure := _of_proxy(error, route, proxy)) is not None:
        return failure
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        through = f" through the proxy {proxy}" if proxy is not None else ""
        limit_s = route.provider.connect_timeout_s
        return UpstreamUnreachable(name, address, f"none within {limit_s:g} s{through}")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return UpstreamTlsFailed(name, address, "its certificate is not trusted")
    if isinstance(error, aiohttp.ClientSSLError):
        return UpstreamTlsFailed(name, address, "the handshake was refused")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return UpstreamUnreachable(name, address, NO_NAME)
    if isinstance(error, aiohttp.ClientConnectorError):
        return UpstreamUnreachable(name, address, _os_reason(error.os_error))
    if isinstance(error, aiohttp.InvalidURL):
        return BadPath("it does not make a URL")
    return _map_failure_of_connection(error, phase)


def _of_proxy(error: Exception, route: Route, proxy: Proxy) -> RelayError | None:
    """Where it is the proxy that failed; nothing was sent to the provider then."""
    name, address, named = route.provider.name, _address(route), f"the proxy {proxy}"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        hint = ": it wants another user or password" if error.status == 407 else ""
        return UpstreamUnreachable(name, address, f"{named} answered {error.status}{hint}")
    if isinstance(error, ProxyBroke):
        return UpstreamUnreachable(name, address, f"{named} broke off, or answered no HTTP")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return UpstreamUnreachable(name, address, f"the name of {named} does not resolve")
    tls = aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError
    if isinstance(error, tls) and proxy.shown == f"https://{error.host}:{error.port}":
        return UpstreamTlsFailed(name, address, f"{named} has no certificate that is trusted")
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return UpstreamUnreachable(name, address, f"{named}: {_os_reason(error.os_error)}")
    return None


def _address(route: Route) -> str:
    """Host and port of the target."""
    host = route.target.host
    return f"[{host}]:{route.target.port}" if ":" in host else f"{host}:{route.target.port}"


def _drop_tracebacks(error: BaseException) -> None:
    """Of an exception and of those behind it. Their frames, aiohttp's and ours, hold the exceptions
    as well as the call: cycles that only the garbage collector would free.
    """
    seen: set[int] = set()
    left: list[object] = [error]
    while left:
        each = left.pop()
        if isinstance(each, BaseException) and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            left += [each.__cause__, each.__context__, getattr(each, "os_error", None)]


def _map_failure_of_connection(error: Exception, phase: str) -> RelayError:
    """Failures of a connection that was up."""
    if isinstance(error, aiohttp.ServerTimeoutError):
        return UpstreamTimeout(phase, 0)
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return UpstreamProtocolError(f"its WebSocket handshake is wrong ({quoted(error.message)})")
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | OSError):
        # A body that cannot be parsed comes as ClientPayloadError too: for the caller it is cut all
        # the same.
        return UpstreamDisconnected(phase)
    if isinstance(error, aiohttp.ClientResponseError | HttpProcessingError):
        return UpstreamProtocolError("it is not valid HTTP")
    if isinstance(error, ValueError):
        return BadRequest("a header holds characters that cannot be passed on")
    return UpstreamDisconnected(phase)


def _os_reason(error: OSError) -> str:
    if error.errno == errno.ECONNREFUSED:
        return "it was refused"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "the relay has no file descriptor left (ulimit -n)"
    return os.strerror(error.errno).lower() if error.errno else "network error"
