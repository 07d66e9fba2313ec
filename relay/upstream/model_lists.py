"""Know the models of each provider: its own list, fetched in the background, or the price list's
until that has arrived.

Owns the lists of a process and when they are fetched: when the unified surface is used, and again
ten minutes later at the earliest. Only a call for a model that no known list has waits for the
first lists: it may be in one of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

import msgspec
from aiohttp import ClientSession

from relay import log
from relay.core.errors import ModelNotFound
from relay.core.fields import UNREADABLE
from relay.core.provider import Provider, rest_route
from relay.core.text import clean
from relay.prices import price_list
from relay.upstream.failures import MAPPABLE_ERRORS
from relay.upstream.request import Outgoing
from relay.upstream.send import send, upstream_headers, upstream_url

T = TypeVar("T")
FRESH_S = 600.0
_FETCH_S = 20.0
_FIRST_S = 5.0
"""How long a call waits for the first lists."""
_BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "demo": ("demo-chat", "demo-embedding", "demo-speech", "demo-realtime")
}
"""The models of the built-in provider, until its list has arrived: the price list has none."""
_MAX_BYTES = 8 * 1024 * 1024
_MAX_MODELS = 5000
_PATHS: Mapping[str, tuple[str, str]] = {
    "openai": ("models", ""),
    "anthropic": ("v1/models", "limit=1000"),
    "google": ("v1beta/models", "pageSize=1000"),
}
"""The path and the query of the list, by wire format. Other formats have none that is used."""
LIST_ERRORS = (*MAPPABLE_ERRORS, *UNREADABLE, TimeoutError)
"""What may go wrong while a list is fetched and read; ValueError, one of MAPPABLE_ERRORS, for the
content of a response."""


class _Model(msgspec.Struct):
    id: str = ""
    name: str = ""


class _List(msgspec.Struct):
    data: list[_Model] = []
    models: list[_Model] = []


class ModelLists:
    """The lists of all providers. `session` returns the session of REST calls."""

    def __init__(self, session: Callable[[], ClientSession], clock: Callable[[], float]) -> None:
        self._session, self._clock = session, clock
        self._fetched: dict[str, tuple[str, ...]] = {}
        self._asked_s: float | None = None
        self._fetches = Fetches()
        self.version = 0
        """Number of changes of the lists."""

    def models(self, provider: Provider) -> tuple[str, ...]:
        """Return the ids of the models of a provider, as far as they are known."""
        fetched = self._fetched.get(provider.name)
        if fetched is not None:
            return fetched
        built_in = _BUILT_IN.get(provider.name)
        return built_in or price_list.models_of(price_list.listed_name(provider))

    def has(self, provider: Provider, model: str) -> bool:
        """True if a provider lists this model."""
        fetched = self._fetched.get(provider.name)
        if fetched is not None:
            return model in fetched
        if model in _BUILT_IN.get(provider.name, ()):
            return True
        return price_list.has_price(provider, model, time.time())

    async def find(self, find: Callable[[], T]) -> T:
        """Return what `find` returns. While it raises ModelNotFound and lists are fetched for the
        first time, call it again with each list that arrives, for five seconds at most.
        """
        until_s = self._clock() + _FIRST_S
        while True:
            try:
                return find()
            except ModelNotFound:
                first = [
                    task
                    for name, task in self._fetches.tasks.items()
                    if name not in self._fetched and not task.done()
                ]
                left_s = until_s - self._clock()
                if not first or left_s <= 0:
                    raise
                await asyncio.wait(first, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)

    def refresh(self, providers: Iterable[Provider]) -> None:
        """Fetch the lists of these providers if they are missing or old, without waiting."""
        now_s = self._clock()
        if self._asked_s is not None and now_s - self._asked_s < FRESH_S:
            return
        self._asked_s = now_s
        for provider in providers:
            if provider.format in _PATHS and provider.name not in self._fetches.tasks:
                self._fetches.start(provider.name, self._refresh(provider))

    def forget(self) -> None:
        """Fetch all lists anew when they are needed next: the configuration has changed."""
        self._asked_s = None

    async def _refresh(self, provider: Provider) -> None:
        try:
            found = await self._fetch(provider)
        except LIST_ERRORS as error:
            log.event("models.list_failed", provider=provider.name, cause=type(error).__name__)
            return
        if found != self._fetched.get(provider.name):
            self._fetched[provider.name] = found
            self.version += 1

    async def _fetch(self, provider: Provider) -> tuple[str, ...]:
        _, query = _PATHS[provider.format]
        body = await fetch_list(self._session(), provider, query)
        found = msgspec.json.decode(body, type=_List)
        ids = (each.id or each.name.removeprefix("models/") for each in found.data or found.models)
        return tuple(dict.fromkeys(clean(each) for each in ids if each))[:_MAX_MODELS]

    async def stop(self) -> None:
        """Cancel what is being fetched."""
        await self._fetches.stop()


class Fetches:
    """The lists that are being fetched, in the background: one of each provider at a time."""

    def __init__(self) -> None:
        self.tasks: dict[str, asyncio.Task[None]] = {}
        """By the name of the provider, until they are done."""

    def start(self, provider: str, fetch: Coroutine[Any, Any, None]) -> None:
        """Run `fetch`, which must raise nothing."""
        self.tasks[provider] = task = asyncio.create_task(fetch)
        task.add_done_callback(lambda _: self.tasks.pop(provider, None))

    async def stop(self) -> None:
        """Cancel what is being fetched."""
        tasks = list(self.tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def fetch_list(session: ClientSession, provider: Provider, query: str) -> bytes:
    """Fetch the list of a provider. Raises LIST_ERRORS."""
    path, _ = _PATHS[provider.format]
    route = rest_route(provider, path)
    if not route.target.pool:
        raise ValueError("no credential")
    keys = route.target.pool[0]
    headers = upstream_headers(route, (), None, keys)
    headers["Accept-Encoding"] = "identity"
    url = upstream_url(route, query, keys)
    async with asyncio.timeout(_FETCH_S):
        response = await send(session, route, "GET", url, Outgoing(headers, b""))
        try:
            body = await response.content.read(_MAX_BYTES) if response.status == 200 else b""
            while response.status == 200 and not response.content.at_eof():
                body += await response.content.read(_MAX_BYTES)
                if len(body) > _MAX_BYTES:
                    raise ValueError("the list is too large")
        finally:
            response.release()
    if response.status != 200:
        raise ValueError(f"status {response.status}")
    return body
