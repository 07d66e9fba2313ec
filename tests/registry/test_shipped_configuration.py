"""The shipped gateway.yaml, its database and its demo, unchanged, started in an empty folder.

No test here writes a configuration. Providers are reached through CLOUDFLARE_BASE_URL, or are the
built-in demo.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from relay import log
from relay.cli import doctor
from relay.cli.doctor import examine
from relay.client import AIGateway, AIGatewayError
from relay.core.paths import API
from relay.demo.provider import REPLY
from relay.registry.load import Sources
from relay.registry.packaged import packaged
from tests.conftest import Vendors
from tests.processes import ROOT, STARTED
from tests.relays import CLOUDFLARE_TOKEN, HANG_GUARD_S, KEYS, LogStream
from tests.template import Command, Popen, popen
from tests.upstream.cloudflare import cloudflare
from tests.upstream.raw import CLOSE, RESET, SILENCE, RawUpstream, Step, chunk, head, ok
from tests.upstream.vendors import APPS

CHAT = {"model": "demo-chat", "messages": [{"role": "user", "content": "hi"}]}
_RELAY_VARIABLES = re.compile(r"(.*_API_KEY|FAL_KEY|CLOUDFLARE_.*|RELAY_.*|OTEL_.*)\Z")
# The shipped providers that are reached by REST and by sockets through Cloudflare.
PROVIDERS = ["openai", "cartesia", "elevenlabs"]


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not _RELAY_VARIABLES.match(name)}


def _run(command: Command) -> tuple[int, str, str]:
    """Run a command to its end. Returns the exit code, standard output and standard error."""
    output, errors = command.folder / "output", command.folder / "errors"
    with output.open("w") as out, errors.open("w") as err:
        code = popen(command, out.fileno(), err.fileno()).wait(HANG_GUARD_S * 3)
    return code, output.read_text(), errors.read_text()


# Supervisor ---------------------------------------------------------------------------------------


@dataclass
class Shipped:
    """`relay serve --workers 2` in an empty folder."""

    process: Popen
    folder: Path
    url: str = ""

    @property
    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()

    def until(self, pattern: str, count: int = 1) -> re.Match[str]:
        end = time.monotonic() + HANG_GUARD_S * 3
        while time.monotonic() < end:
            if len(found := [match for line in self.log if (match := re.search(pattern, line))]) >= count:
                return found[0]
            assert self.process.poll() is None, self.log
            time.sleep(0.02)
        raise AssertionError(f"{pattern} is not in {self.log}")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shipped]:
    """One relay for all tests of this module; it must exit with 0 and leave no process."""
    folder = tmp_path_factory.mktemp("shipped")
    with (folder / "log").open("wb") as log:
        command = Command(("serve", "--workers", "2", "--port", "0"), folder, _clean_environment() | {"PYTHONPATH": str(ROOT)})
        process = popen(command, log.fileno(), log.fileno())
    running = Shipped(process, folder)
    try:
        running.url = running.until(STARTED).group(1)
        running.until("worker.ready", 2)
        workers = [json.loads(line)["pid"] for line in running.log if "worker.ready" in line]
        yield running
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_GUARD_S * 2) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(HANG_GUARD_S)
        LogStream.everything.extend(running.log)
    assert not any("Traceback" in line or "worker.died" in line for line in running.log)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.fixture
async def session(shipped: Shipped) -> AsyncIterator[aiohttp.ClientSession]:
    """A client with one connection, hence to one worker."""
    async with aiohttp.ClientSession(shipped.url, connector=aiohttp.TCPConnector(limit=1)) as client:
        yield client


DEMO = f"{API}/providers/demo"


async def _row(session: aiohttp.ClientSession, request_id: str) -> dict[str, Any]:
    """Return the row of a call once its worker has written it."""
    async with asyncio.timeout(HANG_GUARD_S):
        while True:
            async with session.get(f"{API}/logs/{request_id}") as answer:
                if answer.status == 200:
                    row: dict[str, Any] = await answer.json()
                    return row
                assert answer.status == 404, await answer.text()
            await asyncio.sleep(0.02)


async def test_a_whole_response_is_relayed_and_recorded(session: aiohttp.ClientSession, shipped: Shipped) -> None:
    async with session.post(f"{DEMO}/chat/completions", json=CHAT) as answer:
        assert answer.status == 200 and (await answer.json())["choices"][0]["message"]["content"] == REPLY
        request_id = answer.headers["cf-aig-log-id"]
    row = await _row(session, request_id)
    assert (row["provider"], row["model"], row["outcome"], row["status"]) == ("demo", "demo-chat", "relayed", 200)
    assert row["usage"]["output_tokens"] > 20 and row["cost_usd"] > 0
    with sqlite3.connect(shipped.folder / "data/relay.db") as database:
        assert database.execute("SELECT count(*) FROM exchanges WHERE id = ?", (request_id,)).fetchone() == (1,)


async def test_a_streamed_response_is_relayed_and_recorded(session: aiohttp.ClientSession) -> None:
    async with session.post(f"{DEMO}/chat/completions", json=CHAT | {"stream": True, "stream_options": {"include_usage": True}}) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        text = await answer.text()
        request_id = answer.headers["cf-aig-log-id"]
    assert text.count("data: ") > 20 and text.endswith("data: [DONE]\n\n")
    row = await _row(session, request_id)
    assert row["stream"] is True and row["usage"]["output_tokens"] > 20 and row["cost_usd"] > 0


async def test_speech_of_the_demo_has_a_price(session: aiohttp.ClientSession) -> None:
    async with session.post(f"{DEMO}/audio/speech", json={"model": "demo-speech", "input": "hi", "voice": "alloy"}) as answer:
        assert answer.status == 200 and await answer.read()
        request_id = answer.headers["cf-aig-log-id"]
    row = await _row(session, request_id)
    assert (row["usage"]["characters"], row["cost_usd"]) == (2, 0.00003)


async def test_a_session_is_relayed_and_recorded(session: aiohttp.ClientSession, shipped: Shipped) -> None:
    async with asyncio.timeout(HANG_GUARD_S), aiohttp.ClientSession(shipped.url) as own:
        async with own.ws_connect(f"{API}/ws/demo", protocols=["realtime"]) as ws:
            assert (await ws.receive_json())["type"] == "session.created"
            await ws.send_json({"type": "response.create", "response": {"output_modalities": ["text"]}})
            while (await ws.receive_json())["type"] != "response.done":
                pass
        while True:
            async with own.get(f"{API}/logs?transport=websocket") as answer:
                if rows := (await answer.json())["logs"]:
                    break
            await asyncio.sleep(0.02)
    assert (rows[0]["provider"], rows[0]["close_code"], rows[0]["outcome"]) == ("demo", 1000, "relayed")
    assert rows[0]["cost_usd"] > 0


async def test_the_usage_report_adds_up_calls(session: aiohttp.ClientSession) -> None:
    async with session.post(f"{DEMO}/embeddings", json={"model": "demo-embedding", "input": "one two three"}) as answer:
        assert answer.status == 200
    async with asyncio.timeout(HANG_GUARD_S):
        while True:
            async with session.get(f"{API}/usage?by=provider,model") as answer:
                sums = {(each["provider"], each["model"]): each for each in (await answer.json())["rows"]}
            if ("demo", "demo-embedding") in sums:
                break
            await asyncio.sleep(0.02)
    assert sums["demo", "demo-embedding"]["input_tokens"] >= 3 and sums["demo", "demo-embedding"]["cost_usd"] > 0


async def test_a_call_is_cached_on_request_and_a_purge_reaches_every_worker(session: aiohttp.ClientSession) -> None:
    question, wanted = CHAT | {"user": "cache"}, {"cf-aig-cache-ttl": "60"}
    statuses = []
    for _ in range(2):
        async with session.post(f"{DEMO}/chat/completions", json=question, headers=wanted) as answer:
            await answer.read()
            statuses.append(answer.headers["cf-aig-cache-status"])
    assert statuses == ["MISS", "HIT"]
    async with session.delete(f"{API}/cache?provider=demo") as answer:
        assert (answer.status, await answer.json()) == (200, {"purged": 1})
    async with session.post(f"{DEMO}/chat/completions", json=question, headers=wanted) as answer:
        await answer.read()
        assert answer.headers["cf-aig-cache-status"] == "MISS"


async def test_a_reload_reaches_every_worker(session: aiohttp.ClientSession) -> None:
    async with session.post(f"{API}/providers/reload") as answer:
        body = await answer.json()
    assert (answer.status, body["reloaded"], body["needs_restart"]) == (200, True, []), body
    assert {"demo", "openai", "google-ai-studio"} <= set(body["providers"])
    async with session.post(f"{DEMO}/chat/completions", json=CHAT) as answer:
        assert answer.status == 200, "the demo is still configured"


async def test_a_provider_without_a_key_is_an_error(session: aiohttp.ClientSession) -> None:
    async with session.get(f"{API}/providers/openai/models") as answer:
        assert answer.status == 503 and (await answer.json())["error"]["code"] == "provider_not_configured"


async def test_readiness_and_metrics_are_served(session: aiohttp.ClientSession) -> None:
    async with session.get("/readyz") as answer:
        body = await answer.json()
        assert (answer.status, body["status"], body["ledger"]) == (200, "ready", "ok")
    async with session.get("/metrics") as answer:
        assert answer.status == 200 and "relay_requests_in_flight" in await answer.text()


# Doctor -------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Sources]:
    """`keys(url)` returns the shipped file as `Sources`, in an empty working folder.

    The environment holds every provider's key and the base URL of Cloudflare's gateway at `url`.
    """
    log.setup("error", "json", LogStream())  # type: ignore[arg-type]  # as the command does
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if _RELAY_VARIABLES.match(name):
            monkeypatch.delenv(name)

    def sources(url: str) -> Sources:
        account = {"CLOUDFLARE_ACCOUNT_ID": "acct", "CLOUDFLARE_GATEWAY_ID": "gw", "CLOUDFLARE_API_KEY": CLOUDFLARE_TOKEN}
        for name, value in (KEYS | account | {"CLOUDFLARE_BASE_URL": f"{url}/v1"}).items():
            monkeypatch.setenv(name, value)
        return Sources(packaged() / "gateway.yaml", Path(".env"))

    return sources


async def _examine(sources: Sources, names: list[str]) -> tuple[bool, str]:
    lines: list[str] = []
    async with asyncio.timeout(HANG_GUARD_S * 2):
        healthy = await examine(sources, names, lines.append)
    LogStream.everything.extend(lines)
    return healthy, "\n".join(lines)


async def test_doctor_tries_several_providers_at_once(keys: Callable[[str], Sources], vendors: Vendors, aiohttp_server: Any) -> None:
    front = await aiohttp_server(cloudflare({name: vendors.url(name) for name in APPS}, CLOUDFLARE_TOKEN))
    _, text = await _examine(keys(str(front.make_url("")).rstrip("/")), PROVIDERS)
    assert "openai      ok         GET models: 200 in" in text and "cartesia    ok         WebSocket handshake: 101 in" in text, text
    assert f"{len(PROVIDERS)} provider(s) tried" in text and text.endswith("Providers with a slug are called through Cloudflare's gateway 'gw'.")


ENDLESS = (head("Content-Type: application/json", "Transfer-Encoding: chunked"), *[chunk(b"[" * 65536)] * 200, SILENCE)


@pytest.mark.parametrize(
    "steps",
    [(SILENCE,), (RESET,), (CLOSE,), (b"\x00\xffgarbage\r\n\r\n", CLOSE), (head("Content-Length: 10"), b"x", SILENCE), (ok(b"\xff\xfe{", status="500 Odd"), CLOSE), (ok(b"", status="999 Odd"), CLOSE), (ok(b'{"error": "\\u001b[2J\\n\\u0007"}', status="400 Bad"),), ENDLESS],
    ids=["silent", "reset", "closed", "garbage", "half a response", "error in no valid encoding", "odd status", "escapes", "endless"],
)
async def test_doctor_ends_with_a_report_whatever_providers_send(keys: Callable[[str], Sources], raw: RawUpstream, monkeypatch: pytest.MonkeyPatch, steps: tuple[Step, ...]) -> None:
    monkeypatch.setattr(doctor, "TIMEOUT_S", 0.5)
    raw.plays(*steps)
    _, text = await _examine(keys(raw.url), PROVIDERS)
    for name in PROVIDERS:
        assert len(re.findall(rf"^{name} +(?:ok|FAILED|not tried) +(?:GET|WebSocket (?:handshake|session):) ?", text, re.MULTILINE)) == 2, text
    assert f"{len(PROVIDERS)} provider(s) tried, " in text and "[the probe]" not in text
    assert all(line.isprintable() for line in text.splitlines()), "the report is for a terminal"


async def test_doctor_reports_why_the_relay_cannot_start(keys: Callable[[str], Sources], tmp_path: Path) -> None:
    sources = keys("http://127.0.0.1:9")
    await examine(sources, ["openai"], lambda _: None)  # creates the database
    with sqlite3.connect(tmp_path / "data/relay.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    healthy, text = await _examine(sources, PROVIDERS)
    assert not healthy and text.count("[the relay]") == 2 * len(PROVIDERS) and "of a newer relay" in text


def test_the_doctor_command_reports_and_exits_with_1(tmp_path: Path) -> None:
    environment = _clean_environment() | {"PYTHONPATH": str(ROOT), "CLOUDFLARE_ACCOUNT_ID": "acct", "CLOUDFLARE_BASE_URL": "http://127.0.0.1:9/v1"} | KEYS
    code, said, complaints = _run(Command(("doctor", *PROVIDERS), tmp_path, environment))
    assert code == 1 and "Traceback" not in complaints and "Unclosed" not in complaints
    assert said.count("FAILED") == 2 * len(PROVIDERS)
    LogStream.everything.append(said + complaints)


# In process ---------------------------------------------------------------------------------------


async def test_many_first_calls_start_the_relay_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with AIGateway.from_config(packaged() / "gateway.yaml", tmp_path / ".env") as gateway:
        calls = [gateway.request(provider="demo", endpoint="chat/completions", data=CHAT) for _ in range(20)]
        sessions = [gateway.connect(provider="demo") for _ in range(3)]
        opened = await asyncio.gather(*(one.__aenter__() for one in sessions), *calls)
        assert [answer.status for answer in opened[3:]] == [200] * 20
        for one in opened[:3]:
            assert (await one.receive())["type"] == "session.created"
            await one.close()
        events = [event async for event in gateway.stream(provider="demo", endpoint="chat/completions", data=CHAT | {"stream": True})]
        assert events[-1].data == "[DONE]"
    with sqlite3.connect(tmp_path / "data/relay.db") as database:
        assert database.execute("SELECT count(*) FROM exchanges").fetchone() == (24,)
    assert {task for task in asyncio.all_tasks() if task is not asyncio.current_task()} == set()


async def test_a_failed_start_is_reported_to_all_callers_and_may_be_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    database = tmp_path / "data/relay.db"
    async with AIGateway.from_config(packaged() / "gateway.yaml", tmp_path / ".env") as gateway:
        await gateway.request(provider="demo", endpoint="models")  # creates the database
    _version(database, "9999")
    async with AIGateway.from_config(packaged() / "gateway.yaml", tmp_path / ".env") as gateway:
        calls = [gateway.request(provider="demo", endpoint="models") for _ in range(5)]
        failures = await asyncio.gather(*calls, return_exceptions=True)
        assert [getattr(failure, "code", failure) for failure in failures] == ["relay_not_started"] * 5
        assert "of a newer relay" in str(failures[0])
        _version(database, "0001")
        assert (await gateway.request(provider="demo", endpoint="models")).ok


def _version(database: Path, version: str) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))


async def test_a_cancelled_caller_does_not_end_the_start_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with AIGateway.from_config(packaged() / "gateway.yaml", tmp_path / ".env") as gateway:
        first, second = (asyncio.create_task(gateway.request(provider="demo", endpoint="models")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).ok
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_closing_during_the_start_fails_the_waiting_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gateway = AIGateway.from_config(packaged() / "gateway.yaml", tmp_path / ".env")
    calls = [asyncio.create_task(gateway.request(provider="demo", endpoint="models")) for _ in range(3)]
    await asyncio.sleep(0)
    await gateway.close()
    failures = await asyncio.gather(*calls, return_exceptions=True)
    assert [getattr(failure, "code", failure) for failure in failures] == ["gateway_closed"] * 3
    assert {task for task in asyncio.all_tasks() if task is not asyncio.current_task()} == set()
    assert (await gateway.request(provider="demo", endpoint="models")).ok, "a call after a close starts the relay again"
    await gateway.close()
    await gateway.close()


def test_event_loops_may_follow_each_other_with_a_close_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gateway = AIGateway.from_config(packaged() / "gateway.yaml", tmp_path / ".env")

    async def once() -> int:
        status = (await gateway.request(provider="demo", endpoint="models")).status
        await gateway.close()
        return status

    assert [asyncio.run(once()) for _ in range(3)] == [200, 200, 200]


UNCLOSED = """
import asyncio, sys
from relay.client import AIGateway, AIGatewayError
gateway = AIGateway.from_config(sys.argv[1], ".env")

async def once():
    try:
        print("GOT", (await gateway.request(provider="demo", endpoint="models")).status)
    except AIGatewayError as error:
        print("GOT", error)

asyncio.run(once())
asyncio.run(once())
asyncio.run(gateway.close())
asyncio.run(once())
"""


def test_another_event_loop_without_a_close_is_refused_with_the_cause(tmp_path: Path) -> None:
    """In a process of its own, because Python warns of a gateway that is not closed."""
    environment = _clean_environment() | {"PYTHONPATH": str(ROOT)}
    code, said, complaints = _run(Command(("-c", UNCLOSED, str(packaged() / "gateway.yaml")), tmp_path, environment))
    assert code == 0, complaints
    first, refused, again = re.findall("^GOT (.*)", said, re.MULTILINE)
    assert (first, again) == ("200", "200")
    assert refused.startswith("wrong_event_loop: ") and "was closed without `await gateway.close()`" in refused


async def test_a_concurrent_event_loop_is_refused_with_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with AIGateway.from_config(packaged() / "gateway.yaml", tmp_path / ".env") as gateway:
        assert (await gateway.request(provider="demo", endpoint="models")).ok

        async def use_from_another_loop() -> None:
            with pytest.raises(AIGatewayError, match="is not this one"):
                await gateway.request(provider="demo", endpoint="models")
            with pytest.raises(AIGatewayError, match="is not this one"):
                await gateway.close()

        await asyncio.to_thread(asyncio.run, use_from_another_loop())
        assert (await gateway.request(provider="demo", endpoint="models")).ok
