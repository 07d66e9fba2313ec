"""A relay in one process: first run, banner, signals, drain, and refused starts."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType

import relay as relay_package
from tests.conftest import StartRelay
from tests.processes import ROOT, STARTED, run
from tests.relays import canary, provider, write_config
from tests.server.conftest import Serve
from tests.template import Start, executed, forked, on_terminal
from tests.upstream.raw import LAST_CHUNK, SILENCE, SSE_HEAD, Pause, RawUpstream, chunk, ok
from tests.upstream.vendors import echo, vendor

pytestmark = pytest.mark.programs

EVENT = b"data: 1\n\n"


async def test_the_banner_of_the_first_run_shows_a_command_that_streams(served: Serve, tmp_path: Path) -> None:
    """The folder contains only the copied example: no key and no network are needed."""
    shutil.copy(ROOT / ".env.example", tmp_path / ".env")
    relay = await run(tmp_path, "serve", "--port", "0", start=on_terminal)
    command = (await relay.until("^(curl .*)$"))[1]
    process = await asyncio.create_subprocess_exec(*shlex.split(command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert out.startswith(b"data: {") and out.endswith(b"data: [DONE]\n\n") and b"Hello!" in out
    await relay.until(r"ok .*POST demo/chat/completions  200  demo-chat  .*tokens  \$")
    await relay.stop()


async def test_the_banner_on_a_terminal_shows_providers_and_access(tmp_path: Path) -> None:
    providers = {"up": provider("http://127.0.0.1:9"), "down": provider("http://127.0.0.1:9", "NOT_SET_KEY")}
    server = {"hosts": ["relay.lan"], "public_url": "https://ai.example.com"}
    write_config(tmp_path, {"demo": {"enabled": True}, "server": server, "cors": {"origins": ["https://app.example.com"]}, "providers": providers})
    (tmp_path / ".env").chmod(0o600)
    relay = await run(tmp_path, "serve", "--port", "0", start=on_terminal)
    await relay.until("^curl ")
    lines = [line.rstrip() for line in relay.lines]
    url = (await relay.until(r"url +(http://127.0.0.1:\d+)"))[1]
    assert lines[0] == f"relay {relay_package.__version__} is ready: pid {relay.pid}"
    assert f"  url        {url}" in lines and "  config     gateway.yaml" in lines
    assert "  access     no key needed, by the host names localhost, 127.0.0.1, ::1, relay.lan, ai.example.com" in lines
    assert "  pages      https://app.example.com (cors.origins), and the relay's own" in lines
    [shown] = [line for line in lines if line.startswith("  providers")]
    assert shown.startswith("  providers  demo, up; 1 not configured: `") and shown.endswith(" -m relay check` lists them")
    assert len(lines) < 12 and "relay.started" not in "\n".join(lines)
    async with aiohttp.ClientSession() as session, session.get(f"{url}/readyz") as answer:
        assert answer.status == 200, "the banner is printed once the relay is ready"
    await relay.stop()


async def test_the_banner_appears_once_all_workers_are_ready(tmp_path: Path) -> None:
    write_config(tmp_path, {"providers": {}})
    relay = await run(tmp_path, "serve", "--port", "0", "--workers", "2", start=on_terminal)
    await relay.until("is ready: pid .*, 2 workers")
    assert sum("worker.ready" in line for line in relay.lines) == 2
    await relay.stop()


async def test_no_color_is_respected(tmp_path: Path) -> None:
    write_config(tmp_path, {"providers": {}})
    for environment, is_coloured in (({"NO_COLOR": "1"}, False), ({}, True)):
        relay = await run(tmp_path, "serve", "--port", "0", env=environment, start=on_terminal)
        await relay.until("is ready")
        await relay.stop()
        assert ("\x1b[" in "".join(relay.lines)) is is_coloured


@pytest.mark.parametrize("start", [on_terminal, forked])
async def test_a_json_log_has_an_event_instead_of_the_banner(tmp_path: Path, start: Start) -> None:
    write_config(tmp_path, {"log": {"format": "json"}, "providers": {"down": provider("http://127.0.0.1:9", "NOT_SET_KEY")}})
    relay = await run(tmp_path, "serve", "--port", "0", start=start)
    await relay.until(STARTED)
    await relay.stop()
    events = [json.loads(line) for line in relay.lines]
    [started] = [event for event in events if event["event"] == "relay.started"]
    assert started["pid"] == relay.pid and started["workers"] == 1 and started["config"] == "gateway.yaml"
    assert (started["providers_ready"], started["providers_not_configured"]) == (0, 1)


async def test_a_pretty_log_in_a_pipe_has_no_banner(tmp_path: Path) -> None:
    write_config(tmp_path, {"log": {"format": "pretty"}, "providers": {}})
    relay = await run(tmp_path, "serve", "--port", "0")
    await relay.until("relay.started.*url=http://")
    await relay.stop()
    assert not any("is ready" in line or "\x1b" in line for line in relay.lines)


async def test_tests_run_on_the_event_loop_of_relay_serve() -> None:
    """Tests in this process use the same event loop as `relay serve`."""
    expected = "asyncio" if os.environ.get("TEST_LOOP") == "asyncio" else "uvloop"
    assert any(each.__module__.startswith(expected) for each in type(asyncio.get_running_loop()).__mro__)


async def test_a_placeholder_account_does_not_call_cloudflare(served: Serve, tmp_path: Path) -> None:
    text = (ROOT / ".env.example").read_text().replace("CLOUDFLARE_ACCOUNT_ID=", "CLOUDFLARE_ACCOUNT_ID=your_account_id")
    (tmp_path / ".env").write_text(text)
    relay = await served(None)
    async with aiohttp.ClientSession() as session, session.get(f"{relay.url}/api/v1/ai-gateway/providers") as answer:
        assert {each["rest"] for each in (await answer.json())["providers"]} == {"direct"}


async def test_sigterm_finishes_calls_and_closes_sessions_with_1012(served: Serve, raw: RawUpstream, aiohttp_server: Any) -> None:
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, chunk(EVENT), LAST_CHUNK)
    relay = await served({"providers": {"up": provider(raw.url), "sock": provider(str(server.make_url("")), websocket={"default_path": "echo"})}})
    async with aiohttp.ClientSession() as session:
        streams = [await session.get(relay.path("up", "x")) for _ in range(20)]
        sockets = [await session.ws_connect(relay.path("sock"), autoclose=False) for _ in range(20)]
        for stream in streams:
            assert await stream.content.readany() == EVENT
        relay.send(signal.SIGTERM)
        for ws in sockets:
            message = await ws.receive(20)
            assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 1012, "the relay is restarting")
            await ws.close()
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"{relay.url}/healthz")
        gate.set()
        assert [await stream.read() for stream in streams] == [EVENT] * 20
    assert await relay.ended() == 0
    outcomes = [json.loads(line)["outcome"] for line in relay.lines if '"exchange"' in line]
    assert outcomes == ["relayed"] * 0 + [*outcomes] and outcomes.count("relayed") == 20


async def test_a_draining_relay_is_not_ready(served: Serve, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(EVENT), Pause(1.5), LAST_CHUNK)
    relay = await served({"providers": {"up": provider(raw.url)}})
    async with aiohttp.ClientSession() as session:
        stream = await session.get(relay.path("up", "x"))
        # A keep-alive connection, opened before the drain.
        reader, writer = await asyncio.open_connection("127.0.0.1", int(relay.url.rpartition(":")[2]))
        request = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        writer.write(request)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await reader.readuntil(b"}")
        relay.send(signal.SIGTERM)
        await relay.until("drain.started")
        writer.write(request)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 503")
        writer.close()
        await stream.read()
    assert await relay.ended() == 0


async def test_calls_are_cancelled_after_the_drain_timeout_and_the_exit_code_is_0(served: Serve, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(EVENT), SILENCE)
    relay = await served({"server": {"drain_timeout_s": 0.5}, "providers": {"up": provider(raw.url)}})
    async with aiohttp.ClientSession() as session:
        stream = await session.get(relay.path("up", "x"))
        relay.send(signal.SIGTERM)
        with pytest.raises(aiohttp.ClientPayloadError):
            await stream.read()
    assert await relay.ended() == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_the_relay_at_once(served: Serve, raw: RawUpstream, second: int) -> None:
    raw.plays(SSE_HEAD, chunk(EVENT), SILENCE)
    relay = await served({"server": {"drain_timeout_s": 3600}, "providers": {"up": provider(raw.url)}})
    async with aiohttp.ClientSession() as session:
        await session.get(relay.path("up", "x"))
        relay.send(signal.SIGTERM)
        await relay.until("drain.started")
        relay.send(second)
        assert await relay.ended() == 0
    assert any('"exchange"' in line for line in relay.lines), "the log is flushed"


async def test_sighup_loads_the_new_registry_and_keeps_the_old_one_after_an_error(served: Serve, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, chunk(EVENT), LAST_CHUNK)
    raw.plays(ok(b"new"))
    relay = await served({"providers": {"up": provider(f"{raw.url}/old")}})
    config = relay.folder / "gateway.yaml"
    async with aiohttp.ClientSession() as session:
        running = await session.get(relay.path("up", "x"))
        assert await running.content.readany() == EVENT
        config.write_text(config.read_text().replace("/old", "/new"))
        relay.send(signal.SIGHUP)
        await relay.until("reload.done")
        async with session.get(relay.path("up", "x")) as answer:
            assert await answer.read() == b"new"
        assert [arrived.target for arrived in raw.arrived] == ["/old/x", "/new/x"]
        config.write_text("sever: {}")
        relay.send(signal.SIGHUP)
        assert "did you mean 'server'?" in (await relay.until("reload.refused.*")).string
        async with session.post(f"{relay.url}/api/v1/ai-gateway/providers/reload") as answer:
            assert answer.status == 422 and "did you mean 'server'?" in (await answer.json())["error"]["message"]
        async with session.get(relay.path("up", "x")) as answer:
            assert await answer.read() == b"new"
        gate.set()
        assert await running.read() == EVENT, "a running stream continues"


async def test_the_api_reloads_the_registry(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"x"))
    relay = await start(one=provider(raw.url))
    config = relay.folder / "gateway.yaml"
    config.write_text(config.read_text().replace("one:", "two:"))
    status, _, body = await relay.call("POST", f"{relay.url}/api/v1/ai-gateway/providers/reload")
    assert (status, json.loads(body)["providers"]) == (200, ["two"])
    assert (await relay.call("GET", relay.path("two", "x")))[2] == b"x"
    assert (await relay.call("GET", relay.path("one", "x")))[1]["x-relay-error"] == "unknown_provider"


async def _run_until_exit(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    process = await run(folder, "serve", *arguments, env=env)
    code = await process.ended()
    return code, "\n".join(process.lines)


@pytest.mark.parametrize("reuse_port", [False, True])
async def test_a_port_in_use_is_reported(tmp_path: Path, reuse_port: bool) -> None:
    """Also if the other program shares its port: it would get half of the calls."""
    with socket.socket() as other:
        if reuse_port:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, text = await _run_until_exit(tmp_path, "--port", str(port))
    assert code == 1 and f"port {port} on 127.0.0.1 is in use by another program" in text


async def test_the_relay_listens_beyond_loopback_only_with_open(tmp_path: Path) -> None:
    code, text = await _run_until_exit(tmp_path, "--host", "0.0.0.0", "--port", "0")
    assert code == 1 and "--open" in text
    relay = await run(tmp_path, "serve", "--host", "0.0.0.0", "--port", "0", "--open")
    await relay.until(r'"url":"http://127.0.0.1:\d+"')
    await relay.stop()


async def test_bad_configuration_is_refused_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("server:\n  prot: 1\n")
    code, text = await _run_until_exit(tmp_path)
    assert code == 2 and "gateway.yaml:2:3: server.prot: unknown key; did you mean 'port'?" in text
    (tmp_path / "gateway.yaml").unlink()
    (tmp_path / ".env").mkdir()
    code, text = await _run_until_exit(tmp_path)
    assert code == 2 and ".env:1:1: cannot be read: Is a directory" in text


async def test_several_workers_are_refused_with_limits_per_process(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("websocket: {max_sessions_per_client: 5}")
    code, text = await _run_until_exit(tmp_path, "--workers", "2", "--port", "0")
    assert code == 2 and "gateway.yaml:1:" in text and "max_sessions_per_client is counted in each process" in text


async def test_neither_output_nor_arguments_contain_a_secret(served: Serve, raw: RawUpstream) -> None:
    relay = await served({"providers": {"up": provider(raw.url)}, "cloudflare": {"api_key": canary("token")}}, by=executed)
    assert "CANARY" not in "\n".join(relay.lines)
    assert b"CANARY" not in Path(f"/proc/{relay.pid}/cmdline").read_bytes()
