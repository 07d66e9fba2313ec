"""Every periodic job of a process, in one loop: end what has timed out, ping silent sockets, report
gauges, check file descriptors.

Owns the loop. What has timed out is decided in timeouts.py.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource

from aiohttp import WSMsgType, web

from relay import log
from relay.core.errors import (
    ClientStalled,
    InternalError,
)
from relay.gateway import GATEWAY, Gateway
from relay.sessions.pump import broken
from relay.sessions.session import GONE, Leg, Session
from relay.timeouts import due_s, legs_to_ping, overdue, overdue_ending

MAX_TICK_S, MIN_TICK_S = 0.5, 0.01
_TICKS_PER_LIMIT = 5
_SESSIONS_AT_ONCE = 100


async def run_periodic_jobs(app: web.Application):  # type: ignore[no-untyped-def]
    """A cleanup context: runs `sweep` for the life of the application."""
    task = asyncio.create_task(_loop(app[GATEWAY]))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _loop(gateway: Gateway) -> None:
    descriptors = DescriptorCheck()
    while True:
        tick, began_s = tick_s(gateway), gateway.clock()
        await asyncio.sleep(tick)
        try:
            if gateway.metrics is not None:
                gateway.metrics.observe_event_loop_lag(gateway.clock() - began_s - tick)
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
            error = overdue(exchange, settings, now)
        except Exception as bug:  # whatever it is, it ends this call alone
            log.bug("periodic.failed", bug, id=exchange.id)
            error = InternalError()
        if error is not None:
            exchange.expire(error)
    stall_s = settings.cache.stall_timeout_s
    for subscriber in gateway.inflight.stalled(stall_s):
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
        if (ending := overdue_ending(session, settings, now)) is not None:
            session.end(ending)
            return
        for leg in legs_to_ping(session, settings, now):
            leg.pinged_s = now
            _ping(leg)
        gateway.sessions.add(session, due_s(session, settings.websocket, now))
    except Exception as bug:  # it ends this session alone; logged when that is accounted for
        session.end(broken(bug))


def _report(gateway: Gateway) -> None:
    """Gauges and counts, for metrics and the log; and what nobody needs any more."""
    gateway.windows.forget()
    if gateway.metrics is not None and gateway.metrics.is_multiprocess:
        gateway.metrics.update(gateway.gauges(), gateway.counters())  # any worker is asked for all
    if shed := gateway.requests_shed - gateway.shed_logged:
        gateway.shed_logged += shed
        log.warn("requests.shed", requests=shed)


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
