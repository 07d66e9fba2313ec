"""Run one worker: listen, serve, reload, drain.

Owns the order of a worker's start and end, its signals, and its supervisor's orders. The listening
sockets are opened in listen.py: several workers share them (docs/decisions/0004), so that no queued
connection is lost when one worker ends. connection.py serves a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from aiohttp import web

from relay import log
from relay.app import RUNNER_OPTIONS, standalone
from relay.cache.store import Purge
from relay.core.errors import ConfigInvalid, Draining, WorkersIncomplete
from relay.gateway import GATEWAY, Gateway
from relay.registry.changes import Reloaded
from relay.registry.files import Snapshot
from relay.registry.load import Config, Sources
from relay.server import signals
from relay.server.connection import RelayRunner
from relay.server.control import Answer, Control, Leaving, Order
from relay.server.listen import BACKLOG, Listeners, scheme_of_management
from relay.sessions.listing import SessionPage, describe_sessions, end_session
from relay.websocket import draining

_REFRESH_S = 1.0
"""The longest that a change of keys waits for all workers to apply it."""
_QUIET_S = 0.1
_DRAIN_POLL_S = 0.02
_CUT_S = 3.0
"""How long a call that is cut may take to send its client the error."""


class _ManagementSite:
    """Serves management on a listener of its own, as a web.SockSite serves the others."""

    def __init__(
        self, runner: RelayRunner, sock: socket.socket, context: ssl.SSLContext | None
    ) -> None:
        self._runner, self._socket, self._context = runner, sock, context
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Accept connections."""
        self._server = await asyncio.get_running_loop().create_server(
            self._runner.management, sock=self._socket, ssl=self._context, backlog=BACKLOG
        )

    async def stop(self) -> None:
        """Accept no more connections."""
        if self._server is not None:
            self._server.close()


def _sites(
    runner: RelayRunner, listeners: Listeners, gateway: Gateway
) -> list[web.SockSite | _ManagementSite]:
    """The sites of the listeners, not started yet. A reload renews the certificate of TLS."""
    sites: list[web.SockSite | _ManagementSite] = []
    sites.append(web.SockSite(runner, listeners.plain, backlog=BACKLOG))
    certificate, context = gateway.config.certificate, None
    if certificate is not None:
        # Imported where it is used: its import takes a tenth of a second.
        from relay.server.tls import server_context

        context = server_context(certificate)
        if listeners.tls is not None:
            sites.append(web.SockSite(runner, listeners.tls, ssl_context=context, backlog=BACKLOG))

        def renew(config: Config) -> None:
            # In force from the next handshake on.
            if config.certificate is not None:
                config.certificate.load_into(context)

        gateway.when_replaced = renew
    if (admin := listeners.admin) is not None:
        scheme = scheme_of_management(gateway.config, admin.getsockname()[0])
        sites.append(_ManagementSite(runner, admin, context if scheme == "https" else None))
        gateway.has_admin_listener = True
    return sites


@dataclass(frozen=True, slots=True)
class Supervision:
    """What a worker has of its supervisor."""

    control: Control
    reloaded: Snapshot | None
    """The files of the last reload; None if there was none."""


async def serve(
    config: Config,
    sources: Sources,
    listeners: Listeners,
    on_ready: Callable[[], None],
    supervision: Supervision | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the process at once.

    `on_ready` is called once when everything has started: the database, all listeners, and under a
    supervisor the configuration of the last reload.
    """
    app = standalone(config, sources)
    gateway = app[GATEWAY]
    runner = RelayRunner(
        app, keepalive_timeout=config.settings.server.keepalive_timeout_s, **RUNNER_OPTIONS
    )
    await runner.setup()
    sites = _sites(runner, listeners, gateway)
    stop = Stop(asyncio.Event(), asyncio.Event())
    control = None
    if supervision is not None:
        control = supervision.control
        if supervision.reloaded is not None:
            # On top of the settings of the start, as in the workers that took the reload.
            assert gateway.apply is not None
            await gateway.apply(supervision.reloaded)
    async with _supervised(gateway, control, stop), _signals(gateway, stop):
        for site in sites:
            await site.start()
        _settle_memory()
        on_ready()
        await stop.first.wait()
        # Before the drain: a connection that no worker accepts would wait for its timeout.
        for site in sites:
            await site.stop()
        if control is not None:
            control.report(Leaving())
        await drain(gateway, stop.second)
        await runner.cleanup()


def _settle_memory() -> None:
    """Run the garbage collector less often: objects of the start stay, and calls leave no cycles.

    By default it runs whenever 700 more objects are alive than before, which the calls in flight
    alone cause all the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of a process: `first` starts the drain, `second` cuts the calls that still run."""

    first: asyncio.Event
    second: asyncio.Event

    def signalled(self) -> None:
        """Count a signal to stop."""
        (self.second if self.first.is_set() else self.first).set()


@contextlib.asynccontextmanager
async def _supervised(gateway: Gateway, control: Control | None, stop: Stop) -> AsyncIterator[None]:
    """Under a supervisor, carry out its orders, and pass requests for all workers to it.

    When the supervisor ends the worker drains: nothing would restart or reload it any more.
    """
    if control is None:
        yield
        return
    orders = _orders(gateway, stop)
    _pass_to_all(gateway, control)

    async def listen() -> None:
        try:
            await control.listen(orders)
        finally:
            stop.first.set()

    listener = asyncio.create_task(listen())
    try:
        yield
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)


def _orders(gateway: Gateway, stop: Stop) -> dict[str, Order]:
    """The orders that this worker carries out."""
    apply_locally, purge_locally = gateway.apply, gateway.purge
    refresh_locally = gateway.refresh_access
    assert apply_locally is not None

    async def reload(arguments: dict[str, Any]) -> Answer:
        try:
            await apply_locally(msgspec.convert(arguments, Snapshot))
        except ConfigInvalid as error:
            return Answer(list(error.problems))
        return Answer()

    async def purge(arguments: dict[str, Any]) -> Answer:
        return Answer(count=await purge_locally(Purge(**arguments)))

    async def drain(_arguments: dict[str, Any]) -> Answer:
        stop.first.set()
        return Answer()

    async def cut(_arguments: dict[str, Any]) -> Answer:
        stop.first.set()
        stop.second.set()
        return Answer()

    async def refresh_access(_arguments: dict[str, Any]) -> Answer:
        await refresh_locally()
        return Answer()

    async def sessions(arguments: dict[str, Any]) -> Answer:
        return Answer(items=describe_sessions(gateway, arguments["after"], arguments["limit"]))

    async def end(arguments: dict[str, Any]) -> Answer:
        return Answer(count=int(end_session(gateway, arguments["id"])))

    return {
        "reload": reload, "purge": purge, "refresh_access": refresh_access, "sessions": sessions,
        "end_session": end, "drain": drain,
        "cut": cut,
    }  # fmt: skip


def _pass_to_all(gateway: Gateway, control: Control) -> None:
    """Have what a client requests of this worker done by all workers: a reload, a purge, a change
    of keys, the list and the end of sessions.
    """

    async def reload() -> Reloaded:
        answer = await control.order_all("reload", {})
        if answer.problems:
            raise ConfigInvalid(answer.problems)
        if answer.missing:
            raise WorkersIncomplete("reload", answer.missing)
        return Reloaded(answer.changed, answer.restart)

    purge_locally = gateway.purge

    async def purge(which: Purge) -> int:
        if gateway.cache.is_shared:
            return await purge_locally(which)
        answer = await control.order_all("purge", asdict(which))
        if answer.problems or answer.missing:
            raise WorkersIncomplete("purge", [*answer.problems, *answer.missing])
        return answer.count

    async def refresh_access() -> None:
        # A worker that does not answer polls by itself within half a second.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REFRESH_S):
                await control.order_all("refresh_access", {})

    async def list_sessions(after: str, limit: int) -> SessionPage:
        answer = await control.order_all("sessions", {"after": after, "limit": limit})
        return SessionPage(answer.items, [*answer.problems, *answer.missing])

    async def end_any(id: str) -> tuple[bool, Sequence[str]]:
        answer = await control.order_all("end_session", {"id": id})
        return answer.count > 0, [*answer.problems, *answer.missing]

    gateway.reload, gateway.purge = reload, purge
    gateway.refresh_access = refresh_access
    gateway.list_sessions, gateway.end_session = list_sessions, end_any


@contextlib.asynccontextmanager
async def _signals(gateway: Gateway, stop: Stop) -> AsyncIterator[None]:
    tasks: set[asyncio.Task[None]] = set()

    def hang_up() -> None:
        task = asyncio.create_task(_reload_logged(gateway))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    signals.handle(stop.signalled, hang_up)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _reload_logged(gateway: Gateway) -> None:
    try:
        assert gateway.reload is not None
        await gateway.reload()
    except (ConfigInvalid, WorkersIncomplete):
        return  # logged where the reload was refused
    except Exception as error:
        # No caller waits for the result: it is logged, and the old configuration stays.
        log.bug("reload.failed", error)


async def drain(gateway: Gateway, at_once: asyncio.Event) -> None:
    """Wait for running calls up to `drain_timeout_s`, and cut the rest. Sessions are closed with
    the code for a restart. The listeners are closed already.

    A call that arrives on a kept connection meanwhile is served, with `Connection: close`.
    """
    gateway.draining = True
    loop = asyncio.get_running_loop()
    log.event("drain.started", in_flight=len(gateway.running), sessions=len(gateway.sessions))
    for session in list(gateway.sessions):
        session.end(draining())
    deadline = loop.time() + gateway.settings.server.drain_timeout_s
    quiet_since = loop.time()
    while loop.time() < deadline and not at_once.is_set():
        if gateway.running:
            quiet_since = loop.time()
        elif loop.time() - quiet_since >= _QUIET_S:
            break
        await asyncio.sleep(_DRAIN_POLL_S)
    log.event("drain.ended", cut=len(gateway.running))
    await _cut(gateway)


async def _cut(gateway: Gateway) -> None:
    """End running calls with the error `draining`, and wait until they are recorded."""
    for exchange in list(gateway.running):
        if exchange.task is None or exchange.waiting.expired is not None:
            continue
        if exchange.outcome.error is None:
            exchange.expire(Draining())
        else:  # the call keeps its own error
            exchange.task.cancel()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _CUT_S
    while gateway.running and loop.time() < deadline:  # noqa: ASYNC110 (bounded, at the end)
        await asyncio.sleep(_DRAIN_POLL_S)
