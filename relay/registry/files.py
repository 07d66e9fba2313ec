"""Read the files of a configuration, each once, and keep their bytes.

Owns reading with bounds, include patterns, and the Snapshot, from which another process builds the
same configuration even if the files have changed. It does not interpret the files.
"""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path, PurePath

import msgspec

MAX_FILE_BYTES = 1024 * 1024
MAX_TOTAL_BYTES = 4 * MAX_FILE_BYTES
"""Limit for all files together, because a supervisor sends them to a worker in one message."""
MAX_INCLUDED = 1000


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The files of one configuration as read. It contains secrets: never log or store it."""

    files: dict[str, bytes] = {}
    failed: dict[str, int] = {}
    """Path of each unreadable file to its errno."""
    found: dict[str, list[str]] = {}
    """Include pattern to the files that matched."""

    def __repr__(self) -> str:
        return f"Snapshot({len(self.files)} files)"


class Unreadable(Exception):
    """A file cannot be read. `number` is the errno."""

    def __init__(self, number: int) -> None:
        too_large = number == errno.EFBIG
        super().__init__("the file is larger than 1 MiB" if too_large else os.strerror(number))
        self.number = number


class TooLarge(Exception):
    """The files together are larger than MAX_TOTAL_BYTES."""


class BadPattern(Exception):
    """An include pattern is refused; the text says why."""


class Files:
    """Reads from disk, or from a Snapshot only."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self._snapshot = snapshot
        self._files: dict[str, bytes] = {}
        self._failed: dict[str, int] = {}
        self._found: dict[str, list[str]] = {}

    @property
    def on_disk(self) -> bool:
        """False if files are read from a Snapshot."""
        return self._snapshot is None

    def read(self, path: Path) -> bytes:
        """Return the bytes of a file. Raises Unreadable, TooLarge."""
        name = str(path)
        if name not in self._files and name not in self._failed:
            try:
                self._files[name] = self._take(path)
            except Unreadable as error:
                self._failed[name] = error.number
        if name in self._failed:
            raise Unreadable(self._failed[name])
        if sum(map(len, self._files.values())) > MAX_TOTAL_BYTES:
            raise TooLarge
        return self._files[name]

    def _take(self, path: Path) -> bytes:
        if self._snapshot is not None:
            if (data := self._snapshot.files.get(str(path))) is None:
                raise Unreadable(self._snapshot.failed.get(str(path), errno.ENOENT))
            return data
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise Unreadable(error.errno or errno.EIO) from error
        except ValueError:  # a NUL in its name
            raise Unreadable(errno.EINVAL) from None
        if len(data) > MAX_FILE_BYTES:
            raise Unreadable(errno.EFBIG)
        return data

    def matching(self, folder: Path, pattern: str) -> list[Path]:
        """Return the files in `folder` that match an include pattern, sorted. Raises BadPattern."""
        if pattern not in self._found:
            _check_pattern(pattern)
            if self._snapshot is not None:
                self._found[pattern] = self._snapshot.found.get(pattern, [])
            else:
                self._found[pattern] = [str(path) for path in _on_disk(folder, pattern)]
        return [Path(name) for name in self._found[pattern]]

    def snapshot(self) -> Snapshot:
        """Return everything that was read."""
        return Snapshot(self._files, self._failed, self._found)


def _check_pattern(pattern: str) -> None:
    if not pattern.strip():
        raise BadPattern("is empty: name a file, or remove the entry")
    if PurePath(pattern).is_absolute():
        raise BadPattern("is an absolute path: name the file relative to gateway.yaml")
    if "**" in pattern:
        raise BadPattern("`**` is not supported: name the folder, and use * for the files in it")


def _on_disk(folder: Path, pattern: str) -> list[Path]:
    try:
        files = (path for path in folder.glob(pattern) if path.is_file())
        found = sorted(itertools.islice(files, MAX_INCLUDED + 1))
    except (ValueError, OSError, IndexError) as error:
        raise BadPattern("is not a pattern of file names") from error
    if len(found) > MAX_INCLUDED:
        raise BadPattern(f"matches more than {MAX_INCLUDED} files")
    return found
