"""Several workers: who starts them, restarts them and speaks to all of them at once.

Owns: the listening socket that all workers share, the demo, signals, and a control channel to each
worker (a Unix socket pair, one JSON object a line). A worker that dies is started again with
back-off; one that drains keeps its running calls while its successor takes the new ones. Only
processes that were started here are ever signalled, by id.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relay.control import ACK_TIMEOUT_S, say
from relay.demo import Demo
from relay.ledger import log
from relay.listen import Listeners
from relay.registry.load import Config, ConfigError, Sources, load

START_TIMEOUT_S = 30.0
_BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)
_EXIT_GRACE_S = 5.0


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Runs until SIGTERM or SIGINT; `run` returns when every worker has ended."""

    def __init__(
        self, config: Config, sources: Sources, listeners: Listeners, demo: Demo | None
    ) -> None:
        self._config, self._sources, self._listeners, self._demo = config, sources, listeners, demo
        self._workers: dict[int, _Worker] = {}
        self._acks: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ids = itertools.count(1)
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        # Where workers put their numbers, for whichever of them is asked for /metrics.
        self._metrics = tempfile.TemporaryDirectory(prefix="relay-metrics-")

    async def run(self) -> None:
        """Start all, keep them running, end all."""
        demo = self._demo.running() if self._demo else None
        if demo is not None:
            await anext(demo)
        loop = asyncio.get_running_loop()
        handlers = {
            signal.SIGTERM: self._terminate,
            signal.SIGINT: self._terminate,
            signal.SIGHUP: self._hang_up,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        keepers = [
            asyncio.create_task(self._keep(n)) for n in range(self._config.settings.server.workers)
        ]
        try:
            await asyncio.gather(*keepers)
        finally:
            for task in (*keepers, *self._tasks):
                task.cancel()
            await asyncio.gather(*keepers, *self._tasks, return_exceptions=True)
            self._metrics.cleanup()
            if demo is not None:
                await anext(demo, None)

    async def _keep(self, number: int) -> None:
        """Keep the worker of this number running until the end."""
        for attempt in itertools.count():
            worker = await self._start(number)
            listener = asyncio.create_task(self._listen(worker))
            waited = await self._until_ended(worker)
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
            if self._stopping.is_set():
                return
            if worker.leaving.is_set():
                continue
            pause = _BACKOFF_S[min(attempt if waited < START_TIMEOUT_S else 0, len(_BACKOFF_S) - 1)]
            log.warn(
                "worker.died",
                worker=number,
                exit_code=worker.process.returncode,
                restart_in_s=pause,
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            if self._stopping.is_set():
                return

    async def _until_ended(self, worker: _Worker) -> float:
        """Wait for its end, or for its farewell: then a successor starts while it drains. Seconds
        it served.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        leaving = asyncio.create_task(worker.leaving.wait())
        ended = asyncio.create_task(worker.process.wait())
        await asyncio.wait({leaving, ended}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if self._stopping.is_set() or not worker.leaving.is_set():
            await self._reap(worker, ended)
        else:
            self._own(asyncio.create_task(self._reap(worker, ended)))
        return loop.time() - began

    async def _reap(self, worker: _Worker, ended: asyncio.Task[int]) -> None:
        limit = self._config.settings.server.drain_timeout_s + _EXIT_GRACE_S
        if worker.leaving.is_set() or self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(ended), limit)
            if worker.process.returncode is None:
                worker.process.kill()
        await ended
        self._workers.pop(worker.process.pid, None)
        self._forget_gauges(worker.process.pid)
        worker.writer.close()

    def _forget_gauges(self, pid: int) -> None:
        """What came and went in a worker is gone with it; what was counted stays."""
        for file in Path(self._metrics.name).glob(f"gauge_live*_{pid}.db"):
            file.unlink(missing_ok=True)

    def _own(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        arguments = worker_arguments(self._sources, self._listeners, theirs.fileno())
        shared = [sock.fileno() for sock in (self._listeners.plain, self._listeners.tls) if sock]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "relay", *arguments,
            env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": self._metrics.name},
            pass_fds=(*shared, theirs.fileno()), stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = _Worker(number, process, reader, writer)
        self._workers[process.pid] = worker
        return worker

    async def _listen(self, worker: _Worker) -> None:
        """What a worker says: ready, leaving, how it did what it was told, or a wish for all."""
        while line := await worker.reader.readline():
            said = json.loads(line)
            if said["say"] == "ready":
                worker.ready.set()
                log.event("worker.ready", worker=worker.number, pid=worker.process.pid)
            elif said["say"] == "leaving":
                worker.leaving.set()
            elif said["say"] == "did":
                if (waiting := self._acks.get(said["id"])) and not waiting.done():
                    waiting.set_result(said["answer"])
            elif said["say"] == "ask":
                self._own(asyncio.create_task(self._for_all(worker, said)))

    async def _for_all(self, worker: _Worker, said: dict[str, Any]) -> None:
        answer = await self.order(said["order"], said["given"])
        await say(worker.writer, {"say": "done", "id": said["id"], "answer": answer})

    async def order(self, order: str, given: dict[str, Any]) -> dict[str, Any]:
        """Have every worker do it: `problems` of all, and `count` summed up."""
        config: Config | None = None
        if order == "reload":
            try:
                config = await asyncio.to_thread(load, self._sources)
            except ConfigError as error:
                problems = [str(problem) for problem in error.problems]
                log.warn("reload.refused", problems=problems)
                return {"problems": problems}
        answers = await asyncio.gather(
            *(self._tell(worker, order, given) for worker in list(self._workers.values()))
        )
        problems = [problem for answer in answers for problem in answer.get("problems", ())]
        if config is not None and not problems:
            self._config = config
        return {"problems": problems, "count": sum(answer.get("count", 0) for answer in answers)}

    async def _tell(self, worker: _Worker, order: str, given: dict[str, Any]) -> dict[str, Any]:
        if worker.leaving.is_set() or not worker.ready.is_set():
            return {}  # it goes, or it starts with all that is new
        ask_id = next(self._ids)
        self._acks[ask_id] = asyncio.get_running_loop().create_future()
        message = {"say": "do", "id": ask_id, "order": order, "given": given}
        try:
            await say(worker.writer, message)
            return await asyncio.wait_for(self._acks[ask_id], ACK_TIMEOUT_S)
        except (TimeoutError, OSError):
            late = f"worker {worker.number} did not answer within {ACK_TIMEOUT_S:g} s"
            return {"problems": [late]}
        finally:
            del self._acks[ask_id]

    def _hang_up(self) -> None:
        self._own(asyncio.create_task(self.order("reload", {})))

    def _terminate(self) -> None:
        self._stopping.set()
        for worker in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGTERM)


def worker_arguments(sources: Sources, listeners: Listeners, control_fd: int) -> Sequence[str]:
    """The command line of a worker."""
    arguments = [
        "worker",
        f"--listen-fd={listeners.plain.fileno()}",
        f"--control-fd={control_fd}",
        f"--config={sources.config}",
    ]
    if sources.env_file is not None:
        arguments += ["--env-file", str(sources.env_file)]
    if listeners.tls is not None:
        arguments += ["--tls-fd", str(listeners.tls.fileno())]
    if sources.certificate is not None:
        arguments += ["--tls-certificate", str(sources.certificate.chain)]
        arguments += ["--tls-key", str(sources.certificate.key)]
    return arguments + (["--demo-url", sources.demo_url] if sources.demo_url else [])
