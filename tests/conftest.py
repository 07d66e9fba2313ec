"""Provide the fixtures: relays and stand-in providers on loopback.

Owns also the set-up of a run: the event loop, the proxy variables, the garbage collector, and the
registration of the checks over the whole run (tests/whole_run.py).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from aioresponses import aioresponses
from hypothesis import settings

from tests.browser import browser  # noqa: F401
from tests.databases import (  # noqa: F401
    database,
    database_setting,
    migrated_sqlite,
    new_database_setting,
    other_database,
    patient_reads,
    postgres,
    sqlite_setting,
)
from tests.loops import StrictLoop
from tests.order import SlowFirst
from tests.processes import kill_leftover_processes
from tests.relays import (
    CLOUDFLARE_TOKEN,
    LogStream,
    Relay,
    packaged_provider,
    start_relay,
    stop_relay,
)
from tests.statements import share_compiled_statements
from tests.tools import need
from tests.upstream.cloudflare import cloudflare
from tests.upstream.raw import RawUpstream
from tests.upstream.vendors import APPS, SEEN, Seen
from tests.whole_run import CANARY, WholeRun

# Until all tests are collected: nothing that the collection creates is freed before the end.
gc.disable()
# No deadline: a slow machine must not fail a test.
settings.register_profile("tests", deadline=None, max_examples=40)
settings.load_profile("tests")
StartRelay = Callable[..., Awaitable[Relay]]


class _CollectLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += logging.Formatter().formatException(record.exc_info)
        if record.name.split(".")[0] not in ("httpx2", "httpcore2", "openai", "hypothesis", "httpx", "httpcore", "websockets"):
            LogStream.everything.append(text)


def pytest_configure(config: pytest.Config) -> None:
    """Collect the lines of every logger at DEBUG, and register the checks over the whole run."""
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        for spelling in (name, name.lower()):
            # The proxy of this machine. Tests of proxies set their own.
            os.environ.pop(spelling, None)
    config.pluginmanager.register(WholeRun(config))
    config.pluginmanager.register(SlowFirst())
    share_compiled_statements()
    logging.getLogger().addHandler(_CollectLines())
    logging.getLogger("aiohttp").setLevel(logging.DEBUG)


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every test on uvloop, as `relay serve` does, or on asyncio with TEST_LOOP=asyncio."""
    if os.environ.get("TEST_LOOP") == "asyncio":
        return {"asyncio": asyncio.new_event_loop}
    return {"uvloop": StrictLoop}


STARTS_PROGRAMS = {"nginx", "redis_server", "postgres"}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Kill the processes that a failed test left, before its fixtures and its loop end."""
    kill_leftover_processes()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `programs` each test that starts a program through a fixture or a parameter."""
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if STARTS_PROGRAMS.intersection(item.fixturenames) or "postgresql" in parameters:
            item.add_marker(pytest.mark.programs)


@pytest.fixture(autouse=True)
def _closing_means_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a client that closes its connection as gone, however soon after its request it does.

    A client that closes only its sending half right behind its request gets its response;
    tests/server/test_connections.py tests that.
    """
    monkeypatch.setattr("relay.server.half_close.BEHIND_REQUEST_S", -1.0)


@pytest.fixture(autouse=True)
def _made_keys_are_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every key that is made fail the run if it appears in a log line or an error."""
    monkeypatch.setattr("relay.gate.administration.new_secret", lambda: f"rk_{CANARY}{secrets.token_hex(13)}")


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartRelay]:
    """Start relays: `await start({...gateway.yaml...})`, or `await start(openai={...})`."""
    relays: list[Relay] = []

    async def begin(document: dict[str, Any] | None = None, **providers: Any) -> Relay:
        folder = tmp_path / f"relay{len(relays)}"
        folder.mkdir()
        whole = dict(document or {})
        whole["providers"] = whole.get("providers", {}) | providers
        relays.append(await start_relay(folder, whole))
        return relays[-1]

    yield begin
    for relay in relays:
        await stop_relay(relay)


@pytest.fixture
async def raw() -> AsyncIterator[RawUpstream]:
    """A stand-in provider whose responses a test scripts byte by byte."""
    upstream = await RawUpstream.start()
    yield upstream
    await upstream.stop()


@dataclass
class Vendors:
    """The stand-ins of the vendors, by provider name."""

    servers: dict[str, TestServer] = field(default_factory=dict)

    def url(self, name: str) -> str:
        return str(self.servers[name].make_url("")).rstrip("/")

    def seen(self, name: str) -> list[Seen]:
        """The requests that this stand-in received."""
        return self.servers[name].app[SEEN]

    def entries(self) -> dict[str, Any]:
        """The provider entries that ship, with the URLs of the stand-ins."""
        return {name: packaged_provider(name, self.url(name)) for name in APPS}


@pytest.fixture
async def vendors(aiohttp_server: Any) -> Vendors:
    """Run the stand-in of every vendor."""
    return Vendors({name: await aiohttp_server(make()) for name, make in APPS.items()})


@dataclass
class Through:
    """A relay that calls the vendors' stand-ins directly or through the stand-in of Cloudflare.

    `front` holds the requests that the stand-in of Cloudflare received.
    """

    relay: Relay
    vendors: Vendors
    front: list[Seen]


@pytest.fixture(params=["direct", "cloudflare"])
async def through(request: pytest.FixtureRequest, start: StartRelay, vendors: Vendors, aiohttp_server: Any) -> Through:
    """Run a test over both routes to a provider: client calls must work the same over each."""
    if request.param == "direct":
        return Through(await start({"providers": vendors.entries()}), vendors, [])
    app = cloudflare({name: vendors.url(name) for name in APPS}, CLOUDFLARE_TOKEN)
    front = await aiohttp_server(app)
    account = {"account_id": "acct", "gateway_id": "gw", "api_key": CLOUDFLARE_TOKEN, "base_url": str(front.make_url("/v1"))}
    return Through(await start({"providers": vendors.entries(), "cloudflare": account}), vendors, app[SEEN])


class _AiohttpResponse(aiohttp.ClientResponse):
    """A response with `stream_writer`, which aiohttp 3.14 requires and aioresponses 0.7.9 omits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("stream_writer", SimpleNamespace(output_size=0))
        super().__init__(*args, **kwargs)


@pytest.fixture
def upstream_mock() -> Any:
    """Mock every ClientSession except to loopback, for failures that no server can produce."""
    with aioresponses(passthrough=["http://127.0.0.1"]) as mock:
        original = mock.add

        def add(url: Any, *args: Any, **kwargs: Any) -> None:
            kwargs.setdefault("response_class", _AiohttpResponse)
            original(url, *args, **kwargs)

        mock.add = add
        yield mock


@pytest.fixture
async def redis_server(tmp_path: Path) -> AsyncIterator[Any]:
    """Run a real Redis."""
    from tests.redis import RedisServer

    need("redis-server")
    server = RedisServer(tmp_path)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def nginx(tmp_path: Path) -> AsyncIterator[Any]:
    """nginx with the site that ships; `await nginx.start(port)` starts it in front of a relay."""
    from tests.nginx import Nginx

    server = Nginx(tmp_path)
    yield server
    await server.stop()


def pytest_collection_finish() -> None:
    """Freeze the collected tests: they stay alive, and each garbage collection skips them.

    Fewer collections than Python's default save a twentieth of the CPU time.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()
