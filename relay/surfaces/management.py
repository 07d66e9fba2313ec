"""Authorize a request for management, whatever route it has.

Owns what of a request decides, and the listener on which management answers. gate/management.py
decides who may.
"""

from __future__ import annotations

from aiohttp import web

from relay.core.errors import RelayError
from relay.gate.management import Manager, Question
from relay.gateway import GATEWAY
from relay.surfaces.native import unknown_route


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
