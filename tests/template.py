"""`relay` processes by fork: one process per test process imports the relay once, and forks on request.

To import the relay takes a second of CPU, and hundreds of tests start one. What is forked here is a
process as real as any: its own id, descriptors, environment, folder, signals and exit code, and it
runs `relay.__main__` from its first statement. What differs: the modules are imported already, it is
the template's child, and /proc shows the template's command line. Tests about any of that take
`executed` instead of `forked`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from asyncio import StreamReader, StreamReaderProtocol
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parent.parent
_REQUEST_BYTES = 1 << 17
# What `relay serve` imports, and what it imports where it is used.
_MODULES = (
    "relay.__main__", "relay.cli.main", "relay.cli.serve", "relay.cli.worker", "relay.server.tls", "alembic.command", "alembic.config", "alembic.runtime.migration", "alembic.script",
    "sqlalchemy.dialects.sqlite.aiosqlite", "redis.asyncio.retry", "genai_prices.data_snapshot",
)  # fmt: skip
# Variables that the interpreter or a library reads when it starts: with others of these a process is executed.
_READ_AT_IMPORT = ("PYTHON", "AIOHTTP_", "MULTIDICT_", "YARL_", "FROZENLIST_", "PROMETHEUS_", "prometheus_", "OTEL_", "LANG", "LC_", "TZ", "LD_")


class Process(Protocol):
    """What tests use of asyncio.subprocess.Process."""

    pid: int
    stderr: StreamReader | None

    @property
    def returncode(self) -> int | None: ...
    async def wait(self) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class Command:
    """`relay ARGUMENTS` in a folder. Standard error is a pipe, the others are /dev/null."""

    arguments: tuple[str, ...]
    folder: Path
    env: dict[str, str]


Start = Callable[[Command], Awaitable[Process]]


async def executed(command: Command) -> Process:
    """A fresh `python -m relay`."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "relay", *command.arguments, cwd=command.folder, env=command.env,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


async def forked(command: Command) -> Process:
    """The same, forked from this test process's template."""
    if _read_at_import(command.env) != _read_at_import(dict(os.environ) | {"PYTHONPATH": str(ROOT)}):
        return await executed(command)
    if (template := _Template.running) is None:
        template = _Template.running = _Template()
    return await Forked.start(template, command)


def _read_at_import(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(_READ_AT_IMPORT)}


class _ClosedAtItsEnd(StreamReaderProtocol):
    def eof_received(self) -> bool:
        super().eof_received()
        return False


class Forked:
    """A process that the template forked and reaps. The template writes to `status` its id, and how it ended."""

    def __init__(self, pid: int, stderr: StreamReader, status: StreamReader) -> None:
        self.pid = pid
        self.stderr: StreamReader | None = stderr
        self.returncode: int | None = None
        self._ended = asyncio.create_task(self._follow(status))

    @classmethod
    async def start(cls, template: _Template, command: Command) -> Forked:
        """Returns when the process is there."""
        ours, theirs = socket.socketpair()
        reader, writer = os.pipe()
        with theirs, open(os.devnull, "r+b") as null:
            try:
                template.request(command, null.fileno(), null.fileno(), writer, theirs.fileno())
            finally:
                os.close(writer)
        status, closing = await asyncio.open_connection(sock=ours)
        pid = int(await status.readline() or b"0")
        assert pid, "the template ended; its standard error says why"
        stderr = StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: _ClosedAtItsEnd(stderr), os.fdopen(reader, "rb", 0))
        process = cls(pid, stderr, status)
        process._ended.add_done_callback(lambda _: closing.close())
        return process

    async def _follow(self, status: StreamReader) -> int:
        line = await status.readline()
        assert line, "the template ended before the process did"
        self.returncode = int(line)
        return self.returncode

    async def wait(self) -> int:
        """Its exit code; a negative signal where one ended it."""
        return await asyncio.shield(self._ended)

    def send_signal(self, number: int, /) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Template:
    """The template, seen from the tests. It ends when its socket is closed, thus with this process at the latest."""

    running: _Template | None = None

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        atexit.register(self.close)

    def request(self, command: Command, *descriptors: int) -> None:
        """Have it fork `command`, with standard input, output and error, and the socket that says how it goes."""
        message = json.dumps([command.arguments, str(command.folder.absolute()), command.env]).encode()
        assert len(message) < _REQUEST_BYTES
        socket.send_fds(self._socket, [message], descriptors)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


# The template itself ----------------------------------------------------------------------------------


@dataclass
class _Request:
    arguments: list[str]
    folder: str
    env: dict[str, str]
    descriptors: list[int]

    def become(self) -> None:
        """Make this process, forked just now, what a fresh interpreter is that runs `-m relay`."""
        for target, descriptor in enumerate(self.descriptors):
            os.dup2(descriptor, target)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.env)
        sys.path[0] = self.folder
        sys.argv = ["-m", *self.arguments]
        sys.orig_argv = [sys.executable, "-m", "relay", *self.arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Forking:
    """Forks on request, reaps, and says how each process ended."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._poll = select.poll()
        self._poll.register(requests, select.POLLIN)
        self._running: dict[int, tuple[int, socket.socket]] = {}
        """By the descriptor of a process: its id, and where to say how it ended."""

    def run(self) -> _Request | None:
        """In each process that it forks, what that is to become; None in the template, at its end."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._requests.fileno():
                    self._reap(descriptor)
                    continue
                message, received, *_ = socket.recv_fds(self._requests, _REQUEST_BYTES, 4)
                if not message:
                    return None
                request, status = _Request(*json.loads(message), received[:3]), socket.socket(fileno=received[3])
                if (pid := os.fork()) == 0:
                    status.close()
                    self._forget()
                    return request
                self._follow(pid, status)
                for each in request.descriptors:
                    os.close(each)

    def _follow(self, pid: int, status: socket.socket) -> None:
        descriptor = os.pidfd_open(pid)
        self._running[descriptor] = (pid, status)
        self._poll.register(descriptor, select.POLLIN)
        self._say(status, pid)

    def _reap(self, descriptor: int) -> None:
        pid, status = self._running.pop(descriptor)
        _, ended = os.waitpid(pid, 0)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        self._say(status, os.waitstatus_to_exitcode(ended))
        status.close()

    def _say(self, status: socket.socket, number: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # its test has ended
            status.sendall(b"%d\n" % number)

    def _forget(self) -> None:
        """Nothing of this is a forked process's. Each is closed as itself: none may close a later one of its number."""
        self._requests.close()
        for descriptor, (_, status) in self._running.items():
            os.close(descriptor)
            status.close()


def _main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal it goes to all; this one ends with its tests
    requests = socket.socket(fileno=descriptor)
    gc.disable()
    for name in _MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what the collector does not touch is not copied
    gc.enable()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies one thread"
    if (request := _Forking(requests).run()) is not None:
        request.become()
        runpy.run_module("relay", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
