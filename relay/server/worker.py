"""One worker: listen, serve, drain.

Owns the order of a worker's start and end, its signals, and what its supervisor orders of it. The
listening sockets are given (listen.py): several workers share them (docs/decisions/0004), and no
queued connection is lost when one worker ends. Connections are connection.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
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
from relay.server.control import Answer, Control, Leaving, Order, Ready
from relay.server.listen import BACKLOG, Listeners
from relay.websocket import draining

_QUIET_S = 0.1
_DRAIN_POLL_S = 0.02
_CUT_S = 3.0
"""What a call that is cut gets to tell its client so."""


def _sites(runner: web.AppRunner, listeners: Listeners, gateway: Gateway) -> list[web.SockSite]:
    """What is to be listened on; nothing is yet. A reload takes a renewed certificate."""
    sites = [web.SockSite(runner, listeners.plain, backlog=BACKLOG)]
    certificate = gateway.config.certificate
    if listeners.tls is not None and certificate is not None:
        # Imported only where it is used: it takes a tenth of a second.
        from relay.server.tls import server_context

        context = server_context(certificate)
        sites.append(web.SockSite(runner, listeners.tls, ssl_context=context, backlog=BACKLOG))

        def renew(config: Config) -> None:
            # It serves the next handshake.
            if config.certificate is not None:
                config.certificate.load_into(context)

        gateway.when_replaced = renew
    return sites


async def serve(
    config: Config,
    sources: Sources,
    listeners: Listeners,
    control: Control | None = None,
    reloaded: Snapshot | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal ends at once. A worker has the
    supervisor's `control`, and files that a reload has put in place of those of the start.
    """
    app = standalone(config, sources)
    gateway = app[GATEWAY]
    runner = RelayRunner(
        app, keepalive_timeout=config.settings.server.keepalive_timeout_s, **RUNNER_OPTIONS
    )
    await runner.setup()
    sites = _sites(runner, listeners, gateway)
    stop = Stop(asyncio.Event(), asyncio.Event())
    if reloaded is not None:
        # A worker of an earlier start has the settings of the start, and what a reload took over.
        assert gateway.apply is not None
        await gateway.apply(reloaded)
    async with _supervised(gateway, control, stop), _signals(gateway, stop):
        for site in sites:
            await site.start()
        _settle_memory()
        if control is not None:
            control.report(Ready())
        await stop.first.wait()
        # At once: what a connection that nobody accepts waits for is no queue, but a time-out.
        for site in sites:
            await site.stop()
        if control is not None:
            control.report(Leaving())
        await drain(gateway, stop.second)
        await runner.cleanup()


def _settle_memory() -> None:
    """What start-up made stays, and calls leave no cycles: let the collector look less often.

    By default it walks the young objects whenever 700 more live than before, which the calls in
    flight alone make happen all the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@dataclass(frozen=True, slots=True)
class Stop:
    """What ends a process: `first` drains it, `second` cuts what still runs."""

    first: asyncio.Event
    second: asyncio.Event

    def signalled(self) -> None:
        """One more signal to stop."""
        (self.second if self.first.is_set() else self.first).set()


@contextlib.asynccontextmanager
async def _supervised(gateway: Gateway, control: Control | None, stop: Stop) -> AsyncIterator[None]:
    """Under a supervisor, what concerns all workers goes through it, and comes from it to each.
    When the supervisor is gone the worker drains: nobody would restart or reload it any more.
    """
    if control is None:
        yield
        return
    orders = _orders(gateway, stop)
    _ask_all(gateway, control)

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
    """What the supervisor may order of this worker."""
    apply_here, purge_here = gateway.apply, gateway.purge
    assert apply_here is not None

    async def reload(given: dict[str, Any]) -> Answer:
        try:
            changed, restart = await apply_here(msgspec.convert(given, Snapshot))
            return Answer(changed=changed, restart=restart)
        except ConfigInvalid as error:
            return Answer(list(error.problems))

    async def purge(given: dict[str, Any]) -> Answer:
        return Answer(count=await purge_here(Purge(**given)))

    async def drain(_given: dict[str, Any]) -> Answer:
        stop.first.set()
        return Answer()

    async def cut(_given: dict[str, Any]) -> Answer:
        stop.first.set()
        stop.second.set()
        return Answer()

    return {"reload": reload, "purge": purge, "drain": drain, "cut": cut}


def _ask_all(gateway: Gateway, control: Control) -> None:
    """What is asked of this worker is asked of all."""

    async def reload() -> Reloaded:
        answer = await control.ask("reload", {})
        if answer.problems:
            raise ConfigInvalid(answer.problems)
        if answer.missing:
            raise WorkersIncomplete("reload", answer.missing)
        return Reloaded(answer.changed, answer.restart)

    purge_here = gateway.purge

    async def purge(which: Purge) -> int:
        if gateway.cache.is_shared:
            return await purge_here(which)
        answer = await control.ask("purge", asdict(which))
        if answer.problems or answer.missing:
            raise WorkersIncomplete("purge", [*answer.problems, *answer.missing])
        return answer.count

    gateway.reload, gateway.purge = reload, purge


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
        return  # logged where it was refused
    except Exception as error:
        # Nobody waits for an answer: it is logged, and what was in force goes on.
        log.bug("reload.failed", error)


async def drain(gateway: Gateway, at_once: asyncio.Event) -> None:
    """Let what runs end within `drain_timeout_s`, and cut the rest; tell sessions that the relay
    restarts. Nothing listens any more.

    Kept connections may still bring a call while this lasts: it is served, with `Connection:
    close`.
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
    """End what still runs as `draining`, and wait until it is written down."""
    for exchange in list(gateway.running):
        if exchange.task is None or exchange.waiting.expired is not None:
            continue
        if exchange.outcome.error is None:
            exchange.expire(Draining())
        else:  # it keeps its failure
            exchange.task.cancel()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _CUT_S
    while gateway.running and loop.time() < deadline:  # noqa: ASYNC110 (bounded, at the end)
        await asyncio.sleep(_DRAIN_POLL_S)
