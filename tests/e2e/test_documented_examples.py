"""Examples from the pages of users, unchanged, in a real Chromium through nginx."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import IN_SESSION_LOOP, _function_scoped_runner, opened  # noqa: F401
from tests.conftest import StartRelay, Vendors
from tests.nginx import Nginx
from tests.processes import ROOT
from tests.relays import CLIENT_KEY, KEYS, Relay

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
