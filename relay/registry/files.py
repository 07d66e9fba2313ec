"""The files that a configuration is read from: each is read once, and held as it was read.

Owns: reading with bounds, include patterns, and the Snapshot from which another process makes the
same configuration, whatever has become of the files since. Knows nothing of what the files mean.
"""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path, PurePath

import msgspec

MAX_FILE_BYTES = 1024 * 1024
MAX_TOTAL_BYTES = 4 * MAX_FILE_BYTES
"""Of all files of a configuration: a supervisor sends them to each worker in one message."""
MAX_INCLUDED = 1000


class Snapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The files of one configuration as they were read. It holds secrets: never log or store it."""

    files: dict[str, bytes] = {}
    failed: dict[str, int] = {}
    """Path to the errno with which it could not be read."""
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
    """An include pattern is not taken; the text says why."""


class Files:
    """Reads from the disk; with a Snapshot, from that alone."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self._snapshot = snapshot
        self._files: dict[str, bytes] = {}
        self._failed: dict[str, int] = {}
        self._found: dict[str, list[str]] = {}

    @property
    def on_disk(self) -> bool:
        """False where a Snapshot is read."""
        return self._snapshot is None

    def read(self, path: Path) -> bytes:
        """The file's bytes. Raises Unreadable, TooLarge."""
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
        """The files in `folder` that an include pattern names, sorted. Raises BadPattern."""
        if pattern not in self._found:
            _check_pattern(pattern)
            if self._snapshot is not None:
                self._found[pattern] = self._snapshot.found.get(pattern, [])
            else:
                self._found[pattern] = [str(path) for path in _on_disk(folder, pattern)]
        return [Path(name) for name in self._found[pattern]]

    def snapshot(self) -> Snapshot:
        """All that was read."""
        return Snapshot(self._files, self._failed, self._found)


def _check_pattern(pattern: str) -> None:
    if not pattern.strip():
        raise BadPattern("is empty: name a file, or remove the entry")
    if PurePath(pattern).is_absolute():
        raise BadPattern("is an absolute path: name the file relative to gateway.yaml")
    if "**" in pattern:
        raise BadPattern("`**` is not taken: name the folder, and use * for the files in it")


def _on_disk(folder: Path, pattern: str) -> list[Path]:
    try:
        files = (path for path in folder.glob(pattern) if path.is_file())
        found = sorted(itertools.islice(files, MAX_INCLUDED + 1))
    except (ValueError, OSError, IndexError) as error:
        raise BadPattern("is not a pattern of file names") from error
    if len(found) > MAX_INCLUDED:
        raise BadPattern(f"matches more than {MAX_INCLUDED} files")
    return found
