"""web/AIGatewayChat.jsx in its example app, built with React 18 and 19, in a real Chromium through nginx."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tests.browser import chromium
from tests.conftest import StartRelay
from tests.nginx import Nginx
from tests.relays import HANG_GUARD_S, provider
from tests.sdk.lazy import Lazy
from tests.sdk.test_node import need_packages
from tests.web.test_client import WEB

if TYPE_CHECKING:
    from playwright.async_api import Page

playwright = Lazy("playwright.async_api")

pytestmark = pytest.mark.programs


class Model:
    """A provider that answers what the test tells it to."""

    def __init__(self) -> None:
        self.fails = 0
        self.pauses = asyncio.Event()
        self.pauses.set()
        self.cancelled = asyncio.Event()
        self.drop = False
        self.asked: list[Any] = []

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/chat/completions", self.chat)
        app.router.add_get("/realtime", self.realtime)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        if self.fails:
            self.fails -= 1
            return web.json_response({"error": {"message": "The model is overloaded."}}, status=503)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        try:
            for word in ("Hello ", "from ", "the model."):
                await answer.write(b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}).encode() + b"\n\n")
                await self.pauses.wait()
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled.set()
            raise
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def realtime(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=("realtime",))
        await socket.prepare(request)
        await socket.send_json({"type": "session.created", "session": {}})
        async for message in socket:
            event = json.loads(message.data)
            self.asked.append(event)
            if event["type"] == "response.create":
                await socket.send_json({"type": "response.output_text.delta", "delta": "Live "})
                if self.drop:
                    self.drop = False
                    assert request.transport is not None
                    request.transport.abort()  # type: ignore[attr-defined]
                    break
                await socket.send_json({"type": "response.output_text.delta", "delta": "answer."})
                await socket.send_json({"type": "response.done", "response": {"status": "completed"}})
        return socket


@pytest.fixture(scope="module", params=["19", pytest.param("18", marks=pytest.mark.soak)], ids=["react-19", "react-18"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example app, built once with each React."""
    need_packages(WEB)
    folder = tmp_path_factory.mktemp("built") / "app"
    command = ("../../node_modules/.bin/vite", "build", "--outDir", str(folder), "--emptyOutDir")
    environment = {"PATH": os.environ["PATH"], "REACT": request.param}
    subprocess.run(command, cwd=WEB / "examples/react", env=environment, check=True, capture_output=True, timeout=HANG_GUARD_S * 5)
    return folder


@pytest.fixture
async def chat(built: Path, start: StartRelay, aiohttp_server: Any, nginx: Nginx) -> AsyncIterator[tuple[Page, Model]]:
    model = Model()
    relay = await start(demo=provider(str((await aiohttp_server(model.app())).make_url("")), websocket={"default_path": "realtime", "subprotocols": {"realtime": "pass"}}))
    shutil.copytree(built, nginx.root, dirs_exist_ok=True)
    async with chromium(await nginx.before(relay.port)) as page:
        yield page, model


async def _say(page: Page, text: str) -> None:
    await page.get_by_label("Message").fill(text)
    await page.keyboard.press("Enter")


async def test_a_chat_streams_and_remembers(chat: tuple[Page, Model]) -> None:
    page, model = chat
    model.pauses.clear()
    await _say(page, "hi")
    await playwright.expect(page.get_by_role("log")).to_contain_text("Hello")
    await playwright.expect(page.get_by_role("log")).not_to_contain_text("the model.")
    model.pauses.set()
    await playwright.expect(page.get_by_role("log")).to_contain_text("Hello from the model.")
    await _say(page, "and again")
    await playwright.expect(page.locator(".aigw-assistant[data-state=done]")).to_have_count(2)
    assert [message["role"] for message in model.asked[1]["messages"]] == ["user", "assistant", "user"]


async def test_stop_ends_the_call_and_retry_asks_again(chat: tuple[Page, Model]) -> None:
    page, model = chat
    model.pauses.clear()
    await _say(page, "hi")
    await playwright.expect(page.get_by_role("log")).to_contain_text("Hello")
    await page.keyboard.press("Escape")
    await playwright.expect(page.get_by_text("Stopped.")).to_be_visible()
    await asyncio.wait_for(model.cancelled.wait(), 15)
    model.pauses.set()
    await page.get_by_role("button", name="Retry").click()
    await playwright.expect(page.get_by_role("log")).to_contain_text("Hello from the model.")
    await playwright.expect(page.get_by_role("article")).to_have_count(2)


async def test_an_error_is_shown_nothing_typed_is_lost_and_retry_works(chat: tuple[Page, Model]) -> None:
    page, model = chat
    model.fails = 1
    await _say(page, "a precious question")
    await playwright.expect(page.get_by_role("alert")).to_have_text("The model is overloaded.")
    await playwright.expect(page.get_by_role("log")).to_contain_text("a precious question")
    await page.get_by_role("button", name="Retry").click()
    await playwright.expect(page.get_by_role("log")).to_contain_text("Hello from the model.")
    assert [asked["messages"][-1]["content"] for asked in model.asked] == ["a precious question"] * 2


async def test_a_realtime_session_answers_reconnects_and_says_so(chat: tuple[Page, Model]) -> None:
    page, model = chat
    await page.get_by_label("Realtime").check()
    await _say(page, "hi")
    await playwright.expect(page.get_by_role("log")).to_contain_text("Live answer.")
    await playwright.expect(page.get_by_role("status")).to_have_text("Connected.")
    model.drop = True
    await _say(page, "once more")
    await playwright.expect(page.get_by_role("alert")).to_contain_text("connection was lost")
    await playwright.expect(page.get_by_role("status")).to_have_text("Connected again.")
    await page.get_by_role("button", name="Retry").click()
    await playwright.expect(page.locator(".aigw-assistant").last).to_have_text("AnswerLive answer.")
    assert model.asked[1] == {"type": "response.create", "response": {"output_modalities": ["text"]}}


async def test_it_is_used_by_keyboard_and_named_for_screen_readers(chat: tuple[Page, Model]) -> None:
    page, _ = chat
    await playwright.expect(page.get_by_role("region", name="Chat")).to_be_visible()
    await playwright.expect(page.get_by_role("button", name="Send")).to_be_disabled()
    await page.get_by_label("Message").focus()
    await page.keyboard.type("one")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("two")
    assert await page.get_by_label("Message").input_value() == "one\ntwo"
    await page.keyboard.press("Tab")
    await playwright.expect(page.get_by_role("button", name="Send")).to_be_focused()
    await page.keyboard.press("Enter")
    await playwright.expect(page.get_by_role("log")).to_contain_text("Hello from the model.")
    color = await page.evaluate("() => { document.documentElement.style.setProperty('--aigw-accent', 'rgb(1, 2, 3)'); return getComputedStyle(document.querySelector('.aigw-user')).backgroundColor }")
    assert color == "rgb(1, 2, 3)"


def test_the_example_imports_as_users_do() -> None:
    assert '"../utils/AIGatewayClient"' in (WEB / "AIGatewayChat.jsx").read_text()
    source = WEB / "examples/react/src"
    assert (source / "components/AIGatewayChat.jsx").resolve() == WEB / "AIGatewayChat.jsx"
    assert (source / "utils/AIGatewayClient.js").resolve() == WEB / "AIGatewayClient.js"
