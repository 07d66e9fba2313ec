"""Pages of other origins in a real Chromium, and a relay that needs no key.

No request of such a page reaches a provider.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.browser import IN_SESSION_LOOP, _function_scoped_runner, opened  # noqa: F401
from tests.conftest import StartRelay
from tests.relays import Relay, provider
from tests.upstream.raw import RawUpstream, ok

if TYPE_CHECKING:
    from playwright.async_api import Browser

pytestmark = IN_SESSION_LOOP


@dataclass
class Pages:
    """A page server at another origin, with the host name in its URL."""

    server: TestServer
    host: str

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server.port}/"


@pytest.fixture
async def pages() -> AsyncIterator[TestServer]:
    """Serve an empty page."""
    app = web.Application()

    async def empty(request: web.Request) -> web.Response:
        return web.Response(text="<title>page</title>", content_type="text/html")

    app.router.add_get("/", empty)
    server = TestServer(app)
    await server.start_server()
    yield server
    await server.close()


# Each makes the browser request `url`, and resolves once the request has succeeded or failed.
ATTACKS = {
    "image": "new Promise(done => { const it = new Image(); it.onload = it.onerror = done; it.src = url; })",
    "script": "new Promise(done => { const it = document.createElement('script'); it.onload = it.onerror = done; it.src = url; document.head.append(it); })",
    "style sheet": "new Promise(done => { const it = document.createElement('link'); it.rel = 'stylesheet'; it.onload = it.onerror = done; it.href = url; document.head.append(it); })",
    "frame": "new Promise(done => { const it = document.createElement('iframe'); it.onload = it.onerror = done; it.src = url; document.body.append(it); })",
    "fetch without CORS": "fetch(url, {mode: 'no-cors'}).catch(() => 0)",
    "POST without CORS": "fetch(url, {mode: 'no-cors', method: 'POST', body: '{}'}).catch(() => 0)",
    "POST without referrer": "fetch(url, {mode: 'no-cors', method: 'POST', body: '{}', referrerPolicy: 'no-referrer'}).catch(() => 0)",
    "beacon": "navigator.sendBeacon(url, '{}')",
    "socket": "new Promise(done => { const it = new WebSocket(url.replace('http', 'ws')); it.onopen = it.onerror = done; })",
    "form": """new Promise(done => { const frame = document.createElement('iframe'); frame.name = 'f'; document.body.append(frame);
        const it = document.createElement('form'); it.method = 'POST'; it.action = url; it.target = 'f'; document.body.append(it);
        frame.onload = done; it.submit(); })""",
}  # fmt: skip


async def _relay(start: StartRelay, raw: RawUpstream) -> Relay:
    raw.plays(ok(b"secret", "Content-Type: text/plain"))
    return await start(openai=provider(raw.url, websocket={"default_path": "x"}))


# localhost and 127.0.0.1 are two sites for a browser; two ports of one name are one site.
@pytest.mark.parametrize(("page_host", "site"), [("127.0.0.1", "same-site"), ("localhost", "cross-site")])
async def test_no_request_of_a_foreign_page_reaches_a_provider(browser: Browser, start: StartRelay, raw: RawUpstream, pages: TestServer, page_host: str, site: str) -> None:
    relay = await _relay(start, raw)
    async with opened(browser, Pages(pages, page_host).url) as page:
        for number, (name, attack) in enumerate(ATTACKS.items(), 1):
            await page.evaluate(f"async url => {{ await {attack}; }}", relay.path("openai", f"x?{name.replace(' ', '-')}"))
            # Each attack reaches the relay, which refuses it.
            await relay.events(count=number)
        async with page.expect_navigation() as shown:
            await page.evaluate("url => { location.href = url; }", relay.path("openai", "x?navigation"))
        answer = await shown.value
        assert answer is not None and answer.status == 403
        assert f"(Sec-Fetch-Site: {site})" in await answer.text()
    refusals = await relay.events(count=len(ATTACKS) + 1)
    assert {event["error"] for event in refusals} == {"cross_site_request", "origin_not_allowed"}
    assert raw.connections == 0, [arrived.target for arrived in raw.arrived]


@pytest.mark.parametrize("page_host", ["127.0.0.1", "localhost"])
async def test_links_of_foreign_pages_open_health_and_version(browser: Browser, start: StartRelay, raw: RawUpstream, pages: TestServer, page_host: str) -> None:
    relay = await _relay(start, raw)
    async with opened(browser, Pages(pages, page_host).url) as page:
        for path in ("/healthz", "/version"):
            async with page.expect_navigation() as shown:
                await page.evaluate("url => { location.href = url; }", relay.url + path)
            answer = await shown.value
            assert answer is not None and answer.status == 200
            await page.goto(Pages(pages, page_host).url)


async def test_typed_addresses_and_the_relays_own_page_may_call(browser: Browser, start: StartRelay, raw: RawUpstream) -> None:
    relay = await _relay(start, raw)
    async with opened(browser, relay.url + "/healthz") as page:
        assert await page.evaluate("url => fetch(url).then(answer => answer.status)", relay.path("openai", "x")) == 200
        answer = await page.goto(relay.path("openai", "x"))
        assert answer is not None and answer.status == 200
    assert len(raw.arrived) == 2


async def test_a_listed_page_may_call_from_another_port(browser: Browser, start: StartRelay, raw: RawUpstream, pages: TestServer) -> None:
    raw.plays(ok(b"answer"))
    url = Pages(pages, "127.0.0.1").url
    relay = await start({"cors": {"origins": [url.rstrip("/")]}}, openai=provider(raw.url))
    async with opened(browser, url) as page:
        assert await page.evaluate("url => fetch(url, {method: 'POST', body: 'x'}).then(answer => answer.text())", relay.path("openai", "x")) == "answer"
        await page.evaluate(f"async url => {{ await {ATTACKS['image']}; }}", relay.path("openai", "x"))
    assert (await relay.events(count=2))[-1]["error"] == "cross_site_request"
    assert len(raw.arrived) == 1
