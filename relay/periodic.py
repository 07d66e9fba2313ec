"""Run every periodic job of a process in one loop: end calls and sessions that timed out, write
keepalives into silent streams, ping silent sockets, report gauges, check for free file descriptors.

Owns the loop and its schedule. timeouts.py decides what has timed out.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource

from aiohttp import WSMsgType, web

from relay import log
from relay.core.errors import ClientStalled, InternalError
from relay.gateway import GATEWAY, Gateway
from relay.sessions.pump import broken
from relay.sessions.session import GONE, Leg, Session
from relay.timeouts import due_s, legs_to_ping, overdue, overdue_ending

MAX_TICK_S, MIN_TICK_S = 0.5, 0.01
_TICKS_PER_LIMIT = 5
_SESSIONS_AT_ONCE = 100


async def run_periodic_jobs(app: web.Application):  # type: ignore[no-untyped-def]
    """Run the periodic jobs while the application runs (a cleanup context of aiohttp)."""
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
            # A sweep that fails must not end the loop; each failure is logged.
            log.bug("periodic.failed", error)


def tick_s(gateway: Gateway) -> float:
    """Return the time between two sweeps: a fifth of the shortest time limit, between 10 ms and
    500 ms.
    """
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
        limits += [provider.keepalive_s] if provider.keepalive_s else []
        if rules := provider.websocket_rules:
            limits += [limit for limit in (rules.idle_timeout_s, rules.max_session_s) if limit]
    return max(MIN_TICK_S, min(MAX_TICK_S, min(limits) / _TICKS_PER_LIMIT))


async def sweep(gateway: Gateway) -> None:
    """Check every call, and the sessions that are due; a session that is not due costs nothing."""
    now, settings = gateway.clock(), gateway.settings
    for exchange in list(gateway.calls):
        try:
            error = overdue(exchange, settings, now)
        except Exception as bug:  # any exception ends this call alone
            log.bug("periodic.failed", bug, id=exchange.id)
            error = InternalError()
        if error is not None:
            exchange.expire(error)
    stall_s = settings.cache.stall_timeout_s
    for subscriber in gateway.inflight.stalled(stall_s):
        subscriber.exchange.expire(ClientStalled(stall_s))
    for keepalive in list(gateway.keepalives):
        try:
            keepalive.send_if_due(now)
        except Exception as bug:  # any exception ends these keepalives alone
            log.bug("periodic.failed", bug)
            gateway.keepalives.discard(keepalive)
    for number, session in enumerate(gateway.sessions.take_due(now)):
        if number % _SESSIONS_AT_ONCE == _SESSIONS_AT_ONCE - 1:
            await asyncio.sleep(0)  # thousands may be due at once: do not block the loop
        if session in gateway.sessions:
            _check_session(session, gateway, now)
    await gateway.spending.sweep(now)
    _report(gateway)


def _check_session(session: Session, gateway: Gateway, now: float) -> None:
    """End a session that timed out; else ping its silent sides and schedule its next check."""
    try:
        settings = gateway.settings
        if (ending := overdue_ending(session, settings, now)) is not None:
            session.end(ending)
            return
        for leg in legs_to_ping(session, settings, now):
            leg.pinged_s = now
            _ping(leg)
        gateway.sessions.add(session, due_s(session, settings.websocket, now))
    except Exception as bug:  # any exception ends this session alone, whose end logs it
        session.end(broken(bug))


def _report(gateway: Gateway) -> None:
    """Drop expired windows, update the metrics, and log the requests that load shedding refused."""
    gateway.windows.forget()
    if gateway.metrics is not None and gateway.metrics.is_multiprocess:
        gateway.metrics.update(gateway.gauges(), gateway.counters())  # any worker is asked for all
    if shed := gateway.requests_shed - gateway.shed_logged:
        gateway.shed_logged += shed
        log.warn("requests.shed", requests=shed)


def _ping(leg: Leg) -> None:
    """Send a ping without waiting. If the side does not read, the frame stays in the send buffer,
    and the coroutine that waits for room in the buffer is closed.
    """
    sending = leg.socket.send_frame(b"", WSMsgType.PING)
    try:
        room = sending.send(None)
    except (StopIteration, *GONE):
        return  # the ping is sent; or the connection is lost, which the pump reports
    if room is not None:  # the pump may wait for the same future: it is not cancelled
        room.add_done_callback(lambda done: done.cancelled() or done.exception())
    sending.close()


class DescriptorCheck:
    """Log once that no file descriptors are left, and once that some are available again."""

    def __init__(self) -> None:
        self._exhausted = False

    def check(self) -> None:
        """Try to open two descriptors, as many as a WebSocket session needs."""
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
