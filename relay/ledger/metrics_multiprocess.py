"""The folder in which several workers keep their numbers for Prometheus.

Owns: its making and its end, also after a kill -9: the next start of the same user removes the
folders that no process uses. A folder is in use while a process holds a lock on it (flock); the
system drops the lock when the last process that has the folder open ends, however it ends. Workers
inherit it, so that the folder of a supervisor that was killed stays until its workers have ended.
It also keeps systemd-tmpfiles from deleting what lies in the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PREFIX, _LOCKED = "relay-metrics-", "-locked"
"""Folders without the second are of a relay that took no lock."""
_PID = re.compile(r"_([0-9]{1,10})\.db\Z")


class MetricsFolder(NamedTuple):
    """A folder in use."""

    path: str
    lock: int
    """The descriptor that holds its lock, for workers to inherit."""


@contextlib.contextmanager
def metrics_folder() -> Iterator[MetricsFolder]:
    """A new folder, removed at the end. Raises OSError where there is no room for it."""
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
            continue  # another start took it for dead before it was locked, and removes it


def _lock(path: str) -> int:
    """A descriptor that holds the lock of a folder that is still there. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def remove_dead_folders() -> None:
    """Remove this user's folders that no process uses. What cannot be removed stays."""
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
        if folder.name.endswith(_LOCKED) or _is_left_by_dead(folder):
            shutil.rmtree(folder)
    finally:
        os.close(lock)


def _is_left_by_dead(folder: Path) -> bool:
    """Of a relay that took no lock: its workers' ids are in the names of their files."""
    found = [_PID.search(file.name) for file in folder.iterdir()]
    pids = {int(each[1]) for each in found if each is not None}
    return bool(pids) and not any(map(_is_alive, pids))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
