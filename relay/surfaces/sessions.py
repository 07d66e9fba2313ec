"""Open sessions over HTTP, of all workers: …/sessions, a part of management.

Owns the requests and the shape of responses; sessions/listing.py reads and ends sessions.
"""

from __future__ import annotations

import re

from aiohttp import web

from relay import log
from relay.core.errors import BadRequest, SessionNotFound, WorkersIncomplete
from relay.gateway import GATEWAY
from relay.sessions.listing import MAX_PAGE_SESSIONS
from relay.surfaces.management import audit, authorize, limit_of, parameters_of

_PAGE_SESSIONS = 50
_ID = re.compile(r"[0-9a-f-]{36}\Z")


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the routes under `prefix`."""
    app.router.add_get(f"{prefix}/sessions", list_sessions)
    app.router.add_delete(f"{prefix}/sessions/{{id}}", end_session)


async def list_sessions(request: web.Request) -> web.Response:
    """A page of the open sessions of all workers, the oldest first: `{"sessions": […], "cursor"}`;
    `missing` names workers that did not answer.
    """
    authorize(request)
    parameters = parameters_of(request, "cursor", "limit")
    limit = limit_of(parameters, _PAGE_SESSIONS, MAX_PAGE_SESSIONS)
    after = parameters.get("cursor", "")
    if after and not _ID.match(after):
        raise BadRequest("the cursor is not the one of a page of sessions")
    page = await request.app[GATEWAY].list_sessions(after, limit)
    sessions = page.sessions[:limit]
    cursor = sessions[-1]["id"] if len(sessions) == limit else None
    return web.json_response({"sessions": sessions, "cursor": cursor, "missing": page.missing})


async def end_session(request: web.Request) -> web.Response:
    """End an open session with the close code 4403. 200 when it ends.

    Raises SessionNotFound; WorkersIncomplete if a worker that may have it did not answer.
    """
    manager = authorize(request)
    id = request.match_info["id"]
    if not _ID.match(id):
        raise SessionNotFound
    is_ended, missing = await request.app[GATEWAY].end_session(id)
    if not is_ended:
        if missing:
            raise WorkersIncomplete("end of the session", missing)
        raise SessionNotFound
    log.event("session.ended", id=id, actor=str(manager))
    await audit(request, manager, "session.end", id)
    return web.json_response({"ended": id})
