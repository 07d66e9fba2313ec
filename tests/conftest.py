"""Fixtures: relays and stand-in providers on loopback, and the canary over the whole run."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import uvloop
from aiohttp.test_utils import TestServer
from aioresponses import aioresponses
from hypothesis import settings

from tests.databases import (  # noqa: F401
    database,
    database_setting,
    migrated_sqlite,
    new_database_setting,
    patient_reads,
    postgres,
)
from tests.order import SlowFirst
from tests.processes import end_left_behind
from tests.relays import (
    CLOUDFLARE_TOKEN,
    LogStream,
    Relay,
    packaged_provider,
    start_relay,
    stop_relay,
)
from tests.tools import need
from tests.upstream.cloudflare import cloudflare
from tests.upstream.raw import RawUpstream
from tests.upstream.vendors import APPS, SEEN, Seen
from tests.whole_run import WholeRun

gc.disable()  # until all tests are collected: nothing of that is let go of before the end
settings.register_profile("tests", deadline=None, max_examples=40)  # a busy machine is no failure
settings.load_profile("tests")
StartRelay = Callable[..., Awaitable[Relay]]


class _EveryLine(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += logging.Formatter().formatException(record.exc_info)
        if record.name.split(".")[0] not in ("httpx2", "httpcore2", "openai", "hypothesis", "httpx", "httpcore", "websockets"):
            LogStream.everything.append(text)


def pytest_configure(config: pytest.Config) -> None:
    """Hear every logger of the process, at DEBUG; judge the run as a whole."""
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        for spelt in (name, name.lower()):
            os.environ.pop(spelt, None)  # this machine's; what a test sets for itself counts
    config.pluginmanager.register(WholeRun(config))
    config.pluginmanager.register(SlowFirst())
    logging.getLogger().addHandler(_EveryLine())
    logging.getLogger("aiohttp").setLevel(logging.DEBUG)


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that `relay serve` runs on, for every test; TEST_LOOP=asyncio takes the other one."""
    if os.environ.get("TEST_LOOP") == "asyncio":
        return {"asyncio": asyncio.new_event_loop}
    return {"uvloop": uvloop.new_event_loop}


STARTS_PROGRAMS = {"nginx", "redis_server", "postgres"}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Before fixtures end, and the loop with them."""
    end_left_behind()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts another program by a fixture or a parameter of its own."""
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if STARTS_PROGRAMS.intersection(item.fixturenames) or "postgresql" in parameters:
            item.add_marker(pytest.mark.programs)


@pytest.fixture(autouse=True)
def _who_closes_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that closes its connection within a test has left, however soon that is after its request
    (tests/server/test_connections.py is about those that only close their sending half)."""
    monkeypatch.setattr("relay.server.half_close.BEHIND_REQUEST_S", -1.0)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartRelay]:
    """`await start({...gateway.yaml...})`, or `await start(openai={...})` for providers alone."""
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
    """A provider written as bytes."""
    upstream = await RawUpstream.start()
    yield upstream
    await upstream.stop()


@dataclass
class Vendors:
    """The vendors' stand-ins, by provider name."""

    servers: dict[str, TestServer] = field(default_factory=dict)

    def url(self, name: str) -> str:
        return str(self.servers[name].make_url("")).rstrip("/")

    def seen(self, name: str) -> list[Seen]:
        """What arrived there."""
        return self.servers[name].app[SEEN]

    def entries(self) -> dict[str, Any]:
        """The shipped provider entries, moved to the stand-ins."""
        return {name: packaged_provider(name, self.url(name)) for name in APPS}


@pytest.fixture
async def vendors(aiohttp_server: Any) -> Vendors:
    """Every vendor's stand-in, running."""
    return Vendors({name: await aiohttp_server(make()) for name, make in APPS.items()})


@dataclass
class Through:
    """A relay in front of the vendors, directly or through Cloudflare's stand-in."""

    relay: Relay
    vendors: Vendors
    front: list[Seen]


@pytest.fixture(params=["direct", "cloudflare"])
async def through(request: pytest.FixtureRequest, start: StartRelay, vendors: Vendors, aiohttp_server: Any) -> Through:
    """Both ways to a provider: the same client calls must work the same."""
    if request.param == "direct":
        return Through(await start({"providers": vendors.entries()}), vendors, [])
    app = cloudflare({name: vendors.url(name) for name in APPS}, CLOUDFLARE_TOKEN)
    front = await aiohttp_server(app)
    account = {"account_id": "acct", "gateway_id": "gw", "api_key": CLOUDFLARE_TOKEN, "base_url": str(front.make_url("/v1"))}
    return Through(await start({"providers": vendors.entries(), "cloudflare": account}), vendors, app[SEEN])


class _AiohttpResponse(aiohttp.ClientResponse):
    """aioresponses 0.7.9 does not know the argument that aiohttp 3.14 added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("stream_writer", SimpleNamespace(output_size=0))
        super().__init__(*args, **kwargs)


@pytest.fixture
def upstream_mock() -> Any:
    """aioresponses on every ClientSession but those to loopback: for failures that no server can play."""
    with aioresponses(passthrough=["http://127.0.0.1"]) as mock:
        original = mock.add

        def add(url: Any, *args: Any, **kwargs: Any) -> None:
            kwargs.setdefault("response_class", _AiohttpResponse)
            original(url, *args, **kwargs)

        mock.add = add
        yield mock


@pytest.fixture
async def redis_server(tmp_path: Path) -> AsyncIterator[Any]:
    """A real Redis, running."""
    from tests.redis import RedisServer

    need("redis-server")
    server = RedisServer(tmp_path)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def nginx(tmp_path: Path) -> AsyncIterator[Any]:
    """The shipped nginx site; `await nginx.before(port)` starts it."""
    from tests.nginx import Nginx

    made = Nginx(tmp_path)
    yield made
    await made.stop()


def pytest_collection_finish() -> None:
    """What was collected stays: no collection looks at it again, and each takes milliseconds."""
    gc.freeze()
    gc.enable()
