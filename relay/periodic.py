"""Every periodic job of a process, in one loop: waits that took too long, sockets that went silent.

Owns: the judgement by time. Request paths and pumps only stamp what they wait for, which costs them
next to nothing; a timer for each call, chunk or message would not.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
from collections.abc import Iterator

from aiohttp import WSMsgType, web

from relay import log
from relay.core.errors import (
    BodyTimeout,
    BodyTooSlow,
    ClientGone,
    ClientStalled,
    InternalError,
    RelayError,
    UpstreamTimeout,
)
from relay.core.exchange import Exchange
from relay.gateway import GATEWAY, Gateway
from relay.registry.schema import GatewayFile, Server, WebSockets
from relay.sessions.pump import broken, lost
from relay.sessions.session import GONE, NAMES, Ending, Leg, Session

MAX_TICK_S, MIN_TICK_S = 0.5, 0.01
_TICKS_PER_LIMIT = 5
_SESSIONS_AT_ONCE = 100
_RATED_EACH_S = 1.0
"""How often an idle session is judged where what clients send is limited."""


async def run_periodic_jobs(app: web.Application):  # type: ignore[no-untyped-def]
    """A cleanup context: runs `sweep` for the life of the application."""
    task = asyncio.create_task(_loop(app[GATEWAY]))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _loop(gateway: Gateway) -> None:
    descriptors = DescriptorCheck()
    while True:
        await asyncio.sleep(tick_s(gateway))
        try:
            await sweep(gateway)
            descriptors.check()
        except Exception as error:
            # One bad sweep must not end all that follow; it is logged each time.
            log.bug("periodic.failed", error)


def tick_s(gateway: Gateway) -> float:
    """The time between two sweeps: a fifth of the shortest limit, between 10 ms and 500 ms."""
    settings = gateway.settings
    limits = [
        settings.server.body_idle_timeout_s,
        settings.server.write_timeout_s,
        settings.cache.stall_timeout_s,
        settings.websocket.send_timeout_s,
        settings.websocket.ping_after_s,
        settings.websocket.idle_timeout_s or MAX_TICK_S * _TICKS_PER_LIMIT,
        settings.websocket.max_session_s or MAX_TICK_S * _TICKS_PER_LIMIT,
    ]
    for provider in gateway.registry.providers.values():
        limits += [provider.first_byte_timeout_s, provider.idle_timeout_s]
        limits += [provider.fallback_after_s] if provider.fallback_after_s else []
        if rules := provider.websocket_rules:
            limits += [limit for limit in (rules.idle_timeout_s, rules.max_session_s) if limit]
    return max(MIN_TICK_S, min(MAX_TICK_S, min(limits) / _TICKS_PER_LIMIT))


async def sweep(gateway: Gateway) -> None:
    """Judge every call, and the sessions that are due: an idle one costs nothing in between."""
    now, settings = gateway.clock(), gateway.settings
    for exchange in list(gateway.calls):
        try:
            error = _overdue(exchange, settings, now)
        except Exception as bug:  # whatever it is, it ends this call alone
            log.bug("periodic.failed", bug, id=exchange.id)
            error = InternalError()
        if error is not None:
            exchange.expire(error)
    stall_s = settings.cache.stall_timeout_s
    for subscriber in gateway.inflight.stalled(stall_s):
        if subscriber.exchange.waiting.expired is None:
            subscriber.exchange.expire(ClientStalled(stall_s))
    for number, session in enumerate(gateway.sessions.take_due(now)):
        if number % _SESSIONS_AT_ONCE == _SESSIONS_AT_ONCE - 1:
            await asyncio.sleep(0)  # of thousands that are due at once none holds up the loop
        if session in gateway.sessions:
            _judge_session(session, gateway, now)
    _report(gateway)


def _judge_session(session: Session, gateway: Gateway, now: float) -> None:
    """Judge one session, ping its silent sides, and schedule when it is due again."""
    try:
        settings = gateway.settings
        if (ending := _overdue_ending(session, settings, now)) is not None:
            session.end(ending)
            return
        for leg in _to_ping(session, settings, now):
            leg.pinged_s = now
            _ping(leg)
        gateway.sessions.add(session, _due_s(session, settings.websocket, now))
    except Exception as bug:  # it ends this session alone; logged when that is accounted for
        session.end(broken(bug))


def _due_s(session: Session, common: WebSockets, now: float) -> float:
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


def _report(gateway: Gateway) -> None:
    """Gauges and counts, for metrics and the log; and what nobody needs any more."""
    gateway.windows.forget()
    if gateway.metrics is not None:
        gateway.metrics.tell(gateway.gauges(), gateway.losses())
    if shed := gateway.requests_shed - gateway.shed_logged:
        gateway.shed_logged += shed
        log.warn("requests.shed", requests=shed)


def _overdue(exchange: Exchange, settings: GatewayFile, now: float) -> RelayError | None:
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
        return _body_overdue(exchange, settings.server, waited)
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


def _body_overdue(exchange: Exchange, server: Server, waited_s: float) -> RelayError | None:
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


def _overdue_ending(session: Session, settings: GatewayFile, now: float) -> Ending | None:
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


def _to_ping(session: Session, settings: GatewayFile, now: float) -> Iterator[Leg]:
    after = settings.websocket.ping_after_s
    for leg, other in session.legs:
        silent = now - leg.heard_s > after and leg.pinged_s <= leg.heard_s
        if silent and not other.sending_since_s and not leg.sending_since_s:
            yield leg


def _ping(leg: Leg) -> None:
    """Send a ping and wait for nothing: where a side takes nothing, the frame is in its buffer, and
    the wait for room is given up.
    """
    sending = leg.socket.send_frame(b"", WSMsgType.PING)
    try:
        room = sending.send(None)
    except (StopIteration, *GONE):
        return  # sent; or the connection is gone, which the pump reports
    if room is not None:  # others may wait for the same room: it is not cancelled
        room.add_done_callback(lambda gone: gone.cancelled() or gone.exception())
    sending.close()


class DescriptorCheck:
    """Logs once that none are left, and once that there are some again."""

    def __init__(self) -> None:
        self._exhausted = False

    def check(self) -> None:
        """Try to open two, as a WebSocket session does."""
        try:
            for descriptor in os.pipe():
                os.close(descriptor)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            if not self._exhausted:
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                log.warn("file_descriptors.exhausted", limit=limit, cause=os.strerror(error.errno))
            self._exhausted = True
        else:
            if self._exhausted:
                log.event("file_descriptors.available")
            self._exhausted = False
