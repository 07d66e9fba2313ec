"""Provide a relay with stand-in providers that we did not write, and a home folder for an agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, packaged_provider
from tests.sdk.test_node import NODE, need_packages

AGENTS = Path(__file__).parent
PROVIDERS = ("openai", "anthropic", "google-ai-studio")
NOTE = "a note of the test"


@pytest.fixture
async def aimock(home: Path) -> AsyncIterator[str]:
    """The URL of stand-in providers that we did not write. Each lets its agent read or change the
    note in its work folder.
    """
    need_packages(NODE)
    need_packages(AGENTS)
    process = await asyncio.create_subprocess_exec("node", str(NODE / "aimock.mjs"), str(home / "work"), stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    yield (await asyncio.wait_for(process.stdout.readline(), HANG_GUARD_S)).decode().strip()
    process.terminate()
    await process.wait()


@pytest.fixture
async def relay(aimock: str, start: StartRelay, sqlite_setting: str) -> Relay:
    entries = {name: packaged_provider(name, aimock) for name in PROVIDERS}
    return await start({"access": {"mode": "required"}, "database": sqlite_setting, "providers": entries})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "CLAUDE_CONFIG_DIR", "CODEX_HOME", "RELAY_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home/work").mkdir(parents=True)
    (tmp_path / "home/work" / "note.txt").write_text(f"{NOTE}\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"
