"""Coding agents, unmodified: one turn each, after `relay connect` wrote their settings."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from relay.cli.agent_checks import check_agents
from relay.cli.agent_tools import TOOLS
from relay.cli.connections import load_record, records_folder
from relay.cli.main import main
from tests.agents.conftest import AGENTS, NOTE
from tests.conftest import StartRelay, Vendors
from tests.ledger.test_ledger import rows
from tests.processes import ROOT
from tests.relays import CLIENT_KEY, HANG_GUARD_S, KEYS, Relay, packaged_provider
from tests.sdk.test_node import need_packages

pytestmark = pytest.mark.programs

READ = "Read note.txt"
COMMANDS = {
    "claude": ("claude", "-p", READ),
    "codex": ("codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "-m", "gpt-5", READ),
    "gemini": ("gemini", "--skip-trust", "-m", "gemini-2.5-flash", "-p", READ),
    "opencode": ("opencode", "run", "-m", "openai/gpt-5", READ),
    "aider": ("aider", "--model", "openai/gpt-5", "--edit-format", "diff", "--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings",
              "--message", "Change the note", "note.txt"),
}  # fmt: skip
"""The programs of package-lock.json and aider.txt. Without -m Gemini CLI would first ask a model
which model to use."""
CHANGED = "a changed note"
ANSWERS = dict.fromkeys(COMMANDS, "The tool has read the note.") | {"aider": "Applied edit to note.txt"}
QUIET = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"}


async def connect(relay: Relay, *arguments: str) -> None:
    command = ["connect", *arguments, "--config", str(relay.folder / "gateway.yaml")]
    assert await asyncio.to_thread(main, command if "--undo" in command else [*command, "--url", relay.url]) == 0


async def until_the_key_is_valid(home: Path, tool: str) -> None:
    """A relay that runs applies a new key within a second."""
    lines: list[str] = []
    async with asyncio.timeout(HANG_GUARD_S):
        while not await asyncio.to_thread(check_agents, home, {}, [tool], lines.append):
            assert "client's key" in lines[-3], lines
            await asyncio.sleep(0.4)  # wrong keys are counted


def program_of(tool: str) -> Path:
    """The program: aider is one of Python, the others are of npm."""
    return ROOT / ".venv/aider/bin/aider" if tool == "aider" else AGENTS / "node_modules/.bin" / tool


async def turn(home: Path, tool: str, **environment: str) -> str:
    """Run one turn of a program in its home folder. Returns what it prints."""
    return await run(home, *COMMANDS[tool], **environment)


async def run(home: Path, tool: str, *arguments: str, **environment: str) -> str:
    """Run a program in its home folder. Returns what it prints."""
    process = await asyncio.create_subprocess_exec(
        str(program_of(tool)), *arguments, cwd=home / "work", env={"PATH": os.environ["PATH"], "HOME": str(home)} | QUIET | environment,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(HANG_GUARD_S * 3):
            out, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    return out.decode()


async def calls_of(relay: Relay) -> list[dict[str, Any]]:
    """The rows of the program's calls; those of `relay doctor` name no user agent."""
    return [row for row in await rows(relay) if row.get("user_agent")]


def test_every_tool_is_run() -> None:
    assert set(TOOLS) == set(COMMANDS)


@pytest.mark.parametrize("tool", COMMANDS)
async def test_an_agent_uses_a_tool_through_the_relay_with_its_own_key(relay: Relay, home: Path, tool: str) -> None:
    if not program_of(tool).exists():
        pytest.skip(f"{tool} is not installed: scripts/install-test-tools does, for Python 3.11 and 3.12")
    await connect(relay, tool)
    await until_the_key_is_valid(home, tool)
    said = await turn(home, tool)
    assert ANSWERS[tool] in said, said
    assert (home / "work/note.txt").read_text() == (CHANGED if tool == "aider" else NOTE) + "\n"
    calls = await calls_of(relay)
    assert {call["client"] for call in calls} == {TOOLS[tool].client} and {call["status"] for call in calls} == {200}
    metered = [call["usage"] for call in calls if call.get("usage")]
    assert [(usage["input_tokens"], usage["output_tokens"]) for usage in metered][-2:] == [(20, 5)] * (1 if tool == "aider" else 2)
    assert not any(key in said for key in KEYS.values())
    record = load_record(records_folder(home, {}), tool)
    assert record is not None and record.key is not None
    await connect(relay, tool, "--undo")
    left = {path.relative_to(home) for path in home.rglob("*") if path.is_file() and record.key in path.read_text(errors="replace")}
    assert left == set(), "no file of the program has the key"


async def test_claude_code_keeps_its_subscription_beside_a_key_of_the_relay(start: StartRelay, vendors: Vendors, home: Path) -> None:
    """What docs/agents.md says of a subscription."""
    need_packages(AGENTS)
    entry = packaged_provider("anthropic", vendors.url("anthropic")) | {"client_credentials": "allow"}
    relay = await start({"access": {"mode": "required"}, "clients": {"me": {"key": CLIENT_KEY}}, "providers": {"anthropic": entry}})
    (home / ".claude").mkdir()
    variables = {"ANTHROPIC_BASE_URL": relay.path("anthropic").rstrip("/"), "ANTHROPIC_CUSTOM_HEADERS": f"x-relay-key: {CLIENT_KEY}"}
    (home / ".claude/settings.json").write_text(json.dumps({"env": variables}))
    assert "Hi" in await turn(home, "claude", CLAUDE_CODE_OAUTH_TOKEN="sk-ant-oat01-subscription")
    assert {event["client"] for event in await relay.events()} == {"me"}
    seen = vendors.seen("anthropic")
    assert seen and all(each.header("Authorization") == "Bearer sk-ant-oat01-subscription" for each in seen)
    assert not any("x-api-key" in each.names or CLIENT_KEY in str(each.headers) for each in seen)
