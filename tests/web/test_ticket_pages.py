"""A page of another origin in a real Chromium opens sessions with tickets: by the vendors' browser
SDKs, unmodified, and by AIGatewayClient.js.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import trustme
from aiohttp import web

from relay.app import API
from relay.registry.certificates import Certificate
from relay.server.tls import server_context
from tests.browser import IN_SESSION_LOOP, TIMEOUT_MS, _function_scoped_runner  # noqa: F401
from tests.conftest import StartRelay
from tests.processes import output
from tests.relays import KEYS, canary, packaged_provider
from tests.sdk.test_node import NODE, need_packages
from tests.upstream.media import SDK_APPS
from tests.upstream.vendors import SEEN, Seen
from tests.web.test_client import WEB

if TYPE_CHECKING:
    from playwright.async_api import Browser

pytestmark = [pytest.mark.programs, IN_SESSION_LOOP]

KEY = canary("client-key")
EXPECTED = {
    "openai": 253, "agents": 253, "genai": "Hello from Gemini", "elevenlabs": "Hello there.", "own": 253, "refused": "403 ticket_mismatch",
}  # fmt: skip
PROVIDERS = ("openai", "google-ai-studio", "elevenlabs")


class Backend:
    """The backend of an app: its page, and an endpoint that gets a ticket with the app's key."""

    def __init__(self, script: bytes) -> None:
        self.script, self.relay = script, ""
        self.app = web.Application()
        self.app.router.add_get("/", self.page)
        self.app.router.add_post("/ticket", self.ticket)

    async def page(self, request: web.Request) -> web.Response:
        return web.Response(body=b'<!doctype html><meta charset="utf-8"><script type="module">' + self.script + b"</script>", content_type="text/html")

    async def ticket(self, request: web.Request) -> web.Response:
        wanted = {"provider": request.query["provider"], "origin": request.headers["Origin"]}
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{self.relay}/tickets", json=wanted, headers={"Authorization": f"Bearer {KEY}"}, ssl=False) as answer:
                return web.json_response(await answer.json(), status=answer.status)


async def _bundle(folder: Path) -> bytes:
    need_packages(WEB)
    need_packages(NODE)
    made = folder / "page.js"
    await output(str(WEB / "node_modules/.bin/esbuild"), str(NODE / "tickets.page.mjs"), "--bundle", "--format=esm", "--log-level=error", f"--outfile={made}", env={})
    return made.read_bytes().replace(b"</script", rb"<\/script")


async def test_browser_sdks_open_sessions_with_tickets_from_a_page_of_another_origin(start: StartRelay, aiohttp_server: Any, sqlite_setting: str, tmp_path: Path, browser: Browser) -> None:
    backend = Backend(await _bundle(tmp_path))
    server = await aiohttp_server(backend.app)
    page_url = f"http://localhost:{server.port}"
    servers = {name: await aiohttp_server(SDK_APPS[name]()) for name in PROVIDERS}
    entries = {name: packaged_provider(name, str(each.make_url("")).rstrip("/")) for name, each in servers.items()}
    clients = {"app": {"key": KEY, "origins": page_url}}
    relay = await start({"access": {"mode": "required"}, "clients": clients, "database": sqlite_setting, "providers": entries})
    # The SDK of OpenAI connects by wss:// only.
    issued = trustme.CA().issue_cert("127.0.0.1")
    certificate = Certificate(issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())
    await web.TCPSite(relay.runner, "127.0.0.1", 0, ssl_context=server_context(certificate)).start()
    backend.relay = f"https://127.0.0.1:{relay.runner.addresses[-1][1]}{API}"

    page = await browser.new_page(ignore_https_errors=True)
    try:
        page.set_default_timeout(TIMEOUT_MS)
        await page.goto(page_url)
        run = """async relay => Object.fromEntries(await Promise.all(Object.entries(window.sessions).map(async ([name, session]) =>
            [name, await session(relay).catch(error => `${error?.message ?? JSON.stringify(error)}`)])))"""
        assert await page.evaluate(run, backend.relay) == EXPECTED
    finally:
        await page.close()

    await relay.idle()
    events = [event for event in await relay.events(count=6) if event["transport"] == "websocket"]
    assert sorted((event["client"], event.get("error", "")) for event in events) == [*[("app", "")] * 5, ("app", "ticket_mismatch")]
    seen: list[Seen] = [each for one in servers.values() for each in one.app[SEEN]]
    assert len(seen) == 5 and "rt_" not in "".join(f"{each.target} {each.headers}" for each in seen)
    assert {KEYS[name] for name in ("OPENAI_API_KEY", "GOOGLE_AI_API_KEY", "ELEVENLABS_API_KEY")} <= {value.removeprefix("Bearer ") for each in seen for _, value in each.headers}
