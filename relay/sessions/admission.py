"""Refuse the messages by which a client would use a model that it may not use.

Owns the check of every message of a client whose record or ticket lists models, and what such a
client gets: the error event of its vendor, then a close frame with 1008. core/named_models.py reads
the models of a message; gate/model_access.py decides whether the client may use them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from relay.core.error_bodies import socket_event
from relay.core.errors import EndpointNotAllowed, ModelNotAllowed, ModelUnknown
from relay.core.exchange import Exchange
from relay.core.model_search import Named, Unreadable
from relay.core.named_models import (
    is_named_at,
    models_of_handshake,
    models_of_message,
    places_of_session,
    socket_rule,
)
from relay.core.provider import Route
from relay.core.text import quoted
from relay.gate.model_access import ModelAccess, path_of
from relay.sessions.attempt import handshake_query
from relay.sessions.session import Ending, Leg

_MAX_WORD_BYTES = 16


def allowed_route(
    access: ModelAccess, route: Route, raw_query: str, headers: Mapping[str, str]
) -> Route:
    """Return the route of a session, without the fallbacks whose session the client may not open.
    Raises ModelNotAllowed, ModelUnknown and EndpointNotAllowed for the route itself.
    """
    _check_handshake(access, route, handshake_query(raw_query, route, headers))
    kept = []
    for each in route.alternatives:
        with contextlib.suppress(ModelNotAllowed, ModelUnknown, EndpointNotAllowed):
            _check_handshake(access, each, handshake_query(raw_query, each, headers))
            kept.append(each)
    return replace(route, alternatives=tuple(kept))


def _check_handshake(access: ModelAccess, route: Route, raw_query: str) -> bool:
    """Raise the error for a session whose URL names a model that the client may not use, or none
    where its vendor reads the model from the URL, or whose model the relay does not read.

    True if the URL names the model of the session; False if a message must do so.
    """
    rule = socket_rule(route.format, route.endpoint)
    if rule is None:
        access.check_unread("other")
    found = models_of_handshake(route.format, path_of(route), raw_query)
    if isinstance(found, Unreadable):
        raise ModelUnknown(found.reason)
    access.check(found)
    if rule is None:
        return True
    places = places_of_session(rule, raw_query)
    if is_named_at(places, found):
        return True
    if "message " not in places:
        raise ModelUnknown("the URL of the session names no model")
    return False


class MessageCheck:
    """Judges the messages of a client, as Leg.admit and Leg.admit_binary."""

    __slots__ = ("_access", "_exchange", "_is_named", "_places", "_route", "_rule")

    def __init__(
        self, access: ModelAccess, exchange: Exchange, raw_query: str, headers: Mapping[str, str]
    ) -> None:
        """Make the check of a session that is connected by one of the routes of `allowed_route`."""
        route = exchange.routing.route
        assert route is not None
        raw_query = handshake_query(raw_query, route, headers)
        self._access, self._exchange, self._route = access, exchange, route
        self._rule = socket_rule(route.format, route.endpoint)
        self._places = places_of_session(self._rule, raw_query) if self._rule else ""
        self._is_named = _check_handshake(access, route, raw_query)

    def attach(self, leg: Leg) -> None:
        """Judge the messages of `leg` from now on."""
        leg.admit = self.admit
        if self._rule is not None and self._rule.audio:
            leg.admit_binary = self.admit_audio

    def admit(self, data: bytes) -> Ending | None:
        """Judge a message: None to relay it, or the Ending of the session."""
        rule = self._rule
        if rule is not None and len(data) <= _MAX_WORD_BYTES and data in rule.words:
            return None
        found = models_of_message(self._route.format, data)
        if isinstance(found, Unreadable):
            return self._end(ModelUnknown(found.reason)) if rule is not None else None
        return self._judge(found)

    def admit_audio(self, data: bytes) -> Ending | None:
        """Judge a binary message that is audio, unless it is JSON: a server could read it so."""
        if not data.startswith(b"{"):
            return None if self._is_named else self._judge(())
        found = models_of_message(self._route.format, data)
        return self._judge(() if isinstance(found, Unreadable) else found)

    def _judge(self, found: Sequence[Named]) -> Ending | None:
        error = self._access.refusal(found)
        if error is not None:
            return self._end(error)
        if not self._is_named:
            if not is_named_at(self._places, found):
                return self._end(ModelUnknown("the first message names no model of the session"))
            self._is_named = True
        return None

    def _end(self, error: ModelNotAllowed | ModelUnknown) -> Ending:
        """Return the Ending for an error. Its reason goes to both sides, and names no client."""
        detail = quoted(error.wanted) if isinstance(error, ModelNotAllowed) else error.reason
        event = socket_event(error, self._route.format, self._route.endpoint, self._exchange.id)
        reason = f"{error.code}: {detail}"
        return Ending(error.close_code, reason, "relay", error, event=event)
