"""The relay within a program of yours, without a server: for `AIGateway.from_config`.

Owns: that life. Calls take the same line as through a port, over socket pairs, so that streams,
sockets and backpressure are the same.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from relay.app import RUNNER_OPTIONS, standalone
from relay.connection import RelayRunner
from relay.demo import Demo
from relay.registry.load import Sources, load


class InProcess:
    """Started at the first call, stopped by `close`. Raises ConfigError when made."""

    def __init__(self, config: Path, env_file: Path | None = None) -> None:
        sources = Sources(config, env_file or config.parent / ".env")
        self._demo: Demo | None = None
        if load(sources).settings.demo.enabled:
            self._demo = Demo.bind()
            sources = Sources(config, sources.env_file, self._demo.url)
        self._runner = RelayRunner(standalone(load(sources), sources), **RUNNER_OPTIONS)
        self._demo_life: AsyncIterator[None] | None = None

    async def start(self) -> aiohttp.BaseConnector:
        """Bring it up; what a client session reaches it by."""
        if self._demo is not None:
            self._demo_life = self._demo.running()
            await anext(self._demo_life)
        await self._runner.setup()
        assert self._runner.server is not None
        return _Connector(self._runner.server)

    async def stop(self) -> None:
        """End running calls and take it down."""
        await self._runner.cleanup()
        if self._demo_life is not None:
            await anext(self._demo_life, None)


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
