"""web/AIGatewayChat.jsx in its example app, built with React 18 and 19, in a real Chromium.

One relay behind nginx and one provider serve all tests of this module.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.browser import IN_SESSION_LOOP, TIMEOUT_MS
from tests.nginx import Nginx
from tests.relays import HANG_GUARD_S, provider, start_relay, stop_relay
from tests.sdk.lazy import Lazy
from tests.sdk.test_node import need_packages
from tests.web.test_client import WEB

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

playwright = Lazy("playwright.async_api")

pytestmark = [pytest.mark.programs, IN_SESSION_LOOP]

WORDS = ("Hello ", "from ", "the model.")
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
RICH = """Some `code`, **strong** and [a link](https://example.com/).

```python
print("a line that is much wider than any phone is, so that the block scrolls instead of the page")
```

| one column | another column | a third column | a fourth column |
|---|---|---|---|
| averyveryverylongwordwithoutanyspaces | b | c | averyveryverylongwordwithoutanyspaces |

1. first
2. second

> quoted https://example.com/averyveryverylongpathwithoutanyspaces/averyveryverylongpathwithoutany
"""


@dataclass
class Model:
    """The responses of the provider, and the requests that it received."""

    words: tuple[str, ...] = WORDS
    fails: int = 0
    """The number of calls that fail before one succeeds."""
    status: int = 503
    continues: asyncio.Event = field(default_factory=asyncio.Event)
    """If set, responses are complete; else they stop after their first word."""
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    end: bytes = b"data: [DONE]\n\n"
    drop: bool = False
    """If set, the next realtime response ends with a lost connection."""
    requests: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.continues.set()


class Upstream:
    """A provider of chat completions and Realtime that responds as `model` is set."""

    model: Model

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/chat/completions", self.chat)
        app.router.add_get("/realtime", self.realtime)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        model = self.model
        model.requests.append(await request.json())
        if model.fails:
            model.fails -= 1
            error = {"message": "The model is overloaded."}
            return web.json_response({"error": error}, status=model.status)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        try:
            for word in model.words:
                choice = {"index": 0, "delta": {"content": word}}
                await answer.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
                await model.continues.wait()
        except (asyncio.CancelledError, ConnectionError):
            model.cancelled.set()
            raise
        await answer.write(model.end)
        return answer

    async def realtime(self, request: web.Request) -> web.StreamResponse:
        model = self.model
        socket = web.WebSocketResponse(protocols=("realtime",))
        await socket.prepare(request)
        await socket.send_json({"type": "session.created", "session": {}})
        answers = []
        async for message in socket:
            event = json.loads(message.data)
            model.requests.append(event)
            if event["type"] == "response.create":
                answers.append(asyncio.ensure_future(self._respond(request, socket)))
        await asyncio.gather(*answers, return_exceptions=True)
        return socket

    async def _respond(self, request: web.Request, socket: web.WebSocketResponse) -> None:
        model = self.model
        await socket.send_json({"type": "response.output_text.delta", "delta": "Live "})
        if model.drop:
            model.drop = False
            assert request.transport is not None
            request.transport.abort()  # type: ignore[attr-defined]
            return
        await model.continues.wait()
        await socket.send_json({"type": "response.output_text.delta", "delta": "answer."})
        await socket.send_json({"type": "response.done", "response": {"status": "completed"}})


@dataclass
class Site:
    """The example app behind nginx, with a relay whose provider `demo` is `upstream`."""

    url: str
    browser: Browser
    upstream: Upstream


Chat = tuple["Page", Model]


REACTS = ["19", pytest.param("18", marks=pytest.mark.soak)]


@pytest.fixture(scope="module", params=REACTS, ids=["react-19", "react-18"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the example app, once with each version of React."""
    need_packages(WEB)
    folder = tmp_path_factory.mktemp("built") / "app"
    command = ("../../node_modules/.bin/vite", "build", "--outDir", str(folder), "--emptyOutDir")
    environment = {"PATH": os.environ["PATH"], "REACT": request.param}
    subprocess.run(
        command, cwd=WEB / "examples/react", env=environment, check=True, capture_output=True,
        timeout=HANG_GUARD_S * 5,
    )  # fmt: skip
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def site(browser: Browser, built: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    upstream, nginx = Upstream(), Nginx(folder)
    async with TestServer(upstream.app()) as server:
        websocket = {"default_path": "realtime", "subprotocols": {"realtime": "pass"}}
        demo = provider(str(server.make_url("")), websocket=websocket)
        relay = await start_relay(folder, {"providers": {"demo": demo}})
        shutil.copytree(built, nginx.root, dirs_exist_ok=True)
        yield Site(await nginx.start(relay.port), browser, upstream)
        await nginx.stop()
        await stop_relay(relay)


@pytest_asyncio.fixture(loop_scope="session")
async def chat(site: Site, request: pytest.FixtureRequest) -> AsyncIterator[Chat]:
    """A new page; a parameter sets options of the browser, such as its viewport."""
    site.upstream.model = Model()
    context = await site.browser.new_context(base_url=site.url, **getattr(request, "param", {}))
    page = await context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    await page.goto("/")
    yield page, site.upstream.model
    site.upstream.model.continues.set()
    await context.close()


async def _send_text(page: Page, text: str) -> None:
    await page.get_by_label("Message").fill(text)
    await page.keyboard.press("Enter")


async def _wait_for_answers(page: Page, count: int = 1) -> None:
    """Wait until `count` answers are complete."""
    done = page.locator(".aigw-assistant[data-state=done]")
    await playwright.expect(done).to_have_count(count)


async def _requests(model: Model, count: int) -> list[Any]:
    async with asyncio.timeout(HANG_GUARD_S):
        while len(model.requests) < count:
            await asyncio.sleep(0.005)
    return model.requests


async def test_a_chat_streams_and_sends_its_history(chat: Chat) -> None:
    page, model = chat
    model.continues.clear()
    await _send_text(page, "hi")
    await playwright.expect(page.get_by_role("log")).to_contain_text("Hello")
    await playwright.expect(page.get_by_role("log")).not_to_contain_text("the model.")
    model.continues.set()
    await playwright.expect(page.get_by_role("log")).to_contain_text("Hello from the model.")
    await _send_text(page, "and again")
    await _wait_for_answers(page, 2)
    assert [message["role"] for message in model.requests[1]["messages"]] == [
        "user",
        "assistant",
        "user",
    ]


async def test_an_example_of_the_greeting_is_sent_and_the_greeting_disappears(chat: Chat) -> None:
    page, model = chat
    await playwright.expect(page.get_by_text("How can I help?")).to_be_visible()
    await page.get_by_role("button", name="Compare REST and WebSocket").click()
    await _wait_for_answers(page)
    await playwright.expect(page.get_by_text("How can I help?")).to_have_count(0)
    assert model.requests[0]["messages"] == [
        {"role": "user", "content": "Compare REST and WebSocket in a table."}
    ]
    await page.get_by_role("button", name="New chat").click()
    await playwright.expect(page.get_by_text("How can I help?")).to_be_visible()
    await playwright.expect(page.get_by_role("article")).to_have_count(0)


async def test_stop_ends_the_call_and_retry_sends_it_again(chat: Chat) -> None:
    page, model = chat
    model.continues.clear()
    await _send_text(page, "hi")
    await playwright.expect(page.get_by_role("log")).to_contain_text("Hello")
    await page.keyboard.press("Escape")
    await playwright.expect(page.get_by_text("Stopped.")).to_be_visible()
    await asyncio.wait_for(model.cancelled.wait(), 15)
    model.continues.set()
    await page.get_by_role("button", name="Retry").click()
    await playwright.expect(page.get_by_role("log")).to_contain_text("Hello from the model.")
    await playwright.expect(page.get_by_role("article")).to_have_count(2)


async def test_an_error_is_shown_the_typed_text_is_kept_and_retry_works(chat: Chat) -> None:
    page, model = chat
    model.fails = 1
    await _send_text(page, "a precious question")
    await playwright.expect(page.get_by_role("alert")).to_contain_text("The model is overloaded.")
    await playwright.expect(page.get_by_role("log")).to_contain_text("a precious question")
    await page.get_by_role("button", name="Retry").click()
    await playwright.expect(page.get_by_role("log")).to_contain_text("Hello from the model.")
    assert [request["messages"][-1]["content"] for request in model.requests] == [
        "a precious question"
    ] * 2


async def test_an_error_says_what_to_do(chat: Chat) -> None:
    page, model = chat
    for status, query, advice in (
        (401, "", "Check the token and the provider's key."),
        (429, "", "Wait a moment, then retry."),
        (200, "?provider=nobody", "Choose a provider that gateway.yaml has."),
        (0, "", "Check that the relay runs"),
    ):
        model.fails, model.status = int(status >= 400), status
        await page.goto(f"/{query}")
        if not status:
            await page.route("**/api/**", lambda route: route.abort())
        await _send_text(page, "hi")
        await playwright.expect(page.get_by_role("alert")).to_contain_text(advice)
        await playwright.expect(page.get_by_label("Message")).to_be_focused()


async def test_a_link_to_the_example_cannot_send_messages_to_another_host(chat: Chat) -> None:
    page, model = chat
    await page.goto("/?url=http://127.0.0.1:9&token=x&examples=x&model=linked")
    await _send_text(page, "hi")
    await _wait_for_answers(page)
    assert [request["model"] for request in model.requests] == ["linked"]


async def test_an_answer_is_complete_with_a_finish_reason_and_failed_without_an_end(
    chat: Chat,
) -> None:
    page, model = chat
    model.end = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'
    await _send_text(page, "hi")
    await _wait_for_answers(page)
    model.end = b""
    await _send_text(page, "and now?")
    await playwright.expect(page.get_by_role("alert")).to_contain_text("The answer ended early.")
    await playwright.expect(page.locator(".aigw-markdown").last).to_have_text("".join(WORDS))


async def test_a_failed_answer_without_text_is_not_in_the_history(chat: Chat) -> None:
    page, model = chat
    model.fails = 1
    await _send_text(page, "hi")
    await playwright.expect(page.get_by_role("alert")).to_be_visible()
    await _send_text(page, "hello?")
    await _wait_for_answers(page)
    assert [message["content"] for message in model.requests[1]["messages"]] == ["hi", "hello?"]


async def test_a_realtime_session_answers_and_shows_that_it_reconnects(chat: Chat) -> None:
    page, model = chat
    await page.get_by_label("Realtime").check()
    await _send_text(page, "hi")
    await playwright.expect(page.get_by_role("log")).to_contain_text("Live answer.")
    await playwright.expect(page.get_by_role("status")).to_have_text("Connected.")
    assert model.requests[1] == {
        "type": "response.create",
        "response": {"output_modalities": ["text"]},
    }
    model.drop = True
    await _send_text(page, "once more")
    await playwright.expect(page.get_by_role("alert")).to_contain_text("connection was lost")
    await playwright.expect(page.get_by_role("status")).to_have_text("Connected again.")
    model.requests.clear()
    await page.get_by_role("button", name="Retry").click()
    await _wait_for_answers(page, 2)
    items = [event["item"]["content"][0]["text"] for event in model.requests if "item" in event]
    assert items == ["hi", "Live answer.", "once more"], "the new session of the provider has no history"


async def test_the_conversation_continues_when_the_transport_changes(chat: Chat) -> None:
    page, model = chat
    await _send_text(page, "hi")
    await _wait_for_answers(page)
    await page.get_by_label("Realtime").check()
    sent = (await _requests(model, 3))[1:]
    assert [event["item"] for event in sent] == [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello from the model."}],
        },
    ]
    await _send_text(page, "and live?")
    await _wait_for_answers(page, 2)
    assert [event["type"] for event in model.requests[3:]] == [
        "conversation.item.create",
        "response.create",
    ]
    await page.get_by_role("radio", name="Chat").check()
    await _send_text(page, "and back?")
    await _wait_for_answers(page, 3)
    assert model.requests[-1]["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello from the model."},
        {"role": "user", "content": "and live?"},
        {"role": "assistant", "content": "Live answer."},
        {"role": "user", "content": "and back?"},
    ]


async def test_no_delta_of_a_stopped_realtime_answer_appears_in_the_next(chat: Chat) -> None:
    page, model = chat
    await page.get_by_label("Realtime").check()
    model.continues.clear()
    await _send_text(page, "hi")
    await playwright.expect(page.get_by_role("log")).to_contain_text("Live")
    await page.get_by_role("button", name="Stop").click()
    await playwright.expect(page.get_by_text("Stopped.")).to_be_visible()
    await _send_text(page, "again")
    # item, create, cancel; then a new session with both questions and the answer
    await _requests(model, 7)
    model.continues.set()
    await _wait_for_answers(page)
    await playwright.expect(page.locator(".aigw-markdown")).to_have_text(["Live", "Live answer."])
    assert model.requests[2]["type"] == "response.cancel"


async def test_markdown_is_shown_and_both_code_and_answer_are_copied(chat: Chat) -> None:
    page, model = chat
    model.words = (RICH[:40], RICH[40:])
    # A page over plain HTTP has no clipboard API.
    await page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    await page.evaluate(
        "document.addEventListener('copy', () => { copied = document.activeElement.value })"
    )
    await _send_text(page, "hi")
    await _wait_for_answers(page)
    answer = page.locator(".aigw-markdown")
    await playwright.expect(answer.locator("strong")).to_have_text("strong")
    await playwright.expect(answer.locator("td")).to_have_count(4)
    await playwright.expect(answer.locator("ol > li")).to_have_text(["first", "second"])
    await playwright.expect(answer.get_by_role("link", name="a link")).to_have_attribute(
        "rel", "noopener noreferrer nofollow"
    )
    code = page.get_by_role("button", name="Copy code")
    await code.click()
    assert (await page.evaluate("copied")).startswith('print("a line')
    await playwright.expect(page.get_by_role("button", name="Copied")).to_be_focused()
    await page.get_by_role("button", name="Copy answer").click()
    assert await page.evaluate("copied") == RICH


HOSTILE = """<script>hacked = 1</script> <img src=x onerror="hacked = 1"> <b onclick="hacked = 1">b</b>

<iframe srcdoc="<script>parent.hacked = 1</script>"></iframe>
<style>* { display: none }</style>

[a](javascript:hacked=1) [b](JaVaScRiPt:hacked=1) [c](javascript&colon;hacked=1)
[d](&#106;avascript:hacked=1) [e](java&#10;script:hacked=1) [f]( javascript:hacked=1)
[g](data:text/html,<script>hacked=1</script>) [h](vbscript:hacked) [i][ref] <javascript:hacked=1>
[j](https://example.com/"onmouseover="hacked=1) [k](//evil.invalid/) [l](ftp://evil.invalid/)

![track](https://evil.invalid/pixel.png?secret) ![x](javascript:hacked=1)

```js" onload="hacked = 1
</code></pre><script>hacked = 1</script>
```

| <img src=x onerror=hacked=1> | b |
|:--"onclick=hacked=1 | --- |

[ref]: javascript:hacked=1
"""


async def test_hostile_markdown_causes_no_markup_no_script_and_no_request(chat: Chat) -> None:
    page, model = chat
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    model.words = (HOSTILE,)
    await _send_text(page, "hi")
    await _wait_for_answers(page)
    await playwright.expect(page.locator(".aigw-markdown")).to_contain_text(
        '<img src=x onerror="hacked = 1">'
    )
    found = await page.evaluate("""() => [...document.querySelectorAll('.aigw-markdown *')].map(
        (element) => [element.localName, [...element.attributes].map((each) => each.name)])""")
    assert {name for name, _ in found} <= {"p", "span", "a", "div", "pre", "code", "button", "br"}
    assert not [names for _, names in found if any(name.startswith("on") for name in names)]
    links = await page.evaluate(
        "[...document.querySelectorAll('.aigw-markdown a')].map((a) => a.protocol)"
    )
    assert set(links) == {"https:"}
    assert await page.evaluate("typeof hacked") == "undefined"
    assert not [url for url in requested if "/chat/completions" not in url]


async def test_very_long_or_deeply_nested_markdown_is_shown_as_text(chat: Chat) -> None:
    page, model = chat
    hostile = (">" * 200, "- > " * 5_000, "[" * 20_000, "_a_" * 15_000, "# " + "x" * 60_000)
    for count, text in enumerate(hostile, 1):
        model.words = (text,)
        await _send_text(page, "hi")
        await _wait_for_answers(page, count)
        await playwright.expect(page.locator(".aigw-markdown").last).to_have_text(text)
    model.words = ("- " * 200 + "x",)
    await _send_text(page, "hi")
    await _wait_for_answers(page, len(hostile) + 1)
    nested = page.locator(".aigw-markdown").last
    await playwright.expect(nested).to_contain_text("x")
    assert 0 < await nested.locator("li").count() < 20


async def test_the_system_sets_light_or_dark_and_a_property_overrides_it(
    chat: Chat,
) -> None:
    page, _ = chat

    async def is_dark() -> bool:
        color = await page.evaluate(
            "getComputedStyle(document.querySelector('.aigw')).backgroundColor"
        )
        return sum(map(int, color.strip("rgb()").split(","))) < 3 * 128

    for system in ("light", "dark"):
        await page.emulate_media(color_scheme=system)  # type: ignore[arg-type]
        for theme, dark in {"auto": system == "dark", "light": False, "dark": True}.items():
            await page.evaluate(f"document.querySelector('.aigw').dataset.theme = '{theme}'")
            assert await is_dark() is dark, (system, theme)
    await page.goto("/?theme=light")
    assert not await is_dark()


async def test_axe_finds_no_fault_in_light_and_dark(chat: Chat) -> None:
    page, model = chat
    await page.add_script_tag(path=WEB / "node_modules/axe-core/axe.min.js")

    async def faults() -> list[Any]:
        found = await page.evaluate("axe.run('.aigw', {resultTypes: ['violations']})")
        return [
            (fault["id"], [node["html"] for node in fault["nodes"]])
            for fault in found["violations"]
        ]

    assert await faults() == []
    model.words = (RICH,)
    await _send_text(page, "hi")
    await _wait_for_answers(page)
    await playwright.expect(page.locator(".aigw-markdown td")).to_have_count(4)
    model.fails = 1
    await _send_text(page, "and now?")
    await playwright.expect(page.get_by_role("alert")).to_be_visible()
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert await faults() == [], scheme


@pytest.mark.parametrize("chat", [PHONE], indirect=True)
async def test_the_chat_fits_a_phone_and_stays_above_its_keyboard(chat: Chat) -> None:
    page, model = chat
    model.words = (RICH * 3,)
    await _send_text(
        page, "averyveryverylongquestionwithoutanyspacesaveryveryverylongquestionwithoutanyspaces"
    )
    await _wait_for_answers(page)
    await playwright.expect(page.locator(".aigw-markdown td")).to_have_count(12)
    assert await page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    too_wide = await page.evaluate("""[...document.querySelectorAll('.aigw article, .aigw form, .aigw header')]
        .filter((element) => element.getBoundingClientRect().right > 390).length""")
    assert too_wide == 0
    send = page.get_by_role("button", name="Send")
    assert (await send.bounding_box() or {})["height"] >= 44
    # iOS shrinks the visual viewport and not the page.
    await page.evaluate("""Object.defineProperty(visualViewport, 'height', {value: 500});
        visualViewport.dispatchEvent(new Event('resize'))""")
    box = await send.bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 500


async def test_a_scrolled_up_log_keeps_its_position_while_an_answer_arrives(
    chat: Chat,
) -> None:
    page, model = chat
    model.words = ("line\n\n" * 60, "more\n\n" * 60)
    model.continues.clear()
    await _send_text(page, "hi")
    log = page.get_by_role("log")
    await playwright.expect(log).to_contain_text("line")
    await page.wait_for_function("""() => {
        const log = document.querySelector('.aigw-log');
        return log.scrollTop > 0 && log.scrollHeight - log.scrollTop - log.clientHeight < 2; }""")
    await log.evaluate("log => new Promise(done => { log.onscroll = done; log.scrollTop = 0; })")
    model.continues.set()
    await _wait_for_answers(page)
    await playwright.expect(log).to_contain_text("more")
    assert await log.evaluate("log => log.scrollTop") == 0


async def test_the_chat_works_by_keyboard_and_has_names_for_screen_readers(chat: Chat) -> None:
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
    await playwright.expect(page.get_by_label("Message")).to_be_focused()
    color = await page.evaluate("""() => {
        document.documentElement.style.setProperty('--aigw-accent', 'rgb(1, 2, 3)');
        return getComputedStyle(document.querySelector('.aigw-user')).backgroundColor; }""")
    assert color == "rgb(1, 2, 3)"
