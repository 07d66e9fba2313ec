"""The folders of workers' numbers: those of dead processes go, those in use stay."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from relay.ledger import metrics_multiprocess as module
from relay.ledger.metrics_multiprocess import metrics_folder, remove_dead_folders
from tests.processes import serve


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def _dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_in_use_stays_and_goes_at_its_end(folder: Path) -> None:
    with metrics_folder() as made:
        remove_dead_folders()
        assert Path(made.path).is_dir() and Path(made.path).parent == folder
    assert _left(folder) == []


def test_the_folder_of_a_process_that_was_killed_goes_when_its_workers_have_ended(folder: Path) -> None:
    """The lock is the supervisor's and, inherited, its workers': `cat` is one."""
    made = module._make()
    (Path(made.path) / "counter_1.db").write_bytes(b"x")
    worker = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(made.lock,))
    os.close(made.lock)  # as a kill -9 does
    remove_dead_folders()
    assert _left(folder) == [Path(made.path).name]
    worker.communicate()
    remove_dead_folders()
    assert _left(folder) == []


@pytest.mark.parametrize(("pids", "stays"), [(["dead"], False), (["dead", "living"], True), ([], True)])
def test_a_folder_of_a_relay_that_took_no_lock_goes_when_all_its_workers_are_gone(folder: Path, pids: list[str], stays: bool) -> None:
    old = folder / "relay-metrics-abc123"
    old.mkdir()
    for pid in pids:
        (old / f"counter_{_dead_pid() if pid == 'dead' else os.getpid()}.db").write_bytes(b"x")
    remove_dead_folders()
    assert _left(folder) == ([old.name] if stays else [])


def test_nothing_of_another_user_and_nothing_else_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "relay-metrics-link-locked").symlink_to(folder / "elsewhere")
    (folder / "relay-metrics-file-locked").write_text("")
    (folder / "relay-other").mkdir()
    there = _left(folder)
    remove_dead_folders()
    assert _left(folder) == there
    (folder / "relay-metrics-dead-locked").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    remove_dead_folders()
    assert "relay-metrics-dead-locked" in _left(folder)


def test_a_folder_that_another_start_took_before_it_was_locked_is_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, taken = module._lock, []

    def late(path: str) -> int:
        if not taken:
            taken.append(path)
            os.rmdir(path)
        return lock(path)

    monkeypatch.setattr(module, "_lock", late)
    with metrics_folder() as made:
        assert made.path != taken[0] and Path(made.path).is_dir()


@pytest.mark.programs
async def test_the_next_start_removes_the_folder_of_a_relay_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    for name in ("killed", "next"):
        (tmp_path / name).mkdir()
    killed = await serve(tmp_path / "killed", {"providers": {}}, "--workers", "2")
    killed.send(signal.SIGKILL)
    await killed.ended()  # its workers too
    assert len(list(temporary.glob("relay-metrics-*"))) == 1
    following = await serve(tmp_path / "next", {"providers": {}})
    assert list(temporary.glob("relay-metrics-*")) == []
    await following.stop()
