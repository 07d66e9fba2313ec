"""Examples from the pages of users, unchanged, in a real Chromium through nginx; and the backends
that get tickets for such pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.browser import IN_SESSION_LOOP, _function_scoped_runner, opened  # noqa: F401
from tests.conftest import StartRelay, Vendors
from tests.nginx import Nginx
from tests.processes import ROOT, free_port
from tests.relays import CLIENT_KEY, HANG_GUARD_S, KEYS, Relay, canary
from tests.tools import need

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

pytestmark = [pytest.mark.programs, IN_SESSION_LOOP]


@dataclass
class Stage:
    page: Page
    relay: Relay
    vendors: Vendors


@pytest.fixture
async def stage(browser: Browser, start: StartRelay, vendors: Vendors, nginx: Nginx) -> AsyncIterator[Stage]:
    """A page that nginx serves with the client script, and the relay under /api/."""
    relay = await start({"server": {"trusted_proxies": ["127.0.0.1"]}, "providers": vendors.entries()})
    (nginx.root / "utils").mkdir()
    shutil.copy(ROOT / "web/AIGatewayClient.js", nginx.root / "utils")
    (nginx.root / "index.html").write_text("<!doctype html><title>app</title>")
    async with opened(browser, await nginx.start(relay.port)) as page:
        yield Stage(page, relay, vendors)


def _check_requests(stage: Stage) -> None:
    """Check that the provider got the key of the relay, and no header that identifies the page."""
    for seen in stage.vendors.seen("openai"):
        assert seen.header("Authorization") == f"Bearer {KEYS['OPENAI_API_KEY']}"
        assert CLIENT_KEY not in f"{seen.target} {seen.headers}"
        assert not {"origin", "referer", "cookie"} & seen.names


async def test_the_fetch_example(stage: Stage) -> None:
    text = await stage.page.evaluate(
        """async () => {
          const response = await fetch('/api/v1/ai-gateway/providers/openai/chat/completions', {
            method: 'POST',
            headers: { 'Content-Type': 'application/json' },
            body: JSON.stringify({ model: 'gpt-5', messages: [{ role: 'user', content: 'Hello!' }] }),
          });
          return (await response.json()).choices[0].message.content;
        }"""
    )
    assert text == "Hello wörld"
    _check_requests(stage)


async def test_the_websocket_example(stage: Stage) -> None:
    done = await stage.page.evaluate(
        """async () => {
          const { createOpenAIRealtimeClient } = await import('/utils/AIGatewayClient.js');
          return new Promise(async (resolve, reject) => {
            const client = createOpenAIRealtimeClient({
              onMessage: (message) => { if (message.type === 'response.done') { client.disconnect(); resolve(message); } },
              onError: reject,
            });
            await client.connect();
            client.send({ type: 'response.create', response: { modalities: ['text'], instructions: 'Say hello.' } });
          });
        }"""
    )
    assert done["response"]["usage"]["total_tokens"] == 253
    [seen] = stage.vendors.seen("openai")
    assert seen.target == "/v1/realtime?model=gpt-realtime-2.1"
    assert seen.messages == [{"type": "response.create", "response": {"output_modalities": ["text"], "instructions": "Say hello."}}]
    _check_requests(stage)


async def test_the_custom_header_example(stage: Stage) -> None:
    status = await stage.page.evaluate(
        """async () => {
          const { aiGateway } = await import('/utils/AIGatewayClient.js');
          const response = await aiGateway.request({
            provider: 'openai', endpoint: 'chat/completions',
            data: { model: 'gpt-5', messages: [{ role: 'user', content: 'Hello!' }] },
            headers: { 'OpenAI-Beta': 'assistants=v1' },
          });
          return [response.status, (await response.json()).object, response.headers.get('cf-aig-log-id').length];
        }"""
    )
    assert status == [200, "chat.completion", 36]
    [seen] = stage.vendors.seen("openai")
    assert seen.header("OpenAI-Beta") == "assistants=v1"
    _check_requests(stage)


@pytest.mark.parametrize("realtime", [["realtime"], []], ids=["with-realtime", "secrets-only"])
async def test_two_secrets_as_subprotocols(stage: Stage, realtime: list[str]) -> None:
    """As pages wrote it for Cloudflare: the relay strips both and accepts one that was offered."""
    session: dict[str, Any] = await stage.page.evaluate(
        """([key, protocols]) => new Promise((resolve, reject) => {
          const url = `ws://${location.host}/api/v1/ai-gateway/ws/openai?model=gpt-realtime`;
          const socket = new WebSocket(url, [...protocols, `openai-insecure-api-key.${key}`, `cf-aig-authorization.${key}`]);
          socket.onerror = () => reject(new Error('refused'));
          socket.onmessage = ({ data }) => { resolve({ first: JSON.parse(data).type, protocol: socket.protocol }); socket.close(); };
        })""",
        [CLIENT_KEY, realtime],
    )
    assert session["first"] == "session.created"
    assert session["protocol"] == (realtime or [f"openai-insecure-api-key.{CLIENT_KEY}"])[0]
    [seen] = stage.vendors.seen("openai")
    assert seen.header("Sec-WebSocket-Protocol") in ("realtime", None)
    _check_requests(stage)


async def test_a_page_receives_each_event_of_a_stream_at_once(stage: Stage) -> None:
    text = await stage.page.evaluate(
        """async () => {
          const { aiGateway } = await import('/utils/AIGatewayClient.js');
          let text = '';
          for await (const event of aiGateway.stream({ provider: 'openai', endpoint: 'chat/completions', data: { model: 'gpt-5', messages: [], stream: true } }))
            if (event.data !== '[DONE]') text += event.json().choices[0].delta.content;
          return text;
        }"""
    )
    assert text == "Hello wörld"


async def test_a_page_of_another_origin_is_refused_with_an_error(stage: Stage) -> None:
    message = await stage.page.evaluate(
        """async (url) => {
          const { createAIGatewayClient, createAIGateway } = await import('/utils/AIGatewayClient.js');
          const reported = [];
          await createAIGatewayClient({ provider: 'openai', url }).connect().catch((error) => reported.push(error.code, error.message));
          await createAIGateway({ url }).request({ provider: 'openai', endpoint: 'models' }).catch((error) => reported.push(error.code));
          return reported;
        }""",
        stage.relay.url,
    )
    assert message == ["connect_failed", "The relay cannot be reached, or does not allow this page's origin.", "relay_unreachable"]
    assert not stage.vendors.seen("openai")


# --- the backends that get tickets (docs/browser.md)

APP_KEY, PAGE = canary("client-key"), "https://app.example.com"


async def _relay_of_app(start: StartRelay, vendors: Vendors, database: str) -> Relay:
    clients = {"app": {"key": APP_KEY, "providers": ["openai"], "origins": [PAGE]}}
    return await start({"clients": clients, "database": database, "providers": vendors.entries()})


async def _check_backend(relay: Relay, url: str) -> None:
    """Check that the endpoint of a backend gives a ticket that opens a session."""
    status, _, body = await relay.call("POST", f"{url}/ticket")
    assert status == 200 or status == 201, body
    answer = json.loads(body)
    async with relay.client.ws_connect(answer["websocket_url"], protocols=answer["subprotocols"], headers={"Origin": PAGE}) as socket:
        assert (await socket.receive_json())["type"] == "session.created"


def _block(language: str, about: str) -> str:
    text = (ROOT / "docs/browser.md").read_text()
    [found] = [each for each in re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if about in each]
    return str(found)


async def test_the_aiohttp_backend_gets_tickets(start: StartRelay, vendors: Vendors, sqlite_setting: str, aiohttp_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await _relay_of_app(start, vendors, sqlite_setting)
    monkeypatch.setenv("RELAY_URL", relay.url)
    monkeypatch.setenv("APP_KEY", APP_KEY)
    names: dict[str, Any] = {}
    exec(compile(_block("python", "add_post"), "docs/browser.md", "exec"), names)
    server = await aiohttp_server(names["app"])
    await _check_backend(relay, str(server.make_url("")).rstrip("/"))


async def _run_backend(relay: Relay, port: int, *command: str, **environment: str) -> None:
    """Run a backend on a port, and check it as soon as it answers."""
    env = {"PATH": os.environ["PATH"], "RELAY_URL": relay.url, "APP_KEY": APP_KEY} | environment
    process = await asyncio.create_subprocess_exec(*command, env=env)
    try:
        async with asyncio.timeout(HANG_GUARD_S):
            while True:
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    await _check_backend(relay, f"http://127.0.0.1:{port}")
                    break
                await asyncio.sleep(0.02)
    finally:
        process.kill()
        await process.wait()


async def test_the_node_backend_gets_tickets(start: StartRelay, vendors: Vendors, sqlite_setting: str, tmp_path: Path) -> None:
    need("node")
    relay, port = await _relay_of_app(start, vendors, sqlite_setting), free_port()
    (tmp_path / "backend.mjs").write_text(_block("js", "createServer"))
    await _run_backend(relay, port, "node", str(tmp_path / "backend.mjs"), PORT=str(port))


async def test_the_fastapi_backend_gets_tickets(start: StartRelay, vendors: Vendors, sqlite_setting: str, tmp_path: Path) -> None:
    relay, port = await _relay_of_app(start, vendors, sqlite_setting), free_port()
    (tmp_path / "backend.py").write_text(_block("python", "FastAPI"))
    command = (sys.executable, "-m", "uvicorn", "backend:app", "--port", str(port), "--log-level", "warning")
    await _run_backend(relay, port, *command, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
