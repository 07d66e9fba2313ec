"""Know how providers describe their models to Codex, which asks `GET /models?client_version=…`.

Owns these descriptions, and when they are fetched: in the background when Codex asks, and again ten
minutes later at the earliest. A description has the instructions that Codex sends to the model,
so the relay writes none itself: a model that its provider does not describe is left out, and Codex
uses its own description of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from aiohttp import ClientSession

from relay import log
from relay.core.provider import Provider
from relay.upstream.model_lists import FRESH_S, LIST_ERRORS, Fetches, fetch_list

_MAX_LISTS = 32
"""How many lists are kept: one for each provider and version of Codex."""
_MAX_MODELS = 500
_VERSION = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6}){0,3}")

Description = Mapping[str, Any]
"""An entry of the list: `{"slug": "gpt-5", "display_name": …, "base_instructions": …, …}`."""
Descriptions = Mapping[str, Description]
"""The descriptions of a provider, by the name of the model."""
_NOTHING: Descriptions = {}


class _List(msgspec.Struct):
    models: list[dict[str, Any]] = []


class CodexLists:
    """The descriptions of all providers. `session` returns the session of REST calls."""

    def __init__(self, session: Callable[[], ClientSession], clock: Callable[[], float]) -> None:
        self._session, self._clock = session, clock
        self._asked_s: dict[tuple[str, str], float] = {}
        """Provider and version of Codex to when the list was fetched last."""
        self._known: dict[tuple[str, str], Descriptions] = {}
        self._fetches = Fetches()

    def of(self, provider: Provider, version: str) -> Descriptions:
        """Return the models of a provider as far as they are known, and fetch them if they are
        missing or old. `version` is that of Codex; for a text that is none nothing is fetched.
        """
        if provider.format != "openai" or not _VERSION.fullmatch(version):
            return _NOTHING
        key, now_s = (provider.name, version), self._clock()
        asked_s = self._asked_s.get(key)
        if asked_s is None or now_s - asked_s >= FRESH_S:
            self._drop_old(now_s)
            # One at a time: a client may send any number of versions.
            if provider.name not in self._fetches.tasks and len(self._asked_s) < _MAX_LISTS:
                self._asked_s[key] = now_s
                self._fetches.start(provider.name, self._refresh(provider, version))
        return self._known.get(key, _NOTHING)

    def _drop_old(self, now_s: float) -> None:
        if len(self._asked_s) >= _MAX_LISTS:
            for key in [key for key, at_s in self._asked_s.items() if now_s - at_s >= FRESH_S]:
                del self._asked_s[key]
                self._known.pop(key, None)

    def forget(self) -> None:
        """Fetch all lists anew when they are needed next: the configuration has changed."""
        self._asked_s.clear()
        self._known.clear()

    async def _refresh(self, provider: Provider, version: str) -> None:
        try:
            body = await fetch_list(self._session(), provider, f"client_version={version}")
            # A provider that does not know Codex answers with its usual list, which has `data`.
            models = msgspec.json.decode(body, type=_List).models[:_MAX_MODELS]
        except LIST_ERRORS as error:
            cause = type(error).__name__
            log.event("models.list_failed", provider=provider.name, cause=cause)
            return
        named = {each.get("slug"): each for each in models}
        self._known[provider.name, version] = {
            name: each for name, each in named.items() if isinstance(name, str) and name
        }

    async def stop(self) -> None:
        """Cancel what is being fetched."""
        await self._fetches.stop()
