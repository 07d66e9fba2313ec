"""Run a real Chromium, through Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tests.tools import need

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

TIMEOUT_MS = 15_000


@asynccontextmanager
async def launched() -> AsyncIterator[Browser]:
    """Run Chromium without a page."""
    need("chromium")
    # Chromium refuses to run its sandbox as root, as in containers.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    # The import takes a third of a second, and few tests need it.
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        executable = shutil.which("chromium")
        browser = await playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        await browser.close()


@asynccontextmanager
async def chromium(url: str) -> AsyncIterator[Page]:
    """Open `url` in a new page of a new Chromium."""
    async with launched() as browser:
        page = await browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        await page.goto(url)
        yield page
