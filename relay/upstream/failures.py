"""Map aiohttp's client errors to the relay's own, in this one place.

Owns the mapping, and the reasons that it gives. The texts of aiohttp's errors contain URLs, which
may hold keys, so none of them is quoted.
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
BEFORE_ANSWER = "before its response began"
WITHIN_ANSWER = "in the middle of its response"


class ProxyBroke(aiohttp.ClientConnectionError):
    """A proxy closed the connection, or did not answer with HTTP, instead of opening a tunnel."""


MAPPABLE_ERRORS = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError)
"""The errors that `map_failure` accepts."""


def map_failure(error: Exception, route: Route, phase: str) -> RelayError:
    """Return the RelayError for a failure of the upstream leg. `phase` is BEFORE_ANSWER or
    WITHIN_ANSWER. The traceback of `error`, which is never printed, is dropped.
    """
    drop_tracebacks(error)
    name, address, proxy = route.provider.name, _address(route), route.target.proxy
    if proxy is not None and (failure := _of_proxy(error, route, proxy)) is not None:
        return failure
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        through = f" through the proxy {proxy}" if proxy is not None else ""
        limit_s = route.provider.connect_timeout_s
        return UpstreamUnreachable(name, address, f"timed out after {limit_s:g} s{through}")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return UpstreamTlsFailed(name, address, "its certificate is not trusted")
    if isinstance(error, aiohttp.ClientSSLError):
        return UpstreamTlsFailed(name, address, "the handshake was refused")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return UpstreamUnreachable(name, address, NO_NAME)
    if isinstance(error, aiohttp.ClientConnectorError):
        return UpstreamUnreachable(name, address, _os_reason(error.os_error))
    if isinstance(error, aiohttp.InvalidURL):
        return BadPath("it does not form a valid URL")
    return _map_failure_of_connection(error, phase)


def _of_proxy(error: Exception, route: Route, proxy: Proxy) -> RelayError | None:
    """Return the RelayError if the proxy failed, in which case nothing was sent to the provider;
    else None.
    """
    name, address, named = route.provider.name, _address(route), f"the proxy {proxy}"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        hint = ": check its user name and password" if error.status == 407 else ""
        return UpstreamUnreachable(name, address, f"{named} answered {error.status}{hint}")
    if isinstance(error, ProxyBroke):
        reason = f"{named} closed the connection, or did not answer with HTTP"
        return UpstreamUnreachable(name, address, reason)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return UpstreamUnreachable(name, address, f"the name of {named} does not resolve")
    tls = aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError
    if isinstance(error, tls) and proxy.shown == f"https://{error.host}:{error.port}":
        return UpstreamTlsFailed(name, address, f"the certificate of {named} is not trusted")
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return UpstreamUnreachable(name, address, f"{named}: {_os_reason(error.os_error)}")
    return None


def _address(route: Route) -> str:
    """Return host and port of the target."""
    host = route.target.host
    return f"[{host}]:{route.target.port}" if ":" in host else f"{host}:{route.target.port}"


def drop_tracebacks(error: BaseException) -> None:
    """Drop the tracebacks of an exception and of its causes. Their frames refer to the exceptions
    and to the call: cycles that only the garbage collector would free.
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
    """Map a failure of an established connection."""
    if isinstance(error, aiohttp.ServerTimeoutError):
        return UpstreamTimeout(phase, 0)
    if isinstance(error, aiohttp.WSServerHandshakeError):
        reason = f"its WebSocket handshake is invalid ({quoted(error.message)})"
        return UpstreamProtocolError(reason)
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | OSError):
        # ClientPayloadError stands also for a body that cannot be parsed, which is cut too.
        return UpstreamDisconnected(phase)
    if isinstance(error, aiohttp.ClientResponseError | HttpProcessingError):
        return UpstreamProtocolError("it is not valid HTTP")
    if isinstance(error, ValueError):
        return BadRequest("a header contains characters that HTTP does not allow")
    return UpstreamDisconnected(phase)


def _os_reason(error: OSError) -> str:
    if error.errno == errno.ECONNREFUSED:
        return "connection refused"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "the relay has no file descriptor left (ulimit -n)"
    return os.strerror(error.errno).lower() if error.errno else "network error"
