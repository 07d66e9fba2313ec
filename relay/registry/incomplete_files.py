"""Refuse a reload that finds a file half-written or missing.

Owns this decision, which compares the files with those in force: a file that was empty or cut
before is accepted. Most programs empty a file before they write it, and many write it in pieces.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from relay.core.fields import BYTE_ORDER_MARK
from relay.registry.files import Snapshot
from relay.registry.problems import Document, Problem

_GONE = "; its previous content stays in force (a restart accepts the file as it is)"


@dataclass(frozen=True, slots=True)
class InForce:
    """The files of the configuration in force."""

    files: Snapshot = field(default_factory=Snapshot)
    with_providers: frozenset[str] = frozenset()
    """The paths of files that have providers."""


def report_incomplete_files(
    documents: Sequence[tuple[Path, Document]], before: InForce, now: Snapshot
) -> None:
    """Add a problem to each document that is empty or cut, and was not before."""
    for path, document in documents:
        old, new = before.files.files.get(str(path)), now.files.get(str(path))
        if old is None or new is None or _is_blank(old):
            continue
        if _is_blank(new):
            document.add_problem((), f"is empty{_GONE}")
        elif (place := _cut_at(old, new)) is not None:
            document.add_problem_at(place, (), _CUT)
        elif (
            str(path) in before.with_providers
            and isinstance(document.data, dict)
            and document.data.get("providers") is None
        ):
            document.add_problem((), _WITHOUT_PROVIDERS)


_WITHOUT_PROVIDERS = (
    "has no providers any more: is the file half-written? To remove them, write `providers: {}`"
)
_CUT = "the last line has no line end, as it had before: is the file half-written?"


def find_lost_files(
    env_file: Path | None, before: InForce, now: Snapshot, documents: Sequence[Path]
) -> Iterator[Problem]:
    """Return the problems of the other files: `.env` and secret files."""
    others = set(before.files.files).difference(map(str, documents))
    for name in sorted(others):
        old = before.files.files[name]
        new, failed = now.files.get(name), now.failed.get(name)
        message, place = "", (1, 1)
        if _is_blank(old):
            continue
        if failed is not None:
            is_gone = failed == errno.ENOENT
            reason = "is missing" if is_gone else f"cannot be read: {os.strerror(failed)}"
            message = reason + _GONE
        elif new is not None and _is_blank(new):
            message = f"is empty{_GONE}"
        elif new is not None and name == str(env_file) and (cut := _cut_at(old, new)):
            message, place = _CUT, cut
        if message:
            yield Problem(Path(name).name, *place, (), message)


def _is_blank(data: bytes) -> bool:
    """True if a file has only comments and blank lines."""
    lines = data.removeprefix(BYTE_ORDER_MARK).split()
    if not lines:
        return True
    return all(not line.strip() or line.lstrip()[:1] == b"#" for line in data.splitlines())


def _cut_at(old: bytes, new: bytes) -> tuple[int, int] | None:
    """Return the end of `new` if its last line has no line end, and that of `old` has."""
    if not old.endswith((b"\n", b"\r")) or new.endswith((b"\n", b"\r")):
        return None
    last = new.splitlines()[-1].decode("utf-8", "replace")
    return len(new.splitlines()), len(last) + 1
