"""A worker's line to its supervisor: one JSON object a line, over a socket pair that it inherits.

Owns: what is said on it. What one worker is asked is done by all of them: it asks the supervisor,
which has every worker do it and tells what came of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

ACK_TIMEOUT_S = 5.0

Order = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Does what all workers are to do, with what was given; `problems` and `count` of its answer are
put together."""


async def say(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    """Send one message."""
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()


class Control:
    """A worker's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}

    @classmethod
    async def open(cls, fd: int) -> Control:
        """Take the inherited descriptor."""
        reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd))
        return cls(reader, writer)

    async def say(self, word: str) -> None:
        """Tell the supervisor `ready` or `leaving`."""
        with contextlib.suppress(OSError):
            await say(self._writer, {"say": word})

    async def ask(self, order: str, given: dict[str, Any]) -> dict[str, Any]:
        """Have all workers do it: {problems, count}."""
        request_id = next(self._ids)
        answer = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        try:
            message = {"say": "ask", "id": request_id, "order": order, "given": given}
            await say(self._writer, message)
            return await asyncio.wait_for(answer, 2 * ACK_TIMEOUT_S)
        except (TimeoutError, OSError):
            return {"problems": ["the supervisor did not answer"]}
        finally:
            del self._waiting[request_id]

    async def listen(self, orders: Mapping[str, Order]) -> None:
        """Do what the supervisor says until it is gone; then end this process's reason to be."""
        while line := await self._reader.readline():
            said = json.loads(line)
            if said["say"] == "done":
                if (waiting := self._waiting.get(said["id"])) and not waiting.done():
                    waiting.set_result(said["answer"])
            elif said["say"] == "do":
                answer = await orders[said["order"]](said["given"])
                await say(self._writer, {"say": "did", "id": said["id"], "answer": answer})
        # The supervisor died: without it nobody restarts or reloads us.
        os.kill(os.getpid(), signal.SIGTERM)
