"""Run the relay as a separate process, as `relay serve` does, and stop it by its process id."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.relays import HANG_GUARD_S, LogStream, write_config
from tests.template import ROOT, Command, Process, Start, forked

# Below the ephemeral ports of Linux: an outgoing connection could take one of those after the port
# was chosen and before the program listens on it.
FIRST_PORT, PORTS_EACH = 16384, 2048
STARTED = r'"url":"(http://[^"]+)".*"relay.started"'
"""Matches the log line of a relay that has started. Group 1 is its URL."""
_turns = itertools.count(random.randrange(PORTS_EACH))


def free_port() -> int:
    """Choose a port for a program that cannot choose one itself.

    Each test process cycles through its own range, so no port is used twice in a row.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = FIRST_PORT + worker % 8 * PORTS_EACH
    while True:
        port = first + next(_turns) % PORTS_EACH
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


@dataclass(eq=False)
class Served:
    """A process of `relay serve`, with its own working folder and the log lines so far."""

    process: Process
    folder: Path
    url: str = ""
    lines: list[str] = field(default_factory=list)
    _reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    def path(self, provider: str, endpoint: str = "") -> str:
        return f"{self.url}/api/v1/ai-gateway/providers/{provider}/{endpoint}"

    def send(self, number: int) -> None:
        """Send a signal to this process only, not to its group."""
        os.kill(self.pid, number)

    async def until(self, pattern: str, *, since: int = 0) -> re.Match[str]:
        """Wait for a log line, from index `since` on, that matches. Returns the match."""
        async with asyncio.timeout(HANG_GUARD_S):
            while True:
                for line in self.lines[since:]:
                    if found := re.search(pattern, line):
                        return found
                if self.process.returncode is not None and self._reader is not None and self._reader.done():
                    raise AssertionError("the process ended:\n" + "\n".join(self.lines))
                await asyncio.sleep(0.02)

    async def ended(self) -> int:
        """Wait for the end of the log, and return the exit code.

        Workers outlive a killed supervisor and keep writing to its log.
        """
        async with asyncio.timeout(HANG_GUARD_S * 3):
            code = await self.process.wait()
            assert self._reader is not None
            await self._reader
        _running.discard(self)
        return code

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), HANG_GUARD_S)
            except TimeoutError:
                self.process.kill()
        await self.ended()

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            text = line.decode().rstrip("\n")
            self.lines.append(text)
            LogStream.everything.append(text)


_running: set[Served] = set()


def kill_leftover_processes() -> None:
    """Kill the processes that a failed test left: its loop cannot be closed while they run."""
    while _running:
        served = _running.pop()
        if served.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(served.pid, signal.SIGKILL)


async def run(folder: Path, *arguments: str, env: dict[str, str] | None = None, start: Start = forked, module: str = "relay") -> Served:
    """Start `relay ARGUMENTS` in `folder`, or another module than `relay`."""
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY") and not k.startswith(("CLOUDFLARE_", "RELAY_"))}
    process = await start(Command(arguments, folder, clean | {"PYTHONPATH": str(ROOT)} | (env or {}), module))
    served = Served(process, folder)
    _running.add(served)
    served._reader = asyncio.create_task(served._read())
    return served


async def serve(folder: Path, document: dict[str, Any] | None, *arguments: str, start: Start = forked) -> Served:
    """Start `relay serve` on a free port, and wait until it is ready."""
    if document is not None:
        write_config(folder, document)
    served = await run(folder, "serve", "--port", "0", *arguments, start=start)
    served.url = (await served.until(STARTED)).group(1)
    async with aiohttp.ClientSession() as session, asyncio.timeout(HANG_GUARD_S):
        while True:
            try:
                async with session.get(f"{served.url}/readyz") as answer:
                    if answer.status == 200:
                        return served
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.02)


async def output(*command: str, env: dict[str, str], cwd: Path | None = None) -> str:
    """Run a command with PATH and `env` as its environment. Returns what it prints.

    Raises AssertionError if the command fails.
    """
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env={"PATH": os.environ["PATH"]} | env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(HANG_GUARD_S * 5):
            out, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, (out + errors).decode()
    return out.decode()
