"""The wheel that `pip install .` makes: what is in it, and that the relay runs from it alone."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest

from tests.processes import HANG_GUARD_S, ROOT, output, serve
from tests.template import Command, Process

pytestmark = [pytest.mark.programs, pytest.mark.timeout(600)]
EDITED = ("gateway.yaml", ".env.example", "config/providers/groq.yaml")


def _of_the_commit(*folders: str) -> list[str]:
    """The files that git knows, or would take."""
    command = ("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z", *folders)
    files = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in files if name and (ROOT / name).exists()]


@dataclass(frozen=True)
class Installed:
    """A wheel made from a checkout whose configuration its user has edited, and a venv with it."""

    wheel: Path
    bin: Path

    @property
    def env(self) -> dict[str, str]:
        """The dependencies are those that this test runs with."""
        return {"PYTHONPATH": sysconfig.get_path("purelib")}

    async def start(self, command: Command) -> Process:
        command = replace(command, env=command.env | self.env)
        return await asyncio.create_subprocess_exec(
            str(self.bin / "relay"), *command.arguments, cwd=command.folder, env=command.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    for name in _of_the_commit():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name in EDITED:
        with (source / name).open("a") as file:
            file.write("# edited by the user of this checkout\n")
    (source / "relay/core/__pycache__").mkdir()
    (source / "relay/core/__pycache__/text.cpython-311.pyc").write_bytes(b"")
    offline = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    wheels = base / "wheels"
    made = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(wheels), str(source))
    subprocess.run(made, check=True, cwd=base, env=os.environ | offline)
    [wheel] = wheels.glob("*.whl")
    venv.create(base / "venv", with_pip=False)
    subprocess.run((sys.executable, "-m", "pip", "--python", str(base / "venv"), "install", "-q", "--no-deps", str(wheel)), check=True, cwd=base, env=os.environ | offline)
    return Installed(wheel, base / "venv/bin")


def test_it_has_every_file_of_the_package_and_no_other(installed: Installed) -> None:
    names = [name for name in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(_of_the_commit("relay"))
    assert {"relay/py.typed", "relay/__main__.py", "relay/defaults/gateway.yaml"} <= set(names)


def test_it_has_the_configuration_of_the_commit_and_not_what_the_user_made_of_it(installed: Installed) -> None:
    wheel = zipfile.ZipFile(installed.wheel)
    for name in EDITED:
        assert wheel.read(f"relay/defaults/{name}") == (ROOT / "relay/defaults" / name).read_bytes()


async def test_check_and_init_work_in_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    relay = str(installed.bin / "relay")
    checked = await output(relay, "check", env=installed.env, cwd=tmp_path)
    assert "no problems, 15 providers" in checked and str(ROOT) not in checked
    await output(relay, "init", env=installed.env, cwd=tmp_path)
    written = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {name.removeprefix("relay/defaults/"): (ROOT / name).read_bytes() for name in _of_the_commit("relay/defaults")}


async def test_two_workers_serve_a_stream_of_the_demo_from_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    relay = await serve(tmp_path, None, "--workers", "2", start=installed.start)
    try:
        body = {"model": "demo-chat", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        async with aiohttp.ClientSession() as session, asyncio.timeout(HANG_GUARD_S):
            async with session.post(relay.path("demo", "chat/completions"), json=body) as answer:
                assert answer.status == 200 and (await answer.text()).rstrip().endswith("data: [DONE]")
    finally:
        relay.send(signal.SIGTERM)
        code = await relay.process.wait()
    assert code == 0 and not any(str(ROOT) in line for line in relay.lines)
