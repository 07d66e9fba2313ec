"""Drive Codex over the protocol of its app server: JSON-RPC lines on stdin and stdout."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

TURN_S = 60.0


class Codex:
    """A running app server with one thread."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process, self._ids = process, itertools.count(1)
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._changed = asyncio.Condition()
        self.notifications: list[dict[str, Any]] = []
        self.thread = ""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method. Returns its result; an error fails the test."""
        number = next(self._ids)
        self._replies[number] = answered = asyncio.get_running_loop().create_future()
        self._send({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(TURN_S):
            reply = await answered
        assert "error" not in reply, reply
        return dict(reply["result"])

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def read(self) -> None:
        """Read messages until the program ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            message = json.loads(line)
            if "method" not in message:
                self._replies.pop(message["id"]).set_result(message)
                continue
            async with self._changed:
                self.notifications.append(message)
                self._changed.notify_all()

    async def until(self, method: str, count: int) -> list[dict[str, Any]]:
        """Wait until a notification has come `count` times. Returns all of them."""
        async with asyncio.timeout(TURN_S), self._changed:
            await self._changed.wait_for(lambda: len(self.named(method)) >= count)
        return self.named(method)

    def named(self, method: str) -> list[dict[str, Any]]:
        return [each["params"] for each in self.notifications if each["method"] == method]

    async def begin(self) -> None:
        """Begin a thread."""
        self.thread = (await self.call("thread/start"))["thread"]["id"]

    async def resume(self, thread: str) -> None:
        """Go on with a thread of an earlier process."""
        self.thread = (await self.call("thread/resume", threadId=thread))["thread"]["id"]

    async def turn(self, text: str) -> str:
        """Make one turn. Returns what the agent says at its end."""
        ended = len(self.named("turn/completed"))
        await self.call("turn/start", threadId=self.thread, input=[{"type": "text", "text": text}])
        turn = (await self.until("turn/completed", ended + 1))[-1]["turn"]
        assert turn["status"] == "completed", turn
        said = [each["item"]["text"] for each in self.named("item/completed") if each["item"]["type"] == "agentMessage"]
        return str(said[-1])

    async def compact(self) -> None:
        """Let the conversation be summarised."""
        ended = len(self.named("turn/completed"))
        await self.call("thread/compact/start", threadId=self.thread)
        assert (await self.until("turn/completed", ended + 1))[-1]["turn"]["status"] == "completed"


@asynccontextmanager
async def codex(program: Path, settings: Sequence[str], folder: Path, env: Mapping[str, str]) -> AsyncIterator[Codex]:
    """Run an app server in `folder`, with settings of config.toml as `name=value`."""
    options = [option for setting in settings for option in ("-c", setting)]
    process = await asyncio.create_subprocess_exec(
        str(program), "app-server", *options, cwd=folder, env=env, limit=16 * 1024 * 1024,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    running = Codex(process)
    reading = asyncio.create_task(running.read())
    try:
        await running.call("initialize", clientInfo={"name": "relay-tests", "version": "1"})
        yield running
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # a script starts the program
        await process.wait()
        await reading
