"""Run a real Chromium, through Playwright: one for each test process.

A start takes more than a second of CPU. The browser and its driver belong to an event loop, so all
tests with a browser share the loop of the session: their module is marked IN_SESSION_LOOP, and
imports `_function_scoped_runner` if it uses asynchronous fixtures of other modules.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.tools import need

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

TIMEOUT_MS = 15_000
IN_SESSION_LOOP = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture
def _function_scoped_runner(_session_scoped_runner: Any) -> Any:
    """Replaces the fixture of pytest-asyncio that runs asynchronous fixtures of a test."""
    return _session_scoped_runner


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """A running Chromium."""
    need("chromium")
    # Chromium refuses to run its sandbox as root, as in containers.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    # The import takes a third of a second, and few tests need it.
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        executable = shutil.which("chromium")
        launched = await playwright.chromium.launch(executable_path=executable, args=arguments)
        yield launched
        await launched.close()


@asynccontextmanager
async def opened(browser: Browser, url: str) -> AsyncIterator[Page]:
    """Open `url` in a new page, which shares no cookie, cache or storage with any other."""
    page = await browser.new_page()
    try:
        page.set_default_timeout(TIMEOUT_MS)
        await page.goto(url)
        yield page
    finally:
        await page.close()
