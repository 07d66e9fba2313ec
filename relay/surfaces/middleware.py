"""The one middleware: the path check, and every failure into an answer. No stream passes through
anything else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from relay import log
from relay.core.errors import InternalError, MethodNotAllowed, RelayError
from relay.core.paths import check_target
from relay.gateway import EXCHANGE
from relay.surfaces.errors import answer
from relay.surfaces.native import unknown_route

_NEVER_FORWARDED = frozenset({"TRACE", "CONNECT"})
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse a bad path before anything looks at it; answer every RelayError in its client's
    shape.
    """
    try:
        if request.method in _NEVER_FORWARDED:
            raise MethodNotAllowed(request.method)
        check_target(request.raw_path)
        return await handler(request)
    except RelayError as error:
        return _refused(request, error)
    except web.HTTPException as error:
        if error.status in (404, 405):
            return _refused(request, unknown_route(request))
        raise
    except ConnectionError:
        raise
    except Exception as error:
        # Whatever it is, the client gets a clear answer and the log the cause.
        log.bug("request.failed", error, method=request.method)
        return answer(request, InternalError())


def _refused(request: web.Request, error: RelayError) -> web.StreamResponse:
    """Answer `error`; log it where no Exchange will."""
    if EXCHANGE not in request:
        log.event("request.refused", method=request.method, error=error.code, client=request.remote)
    return answer(request, error)
