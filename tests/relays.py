"""Run a relay inside a test: the real application on a loopback socket, as in production."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web
from yarl import URL

from relay import log
from relay.app import API, RUNNER_OPTIONS, standalone
from relay.gateway import GATEWAY, Gateway
from relay.registry.load import Config, Sources, load
from relay.server.connection import RelayRunner
from tests.whole_run import LogStream, canary

HANG_GUARD_S = 20.0

KEYS = {
    "OPENAI_API_KEY": canary("openai"), "GOOGLE_AI_API_KEY": canary("google"), "CARTESIA_API_KEY": canary("cartesia"),
    "ELEVENLABS_API_KEY": canary("elevenlabs"), "FAL_KEY": canary("fal"), "ANTHROPIC_API_KEY": canary("anthropic"),
    "DEEPGRAM_API_KEY": canary("deepgram"), "GROQ_API_KEY": canary("groq"),
}  # fmt: skip
CLOUDFLARE_TOKEN = canary("cloudflare")
CLIENT_KEY = canary("client")


@dataclass
class Relay:
    """A running relay, and a client that neither decompresses responses nor stores cookies."""

    url: str
    app: web.Application
    client: aiohttp.ClientSession
    logged: LogStream
    folder: Path
    runner: web.AppRunner
    bodies: list[bytes] = field(default_factory=list)

    @property
    def gateway(self) -> Gateway:
        return self.app[GATEWAY]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def path(self, provider: str, endpoint: str = "") -> str:
        """The native URL of an endpoint."""
        return f"{self.url}{API}/providers/{provider}/{endpoint}"

    def ws(self, provider: str, endpoint: str = "") -> str:
        """The native WebSocket URL."""
        return f"{self.url}{API}/ws/{provider}" + (f"/{endpoint}" if endpoint else "")

    async def call(self, method: str, url: str | URL, **options: Any) -> tuple[int, Any, bytes]:
        """Make one call. Returns (status, headers, body)."""
        async with self.client.request(method, url, allow_redirects=False, **options) as answer:
            body = await answer.read()
            if "x-relay-error" in answer.headers:
                LogStream.everything.append(body.decode("utf-8", "replace"))
            return answer.status, answer.headers, body

    async def events(self, name: str = "exchange", count: int = 1) -> list[dict[str, Any]]:
        """Wait for `count` log events of this name. Returns the last `count` of them."""
        async with asyncio.timeout(HANG_GUARD_S):
            while True:
                found = [e for line in self.logged.lines for e in [json.loads(line)] if e["event"] == name]
                if len(found) >= count:
                    return found[-count:]
                await asyncio.sleep(0.01)

    async def idle(self) -> None:
        """Wait until no call runs and the ledger has written everything."""
        async with asyncio.timeout(HANG_GUARD_S):
            while self.gateway.running or self.gateway.sessions or self.gateway.ledger.waiting:
                await asyncio.sleep(0.01)


class _Dumper(yaml.CSafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_config(folder: Path, document: dict[str, Any]) -> Sources:
    """Write gateway.yaml and .env into `folder`.

    By default retries are off (tests/upstream/test_attempts.py tests them), and so are the database
    (tests/ledger tests it) and the demo.
    """
    defaults = {"demo": {"enabled": False}, "retries": {"max_attempts": 1}, "database": None}
    (folder / "gateway.yaml").write_text(yaml.dump(defaults | document, Dumper=_Dumper, sort_keys=False))
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in KEYS.items()))
    return Sources(folder / "gateway.yaml", folder / ".env")


def configured(folder: Path, document: dict[str, Any]) -> tuple[Config, Sources]:
    """Write a configuration into `folder` and load it."""
    sources = write_config(folder, document)
    return load(sources), sources


async def start_relay(folder: Path, document: dict[str, Any]) -> Relay:
    """Serve `document` on a free port."""
    config, sources = configured(folder, document)
    logged = LogStream()
    log.setup("debug", "json", logged)  # type: ignore[arg-type]
    app = standalone(config, sources)
    runner = RelayRunner(app, keepalive_timeout=config.settings.server.keepalive_timeout_s, **RUNNER_OPTIONS)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    client = aiohttp.ClientSession(
        auto_decompress=False, timeout=aiohttp.ClientTimeout(total=HANG_GUARD_S * 3), cookie_jar=aiohttp.DummyCookieJar(),
        max_line_size=65536, max_field_size=65536, max_headers=1000,
    )  # fmt: skip
    return Relay(f"http://127.0.0.1:{port}", app, client, logged, folder, runner)


async def stop_relay(relay: Relay) -> None:
    """Close the client, then the relay."""
    await relay.client.close()
    await relay.runner.cleanup()


def provider(url: str, key: str = "OPENAI_API_KEY", **more: Any) -> dict[str, Any]:
    """A provider entry with a Bearer key."""
    return {"base_url": url, "auth": {"header": "Authorization", "value": f"Bearer ${{{key}}}"}} | more


@functools.cache
def _packaged_providers() -> dict[str, dict[str, Any]]:
    """The provider entries that ship. Read once: parsing their YAML takes 0.1 s."""
    root = Path(__file__).parent.parent
    files = (*(root / "config/providers").glob("*.yaml"), root / "gateway.yaml")
    return {name: entry for file in files for name, entry in yaml.safe_load(file.read_text())["providers"].items()}


def packaged_provider(name: str, url: str) -> dict[str, Any]:
    """A provider entry that ships, with `url` in place of the host of its base URL."""
    entry = copy.deepcopy(_packaged_providers()[name])
    path = entry["base_url"].partition("://")[2].partition("/")[2]
    entry["base_url"] = f"{url}/{path}".rstrip("/")
    return entry
