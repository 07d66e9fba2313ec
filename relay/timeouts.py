"""Decide which calls and sessions have waited too long, and when a session is next to be checked.

Owns the time limits of request bodies, silent providers, stalled clients and WebSocket sessions.
Request paths and pumps only record what they wait for and since when: a timer for each call, chunk
or message would cost more. periodic.py calls these functions and ends what has timed out.
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

_RATE_CHECK_S = 1.0
"""How often an idle session is checked if the rate of client messages is limited."""


def overdue(exchange: Exchange, settings: GatewayFile, now: float) -> RelayError | None:
    """Return the error with which to end a call, or None while it may continue."""
    if exchange.waiting.expired is not None:
        return None
    if exchange.waiting.client_left is not None and exchange.waiting.client_left():
        # Only for a host's server: the relay's own has cancelled the handler by now.
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
    """Return BodyTimeout for a body that paused too long, and BodyTooSlow for one that is too far
    behind the minimum rate. The limit is `server.body_idle_timeout_s` for both.
    """
    limit = server.body_idle_timeout_s
    if waited_s > limit:
        return BodyTimeout(limit)
    if exchange.waiting.body_behind_s + waited_s > limit:
        return BodyTooSlow(server.min_body_bytes_per_s, limit)
    return None


_PHASES = {
    "first_byte": "before its response began",
    "upstream": "in the middle of its response",
    "upload": "while receiving the request body",
}


def overdue_ending(session: Session, settings: GatewayFile, now: float) -> Ending | None:
    """Return the ending of a session that has passed a time or rate limit, or None."""
    rules, common = session.rules, settings.websocket
    for leg, _ in session.legs:
        if leg.sending_since_s and now - leg.sending_since_s > common.send_timeout_s:
            who = NAMES[leg.side]
            limit_s = common.send_timeout_s
            return Ending(1013, f"sending to the {who} took longer than {limit_s:g} s", "relay")
    if rules.max_session_s and now - session.exchange.request.started_s > rules.max_session_s:
        return Ending(4409, f"the session reached its limit of {rules.max_session_s:g} s", "relay")
    last = max(session.downstream.message_s, session.upstream.message_s)
    if rules.idle_timeout_s and now - last > rules.idle_timeout_s:
        return Ending(4408, f"no message for {rules.idle_timeout_s:g} s", "relay")
    if (passed := _passed_rate(session.downstream, common, now)) is not None:
        return Ending(1008, f"the client sent more than {passed}", "relay")
    for leg, other in session.legs:
        if _silent_since_ping(leg, other, now, common.ping_after_s):
            return lost(leg)
    return None


def _passed_rate(leg: Leg, limits: WebSockets, now: float) -> str | None:
    """Return the rate limit that a client has passed since the last full check, or None. It has
    passed one at once if it sent more than a second's worth; rates start anew every second.
    """
    began_s = leg.judged_s or now
    elapsed_s = max(1.0, now - began_s)
    for sent, limit, what in (
        (leg.messages - leg.judged_messages, limits.max_messages_per_s, "messages"),
        (leg.bytes - leg.judged_bytes, limits.max_bytes_per_s, "bytes"),
    ):
        if limit and sent > limit * elapsed_s:
            return f"{limit} {what} a second"
    if now - began_s >= 1 or not leg.judged_s:
        leg.judged_s, leg.judged_messages, leg.judged_bytes = now, leg.messages, leg.bytes
    return None


def _silent_since_ping(leg: Leg, other: Leg, now: float, limit_s: float) -> bool:
    """True if nothing has come from `leg` within `limit_s` after a ping. A leg that the relay does
    not read, since the other one is slow, counts as live.
    """
    is_paused = bool(other.sending_since_s)
    return leg.pinged_s > leg.heard_s and now - leg.pinged_s > limit_s and not is_paused


def due_s(session: Session, common: WebSockets, now: float) -> float:
    """Return the earliest time at which the session may pass a limit, whatever its pumps do until
    then.
    """
    client, provider, rules = session.downstream, session.upstream, session.rules
    due = now + common.send_timeout_s  # for a message whose sending begins now
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
        due = min(due, now + _RATE_CHECK_S if is_quiet else now)
    return due


def legs_to_ping(session: Session, settings: GatewayFile, now: float) -> Iterator[Leg]:
    """Yield the legs that are silent since `websocket.ping_after_s` and were not pinged since."""
    after = settings.websocket.ping_after_s
    for leg, other in session.legs:
        silent = now - leg.heard_s > after and leg.pinged_s <= leg.heard_s
        if silent and not other.sending_since_s and not leg.sending_since_s:
            yield leg
