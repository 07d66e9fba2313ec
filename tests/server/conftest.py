"""Start relays in separate processes and stop them after the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Served, serve
from tests.template import Start, forked

Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Serve]:
    """Start a relay: `await served({...}, "--flag")`. It is stopped after the test."""
    running: list[Served] = []

    async def begin(document: dict[str, Any] | None, *arguments: str, by: Start = forked) -> Served:
        running.append(await serve(tmp_path, document, *arguments, start=by))
        return running[-1]

    yield begin
    for one in running:
        await one.stop()
