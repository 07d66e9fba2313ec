"""Forked relays: they behave as executed ones in everything that a test can observe."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.processes import STARTED, run, serve
from tests.template import Start, executed, forked

pytestmark = pytest.mark.programs


def _status(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/status").read_text().partition(f"{name}:")[2].split("\n")[0].strip()


def _parent(pid: int) -> int:
    return int(_status(pid, "PPid"))


@pytest.mark.parametrize("start", [forked, executed])
async def test_a_relay_has_its_own_folder_signals_and_descriptors(tmp_path: Path, start: Start) -> None:
    relay = await serve(tmp_path, {"providers": {}}, start=start)
    assert os.readlink(f"/proc/{relay.pid}/cwd") == str(tmp_path)
    blocked, ignored = (int(_status(relay.pid, name), 16) for name in ("SigBlk", "SigIgn"))
    # A shell starts background processes with more ignored signals.
    inherited = int(_status(os.getpid(), "SigIgn"), 16)
    assert blocked == 0 and ignored & ~inherited == 0 and ignored & 1 << signal.SIGPIPE - 1
    assert os.readlink(f"/proc/{relay.pid}/fd/0") == os.readlink(f"/proc/{relay.pid}/fd/1") == os.devnull
    relay.send(signal.SIGKILL)
    assert await relay.ended() == -signal.SIGKILL


@pytest.mark.parametrize("start", [forked, executed])
async def test_the_exit_code_and_the_last_output_arrive(tmp_path: Path, start: Start) -> None:
    (tmp_path / "gateway.yaml").write_text("server:\n  host: ${NAME}\n  prot: 1\n")
    relay = await run(tmp_path, "check", env={"NAME": "256.0.0.0"}, start=start)
    assert await relay.ended() == 2
    assert any("server.prot: unknown key" in line for line in relay.lines) and "problem(s); the configuration is refused." in relay.lines[-1]


async def test_workers_are_the_children_of_their_supervisor(tmp_path: Path) -> None:
    relay = await serve(tmp_path, {"providers": {}}, "--workers", "2")
    found = await relay.until(r'"worker":0.*"pid":(\d+)|"pid":(\d+).*"worker":0')
    worker = int(found.group(1) or found.group(2))
    assert _parent(worker) == relay.pid and os.getsid(worker) == worker
    await relay.stop()
    assert not Path(f"/proc/{worker}").exists()


async def test_a_command_with_variables_that_python_reads_at_its_start_is_executed(tmp_path: Path) -> None:
    relay = await run(tmp_path, "serve", "--port", "0", env={"PYTHONHASHSEED": "7"})
    await relay.until(STARTED)
    assert b"\0-m\0relay\0serve\0" in Path(f"/proc/{relay.pid}/cmdline").read_bytes()
    await relay.stop()
