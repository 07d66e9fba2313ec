"""List the open sessions of a process, and end one.

Owns what of a session is shown, and its bounds: with several workers a page of each passes through
the supervisor in one message (server/control.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest
from typing import Any, NamedTuple

from relay.core.errors import SessionEnded
from relay.core.text import clean
from relay.gateway import Gateway
from relay.sessions.session import Ending, Session

MAX_PAGE_SESSIONS = 100
_TEXT_CHARS = 100


class SessionPage(NamedTuple):
    """Open sessions in the order of their ids, and so of their starts."""

    sessions: Sequence[dict[str, Any]]
    missing: Sequence[str] = ()
    """The workers that did not answer, and why."""


def describe_sessions(gateway: Gateway, after: str, limit: int) -> list[dict[str, Any]]:
    """Describe the open sessions of this process with an id above `after`: the first `limit`."""
    later = (session for session in gateway.sessions if session.exchange.id > after)
    found = nsmallest(limit, later, key=lambda session: session.exchange.id)
    now = gateway.clock()
    return [_describe(session, now) for session in found]


def end_session(gateway: Gateway, id: str) -> bool:
    """End the session of this process with this id; False if there is none."""
    for session in gateway.sessions:
        if session.exchange.id == id:
            error = SessionEnded()
            session.end(Ending(error.close_code, "ended by the operator", "relay", error))
            return True
    return False


def _describe(session: Session, now: float) -> dict[str, Any]:
    facts, route = session.exchange.request, session.exchange.routing.route
    endpoint = route.endpoint if route is not None else facts.endpoint
    caller, client, provider = facts.caller, session.downstream, session.upstream
    return {
        "id": session.exchange.id,
        "client": clean(caller.client, _TEXT_CHARS),
        "key_id": caller.key_id or None,
        "address": clean(caller.address, _TEXT_CHARS),
        "provider": facts.provider,
        "endpoint": clean(endpoint, _TEXT_CHARS),
        "model": clean(facts.model, _TEXT_CHARS) if facts.model else None,
        "age_s": round(now - facts.started_s, 3),
        "messages_up": client.messages,
        "messages_down": provider.messages,
        "bytes_up": client.bytes,
        "bytes_down": provider.bytes,
    }
