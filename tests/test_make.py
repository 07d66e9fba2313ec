"""`make run`: its output while it installs, and its error message when a step fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT

pytestmark = pytest.mark.programs

# Replaces Python, and uv: it installs nothing, so no test needs the network. The file `fails` names
# the programs that fail.
PYTHON = """#!/bin/sh
[ "$1" = -m ] && program=$2 || program=$(basename "$0")
if grep -qx "$program" fails 2>/dev/null; then echo "the reason of $program"; exit 1; fi
case "$program $*" in
    "python -c import sys; print"*) echo py3.11 ;;
    "venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "pip "*" config list") printf "%s\\n" "global.index-url='https://index.test/simple'" "global.cert='/certs.pem'" ;;
    "pip "*uv.txt) echo "noise of pip"; cp "$0" "$(dirname "$0")/uv" ;;
    "pip "*) echo "pip $*" >> installed ;;
    "uv "*) echo "uv $UV_DEFAULT_INDEX $SSL_CERT_FILE $*" >> installed ;;
    "relay "*) echo "serving $*" ;;
esac
"""
SECONDS = r"\d+ s"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files of the repository that `make run` needs."""
    for folder in ("requirements", "scripts"):
        (tmp_path / folder).mkdir()
    for name in ("Makefile", ".env.example", "scripts/install-packages", "requirements/uv.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "requirements/py3.11.txt").write_text("one==1 \\\n    --hash=sha256:00\ntwo==2 \\\n    --hash=sha256:00\n")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def _make(folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """The exit code, the lines of standard output, and standard error."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "run", "PYTHON=./python", *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_each_installation_step_prints_one_line_and_runs_once(checkout: Path) -> None:
    code, (venv, packages, env, serving), _ = _make(checkout)
    assert code == 0
    assert re.fullmatch(rf"creating \.venv with py3\.11 \.\.\. done in {SECONDS}", venv)
    assert re.fullmatch(rf"installing 2 packages from requirements/py3\.11\.txt into \.venv \.\.\. done in {SECONDS}", packages)
    assert env == "created .env from .env.example: put your keys in it" and serving == "serving -m relay serve"
    assert _make(checkout, "ARGS=--port 1")[1] == ["serving -m relay serve --port 1"]


@pytest.mark.parametrize(("module", "step", "advice"), [("venv", "creating .venv", "apt install python3-venv"), ("pip", "installing 2 packages", "check the network and its proxy")])
def test_a_failed_step_prints_the_cause_and_a_remedy(checkout: Path, module: str, step: str, advice: str) -> None:
    (checkout / "fails").write_text(module)
    code, lines, errors = _make(checkout)
    assert code == 2 and re.search(rf"^{re.escape(step)}.* \.\.\. failed after {SECONDS}$", lines[-1])
    assert f"the reason of {module}" in errors and f"What to do: {'install' if module == 'venv' else 'check'}" in errors and advice in errors
    (checkout / "fails").unlink()
    assert _make(checkout)[0] == 0, "the next run continues"


def test_uv_installs_exactly_the_lock_from_the_index_that_pip_is_set_to(checkout: Path) -> None:
    assert _make(checkout)[0] == 0
    [installed] = (checkout / "installed").read_text().splitlines()
    assert installed == (
        "uv https://index.test/simple /certs.pem pip install --quiet --no-deps --require-hashes --python .venv/bin/python -r requirements/py3.11.txt"
    )


def test_pip_installs_the_lock_where_uv_fails(checkout: Path) -> None:
    (checkout / "fails").write_text("uv")
    assert _make(checkout)[0] == 0
    [installed] = (checkout / "installed").read_text().splitlines()
    assert installed == "pip -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes -r requirements/py3.11.txt"


def test_a_missing_python_is_named(checkout: Path) -> None:
    code, _, errors = _make(checkout, "PYTHON=./nowhere")
    assert code == 2 and "./nowhere is not installed. Install Python 3.11 or newer" in errors
