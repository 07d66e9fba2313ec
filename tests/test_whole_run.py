"""The checks over a whole run: a leak or a skip fails it, in one process and with workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.whole_run import CANARY

pytestmark = pytest.mark.programs

CONFTEST = """
from tests.whole_run import WholeRun

def pytest_configure(config):
    config.pluginmanager.register(WholeRun(config))
"""
LEAKING = """
from tests.whole_run import CANARY, LogStream

def test_one():
    LogStream().write(f"a line with {CANARY}-openai in it, \\udce9\\n")
"""
PASSING = "def test_other(): pass\n"
SKIPPING = """
import pytest

def test_one():
    pytest.skip("no such program")
"""
SKIPPED_MODULE = """
import pytest

pytest.skip("no such package", allow_module_level=True)
"""
DYING = """
import os

def test_one():
    os._exit(3)
"""

LEFT_OPEN = """
import asyncio

async def test_one():
    await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)

async def test_next(): pass
"""
STRICT_LOOP = """
import pytest
from tests.loops import StrictLoop

def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": StrictLoop}
"""

in_one_process_and_in_two = pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one", "two"])


def run(folder: Path, source: str, *options: str, conftest: str = CONFTEST, **env: str) -> tuple[int, str]:
    """Run pytest over `source` and a test that passes. Returns (exit code, output)."""
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_first.py").write_text(source)
    (folder / "test_second.py").write_text(PASSING)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV", "FORBID_SKIPS"))}
    clean |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder), *options, str(folder)]
    ended = subprocess.run(command, cwd=folder, env=clean | env, capture_output=True, text=True, timeout=100)
    return ended.returncode, ended.stdout + ended.stderr


@in_one_process_and_in_two
def test_a_credential_in_a_log_line_fails_the_run(tmp_path: Path, workers: tuple[str, ...]) -> None:
    code, output = run(tmp_path, LEAKING, *workers)
    assert code == 1 and "2 passed" in output
    assert f"CANARY: 1 log lines or error bodies hold a credential, such as:\na line with {CANARY}-openai" in output


def test_a_run_without_leak_or_skip_passes(tmp_path: Path) -> None:
    code, output = run(tmp_path, PASSING, "-n", "2", FORBID_SKIPS="1")
    assert code == 0 and "2 passed" in output


@in_one_process_and_in_two
@pytest.mark.parametrize("source", [SKIPPING, SKIPPED_MODULE], ids=["test", "module"])
def test_a_skip_fails_the_run_where_skips_are_forbidden(tmp_path: Path, workers: tuple[str, ...], source: str) -> None:
    code, output = run(tmp_path, source, *workers, FORBID_SKIPS="1")
    assert code == 1 and "FORBID_SKIPS: tests were skipped" in output
    assert "SKIPPED: test_first.py" in output and "no such p" in output


def test_a_skip_is_named_and_passes_elsewhere(tmp_path: Path) -> None:
    code, output = run(tmp_path, SKIPPING, "-n", "2")
    assert code == 0 and "SKIPPED: test_first.py::test_one: Skipped: no such program" in output


def test_a_worker_that_dies_fails_the_run_since_its_lines_are_lost(tmp_path: Path) -> None:
    code, output = run(tmp_path, DYING, "-n", "2")
    assert code == 1 and "the log lines of the test processes gw" in output


def test_a_server_that_a_test_left_open_is_an_error_of_that_test_and_the_run_continues(tmp_path: Path) -> None:
    strict = ("-p", "pytest_asyncio.plugin", "-o", "asyncio_mode=auto", "-W", "error::ResourceWarning", "-rE")
    code, output = run(tmp_path, LEFT_OPEN, *strict, conftest=STRICT_LOOP)
    assert code == 1 and "3 passed, 1 error" in output
    assert "ERROR test_first.py::test_one - ResourceWarning: unclosed resource <TCPS" in output
