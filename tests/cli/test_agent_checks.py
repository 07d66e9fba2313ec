"""`relay doctor --agents`: one free call with the settings of each connected program."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from relay.cli.agent_checks import check_agents
from relay.cli.main import main
from tests.conftest import StartRelay, Vendors
from tests.relays import CLIENT_KEY, LogStream, Relay
from tests.upstream.vendors import vendor

CLIENTS = {"access": {"mode": "required"}, "clients": {"me": {"key": CLIENT_KEY}}}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "CLAUDE_CONFIG_DIR", "CODEX_HOME", "RELAY_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
async def relay(start: StartRelay, vendors: Vendors) -> Relay:
    entries = vendors.entries()
    return await start(CLIENTS | {"providers": {name: entries[name] for name in ("openai", "anthropic", "google-ai-studio")}})


async def connect(relay: Relay, tool: str) -> None:
    arguments = ["connect", tool, "--config", str(relay.folder / "gateway.yaml"), "--url", relay.url, "--key", CLIENT_KEY]
    assert await asyncio.to_thread(main, arguments) == 0


async def check(home: Path, *names: str, **environment: str) -> tuple[bool, str]:
    lines: list[str] = []
    healthy = await asyncio.to_thread(check_agents, home, environment, names, lines.append)
    text = "\n".join(lines)
    LogStream.everything.append(text)
    return healthy, text


async def test_each_connected_program_is_tested_with_its_own_settings(relay: Relay, home: Path) -> None:
    for tool in ("claude", "codex", "gemini", "opencode", "aider", "env"):
        await connect(relay, tool)
    healthy, text = await check(home)
    assert healthy, text
    assert "codex     ok         GET openai /models: 200 in" in text
    assert "claude    ok         GET anthropic /v1/models: 404 in" in text, "the stand-in has no list of models"
    assert text.count("opencode  ok") == 3 and "env       not tried  its variables are those of a shell" in text
    assert text.endswith("6 program(s) connected, 0 problem(s).")
    assert {event["client"] for event in await relay.events(count=7)} == {"me"}


async def test_a_program_that_is_not_connected_is_not_tried(home: Path) -> None:
    healthy, text = await check(home, "claude", "vim")
    assert not healthy and "claude    not tried  not connected: `relay connect claude`" in text and "vim: `relay connect` knows no such program" in text
    healthy, text = await check(home)
    assert healthy and text.count("not tried") == 6


async def test_a_revoked_key_and_a_changed_url_are_found(relay: Relay, home: Path) -> None:
    await connect(relay, "claude")
    path = home / ".claude/settings.json"
    text = path.read_text()
    path.write_text(text.replace(CLIENT_KEY, "rk_unknown"))
    healthy, said = await check(home, "claude")
    assert not healthy and "[the client's key]" in said and "to do: run `relay connect claude` again" in said
    path.write_text(text.replace(relay.url, "https://u:secret@api.example.com"))
    healthy, said = await check(home, "claude")
    assert not healthy and f"env.ANTHROPIC_BASE_URL is https://…@api.example.com/api/v1/ai-gateway/providers/anthropic, and not a URL of {relay.url}" in said
    path.write_text("{}")
    assert "has no env.ANTHROPIC_BASE_URL or no env.ANTHROPIC_AUTH_TOKEN" in (await check(home, "claude"))[1]
    path.write_text("{")
    healthy, said = await check(home, "claude")
    assert not healthy and "line 1 is not JSON" in said


async def test_the_environment_wins_over_the_file_of_gemini(relay: Relay, home: Path) -> None:
    await connect(relay, "gemini")
    healthy, text = await check(home, "gemini", GOOGLE_GEMINI_BASE_URL="https://other.example")
    assert not healthy and "GOOGLE_GEMINI_BASE_URL is https://other.example" in text


async def test_a_relay_that_does_not_run_and_a_server_that_is_no_relay_are_found(home: Path, start: StartRelay, aiohttp_server: Any) -> None:
    relay = await start(CLIENTS | {"providers": {}})
    await connect(relay, "codex")
    path = home / ".codex/config.toml"
    record = next((home / ".local/state").rglob("codex.json"))

    def move(url: str) -> None:
        for file in (path, record):
            file.write_text(file.read_text().replace(relay.url, url))

    healthy, text = await check(home, "codex")
    assert not healthy and "[the relay]" in text and "docs/errors.md explains unknown_provider" in text
    other = await aiohttp_server(web.Application())
    before = path.read_text(), record.read_text()
    move(str(other.make_url("")).rstrip("/"))
    assert "404 of a server that is no relay  [network]" in (await check(home, "codex"))[1]
    path.write_text(before[0]), record.write_text(before[1])
    move("http://127.0.0.1:1")
    assert "no relay answers (Connection refused)" in (await check(home, "codex"))[1]


async def test_a_failure_of_the_provider_is_shown_with_its_message(home: Path, start: StartRelay, aiohttp_server: Any) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "bad key"}}, status=401)

    server = await aiohttp_server(vendor(("GET", "/{path:.*}", refuse)))
    entry = {"base_url": str(server.make_url("")), "auth": {"header": "Authorization", "value": "Bearer ${OPENAI_API_KEY}"}}
    relay = await start(CLIENTS | {"providers": {"openai": entry}})
    await connect(relay, "aider")
    healthy, text = await check(home, "aider")
    assert not healthy and "GET openai /models: 401 bad key  [the provider]" in text and "`relay doctor openai`" in text


def test_the_command_needs_no_configuration(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home.parent / "gateway.yaml").write_text("broken: [")
    assert main(["doctor", "--agents"]) == 0
    assert "0 program(s) connected" in capsys.readouterr().out
