"""Write the settings of a program that is connected to a relay, and take them back.

Owns what happens to files: reading with all refusals, one backup, replacement in one step through
symbolic links, modes, and the record of a connection, by which it is undone. The record is in the
user's folder for state (XDG_STATE_HOME), since it has the client's key: only its owner may read it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from relay.cli.settings_formats import (
    ABSENT,
    FORMATS,
    Format,
    NotUnderstood,
    SettingPath,
    value_at,
)
from relay.core.errors import OperatorError

SECRET_MODE = 0o600
_FOLDER_MODE = 0o700
_SUFFIX = ".before-relay"
_MAX_BYTES = 4 * 1024 * 1024


class ConnectFailed(OperatorError):
    """A program was not connected, or not disconnected; the text says why and what to do."""


class Change(msgspec.Struct):
    """A setting that the relay wrote: its value before, null if there was none, and the new one."""

    path: list[str]
    before: Any
    after: str


class ChangedFile(msgspec.Struct):
    """A file that the relay changed. `before` and `after` are SHA-256 of its bytes."""

    path: str
    format: str
    changes: list[Change]
    made: list[list[str]]
    """Groups of settings that were not there before."""
    before: str | None
    """None: the file did not exist, or was changed by others since."""
    after: str
    existed: bool
    mode: int | None = None


class Connection(msgspec.Struct):
    """The record of a connected program. `key` is the key that it has, `key_id` that of a key
    which `relay connect` made.
    """

    tool: str
    url: str
    key: str | None = None
    key_id: str | None = None
    client: str | None = None
    files: list[ChangedFile] = msgspec.field(default_factory=list)

    def __repr__(self) -> str:
        return f"Connection({self.tool!r})"


@dataclass(frozen=True, slots=True)
class Contents:
    """A file as it is; an empty text if it does not exist."""

    path: Path
    text: str
    digest: str | None
    mode: int | None

    @property
    def exists(self) -> bool:
        return self.digest is not None


def read_settings(path: Path, format: Format) -> tuple[Contents, dict[str, Any]]:
    """Read a file, and parse it. Raises ConnectFailed."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except FileNotFoundError:
        if path.is_symlink():
            raise ConnectFailed(
                f"{path} is a link to {path.readlink()}, which does not exist: make that file, or"
                " remove the link"
            ) from None
        return Contents(path, "", None, None), {}
    except OSError as error:
        raise ConnectFailed(f"{path} cannot be read: {error.strerror}") from error
    try:
        if len(data) > _MAX_BYTES:
            raise NotUnderstood(f"it has more than {_MAX_BYTES} bytes")
        text = data.decode()
        settings = format.parse(text)
    except UnicodeDecodeError:
        raise _not_understood(path, "it is not UTF-8") from None
    except NotUnderstood as error:
        raise _not_understood(path, str(error)) from None
    return Contents(path, text, _digest(data), mode), settings


def _not_understood(path: Path, why: str) -> ConnectFailed:
    return ConnectFailed(f"{path} was left as it is, since {why}: correct it, and try again")


def require_writable(path: Path) -> None:
    """Raise ConnectFailed if a file cannot be replaced, before anything is changed."""
    target = path.resolve()
    if target.exists():
        if not target.stat().st_mode & stat.S_IWUSR or not os.access(target, os.W_OK):
            raise ConnectFailed(
                f"{target} is read-only: another program may make it; put the settings there that"
                " `--dry-run` prints, or make the file writable"
            )
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConnectFailed(f"{folder} cannot be written: see whose folder it is")


@dataclass(frozen=True, slots=True)
class Plan:
    """A file with its new text."""

    contents: Contents
    text: str
    record: ChangedFile
    settings: Mapping[str, Any]
    """The settings before."""

    @property
    def is_change(self) -> bool:
        return self.text != self.contents.text


def plan_file(
    path: Path, format: Format, values: Mapping[SettingPath, str], earlier: ChangedFile | None
) -> Plan:
    """Compute the new text of a file, and the record by which it is undone. Nothing is written.
    `earlier` is the record of a connection that is renewed. Raises ConnectFailed.
    """
    contents, settings = read_settings(path, format)
    try:
        text = format.changed(contents.text, values)
    except NotUnderstood as error:
        raise _not_understood(path, str(error)) from None
    is_ours = earlier is not None and contents.digest == earlier.after
    known = {tuple(change.path): change for change in earlier.changes} if earlier else {}
    changes = []
    for setting, value in values.items():
        before, old = value_at(settings, setting), known.pop(setting, None)
        if old is not None and before == old.after:
            before = old.before
        changes.append(Change(list(setting), before, value))
    made = [
        list(setting[:depth])
        for setting in values
        for depth in range(1, len(setting))
        if value_at(settings, setting[:depth]) is ABSENT
    ]
    record = ChangedFile(
        path=str(path),
        format=format.name,
        changes=changes + list(known.values()),
        made=_distinct([*(earlier.made if earlier else ()), *made]),
        before=earlier.before if earlier is not None and is_ours else contents.digest,
        after=_digest(text.encode()),
        existed=earlier.existed if earlier is not None and is_ours else contents.exists,
        mode=earlier.mode if earlier is not None and is_ours else contents.mode,
    )
    if earlier is not None and not is_ours:
        record.before = None
    return Plan(contents, text, record, settings)


def _distinct(paths: Sequence[list[str]]) -> list[list[str]]:
    return [list(path) for path in dict.fromkeys(map(tuple, paths))]


def write_file(plan: Plan) -> Path | None:
    """Write the new text of a file, and copy the old one beside it, once. Returns the copy if one
    was made. Raises ConnectFailed.
    """
    path, copied = plan.contents.path, None
    if plan.is_change:
        backup = backup_of(path)
        is_original = plan.contents.exists and plan.record.before == plan.contents.digest
        if is_original and not backup.exists():
            _replace(backup, plan.contents.text, plan.contents.mode or SECRET_MODE)
            copied = backup
    if plan.is_change or plan.contents.mode != SECRET_MODE:
        _replace(path, plan.text, SECRET_MODE)
    return copied


def backup_of(path: Path) -> Path:
    """Return where the copy of a file is from before the relay changed it."""
    return path.with_name(path.name + _SUFFIX)


def _replace(path: Path, text: str, mode: int) -> None:
    """Replace a file, or the file that a link points to, in one step. Raises ConnectFailed."""
    target = path.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=_FOLDER_MODE)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with open(descriptor, "wb") as file:
                file.write(text.encode())
                os.fchmod(file.fileno(), mode)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise ConnectFailed(f"{target} cannot be written: {error.strerror}") from error


def restore_file(record: ChangedFile) -> list[str]:
    """Take back what the relay changed in a file, and nothing else. Returns the names of settings
    that were left, since they were changed by others. Raises ConnectFailed.
    """
    path, format = Path(record.path), FORMATS[record.format]
    contents, settings = read_settings(path, format)
    if not contents.exists:
        return []
    require_writable(path)
    backup, old = backup_of(path), None
    if contents.digest == record.after and record.before is not None:
        with contextlib.suppress(OSError):
            old = backup.read_bytes()
        if old is not None and _digest(old) == record.before:
            _replace(path, old.decode(), record.mode or SECRET_MODE)
            backup.unlink()
            return []
    left, values = [], {}
    for change in record.changes:
        setting = tuple(change.path)
        if (now := value_at(settings, setting)) == change.after:
            values[setting] = change.before
        elif now != change.before:
            left.append(".".join(setting))
    try:
        text = format.changed(contents.text, values)
        for group in sorted(map(tuple, record.made), key=len, reverse=True):
            if value_at(format.parse(text), group) == {}:
                text = format.changed(text, {group: ABSENT})
    except NotUnderstood as error:
        raise _not_understood(path, str(error)) from None
    if not record.existed and not text.strip("{} \t\r\n"):
        path.resolve().unlink()
    elif text != contents.text:
        _replace(path, text, contents.mode or SECRET_MODE)
    return left


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()


# The records -------------------------------------------------------------------------------------


def records_folder(home: Path, environment: Mapping[str, str]) -> Path:
    """Return the folder of the records."""
    state = Path(environment.get("XDG_STATE_HOME") or home / ".local/state")
    return state / "ai-gateway-relay" / "connected"


def load_record(folder: Path, tool: str) -> Connection | None:
    """Return the record of a program; None if it is not connected. Raises ConnectFailed."""
    path = folder / f"{tool}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Connection)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not what the relay wrote"
        raise ConnectFailed(
            f"{path} cannot be used: {why}; the settings before are in files that end in {_SUFFIX}"
        ) from None


def save_record(folder: Path, connection: Connection) -> None:
    """Store the record of a program. Raises ConnectFailed."""
    text = msgspec.json.format(msgspec.json.encode(connection), indent=2).decode()
    _replace(folder / f"{connection.tool}.json", text + "\n", SECRET_MODE)


def remove_record(folder: Path, tool: str) -> None:
    """Remove the record of a program. Raises ConnectFailed."""
    try:
        (folder / f"{tool}.json").unlink(missing_ok=True)
    except OSError as error:
        raise ConnectFailed(f"{folder / tool}.json cannot be removed: {error.strerror}") from error
