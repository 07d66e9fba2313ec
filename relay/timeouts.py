"""Timeouts: which call or session has waited too long, and when a session is next due.

Owns the judgement by time, of request bodies, silent providers, stalled clients and WebSocket
sessions. Request paths and pumps only stamp what they wait for, which costs them next to nothing; a
timer for each call, chunk or message would not. Who asks, and how often, is periodic.py's.
"""

from __future__ import annotations

from collections.abc import Iterator

from relay.core.errors import (
    BodyTimeout,
    BodyTooSlow,
    ClientGone,
    ClientStalled,
    RelayError,
    UpstreamTimeout,
)
from relay.core.exchange import Exchange
from relay.registry.schema import GatewayFile, Server, WebSockets
from relay.sessions.pump import lost
from relay.sessions.session import NAMES, Ending, Leg, Session

_RATED_EACH_S = 1.0
"""How often an idle session is judged where what clients send is limited."""


def overdue(exchange: Exchange, settings: GatewayFile, now: float) -> RelayError | None:
    """The error to end a call with, or None while it may go on."""
    if exchange.waiting.expired is not None:
        return None
    if exchange.waiting.client_left is not None and exchange.waiting.client_left():
        # Where the server cancels handlers itself this is never reached first.
        return ClientGone()
    waiting = exchange.waiting.for_
    if waiting == "nothing":
        return None
    waited = now - exchange.waiting.since_s
    if waiting == "request_body":
        return _overdue_body(exchange, settings.server, waited)
    if waiting == "client":
        limit = settings.server.write_timeout_s
        return ClientStalled(limit) if waited > limit else None
    provider = exchange.routing.route.provider if exchange.routing.route else None
    if provider is None:
        return None
    first = waiting == "first_byte"
    own = exchange.waiting.first_byte_limit_s
    limit = (own or provider.first_byte_timeout_s) if first else provider.idle_timeout_s
    return None if waited <= limit else UpstreamTimeout(_PHASES[waiting], limit)


def _overdue_body(exchange: Exchange, server: Server, waited_s: float) -> RelayError | None:
    """A body may fall as far behind its least rate as it may pause."""
    limit = server.body_idle_timeout_s
    if waited_s > limit:
        return BodyTimeout(limit)
    if exchange.waiting.body_behind_s + waited_s > limit:
        return BodyTooSlow(server.min_body_bytes_per_s, limit)
    return None


_PHASES = {
    "first_byte": "waiting for the head of its answer",
    "upstream": "in the middle of its answer",
    "upload": "while it took the upload",
}


def overdue_ending(session: Session, settings: GatewayFile, now: float) -> Ending | None:
    """The ending that is due by time, or None."""
    rules, common = session.rules, settings.websocket
    for leg, _ in session.legs:
        if leg.sending_since_s and now - leg.sending_since_s > common.send_timeout_s:
            who = NAMES[leg.side]
            return Ending(
                1013, f"the {who} took no message for {common.send_timeout_s:g} s", "relay"
            )
    if rules.max_session_s and now - session.exchange.request.started_s > rules.max_session_s:
        return Ending(4409, f"the session reached its limit of {rules.max_session_s:g} s", "relay")
    last = max(session.downstream.message_s, session.upstream.message_s)
    if rules.idle_timeout_s and now - last > rules.idle_timeout_s:
        return Ending(4408, f"no message for {rules.idle_timeout_s:g} s", "relay")
    if (sent := _too_fast(session.downstream, common, now)) is not None:
        return Ending(1008, f"the client sent more than {sent}", "relay")
    for leg, other in session.legs:
        if _silent_since_ping(leg, other, now, common.ping_after_s):
            return lost(leg)
    return None


def _too_fast(leg: Leg, limits: WebSockets, now: float) -> str | None:
    """The limit that a client passed, since its rate was last judged: at once if it sent more than
    a second's worth, otherwise second by second.
    """
    began = leg.judged_s or now
    passed = max(1.0, now - began)
    for sent, limit, what in (
        (leg.messages - leg.judged_messages, limits.max_messages_per_s, "messages"),
        (leg.bytes - leg.judged_bytes, limits.max_bytes_per_s, "bytes"),
    ):
        if limit and sent > limit * passed:
            return f"{limit} {what} a second"
    if now - began >= 1 or not leg.judged_s:
        leg.judged_s, leg.judged_messages, leg.judged_bytes = now, leg.messages, leg.bytes
    return None


def _silent_since_ping(leg: Leg, other: Leg, now: float, limit_s: float) -> bool:
    """Pinged, and nothing came for as long again. A leg that we do not read counts as live."""
    paused_by_us = bool(other.sending_since_s)
    return leg.pinged_s > leg.heard_s and now - leg.pinged_s > limit_s and not paused_by_us


def due_s(session: Session, common: WebSockets, now: float) -> float:
    """The earliest time at which a limit of the session may be passed, whatever happens until
    then: pumps only stamp what they do.
    """
    client, provider, rules = session.downstream, session.upstream, session.rules
    due = now + common.send_timeout_s  # of a message that is sent from now on
    for leg in (client, provider):
        if leg.sending_since_s:
            due = min(due, leg.sending_since_s + common.send_timeout_s)
        due = min(due, max(leg.heard_s, leg.pinged_s) + common.ping_after_s)
    if rules.max_session_s:
        due = min(due, session.exchange.request.started_s + rules.max_session_s)
    if rules.idle_timeout_s:
        due = min(due, max(client.message_s, provider.message_s) + rules.idle_timeout_s)
    if common.max_messages_per_s or common.max_bytes_per_s:
        is_quiet = client.messages == client.judged_messages
        due = min(due, now + _RATED_EACH_S if is_quiet else now)
    return due


def legs_to_ping(session: Session, settings: GatewayFile, now: float) -> Iterator[Leg]:
    after = settings.websocket.ping_after_s
    for leg, other in session.legs:
        silent = now - leg.heard_s > after and leg.pinged_s <= leg.heard_s
        if silent and not other.sending_since_s and not leg.sending_since_s:
            yield leg
