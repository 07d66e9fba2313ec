"""Run a real Redis server on loopback, which a test can stop and start again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import redis.asyncio

from tests.processes import free_port
from tests.relays import HANG_GUARD_S


class RedisServer:
    """One Redis server, on its own port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        """Start the server. Returns when it responds."""
        self._process = await asyncio.create_subprocess_exec(
            "redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder),
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(HANG_GUARD_S):
            while True:
                try:
                    async with redis.asyncio.Redis(port=self.port) as client:
                        await client.ping()
                        return
                except redis.exceptions.ConnectionError:
                    await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Stop the server if it runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
