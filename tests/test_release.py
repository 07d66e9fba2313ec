"""The release that scripts/release makes: its files, and that the relay runs from its wheel."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest
import yaml

import relay
from tests.processes import HANG_GUARD_S, ROOT, serve
from tests.template import Command, Process
from tests.tools import need

pytestmark = [pytest.mark.programs, pytest.mark.timeout(600)]
EDITED = ("gateway.yaml", ".env.example", "config/providers/groq.yaml")
VERSION = relay.__version__
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "init.defaultBranch=main")


def _tracked_files(*folders: str) -> list[str]:
    """The files that git tracks, or would add."""
    command = ("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z", *folders)
    files = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in files if name and (ROOT / name).exists()]


def _copy(folder: Path) -> None:
    """Make a repository of one commit: the files of this one, with a date for the version."""
    for name in _tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    changelog = folder / "CHANGELOG.md"
    changelog.write_text(re.sub(rf"^## {re.escape(VERSION)} - .*$", f"## {VERSION} - 2026-01-31", changelog.read_text(), flags=re.MULTILINE))
    subprocess.run((*GIT, "init", "-q"), check=True, cwd=folder)
    _commit(folder)


def _commit(folder: Path) -> None:
    subprocess.run((*GIT, "add", "--all"), check=True, cwd=folder)
    subprocess.run((*GIT, "commit", "-q", "-m", "all"), check=True, cwd=folder)


def _release(folder: Path, *options: str, version: str = VERSION) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "scripts/release", version, *options, "--no-image", "--skip-tests")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Released:
    """The files of a release, made in a checkout whose configuration was edited."""

    said: str
    output: Path
    wheel: Path
    bin: Path
    """The `bin` folder of a virtual environment with the wheel."""

    @property
    def env(self) -> dict[str, str]:
        """The environment: the dependencies come from the interpreter of this test."""
        return {"PYTHONPATH": sysconfig.get_path("purelib")}

    async def start(self, command: Command) -> Process:
        command = replace(command, env=command.env | self.env)
        return await asyncio.create_subprocess_exec(
            str(self.bin / "relay"), *command.arguments, cwd=command.folder, env=command.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )


def _make(base: Path) -> None:
    source = base / "source"
    source.mkdir()
    _copy(source)
    for name in EDITED:
        with (source / name).open("a") as file:
            file.write("# edited by the user of this checkout\n")
    _commit(source)
    # Files in the folder that are not in the commit.
    (source / "relay/core/__pycache__").mkdir()
    (source / "relay/core/__pycache__/text.cpython-311.pyc").write_bytes(b"")
    (source / "build/lib/relay").mkdir(parents=True)
    (source / "build/lib/relay/stale.py").write_text("")
    done = _release(source, "--dry-run", "--installed", "--output", str(base / "output"))
    assert done.returncode == 0, done.stderr
    (base / "said").write_text(done.stdout)
    [wheel] = (base / "output").glob("*.whl")
    subprocess.run((sys.executable, "-m", "venv", "--without-pip", base / "venv"), check=True)
    subprocess.run((sys.executable, "-m", "pip", "--python", str(base / "venv"), "install", "-q", "--no-deps", str(wheel)), check=True, cwd=base, env=os.environ | {"PIP_NO_INDEX": "1"})


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    """Make one release for all test processes: it takes several seconds."""
    need("npm")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    base /= "released"
    base.mkdir(exist_ok=True)
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "said").exists():
            _make(base)
    [wheel] = (base / "output").glob("*.whl")
    yield Released((base / "said").read_text(), base / "output", wheel, base / "venv/bin")


def test_a_release_has_every_file_with_its_checksum(released: Released) -> None:
    names = {file.name for file in released.output.iterdir()}
    assert {f"ai_gateway_relay-{VERSION}.tar.gz", f"ai_gateway_relay-{VERSION}-py3-none-any.whl", "requirements-py3.13-full.txt"} <= names
    sums = dict(reversed(line.split("  ")) for line in (released.output / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((released.output / name).read_bytes()).hexdigest() for name in names - {"SHA256SUMS"}}


def test_the_release_is_checked_before_it_is_complete(released: Released) -> None:
    checked = [line.removeprefix("checked ") for line in released.said.splitlines() if line.startswith("checked ")]
    assert checked[0] == released.wheel.name and checked[1].endswith(f"-{VERSION}.tgz")
    assert released.said.splitlines()[-1] == f"{released.output} is complete; no tag was made"


def test_the_source_archive_has_what_the_deployment_needs(released: Released) -> None:
    with tarfile.open(released.output / f"ai_gateway_relay-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(_tracked_files("config", "docs", "requirements", "relay")) <= names and {"CHANGELOG.md", "gateway.yaml", ".env.example"} <= names
    assert not any("stale.py" in name or "__pycache__" in name for name in names)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    for name in ("scripts/release", "relay/__init__.py", "web/package.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## {VERSION} - unreleased\n")
    subprocess.run((*GIT, "init", "-q"), check=True, cwd=folder)
    _commit(folder)
    return folder


def test_a_commit_that_is_not_ready_is_refused_with_all_reasons(copy: Path) -> None:
    (copy / "left.txt").write_text("")
    refused = _release(copy, "--dry-run", version="9.9.9")
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == [
        "scripts/release: the working tree has changes: commit them, or remove them",
        f"relay/__init__.py has the version {VERSION}",
        f"web/package.json has the version {VERSION}",
        "CHANGELOG.md has no section '## 9.9.9 - DATE'",
    ]


def test_a_version_is_released_once_and_with_a_date(copy: Path) -> None:
    subprocess.run((*GIT, "tag", f"v{VERSION}"), check=True, cwd=copy)
    refused = _release(copy)
    assert refused.stderr.splitlines() == [
        f"scripts/release: CHANGELOG.md dates {VERSION} 'unreleased', not YYYY-MM-DD",
        f"the tag v{VERSION} exists",
    ]


def test_what_is_committed_while_the_tests_run_is_neither_tagged_nor_released(copy: Path) -> None:
    """A release whose first step, `make test`, is a commit."""
    (copy / "CHANGELOG.md").write_text(f"# Changelog\n\n## {VERSION} - 2026-01-31\n")
    (copy / "Makefile").write_text("test:\n\techo later > later.txt && git add . && git -c user.name=t -c user.email=t@localhost commit -q -m later\n")
    _commit(copy)
    command = (sys.executable, "scripts/release", VERSION, "--dry-run", "--installed", "--no-image")
    refused = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert refused.stderr.splitlines() == ["scripts/release: the commit or the working tree changed while the tests ran"]


def test_the_wheel_has_exactly_the_files_of_the_package(released: Released) -> None:
    names = [name for name in zipfile.ZipFile(released.wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(_tracked_files("relay"))
    assert {"relay/py.typed", "relay/__main__.py", "relay/defaults/gateway.yaml"} <= set(names)


def test_the_wheel_has_the_configuration_of_the_commit_and_no_edits(released: Released) -> None:
    wheel = zipfile.ZipFile(released.wheel)
    for name in EDITED:
        assert wheel.read(f"relay/defaults/{name}") == (ROOT / "relay/defaults" / name).read_bytes()


async def test_two_workers_stream_from_the_demo_in_an_empty_folder(released: Released, tmp_path: Path) -> None:
    relay = await serve(tmp_path, None, "--workers", "2", start=released.start)
    try:
        body = {"model": "demo-chat", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        async with aiohttp.ClientSession() as session, asyncio.timeout(HANG_GUARD_S):
            async with session.post(relay.path("demo", "chat/completions"), json=body) as answer:
                assert answer.status == 200 and (await answer.text()).rstrip().endswith("data: [DONE]")
    finally:
        relay.send(signal.SIGTERM)
        code = await relay.process.wait()
    assert code == 0 and not any(str(ROOT) in line for line in relay.lines)


def test_the_ci_workflows_only_call_the_scripts() -> None:
    """They do nothing that another machine could not do."""
    ci, release = (yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())["jobs"] for name in ("ci", "release"))
    assert ci["test"]["steps"][-1]["run"] == ".ci/run"
    commands = [step["run"] for step in release["release"]["steps"] if "run" in step]
    assert [command for command in commands if "scripts/" in command] == ['scripts/release "$VERSION" --skip-tests']
    assert release["test"]["if"] == "github.ref == 'refs/heads/main'", "another branch may have passed no review"
    assert release["release"]["needs"] == "test" and release["test"]["uses"] == "./.github/workflows/ci.yml"


def test_ci_runs_on_every_python_that_has_a_lock() -> None:
    """Python 3.11 is that of Debian 12, in the job that runs everything."""
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["pythons"]
    assert job["steps"][-1]["run"] == "make fast"
    locked = {path.stem.removeprefix("py") for path in (ROOT / "requirements").glob("py*[0-9].txt")}
    assert {"3.11", *job["strategy"]["matrix"]["python"]} == locked
