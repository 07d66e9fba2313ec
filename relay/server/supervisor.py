"""Start several workers, restart them, and send orders to all of them.

Owns the listening sockets that all workers share, the signals, and a control channel to each worker
(control.py). A worker that dies is started again with back-off; one that drains keeps its running
calls while its successor accepts new ones. A ready worker is drained by a message on its channel,
so that a signal which also reaches it does not count as a second one; a worker that is still
starting gets SIGTERM. Only processes that were started here are signalled, by their id.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from relay import log
from relay.ledger.metrics_multiprocess import metrics_folder
from relay.registry.changes import Reloaded, changed_names
from relay.registry.limits import find_broken_promise
from relay.registry.load import Config, ConfigError, Sources, load
from relay.registry.restart import needing_restart, taken_over
from relay.server import signals
from relay.server.control import (
    ANSWER_TIMEOUT_S,
    MAX_ITEMS,
    Answer,
    Begin,
    Channel,
    Command,
    Leaving,
    Ready,
    Reply,
    bounded,
)
from relay.server.listen import Listeners

_BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)
_STABLE_S = 30.0
"""When a worker that was ready for this long dies, its back-off begins again."""
_EXIT_GRACE_S = 12.0
"""How long a worker may take after its drain: 3 s to end the calls that it cut, 2 s for background
work, 5 s to write records, and a reserve."""
_REAP_POLL_S = 0.01
_FOR_ALL = frozenset({"purge", "refresh_access", "sessions", "end_session"})
"""Orders that the supervisor passes to every worker as they are."""
_NO_REPLY = 0
"""The id of an order to which no reply is expected."""


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    channel: Channel
    ended: asyncio.Future[None] = field(default_factory=asyncio.Future)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    ready_s: float = 0.0
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the worker leaves or has ended, its channel has ended, or the supervisor stops."""
    followed: asyncio.Future[Any] = field(default_factory=asyncio.Future)
    """Done when the worker has ended and its channel, entry and gauges are removed."""

    def post(self, message: Begin | Command | Reply) -> None:
        """Send the worker a message, if its channel is open."""
        with contextlib.suppress(ConnectionError):
            self.channel.post(message)

    @property
    def state(self) -> str:
        """Why the worker has not answered."""
        if not self.ready.is_set():
            return "still starting; carries out the order when ready"
        return f"no answer within {ANSWER_TIMEOUT_S:g} s"


class Supervisor:
    """Runs until SIGTERM or SIGINT; `run` returns when every worker has ended."""

    def __init__(
        self,
        config: Config,
        sources: Sources,
        listeners: Listeners,
        on_ready: Callable[[], None],
    ) -> None:
        """`on_ready` is called once, when every worker serves."""
        self._started_with, self._config = config, config
        self._sources, self._listeners = sources, listeners
        self._on_ready: Callable[[], None] | None = on_ready
        self._workers: dict[int, _Worker] = {}
        self._serving = [asyncio.Event() for _ in range(config.settings.server.workers)]
        """For each worker number: set while a worker is ready and not leaving."""
        self._reloading = asyncio.Lock()
        self._stopping, self._cutting = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        """Start all workers, keep them running until a signal, and end them."""
        signals.handle(self.stop, self._hang_up)
        # Workers write their metrics here, for the one that answers /metrics.
        with metrics_folder() as self._metrics:
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(len(self._serving)):
                        group.create_task(self._keep_running(number))
                while self._workers:  # also those that were draining before the signal
                    await asyncio.wait([one.followed for one in self._workers.values()])
            finally:
                for task in list(self._tasks):
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep_running(self, number: int) -> None:
        """Keep a worker of this number running until the end."""
        failures = 0
        while not self._stopping.is_set():
            try:
                worker = await self._start(number)
            except OSError as error:
                failures += 1
                pause = _pause_s(failures)
                cause = error.strerror or type(error).__name__
                log.warn("worker.not_started", worker=number, cause=cause, retry_in_s=pause)
            else:
                await worker.over.wait()
                if worker.leaving.is_set() and worker.ready.is_set():
                    failures = 0
                    continue  # the worker drains, and is reaped when it has ended
                await worker.ended
                served_s = asyncio.get_running_loop().time() - worker.ready_s
                stable = worker.ready.is_set() and served_s >= _STABLE_S
                failures = 1 if stable else failures + 1
                pause = _pause_s(failures)
                if not self._stopping.is_set():
                    code = worker.process.returncode
                    log.warn("worker.died", worker=number, exit_code=code, restart_in_s=pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _start(self, number: int) -> _Worker:
        """Start a worker. Raises OSError if the system allows no more processes or files."""
        inherited = (*self._listeners.descriptors(), self._metrics.lock)
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as opened:
            opened.callback(ours.close)
            with theirs:
                # Not by the loop: uvloop 0.22 leaks descriptors when a process does not start.
                process = subprocess.Popen(  # noqa: ASYNC220, S603 (a few ms; a fixed command)
                    _worker_command(self._sources, self._listeners, theirs),
                    env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": self._metrics.path},
                    pass_fds=(*inherited, theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            opened.callback(process.kill)
            channel = await Channel.open(ours)
            opened.pop_all()
        worker = _Worker(number, process, channel)
        # It starts with the files of the first workers, then applies the last reload as they did.
        reloaded = None if self._config is self._started_with else self._config.read.files
        worker.post(Begin(self._started_with.read.files, reloaded))
        worker.ended.add_done_callback(lambda _: self._mark_over(worker))
        self._workers[process.pid] = worker
        worker.followed = self._run_logged(self._follow(worker))
        if self._stopping.is_set():  # the signal arrived while the process was started
            self._end(worker)
        return worker

    async def _follow(self, worker: _Worker) -> None:
        """Handle a worker's messages until it ends; kill it if it does not end in time."""
        listener = asyncio.create_task(self._listen(worker))
        listener.add_done_callback(lambda _: self._mark_over(worker))
        reaper = asyncio.create_task(_reap(worker, listener))
        try:
            await worker.over.wait()
            limit_s = _EXIT_GRACE_S
            if not listener.done():
                limit_s += self._config.settings.server.drain_timeout_s
            await self._ended_within(worker, limit_s)
        finally:
            for task in (reaper, listener):
                task.cancel()
            await asyncio.gather(reaper, listener, return_exceptions=True)
            worker.channel.close()
            self._workers.pop(worker.process.pid, None)
            self._forget_gauges(worker.process.pid)

    async def _ended_within(self, worker: _Worker, limit_s: float) -> None:
        """Wait for the worker's end; kill it after `limit_s`, sooner when calls are being cut."""
        cutting = asyncio.create_task(self._cutting.wait())
        waits: list[asyncio.Future[Any]] = [worker.ended, cutting]
        await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        cutting.cancel()
        if not worker.ended.done() and self._cutting.is_set():
            await asyncio.wait({worker.ended}, timeout=_EXIT_GRACE_S)
        if not worker.ended.done():
            log.warn("worker.killed", worker=worker.number, pid=worker.process.pid)
            worker.process.kill()
        await worker.ended

    def _mark_over(self, worker: _Worker) -> None:
        """Let a successor of the worker start."""
        if not worker.over.is_set():
            worker.over.set()
            self._serving[worker.number].clear()

    def _forget_gauges(self, pid: int) -> None:
        """Remove the gauges of a worker that has ended; its counters stay."""
        for file in Path(self._metrics.path).glob(f"gauge_live*_{pid}.db"):
            file.unlink(missing_ok=True)

    def _run_logged(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        """Run `work` as a task whose exception is logged."""

        def ended(task: asyncio.Task[object]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.bug("supervisor.failed", error)

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    async def _listen(self, worker: _Worker) -> None:
        """Handle what a worker sends: ready, leaving, a reply, or a command for all workers."""
        async for message in worker.channel.messages():
            if isinstance(message, Ready):
                worker.ready_s = asyncio.get_running_loop().time()
                worker.ready.set()
                if not worker.over.is_set():
                    self._serving[worker.number].set()
                log.event("worker.ready", worker=worker.number, pid=worker.process.pid)
                self._report_ready()
            elif isinstance(message, Leaving):
                worker.leaving.set()
                self._mark_over(worker)
            elif isinstance(message, Reply):
                worker.channel.resolve(message)
            elif isinstance(message, Command):
                self._run_logged(self._order_and_reply(worker, message))
            else:
                log.warn("control.unexpected_message", say=type(message).__name__.lower())

    def _report_ready(self) -> None:
        if self._on_ready is not None and all(serving.is_set() for serving in self._serving):
            on_ready, self._on_ready = self._on_ready, None
            on_ready()

    async def _order_and_reply(self, worker: _Worker, message: Command) -> None:
        try:
            answer = await self.order(message.order, message.arguments)
        except Exception as error:
            # For any exception the requesting worker gets an answer, and the log has the cause.
            log.bug("control.order_failed", error, order=message.order[:40])
            answer = Answer(missing=[f"the supervisor failed ({type(error).__name__})"])
        worker.post(Reply(message.id, answer))

    async def order(self, order: str, arguments: dict[str, Any]) -> Answer:
        """Have every worker carry out an order; `missing` names the workers that did not."""
        if order == "reload":
            async with self._reloading:
                return await self._reload()
        if order in _FOR_ALL:
            return await self._order_all(order, arguments)
        log.warn("control.unknown_order", order=order[:40])
        return Answer([f"the supervisor does not know the order '{order[:40]}'"])

    async def _reload(self) -> Answer:
        try:
            loaded = await asyncio.to_thread(load, self._sources, None, self._config)
        except ConfigError as error:
            return _refused([str(problem) for problem in error.problems])
        config = taken_over(self._started_with, loaded)
        # Checked against the number of workers and the Redis of the start, which stay in force.
        found = (find_broken_promise(rule, config.settings) for rule in config.all_limits)
        if problems := list(filter(None, found)):
            return _refused(problems)
        changed = changed_names(self._config, config)
        self._config = config
        config.log_warnings()
        restart = needing_restart(self._started_with.settings, loaded.settings)
        deadline = asyncio.get_running_loop().time() + ANSWER_TIMEOUT_S
        missing = (await self._order_all("reload", msgspec.to_builtins(config.read.files))).missing
        missing += await self._not_serving(deadline)
        if missing:
            log.warn("reload.incomplete", missing=missing)
        else:
            result = Reloaded(changed, restart)
            log.event("reload.complete", workers=len(self._serving), **result._asdict())
        return Answer(missing=bounded(missing), changed=bounded(changed), restart=restart)

    async def _order_all(self, order: str, arguments: dict[str, Any]) -> Answer:
        """Order it of every worker; one that is starting reads the order when it is ready."""
        workers = list(self._workers.values())
        answers = await asyncio.gather(
            *(_send_order(worker, order, arguments) for worker in workers)
        )
        missing = [
            f"worker {worker.number}: {problem}"
            for worker, answer in zip(workers, answers, strict=True)
            for problem in answer.problems
        ]
        items = sorted(
            chain(*(answer.items for answer in answers)), key=lambda item: str(item["id"])
        )
        count = sum(answer.count for answer in answers)
        return Answer(missing=bounded(missing), count=count, items=items[:MAX_ITEMS])

    async def _not_serving(self, deadline_s: float) -> list[str]:
        """The workers without a serving process, after starting ones had time until
        `deadline_s`.
        """
        left_s = max(0.0, deadline_s - asyncio.get_running_loop().time())
        all_serve = asyncio.gather(*(serving.wait() for serving in self._serving))
        stopping = asyncio.create_task(self._stopping.wait())
        waits: list[asyncio.Future[Any]] = [all_serve, stopping]
        await asyncio.wait(waits, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        starting = {worker.number for worker in self._workers.values() if not worker.over.is_set()}
        return [
            f"worker {number}: died; gets the new configuration when it starts again"
            for number, serving in enumerate(self._serving)
            if not serving.is_set() and number not in starting
        ]

    def _hang_up(self) -> None:
        self._run_logged(self.order("reload", {}))

    def stop(self) -> None:
        """Handle a signal to end: the first one drains, each further one cuts running calls."""
        if self._stopping.is_set():
            self._cutting.set()
        self._stopping.set()
        self._listeners.close()
        for worker in list(self._workers.values()):
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        worker.post(Command(_NO_REPLY, "cut" if self._cutting.is_set() else "drain"))
        if not worker.ready.is_set():
            worker.process.terminate()
        self._mark_over(worker)


async def _reap(worker: _Worker, listener: asyncio.Task[None]) -> None:
    """Reap the worker when its channel ends, which no other process has open."""
    await asyncio.wait([listener])
    while worker.process.poll() is None:  # noqa: ASYNC110 (a process has no event; a few ms)
        await asyncio.sleep(_REAP_POLL_S)
    worker.ended.set_result(None)


async def _send_order(worker: _Worker, order: str, arguments: dict[str, Any]) -> Answer:
    with worker.channel.pending() as (command_id, answer):
        worker.post(Command(command_id, order, arguments))
        waits: list[asyncio.Future[Any]] = [answer, worker.ended]
        await asyncio.wait(waits, timeout=ANSWER_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    if answer.done():
        return answer.result()
    # A worker that ended has nothing left to change; its successor starts with the current state.
    return Answer() if worker.ended.done() else Answer([worker.state])


def _refused(problems: list[str]) -> Answer:
    texts = bounded(problems)
    log.warn("reload.refused", problems=texts)
    return Answer(texts)


def _worker_command(
    sources: Sources, listeners: Listeners, control: socket.socket
) -> Sequence[str]:
    """The command that cli/worker.py parses."""
    certificate = sources.certificate
    options = {
        "listen-fd": listeners.plain.fileno(),
        "control-fd": control.fileno(),
        "config": sources.config,
        "overrides": json.dumps(sources.overrides),
        "env-file": sources.env_file,
        "tls-fd": listeners.tls.fileno() if listeners.tls else None,
        "admin-fd": listeners.admin.fileno() if listeners.admin else None,
        "tls-certificate": certificate.chain if certificate else None,
        "tls-key": certificate.key if certificate else None,
        "demo-url": sources.demo_url or None,
    }
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [sys.executable, "-m", "relay", "worker", *arguments]


def _pause_s(failures: int) -> float:
    """The pause before a worker is started again."""
    return _BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1]
