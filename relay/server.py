"""One worker: listen, serve, drain.

Owns: sockets, the event loop, signals, and what a request that is not even HTTP gets for an answer.
The address is bound once, without SO_REUSEPORT, so that a foreign listener is found; several
workers share that one socket (docs/decisions/0004), and none of its queued connections is lost when
one of them ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp.http_parser
from aiohttp import web

from relay.app import RUNNER_OPTIONS, standalone
from relay.cache.store import Purge
from relay.connection import RelayRunner
from relay.control import Control
from relay.core.errors import ConfigInvalid, InternalError
from relay.gateway import GATEWAY, Gateway
from relay.ledger import log
from relay.listen import BACKLOG, CannotListen, Listeners
from relay.registry.load import Config, Sources
from relay.tls import server_context
from relay.websocket import draining

_QUIET_S = 0.1
_DRAIN_POLL_S = 0.02


def assert_fast_parser() -> None:
    """Refuse aiohttp's pure-Python parser: most of its request smuggling bugs were there."""
    if aiohttp.http_parser.HttpRequestParser is aiohttp.http_parser.HttpRequestParserPy:
        raise CannotListen(
            "aiohttp runs without its C parser; reinstall it, and unset AIOHTTP_NO_EXTENSIONS"
        )


async def _start(
    runner: web.AppRunner, listeners: Listeners, gateway: Gateway
) -> list[web.SockSite]:
    sites = [web.SockSite(runner, listeners.plain, backlog=BACKLOG)]
    certificate = gateway.config.certificate
    if listeners.tls is not None and certificate is not None:
        context = server_context(certificate)
        sites.append(web.SockSite(runner, listeners.tls, ssl_context=context, backlog=BACKLOG))
        reload_config = gateway.reload
        assert reload_config is not None

        async def reload() -> None:
            await reload_config()
            # A renewed certificate serves the next handshake.
            context.load_cert_chain(certificate.chain, certificate.key)

        gateway.reload = reload
    for site in sites:
        await site.start()
    return sites


async def serve(
    config: Config, sources: Sources, listeners: Listeners, control: Control | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal ends at once."""
    app = standalone(config, sources)
    gateway = app[GATEWAY]
    runner = RelayRunner(
        app, keepalive_timeout=config.settings.server.keepalive_timeout_s, **RUNNER_OPTIONS
    )
    await runner.setup()
    sites = await _start(runner, listeners, gateway)
    async with _supervised(gateway, control), _signals(gateway) as stop:
        _settle_memory()
        if control is not None:
            await control.say("ready")
        await stop.first.wait()
        if control is not None:
            await control.say("leaving")
        await drain(gateway, sites, stop.second)
        await runner.cleanup()


def _settle_memory() -> None:
    """What start-up made stays, and calls leave no cycles: let the collector look less often.

    By default it walks the young objects whenever 700 more live than before, which the calls in
    flight alone make happen all the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@contextlib.asynccontextmanager
async def _supervised(gateway: Gateway, control: Control | None) -> AsyncIterator[None]:
    """Under a supervisor, what concerns all workers goes through it, and comes from it to each."""
    if control is None:
        yield
        return
    reload_here, purge_here = gateway.reload, gateway.purge
    assert reload_here is not None

    async def reload(given: dict[str, Any]) -> dict[str, Any]:
        try:
            await reload_here()
        except ConfigInvalid as error:
            return {"problems": list(error.problems)}
        return {}

    async def purge(given: dict[str, Any]) -> dict[str, Any]:
        return {"count": await purge_here(Purge(**given))}

    async def reload_everywhere() -> None:
        if problems := (await control.ask("reload", {}))["problems"]:
            raise ConfigInvalid(problems)

    async def purge_everywhere(which: Purge) -> int:
        answer = await control.ask("purge", asdict(which))
        if answer["problems"]:
            raise InternalError
        return int(answer["count"])

    gateway.reload = reload_everywhere
    if gateway.settings.cache.store == "memory":  # Redis is one for all
        gateway.purge = purge_everywhere
    listener = asyncio.create_task(control.listen({"reload": reload, "purge": purge}))
    try:
        yield
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Stop:
    first: asyncio.Event
    second: asyncio.Event


@contextlib.asynccontextmanager
async def _signals(gateway: Gateway) -> AsyncIterator[_Stop]:
    loop = asyncio.get_running_loop()
    stop = _Stop(asyncio.Event(), asyncio.Event())
    tasks: set[asyncio.Task[None]] = set()

    def terminate() -> None:
        (stop.second if stop.first.is_set() else stop.first).set()

    def hang_up() -> None:
        task = asyncio.create_task(_reload_logged(gateway))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    handlers = {signal.SIGTERM: terminate, signal.SIGINT: terminate, signal.SIGHUP: hang_up}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield stop
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
        await asyncio.gather(*tasks, return_exceptions=True)


async def _reload_logged(gateway: Gateway) -> None:
    try:
        assert gateway.reload is not None
        await gateway.reload()
    except ConfigInvalid:
        return  # logged where it was refused; the old configuration stays


async def drain(gateway: Gateway, sites: Sequence[web.SockSite], at_once: asyncio.Event) -> None:
    """Take nothing new; let what runs end within `drain_timeout_s`; tell sessions that the relay
    restarts.

    Kept connections may still bring a call while this lasts: it is served, with `Connection:
    close`.
    """
    gateway.draining = True
    loop = asyncio.get_running_loop()
    log.event("drain.started", running=len(gateway.running), sessions=len(gateway.sessions))
    for site in sites:
        await site.stop()
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
    for exchange in list(gateway.running):
        if exchange.task is not None:
            exchange.task.cancel()
