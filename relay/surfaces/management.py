"""What the routes of management share: authorize a request, read its parameters and its body,
answer in JSON, write the audit.

Owns what of a request decides who may manage, and the listener on which management answers;
gate/management.py decides. Bodies are bounded in bytes and time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from relay import log
from relay.core.errors import BadFraming, BadRequest, BodyTimeout, RelayError, StoreUnavailable
from relay.core.fields import UNREADABLE
from relay.core.numbers import header_number
from relay.core.text import clean
from relay.gate.management import Manager, Question
from relay.gateway import GATEWAY
from relay.storage.database import Database, DatabaseNewer, DatabaseUnavailable, RowsRefused
from relay.surfaces.native import unknown_route

_MAX_BODY_BYTES = 64 * 1024
T = TypeVar("T")


def authorize(request: web.Request) -> Manager:
    """Return who manages. Raises the error for a request that may not: UnknownRoute where
    management has another listener, else those of Management.require.
    """
    require_listener(request)
    return request.app[GATEWAY].management.require(question_of(request))


def require_listener(request: web.Request) -> None:
    """Raise UnknownRoute for a request that came to a listener without management."""
    if not answers_here(request):
        raise unknown_route(request)


def answers_here(request: web.Request) -> bool:
    """True if management answers on the listener to which `request` came."""
    if not request.app[GATEWAY].has_admin_listener:
        return True
    return getattr(request.protocol, "is_of_management", False)


def question_of(request: web.Request) -> Question:
    """Return what of `request` decides whether it may manage."""
    caller = request.app[GATEWAY].callers.locate(request)
    query = request.raw_path.partition("?")[2]
    return Question(request.method, request.headers, query, caller)


def require_metrics(request: web.Request) -> None:
    """Raise the error for a request that may not read metrics."""
    require_listener(request)
    gateway = request.app[GATEWAY]
    gateway.management.require_metrics(question_of(request), gateway.access)


def may_read_metrics(request: web.Request) -> bool:
    """True if a request may read metrics, and so the counters of /readyz."""
    gateway = request.app[GATEWAY]
    if not answers_here(request):
        return False
    return gateway.management.may_read_metrics(question_of(request), gateway.access)


def may_see_page(request: web.Request) -> bool:
    """True if a request gets the status page, which holds nothing but asks management itself: for
    who may manage, for local callers, who then type the token, and on a listener of management's
    own.
    """
    gateway = request.app[GATEWAY]
    if not answers_here(request):
        return False
    question = question_of(request)
    if gateway.management.is_local(question):
        return True
    try:
        gateway.management.require(question)
    except RelayError:
        return gateway.has_admin_listener and gateway.management.has_tokens
    return True


def database_of(request: web.Request) -> Database:
    """Return the database. Raises StoreUnavailable where there is none."""
    database = request.app[GATEWAY].ledger.database
    if database is None:
        raise StoreUnavailable
    return database


def private_json(content: object, status: int = 200) -> web.Response:
    """Return a response in JSON that must not be cached."""
    return web.Response(
        body=msgspec.json.encode(content), status=status, content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )  # fmt: skip


def parameters_of(request: web.Request, *known: str) -> dict[str, str]:
    """Return the query. Raises BadRequest for a parameter that is not one of those known."""
    parameters = dict(request.query)
    if unknown := set(parameters) - set(known):
        raise BadRequest(f"unknown parameter '{clean(min(unknown), 40)}'")
    return parameters


def limit_of(parameters: Mapping[str, str], default: int, most: int) -> int:
    """Return how many rows a page may have. Raises BadRequest."""
    limit = header_number("limit", parameters.get("limit"), 1, most)
    return default if limit is None else limit


async def read_json(request: web.Request, kind: type[T]) -> T:
    """The JSON in the request body, as a `kind`. Raises BadRequest, BadFraming, BodyTimeout."""
    pause_s = request.app[GATEWAY].settings.server.body_idle_timeout_s
    body = b""
    try:
        while True:
            async with asyncio.timeout(pause_s):
                chunk = await request.content.readany()
            if not chunk:
                return msgspec.json.decode(body, type=kind)
            body += chunk
            if len(body) > _MAX_BODY_BYTES:
                raise BadRequest(f"the body has more than {_MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise BodyTimeout(pause_s) from None
    except RequestPayloadError:
        raise BadFraming("its body is not framed correctly") from None
    except msgspec.ValidationError as error:
        raise BadRequest(f"the body is not as documented: {clean(str(error), 200)}") from None
    except UNREADABLE:
        raise BadRequest("the body is not a JSON object") from None


async def audit(request: web.Request, manager: Manager, action: str, target: str = "") -> None:
    """Write that `manager` did `action`, which has been done. Without a database only the log has
    it; a failure is logged.
    """
    store = request.app[GATEWAY].access_store
    if store is None:
        return
    try:
        await store.audit(str(manager), action, target, {})
    except (DatabaseUnavailable, DatabaseNewer, RowsRefused) as error:
        log.warn("audit.failed", action=action, actor=str(manager), cause=type(error).__name__)
