"""Run the relay within a program, without a listening server: for `AIGateway.from_config`.

Owns the start and stop of that relay, and the connector to it: a socket pair for each connection,
so that calls take the same request path, with the same backpressure, as through a port.
client/gateway.py decides when the relay starts and stops.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from relay.app import RUNNER_OPTIONS, standalone
from relay.demo.provider import Demo
from relay.internals import check_private_parts
from relay.registry.files import Files
from relay.registry.load import Sources, load
from relay.server.connection import RelayRunner


class InProcess:
    """A relay that can be started and stopped any number of times. The constructor raises
    ConfigError.
    """

    def __init__(self, config: Path, env_file: Path | None = None) -> None:
        self._config, self._env_file = config, env_file or config.parent / ".env"
        self._running: _Run | None = _Run(self._config, self._env_file)

    async def start(self) -> aiohttp.BaseConnector:
        """Start the relay, and return the connector to it. After a failure nothing is left open."""
        run = self._running = self._running or _Run(self._config, self._env_file)
        try:
            return await run.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End running calls and stop the relay, in its own event loop."""
        run, self._running = self._running, None
        if run is not None:
            await run.stop()

    def abandon(self) -> None:
        """Drop a relay whose event loop is closed, in which it can no longer be stopped."""
        self._running = None


class _Run:
    """One run of the relay: an aiohttp application can be started only once."""

    def __init__(self, config: Path, env_file: Path) -> None:
        check_private_parts()
        sources = Sources(config, env_file)
        self._demo: Demo | None = None
        loaded = load(sources)
        if loaded.settings.demo.enabled:
            self._demo = Demo.bind()
            sources = Sources(config, env_file, self._demo.url)
            loaded = load(sources, Files(loaded.read.files))
        app = standalone(loaded, sources)
        if self._demo is not None:
            app.cleanup_ctx.append(self._demo.running)
        self._runner = RelayRunner(app, **RUNNER_OPTIONS)

    async def start(self) -> aiohttp.BaseConnector:
        await self._runner.setup()
        assert self._runner.server is not None
        return _Connector(self._runner.server)

    async def stop(self) -> None:
        await self._runner.cleanup()
        if self._demo is not None:
            self._demo.socket.close()


class _Connector(aiohttp.BaseConnector):
    """Connects to a server in this process. It overrides the method that aiohttp's own connectors
    override.
    """

    def __init__(self, server: Callable[[], Any]) -> None:
        super().__init__(limit=0)
        self._server = server

    async def _create_connection(
        self, req: Any, traces: list[Any], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        await loop.connect_accepted_socket(self._server, theirs)
        _, protocol = await loop.create_connection(self._factory, sock=ours)
        return protocol
