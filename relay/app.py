"""Composition root: build an aiohttp Application from a Config, and start and stop its parts in
order.

`create(config)` makes an application to mount in your own aiohttp application:

    app.add_subapp("/api/v1/ai-gateway", relay.app.create("gateway.yaml"))

`standalone(config, sources)` makes the application that `relay serve` runs: the same surfaces under
/api/v1/ai-gateway, and health checks at the root. A mounted relay runs with the server options of
the host application, which may be aiohttp's defaults, instead of RUNNER_OPTIONS.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from relay import log
from relay.access_updates import run_access_updates
from relay.core.errors import ConfigInvalid
from relay.core.paths import API
from relay.demo.provider import Demo
from relay.gateway import GATEWAY, Gateway
from relay.internals import check_private_parts
from relay.periodic import run_periodic_jobs
from relay.registry.changes import Reloaded, changed_names
from relay.registry.files import Files, Snapshot
from relay.registry.load import Config, ConfigError, Sources, load
from relay.registry.restart import needing_restart
from relay.sessions.listing import SessionPage, describe_sessions, end_session
from relay.surfaces import (
    admin,
    budgets,
    health,
    keys,
    logs,
    native,
    openapi,
    pages,
    sessions,
    tickets,
    unified,
    usage,
)
from relay.surfaces.cors import CORS, Cors
from relay.surfaces.middleware import middleware
from relay.surfaces.native import CALL_PREFIXES, unknown_route

RUNNER_OPTIONS: dict[str, Any] = {
    "handler_cancellation": True,
    "auto_decompress": False,
    "access_log": None,
    "max_line_size": 16 * 1024,
    "max_field_size": 16 * 1024,
    "max_headers": 128,
    "read_bufsize": 64 * 1024,
    "shutdown_timeout": 0.5,
}
"""Options of the relay's own server: a client that disconnects cancels its call, and request bodies
are not decompressed."""


def create(config: str | Path | Config) -> web.Application:
    """Make an Application to mount with `add_subapp`. A path is loaded with the `.env` beside it.
    Raises ConfigError, and UnknownLibrary for another version of aiohttp.

    The application also runs the built-in provider `demo` if the configuration enables it.
    """
    check_private_parts()
    demo: Demo | None = None
    path = config.path if isinstance(config, Config) else Path(config)
    sources = Sources(path, path.parent / ".env")
    if not isinstance(config, Config):
        config = load(sources)
        if config.settings.demo.enabled:
            demo = Demo.bind()
            sources = Sources(path, sources.env_file, demo.url)
            config = load(sources, Files(config.read.files))
    gateway = Gateway(config)
    gateway.mounted = True
    app = _build(gateway, "", sources)
    if demo is not None:
        app.cleanup_ctx.append(demo.running)
    return app


def standalone(config: Config, sources: Sources) -> web.Application:
    """Make the Application that `relay serve` runs. The caller starts the demo provider, and has
    called `check_private_parts` (a supervisor does so once for all its workers).
    """
    return _build(Gateway(config), API, sources)


def _build(gateway: Gateway, prefix: str, sources: Sources) -> web.Application:
    app = web.Application(middlewares=[middleware])
    app[GATEWAY] = gateway
    app[CALL_PREFIXES] = []
    app[CORS] = Cors(app, gateway)
    reloading = asyncio.Lock()

    async def reload_alone(files: Snapshot | None = None) -> Reloaded:
        # A reload that read the files earlier must not replace the result of a later one.
        async with reloading:
            return await reload(gateway, sources, files)

    gateway.reload = gateway.apply = reload_alone

    async def list_sessions(after: str, limit: int) -> SessionPage:
        return SessionPage(describe_sessions(gateway, after, limit))

    async def end_here(id: str) -> tuple[bool, Sequence[str]]:
        return end_session(gateway, id), ()

    gateway.list_sessions, gateway.end_session = list_sessions, end_here
    # aiohttp tries the longest fixed path first: /providers/reload is not taken for a provider.
    native.add_routes(app, prefix)
    admin.add_routes(app, prefix)
    tickets.add_routes(app, prefix)
    logs.add_routes(app, prefix)
    usage.add_routes(app, prefix)
    keys.add_routes(app, prefix)
    budgets.add_routes(app, prefix)
    sessions.add_routes(app, prefix)
    unified.add_routes(app, prefix)
    health.add_routes(app, "")
    openapi.add_routes(app, prefix)
    if prefix:  # mounted, the host's own pages are at `/`
        pages.add_routes(app)
    # Without it aiohttp makes a route, a cycle of objects, for each request that matches none.
    app.router.add_route("*", "/{path:.*}", _refuse_unknown_route)
    app.cleanup_ctx.append(_outbound)
    app.cleanup_ctx.append(run_access_updates)
    app.cleanup_ctx.append(run_periodic_jobs)
    return app


async def _refuse_unknown_route(request: web.Request) -> web.StreamResponse:
    raise unknown_route(request)


async def _outbound(app: web.Application) -> AsyncIterator[None]:
    log.setup_embedded()
    try:
        await app[GATEWAY].start()
        yield
    finally:  # after a failed start too: some parts may be open
        await app[GATEWAY].stop()


async def reload(gateway: Gateway, sources: Sources, files: Snapshot | None = None) -> Reloaded:
    """Load the configuration again, apply it, and return what changed. Raises ConfigInvalid; the
    old configuration stays then.

    `files`, which a supervisor has read and checked, are used instead of those on disk. Running
    exchanges keep the configuration with which they began.
    """
    try:
        if files is None:
            config = await asyncio.to_thread(load, sources, None, gateway.config)
        else:
            config = await asyncio.to_thread(load, sources, Files(files))
    except ConfigError as error:
        log.warn("reload.refused", problems=[str(problem) for problem in error.problems])
        raise ConfigInvalid([str(problem) for problem in error.problems]) from error
    needs_restart = needing_restart(gateway.started_with.settings, config.settings)
    before = gateway.config
    gateway.replace(config)
    result = Reloaded(changed_names(before, gateway.config), needs_restart)
    if files is None:
        config.log_warnings()
    log.event("reload.done", providers=len(config.registry.providers), **result._asdict())
    return result
