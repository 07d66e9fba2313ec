"""Share the metrics of several workers: the folder that they write to, and their process metrics.

Owns the folder for its whole life. The next start of the same user removes the folder of a relay
that was killed. A folder is in use while a process holds a lock on it (flock); the system drops the
lock when the last process that has the folder open ends, however it ends. Workers inherit the lock,
so the folder of a supervisor that was killed stays until its workers have ended. The lock also
keeps systemd-tmpfiles from deleting the files in the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import GaugeMetricFamily

_PREFIX, _LOCKED = "relay-metrics-", "-locked"
"""The suffix is missing from folders of older relays, which took no lock."""
_PID = re.compile(r"_([0-9]{1,10})\.db\Z")
_OF_WORKERS: dict[str, Callable[[list[float]], float]] = {
    "process_resident_memory_bytes": sum,
    "process_virtual_memory_bytes": sum,
    "process_open_fds": max,
    "process_max_fds": min,
    "process_start_time_seconds": min,
}
"""How the process metrics of several workers become one. The limit of descriptors is each worker's
own, so the worker nearest to it counts. CPU time is missing: it must not shrink when a worker ends,
so each worker counts its own (relay/ledger/metrics.py)."""


class MetricsFolder(NamedTuple):
    """A folder in use."""

    path: str
    lock: int
    """The descriptor that holds its lock, for workers to inherit."""


@contextlib.contextmanager
def metrics_folder() -> Iterator[MetricsFolder]:
    """Make a folder, and remove it at the end. Raises OSError if it cannot be made."""
    made = _make()
    try:
        yield made
    finally:
        shutil.rmtree(made.path, ignore_errors=True)
        os.close(made.lock)


def _make() -> MetricsFolder:
    while True:
        path = tempfile.mkdtemp(prefix=_PREFIX, suffix=_LOCKED)
        try:
            return MetricsFolder(path, _lock(path))
        except (FileNotFoundError, BlockingIOError):
            continue  # another process that starts found it unlocked, and removes it


def _lock(path: str) -> int:
    """Lock a folder that exists; the descriptor holds the lock. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def remove_dead_folders() -> None:
    """Remove this user's folders that no process uses. A folder that cannot be removed stays."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                _remove_if_dead(folder)


def _remove_if_dead(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return
    lock = _lock(str(folder))  # BlockingIOError: it is in use
    try:
        if folder.name.endswith(_LOCKED) or _is_abandoned(folder):
            shutil.rmtree(folder)
    finally:
        os.close(lock)


def _is_abandoned(folder: Path) -> bool:
    """True if all workers of a relay that took no lock have ended."""
    pids = _pids(folder)
    return bool(pids) and not any(map(_is_alive, pids))


def _pids(folder: Path, pattern: str = "*") -> set[int]:
    """The process ids in the names of the files that workers wrote."""
    found = [_PID.search(file.name) for file in folder.glob(pattern)]
    return {int(each[1]) for each in found if each is not None}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True


class WorkersCollector:
    """Collects memory, file descriptors and start time of all workers that run."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The supervisor removes the gauges of a worker that ended: the others run."""
        values: dict[str, list[float]] = {}
        helps: dict[str, str] = {}
        for pid in _pids(self._folder, "gauge_live*"):
            for metric in _process_collector(pid).collect():
                helps[metric.name] = metric.documentation
                values.setdefault(metric.name, []).append(metric.samples[0].value)
        for name, combine in _OF_WORKERS.items():
            if name in values:
                yield GaugeMetricFamily(name, helps[name], combine(values[name]))


def _process_collector(pid: int) -> ProcessCollector:
    return ProcessCollector(pid=lambda: pid, registry=None)
