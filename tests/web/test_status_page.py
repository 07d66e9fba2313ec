"""The status page of the relay in a real Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from relay.demo import provider as demo
from tests.browser import IN_SESSION_LOOP, _function_scoped_runner, opened  # noqa: F401
from tests.conftest import StartRelay
from tests.relays import _packaged_providers, canary

if TYPE_CHECKING:
    from playwright.async_api import Browser

pytestmark = [pytest.mark.programs, IN_SESSION_LOOP]
ATTACK = "<img src=x onerror=\"document.title='taken'\">"


async def test_the_page_shows_providers_calls_and_spend_and_streams_an_answer(browser: Browser, start: StartRelay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WORDS_PER_S", 1000.0)
    built_in = demo.Demo.bind()
    openai = _packaged_providers()["openai"] | {"auth": {"header": "Authorization", "value": "Bearer ${NOT_SET}"}}
    async with built_in.running():
        price = [{"input_per_mtok": 1_000_000, "output_per_mtok": 0}]
        relay = await start({"database": str(tmp_path / "relay.db"), "providers": {"demo": {"base_url": built_in.url, "pricing": price, "inject_usage": True}, "openai": openai}})
        from playwright.async_api import expect

        async with opened(browser, "about:blank") as page:
            console_messages: list[str] = []
            page.on("console", lambda message: console_messages.append(message.text))
            page.on("pageerror", lambda error: console_messages.append(str(error)))
            await page.goto(relay.url)
            await expect(page.locator("#providers li")).to_have_text(["demoready", "openaiset NOT_SET"])
            await expect(page.locator("#none")).to_have_text("No calls yet.")
            await page.fill("#model", ATTACK)
            await page.click("#send")
            await expect(page.locator("#answer")).to_have_text(demo.REPLY)
            await expect(page.locator("#rows td.model")).to_have_text([ATTACK], timeout=15_000)
            await expect(page.locator("#rows td.outcome")).to_have_text(["relayed 200"])
            await expect(page.locator("#spend")).to_have_text("$5.00", timeout=15_000)
            monkeypatch.setattr(demo, "_CHAT_FIELDS", set())
            await page.click("#send")
            await expect(page.locator("#answer.bad")).to_have_text("Unknown parameter: 'messages'.")
            await page.set_viewport_size({"width": 390, "height": 844})
            assert await page.evaluate("document.documentElement.scrollWidth") <= 390
            assert await page.title() == "AI gateway relay"
            assert all("400" in message_text for message_text in console_messages), console_messages
            held: list[object] = []
            await page.route("**/providers", lambda route: held.append(route))
            while not held:
                await page.evaluate("() => { refresh(); refresh(); }")
            assert await page.evaluate("fetch('/version').then((response) => response.status)") == 200
            assert len(held) == 1, "a refresh began before the one before it was over"


async def test_the_page_asks_for_the_token_of_management_and_keeps_it_to_itself(browser: Browser, start: StartRelay) -> None:
    admin = canary("status-page-admin")
    relay = await start({"access": {"admin_token": admin}, "providers": {"openai": _packaged_providers()["openai"]}})
    from playwright.async_api import expect

    async with opened(browser, "about:blank") as page:
        await page.goto(relay.url)
        await expect(page.locator("#access")).to_be_visible()
        await page.fill("#token", "a wrong one")
        await page.click("#access button")
        await expect(page.locator("#problem")).to_contain_text("not a token")
        await expect(page.locator("#access")).to_be_visible()
        await page.fill("#token", admin)
        await page.click("#access button")
        await expect(page.locator("#providers li")).to_have_count(1)
        await expect(page.locator("#access")).to_be_hidden()
        assert await page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert await page.input_value("#token") == ""
