"""Coding agents over many turns, with everything that happens in an afternoon: a restart of the
relay, compaction, a resumed conversation, sub-agents. `make agents` runs them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.cli.main import main
from tests.agents.codex import Codex, codex
from tests.agents.conftest import PROVIDERS
from tests.agents.test_agents import ANSWERS, connect, program_of, run, until_the_key_is_valid
from tests.agents.test_agents import calls_of as agent_calls
from tests.processes import Served, free_port, serve
from tests.relays import Relay, packaged_provider

pytestmark = [pytest.mark.programs, pytest.mark.soak, pytest.mark.timeout(300)]

TURNS = 30
WARM_UP = 1
"""Codex's first request on its first socket, which aimock answers like any other."""
WITH_SOCKETS = ("model=gpt-5", "model_providers.relay.supports_websockets=true")
HTTP_ONLY = ("model=gpt-5",)


class Restarted:
    """A relay in a process of its own, which is restarted on its port."""

    def __init__(self, folder: Path, aimock_url: str) -> None:
        self.folder, self.port = folder, free_port()
        entries = {name: packaged_provider(name, aimock_url) for name in PROVIDERS}
        self._document: dict[str, Any] | None = {"access": {"mode": "required"}, "database": str(folder / "relay.db"), "providers": entries}
        self._served: Served | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._served = await serve(self.folder, self._document, "--port", str(self.port))
        self._document = None

    async def stop(self) -> None:
        assert self._served is not None
        await self._served.stop()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def rows(self, transport: str) -> list[dict[str, Any]]:
        """The records of the calls or sessions, in the order in which they began."""
        with sqlite3.connect(self.folder / "relay.db") as database:
            found = database.execute("SELECT record FROM exchanges WHERE transport = ? ORDER BY id", (transport,)).fetchall()
        return [json.loads(record) for (record,) in found]


@pytest.fixture
async def restarted(tmp_path: Path, aimock: str, home: Path) -> AsyncIterator[Restarted]:
    """A relay to which Codex is connected."""
    (tmp_path / "served").mkdir()
    relay = Restarted(tmp_path / "served", aimock)
    await relay.start()
    await asyncio.to_thread(main, ["connect", "codex", "--config", str(relay.folder / "gateway.yaml"), "--url", relay.url])
    await until_the_key_is_valid(home, "codex")
    yield relay
    await relay.stop()


def environment(home: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(home)}


def used(responses: int) -> tuple[int, int]:
    """The tokens of so many responses: a turn has two, a tool call and what is said then."""
    return 20 * responses, 5 * responses


def tokens(rows: list[dict[str, Any]]) -> tuple[int, int]:
    usages = [row["usage"] for row in rows if row.get("usage")]
    return sum(usage["input_tokens"] for usage in usages), sum(usage["output_tokens"] for usage in usages)


def calls_of(relay: Restarted) -> list[dict[str, Any]]:
    """The REST calls of the program; those of `relay doctor` name no user agent."""
    return [row for row in relay.rows("rest") if row.get("user_agent")]


async def make_turns(agent: Codex, count: int) -> None:
    for number in range(count):
        assert await agent.turn(f"Again: what is in note.txt? ({number})") == ANSWERS["codex"]


async def test_codex_makes_30_turns_over_websockets_while_the_relay_is_restarted_once(restarted: Restarted, home: Path) -> None:
    async with codex(program_of("codex"), WITH_SOCKETS, home / "work", environment(home)) as agent:
        await agent.begin()
        await make_turns(agent, TURNS // 2 - 1)
        await asyncio.gather(make_turns(agent, 1), restarted.restart())
        await make_turns(agent, TURNS - TURNS // 2)
        errors = agent.named("error")
    await restarted.stop()
    assert all(error["willRetry"] for error in errors), "at most it says that it connects again"
    first, second = restarted.rows("websocket")
    assert (first["error"], first["close_code"], first["agent_session"]) == ("draining", 1012, second["agent_session"])
    assert {row["client"] for row in (first, second)} == {"codex"} and calls_of(restarted) == []
    # What the restart cut off is asked again.
    assert tokens([first, second]) in [used(2 * TURNS + WARM_UP), used(2 * TURNS + WARM_UP + 1)]


@pytest.mark.parametrize("settings", [WITH_SOCKETS, HTTP_ONLY], ids=["websocket", "http"])
async def test_codex_compacts_a_conversation_and_goes_on(restarted: Restarted, home: Path, settings: tuple[str, ...]) -> None:
    async with codex(program_of("codex"), settings, home / "work", environment(home)) as agent:
        await agent.begin()
        await make_turns(agent, 2)
        await agent.compact()
        await make_turns(agent, 2)
        assert agent.named("error") == []
    await restarted.stop()
    rows, warm_up = (restarted.rows("websocket"), WARM_UP) if settings is WITH_SOCKETS else (calls_of(restarted), 0)
    assert tokens(rows) == used(2 * 4 + 1 + warm_up), "two for each turn, and the summary"


@pytest.mark.parametrize("settings", [WITH_SOCKETS, HTTP_ONLY], ids=["websocket", "http"])
async def test_codex_resumes_a_conversation_in_a_new_process(restarted: Restarted, home: Path, settings: tuple[str, ...]) -> None:
    thread = ""
    for _ in range(2):
        async with codex(program_of("codex"), settings, home / "work", environment(home)) as agent:
            await (agent.resume(thread) if thread else agent.begin())
            thread = agent.thread
            await make_turns(agent, 2)
            assert agent.named("error") == []
    await restarted.stop()
    rows, warm_ups = (restarted.rows("websocket"), 2 * WARM_UP) if settings is WITH_SOCKETS else (calls_of(restarted), 0)
    assert tokens(rows) == used(2 * 4 + warm_ups) and {row["agent_session"] for row in rows} == {thread}


async def test_claude_code_uses_sub_agents_whose_calls_name_their_parent(relay: Relay, home: Path) -> None:
    await connect(relay, "claude")
    await until_the_key_is_valid(home, "claude")
    said = await run(home, "claude", "-p", "Let two agents work")
    calls = await agent_calls(relay)
    assert "Both agents have worked." in said
    (session,) = {call["agent_session"] for call in calls}
    assert Counter(call.get("agent_parent") for call in calls) == {None: 2, session: 2}
    assert tokens(calls) == used(4)
