"""Run the work that is left when a call has ended: token refunds, cache writes.

Owns a bounded queue and the one task that empties it, in order. A call never waits for the queue;
work that does not fit is dropped and counted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any

from relay import log

_MAX_WAITING = 10_000
_STOP_S = 2.0

Work = Coroutine[Any, Any, None]


class BackgroundQueue:
    """Queue a coroutine by calling this object. Call `start` and `stop` within the running loop."""

    def __init__(self) -> None:
        self._work: deque[Work] = deque()
        self._added = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None
        self.dropped = 0

    def __call__(self, work: Work) -> bool:
        """Queue `work`; False if it was dropped, because the queue is full."""
        if len(self._work) >= _MAX_WAITING:
            work.close()
            self.dropped += 1
            return False
        self._work.append(work)
        self._empty.clear()
        self._added.set()
        return True

    async def start(self) -> None:
        """Start the task."""
        self._task = asyncio.create_task(self._run())

    async def done(self) -> None:
        """Wait until all queued work is done."""
        await self._empty.wait()

    async def stop(self) -> None:
        """Finish the queued work within two seconds; drop the rest."""
        try:
            async with asyncio.timeout(_STOP_S):
                await self._empty.wait()
        except TimeoutError:
            log.warn("background.unfinished", left=len(self._work))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while self._work:
            self._work.popleft().close()

    async def _run(self) -> None:
        while True:
            await self._added.wait()
            self._added.clear()
            while self._work:
                try:
                    await self._work.popleft()
                except Exception as error:
                    # Work that fails must not end the task; each failure is logged.
                    log.bug("background.failed", error)
            self._empty.set()
