"""The relay within a program of yours, without a server: for `AIGateway.from_config`.

Owns: that life. Who starts it, once, is client/gateway.py's. Calls take the same request path as
through a port, over socket pairs, so that streams, sockets and backpressure are the same.
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
    """A relay that `start` brings up and `stop` takes down, as often as one likes. Raises
    ConfigError when made.
    """

    def __init__(self, config: Path, env_file: Path | None = None) -> None:
        self._config, self._env_file = config, env_file or config.parent / ".env"
        self._life: _Life | None = _Life(self._config, self._env_file)

    async def start(self) -> aiohttp.BaseConnector:
        """Bring it up; what a client session reaches it by. Where it fails, nothing is left."""
        life = self._life = self._life or _Life(self._config, self._env_file)
        try:
            return await life.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End running calls and take it down. In its own event loop."""
        life, self._life = self._life, None
        if life is not None:
            await life.stop()

    def abandon(self) -> None:
        """Let go of one whose event loop is closed: nothing of it can be ended any more."""
        self._life = None


class _Life:
    """One application, from its start to its end: aiohttp's can have but one."""

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
    """Connects to a server in this process: aiohttp's own connectors override the same method."""

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
