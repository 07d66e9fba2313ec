"""Start `relay` processes by fork: a template process imports the relay once and forks on request.

Importing the relay takes a second of CPU, and hundreds of tests start a relay. Each test process
has one template. A forked relay has its own process id, descriptors, environment, folder, signals
and exit code, and runs `relay.__main__` from its first statement. It differs from an executed one
in four ways: its modules are imported already, it is a child of the template, /proc shows the
command line of the template, and the workers of a supervisor are forked before it starts them (see
_Spares). Tests about any of the first three use `executed` instead of `forked`; tests about the
start of workers use `executing_workers` or `executing_successors`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import gc
import importlib
import itertools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from asyncio import StreamReader, StreamReaderProtocol
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parent.parent
_REQUEST_BYTES, _DESCRIPTORS = 1 << 17, 16
_RESTARTS = 2  # spares of a supervisor for workers that are started again
_TEMPLATE_ENDED = "the template ended; its standard error says why"
# The modules that `relay serve` imports, at its start and later.
_MODULES = (
    "relay.cli.main", "relay.cli.serve", "relay.cli.worker", "relay.server.tls", "alembic.command", "alembic.config", "alembic.runtime.migration", "alembic.script",
    "sqlalchemy.dialects.sqlite.aiosqlite", "redis.asyncio.retry", "genai_prices.data_snapshot",
)  # fmt: skip
# Variables that the interpreter or a library reads when it is imported. If their values differ from
# those of the template, the process is executed.
_READ_AT_IMPORT = ("PYTHON", "AIOHTTP_", "MULTIDICT_", "YARL_", "FROZENLIST_", "PROMETHEUS_", "prometheus_", "OTEL_", "LANG", "LC_", "TZ", "LD_")


class Process(Protocol):
    """The part of asyncio.subprocess.Process that tests use."""

    pid: int
    stderr: StreamReader | None

    @property
    def returncode(self) -> int | None: ...
    async def wait(self) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class Command:
    """`relay ARGUMENTS` in a folder. The arguments `-c CODE ...` run code, as `python -c` does.

    Standard input is /dev/null.
    """

    arguments: tuple[str, ...]
    folder: Path
    env: dict[str, str]
    module: str = "relay"
    """The module to run: another one is a part of a test that needs a process of its own."""


Start = Callable[[Command], Awaitable[Process]]


async def executed(command: Command) -> Process:
    """Execute `python -m relay`. Standard output is /dev/null, and standard error is a pipe."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", command.module, *command.arguments, cwd=command.folder, env=command.env,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


async def forked(command: Command) -> Process:
    """Fork the command from the template of this test process."""
    if not _may_fork(command):
        return await executed(command)
    return await Forked.start(_Fork(command, _spares(command)), _open_pipe)


async def executing_workers(command: Command) -> Process:
    """Fork a supervisor that executes its workers."""
    assert _may_fork(command)
    return await Forked.start(_Fork(command, 0), _open_pipe)


async def executing_successors(command: Command) -> Process:
    """Fork a supervisor and its first workers. It executes each worker that replaces another."""
    assert _may_fork(command)
    return await Forked.start(_Fork(command, _workers(command)), _open_pipe)


def passing_socket(sock: socket.socket) -> Start:
    """Make a `Start` that passes a listening socket to the relay, as systemd does."""

    async def start(command: Command) -> Process:
        assert _may_fork(command)
        command = replace(command, env=command.env | {"LISTEN_FDS": "1"})
        return await Forked.start(_Fork(command, _spares(command), (sock.fileno(),)), _open_pipe)

    return start


async def on_terminal(command: Command) -> Process:
    """Fork the command with a terminal as standard output and error, read through `stderr`."""
    return await Forked.start(_Fork(command, _spares(command)), _open_terminal)


def _may_fork(command: Command) -> bool:
    return _read_at_import(command.env) == _read_at_import(dict(os.environ) | {"PYTHONPATH": str(ROOT)})


def _workers(command: Command) -> int:
    """The value of `--workers`, or 1."""
    given = command.arguments
    return int(given[given.index("--workers") + 1]) if "--workers" in given else 1


def _spares(command: Command) -> int:
    """The number of workers that a supervisor needs in a test; 0 without a supervisor."""
    return workers + _RESTARTS if (workers := _workers(command)) > 1 else 0


@dataclass(frozen=True)
class _Fork:
    """What the template forks."""

    command: Command
    spares: int
    """The number of workers that are forked. Further ones are executed."""
    passed: tuple[int, ...] = ()
    """Descriptors that the process gets as 3, 4 and so on."""

    def request(self, output: int, errors: int) -> socket.socket:
        """Send the request. Returns the socket for the process id and the exit code, as lines."""
        ours, theirs = socket.socketpair()
        with theirs, open(os.devnull, "rb") as null:
            _running_template().request(self, [theirs.fileno(), null.fileno(), output, errors, *self.passed])
        return ours


def popen(command: Command, output: int, errors: int) -> Popen:
    """Fork the command, with these descriptors as its standard output and error.

    Needs no event loop, so that fixtures of a module can use it.
    """
    assert _may_fork(command)
    return Popen(_Fork(command, _spares(command)).request(output, errors))


def _running_template() -> _Template:
    if (template := _Template.running) is None:
        template = _Template.running = _Template()
    return template


def _open_pipe() -> tuple[int, int, int]:
    reader, writer = os.pipe()
    return os.open(os.devnull, os.O_WRONLY), writer, reader


def _open_terminal() -> tuple[int, int, int]:
    """Open a terminal, and a pipe into which a thread copies its output.

    A read from a closed terminal fails; a read from a closed pipe gets the end of the file.
    """
    screen, terminal = os.openpty()
    reader, writer = os.pipe()

    def copy() -> None:
        with contextlib.suppress(OSError):
            while shown := os.read(screen, 65536):
                os.write(writer, shown)
        os.close(screen)
        os.close(writer)

    threading.Thread(target=copy, daemon=True).start()
    return terminal, os.dup(terminal), reader


def _read_at_import(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(_READ_AT_IMPORT)}


class _CloseAtEnd(StreamReaderProtocol):
    def eof_received(self) -> bool:
        super().eof_received()
        return False


class Forked:
    """A process that the template forked and reaps.

    The template writes the process id to `status`, and later the exit code.
    """

    def __init__(self, pid: int, stderr: StreamReader, status: StreamReader) -> None:
        self.pid = pid
        self.stderr: StreamReader | None = stderr
        self.returncode: int | None = None
        self._ended = asyncio.create_task(self._follow(status))

    @classmethod
    async def start(cls, fork: _Fork, open_output: Callable[[], tuple[int, int, int]]) -> Forked:
        """Fork the command. Returns when the process exists.

        `open_output` returns three descriptors: standard output, standard error, and the one from
        which both are read.
        """
        output, errors, reader = open_output()
        try:
            ours = fork.request(output, errors)
        finally:
            os.close(output)
            os.close(errors)
        status, closing = await asyncio.open_connection(sock=ours)
        pid = int(await status.readline() or b"0")
        assert pid, _TEMPLATE_ENDED
        stderr = StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: _CloseAtEnd(stderr), os.fdopen(reader, "rb", 0))
        process = cls(pid, stderr, status)
        process._ended.add_done_callback(lambda _: closing.close())
        return process

    async def _follow(self, status: StreamReader) -> int:
        line = await status.readline()
        assert line, "the template ended before the process did"
        self.returncode = int(line)
        return self.returncode

    async def wait(self) -> int:
        """Wait for the end. Returns the exit code, or the negated number of the fatal signal."""
        return await asyncio.shield(self._ended)

    def send_signal(self, number: int, /) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Popen:
    """The part of subprocess.Popen that tests use, for a process that the template forked."""

    def __init__(self, status: socket.socket) -> None:
        self._socket = status
        self._status = status.makefile("rb")
        self.pid = int(self._status.readline() or b"0")
        assert self.pid, _TEMPLATE_ENDED
        self.returncode: int | None = None

    def wait(self, timeout: float) -> int:
        """Wait for the end. Raises TimeoutError."""
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} did not end within {timeout} s")
            self.returncode = int(self._status.readline())
            self._status.close()
            self._socket.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(TimeoutError):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Template:
    """The template as the test process sees it.

    The template ends when its socket is closed, so at the latest with the test process.
    """

    running: _Template | None = None

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        atexit.register(self.close)

    def request(self, fork: _Fork, descriptors: list[int]) -> None:
        """Request a fork.

        `descriptors` are the socket for the status, and those that the process gets as 0, 1, 2 and
        so on.
        """
        command, targets = fork.command, list(range(len(descriptors) - 1))
        request = {"arguments": command.arguments, "folder": str(command.folder.absolute()), "env": command.env, "targets": targets, "module": command.module, "spares": fork.spares}
        _send(self._socket, request, descriptors)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


# Requests, to the template and to the spares of a supervisor ------------------------------------


def _send(sock: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    message = json.dumps(request).encode()
    assert len(message) < _REQUEST_BYTES
    socket.send_fds(sock, [message], descriptors)


def _receive(sock: socket.socket) -> tuple[_Request, list[int]] | None:
    """Receive a request and its descriptors. Returns None when the other side has closed."""
    message, descriptors, *_ = socket.recv_fds(sock, _REQUEST_BYTES, _DESCRIPTORS)
    return (_Request(**json.loads(message)), descriptors) if message else None


@dataclass
class _Request:
    """A description of the process that a new fork becomes: `python -m relay ARGUMENTS`."""

    arguments: list[str]
    folder: str
    env: dict[str, str]
    targets: list[int]
    """The numbers that the received descriptors get."""
    starts_session: bool = False
    module: str = "relay"
    spares: int = 0

    @property
    def is_code(self) -> bool:
        return self.arguments[:1] == ["-c"]

    def become(self, descriptors: list[int]) -> None:
        """Set everything that differs from a new interpreter.

        Closes every descriptor except `targets` and 0, 1 and 2.
        """
        above = max(self.targets) + 1
        for target, descriptor in zip(self.targets, [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, above) for each in descriptors], strict=True):
            os.dup2(descriptor, target)
        _close_all_but(self.targets)
        if self.starts_session:
            os.setsid()
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.env)
        if "LISTEN_FDS" in self.env:
            os.environ["LISTEN_PID"] = str(os.getpid())
        from prometheus_client import values

        sys.path[0] = self.folder
        sys.argv = self.arguments if self.is_code else ["-m", *self.arguments]
        sys.orig_argv = [sys.executable, *(() if self.is_code else ("-m", self.module)), *self.arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # The import of prometheus_client has chosen this class by the environment of the template.
        values.ValueClass = values.get_value_class()


def _close_all_but(kept: list[int]) -> None:
    """Close every descriptor above 2 that is not in `kept`."""
    for low, high in itertools.pairwise([2, *sorted(each for each in kept if each > 2), os.sysconf("SC_OPEN_MAX")]):
        if low + 1 < high:
            os.closerange(low + 1, high)


# The template itself ----------------------------------------------------------------------------


class _Forker:
    """Forks on request, reaps each process, and reports its exit code."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._poll = select.poll()
        self._poll.register(requests, select.POLLIN)
        self._running: dict[int, tuple[int, socket.socket]] = {}
        """Process id and status socket, by the pidfd of the process."""

    def run(self) -> _Request | None:
        """Serve requests until the tests end.

        Returns the request in each forked process, which has become the requested one by then.
        Returns None in the template at the end of the tests.
        """
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._requests.fileno():
                    self._reap(descriptor)
                elif (received := _receive(self._requests)) is None:
                    return None
                elif self._fork(*received):
                    return received[0]

    def _fork(self, request: _Request, descriptors: list[int]) -> bool:
        """Fork a process. Returns True in the new process."""
        if (pid := os.fork()) == 0:
            # These sockets are closed as objects, so that no destructor later closes a descriptor
            # that has the same number.
            self._requests.close()
            for _, status in self._running.values():
                status.close()
            request.become(descriptors[1:])
            return True
        status = socket.socket(fileno=descriptors[0])
        for each in descriptors[1:]:
            os.close(each)
        ending = os.pidfd_open(pid)
        self._running[ending] = (pid, status)
        self._poll.register(ending, select.POLLIN)
        self._report(status, pid)
        return False

    def _reap(self, ending: int) -> None:
        pid, status = self._running.pop(ending)
        _, ended = os.waitpid(pid, 0)
        self._poll.unregister(ending)
        os.close(ending)
        self._report(status, os.waitstatus_to_exitcode(ended))
        status.close()

    def _report(self, status: socket.socket, number: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # the test has ended
            status.sendall(b"%d\n" % number)


# Workers of a supervisor ------------------------------------------------------------------------


class _Spares:
    """Children that a supervisor forks in advance, while it has no thread and no loop yet.

    Each waits for a request to become a worker, and ends with the supervisor. When no spare is
    left, workers are executed.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, socket.socket]] = []
        self._execute = subprocess.Popen

    def fork(self, count: int) -> bool:
        """Fork `count` spares. Returns True in a spare that has become a worker."""
        for _ in range(count):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if (pid := os.fork()) == 0:
                for each in (ours, *(sock for _, sock in self._waiting)):
                    each.close()
                if (received := _receive(theirs)) is None:
                    os._exit(0)
                theirs.close()
                request, descriptors = received
                request.become(descriptors)
                return True
            theirs.close()
            self._waiting.append((pid, ours))
        atexit.register(self._end)
        return False

    def _end(self) -> None:
        """End the spares that have become no worker, before the supervisor ends."""
        for pid, sock in self._waiting:
            sock.close()
            os.waitpid(pid, 0)

    def popen(self, command: list[str], **options: Any) -> Any:
        """Replaces subprocess.Popen in the supervisor: turns a spare into a worker."""
        if not self._waiting or command[:4] != [sys.executable, "-m", "relay", "worker"]:
            return self._execute(command, **options)
        pid, sock = self._waiting.pop(0)
        passed = list(options["pass_fds"])
        request = {"arguments": command[3:], "folder": os.getcwd(), "env": dict(options["env"]), "targets": [0, *passed], "starts_session": options["start_new_session"]}
        with sock, open(os.devnull, "rb") as null:
            assert options["stdin"] == subprocess.DEVNULL
            _send(sock, request, [null.fileno(), *passed])
        return _Worker(pid)


class _Worker:
    """The part of subprocess.Popen that a supervisor uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _main(descriptor: int) -> None:
    # A terminal sends SIGINT to the whole process group. The template ends with its tests instead.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = socket.socket(fileno=descriptor)
    gc.disable()
    for name in _MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # pages that the collector does not touch stay shared with the forks
    gc.enable()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies only one thread"
    if (request := _Forker(requests).run()) is None:
        return
    if request.spares:
        spares = _Spares()
        if not spares.fork(request.spares):
            subprocess.Popen = spares.popen  # type: ignore[assignment,misc]
    try:
        if request.is_code:
            _, code, *sys.argv[1:] = request.arguments
            exec(code, {"__name__": "__main__"})
        else:
            runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise
        _exit(end.code or 0)
    _exit(0)


def _exit(code: int) -> None:
    """End as the interpreter does, but leave its objects to the system. To free them writes to all
    the pages that are shared with the template, so that each is copied: 60 ms of CPU.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
