"""The metrics folders of workers: those of dead processes are removed, those in use are kept."""

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
    """The folder in which temporary folders are created."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def _dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def _remaining(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_in_use_is_kept_and_removed_at_its_end(folder: Path) -> None:
    with metrics_folder() as metrics:
        remove_dead_folders()
        assert Path(metrics.path).is_dir() and Path(metrics.path).parent == folder
    assert _remaining(folder) == []


def test_the_folder_of_a_killed_process_is_removed_once_its_workers_have_ended(folder: Path) -> None:
    """The supervisor holds the lock, and its workers inherit it. `cat` is one of them."""
    metrics = module._make()
    (Path(metrics.path) / "counter_1.db").write_bytes(b"x")
    worker = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(metrics.lock,))
    os.close(metrics.lock)  # has the effect of kill -9
    remove_dead_folders()
    assert _remaining(folder) == [Path(metrics.path).name]
    worker.communicate()
    remove_dead_folders()
    assert _remaining(folder) == []


@pytest.mark.parametrize(("pids", "is_kept"), [(["dead"], False), (["dead", "living"], True), ([], True)])
def test_a_folder_without_a_lock_is_removed_once_all_its_workers_have_ended(folder: Path, pids: list[str], is_kept: bool) -> None:
    old = folder / "relay-metrics-abc123"
    old.mkdir()
    for pid in pids:
        (old / f"counter_{_dead_pid() if pid == 'dead' else os.getpid()}.db").write_bytes(b"x")
    remove_dead_folders()
    assert _remaining(folder) == ([old.name] if is_kept else [])


def test_folders_of_other_users_and_other_files_are_not_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "relay-metrics-link-locked").symlink_to(folder / "elsewhere")
    (folder / "relay-metrics-file-locked").write_text("")
    (folder / "relay-other").mkdir()
    before = _remaining(folder)
    remove_dead_folders()
    assert _remaining(folder) == before
    (folder / "relay-metrics-dead-locked").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    remove_dead_folders()
    assert "relay-metrics-dead-locked" in _remaining(folder)


def test_a_folder_that_another_start_removed_before_it_was_locked_is_created_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, taken = module._lock, []

    def late(path: str) -> int:
        if not taken:
            taken.append(path)
            os.rmdir(path)
        return lock(path)

    monkeypatch.setattr(module, "_lock", late)
    with metrics_folder() as metrics:
        assert metrics.path != taken[0] and Path(metrics.path).is_dir()


@pytest.mark.programs
async def test_the_next_start_removes_the_folder_of_a_relay_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    for name in ("killed", "next"):
        (tmp_path / name).mkdir()
    killed = await serve(tmp_path / "killed", {"providers": {}}, "--workers", "2")
    killed.send(signal.SIGKILL)
    await killed.ended()  # and so have its workers
    assert len(list(temporary.glob("relay-metrics-*"))) == 1
    following = await serve(tmp_path / "next", {"providers": {}})
    assert list(temporary.glob("relay-metrics-*")) == []
    await following.stop()
