"""The one middleware: checks the path, and turns every error into a response.

Owns the order: the path is checked before anything reads it. surfaces/errors.py makes the
responses. A streamed body passes through no other middleware.
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
    """Refuse a bad path before anything reads it; answer every RelayError in the format of the
    client's SDK.
    """
    try:
        if request.method in _NEVER_FORWARDED:
            raise MethodNotAllowed(request.method)
        check_target(request.raw_path)
        return await handler(request)
    except RelayError as error:
        return _answer_refused(request, error)
    except web.HTTPException as error:
        if error.status in (404, 405):
            return _answer_refused(request, unknown_route(request))
        raise
    except ConnectionError:
        raise
    except Exception as error:
        # A bug: the client gets a clear error, and the log has the cause.
        log.bug("request.failed", error, method=request.method)
        return answer(request, InternalError())


def _answer_refused(request: web.Request, error: RelayError) -> web.StreamResponse:
    """Answer with `error`; log it, unless there is an Exchange, whose line has it."""
    if EXCHANGE not in request:
        log.event("request.refused", method=request.method, error=error.code, client=request.remote)
    return answer(request, error)
