"""Two relays in one process share only the log."""

from __future__ import annotations

import gc
import sqlite3
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from relay import log
from relay.app import reload
from relay.registry.load import Sources
from tests.conftest import StartRelay
from tests.relays import KEYS, Relay, provider, stop_relay
from tests.upstream.raw import RawUpstream, ok

FIRST_KEY, SECOND_KEY = KEYS["OPENAI_API_KEY"], KEYS["GROQ_API_KEY"]


def _document(folder: Path, url: str, key: str) -> dict[str, Any]:
    providers = {"openai": provider(url, key)}
    return {"database": str(folder / f"{key}.db"), "ledger": {"bodies": "on"}, "providers": providers}


async def _start(start: StartRelay, raw: RawUpstream, folder: Path) -> tuple[Relay, Relay]:
    first = await start(_document(folder, raw.url, "OPENAI_API_KEY"))
    return first, await start(_document(folder, raw.url, "GROQ_API_KEY"))


async def _reload(relay: Relay, **changed: Any) -> None:
    for name, value in changed.items():
        env = relay.folder / ".env"
        env.write_text(env.read_text() + f"{name}={value}\n")
    await reload(relay.gateway, Sources(relay.folder / "gateway.yaml", relay.folder / ".env"))


async def _logged(relay: Relay, text: str) -> str:
    """Log an exception with `text`. Returns its traceback in the log."""
    count = len([line for line in relay.logged.lines if "test.bug" in line])
    log.bug("test.bug", ValueError(text))
    return str((await relay.events("test.bug", count + 1))[-1]["traceback"])


async def _stored_response(relay: Relay, body: bytes, raw: RawUpstream) -> bytes:
    raw.plays(ok(body))
    _, headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), data=b"{}")
    await relay.idle()
    logs = f"{relay.url}/api/v1/ai-gateway/logs"
    return (await relay.call("GET", f"{logs}/{headers['cf-aig-log-id']}/response"))[2]


async def test_the_log_redacts_the_keys_of_both(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    _, second = await _start(start, raw, tmp_path)
    shown = await _logged(second, f"{FIRST_KEY} and {SECOND_KEY}")
    assert "[redacted] and [redacted]" in shown


async def test_reloads_of_one_relay_keep_the_key_of_the_other_redacted(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    _, second = await _start(start, raw, tmp_path)
    for _ in range(3):
        await _reload(second)
    assert "[redacted] and [redacted]" in await _logged(second, f"{FIRST_KEY} and {SECOND_KEY}")


async def test_the_stop_of_one_relay_keeps_both_keys_redacted(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    first, second = await _start(start, raw, tmp_path)
    await stop_relay(second)
    await _reload(first)
    assert "[redacted] and [redacted]" in await _logged(second, f"{FIRST_KEY} and {SECOND_KEY}")


async def test_a_reload_redacts_the_new_key_and_the_previous_one(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    first, second = await _start(start, raw, tmp_path)
    await _reload(first, OPENAI_API_KEY="CANARY-rotated-key-of-the-first")
    shown = await _logged(second, f"{FIRST_KEY} and CANARY-rotated-key-of-the-first and {SECOND_KEY}")
    assert "[redacted] and [redacted] and [redacted]" in shown


async def test_stored_bodies_lack_the_keys_of_their_relay_after_reloads_of_the_other(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    first, second = await _start(start, raw, tmp_path)
    for _ in range(3):
        await _reload(second)
    raw_body = f'{{"quoted": "sk-{FIRST_KEY}"}}'.encode()
    assert FIRST_KEY.encode() not in await _stored_response(first, raw_body, raw)


async def test_stored_bodies_keep_a_text_that_is_a_secret_of_the_other_relay_only(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    first, second = await _start(start, raw, tmp_path)
    await _reload(second, GROQ_API_KEY="common-word")
    assert await _stored_response(first, b'{"text": "common-word"}', raw) == b'{"text": "common-word"}'
    assert await _stored_response(second, b'{"text": "common-word"}', raw) == b'{"text": "[redacted]"}'


async def test_each_database_has_the_calls_of_its_own_relay(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    relays = await _start(start, raw, tmp_path)
    raw.plays(ok(b"{}"))
    for times, relay in enumerate(relays, 1):
        for _ in range(times):
            await relay.call("POST", relay.path("openai", "chat/completions"), data=b"{}")
    for times, (relay, key) in enumerate(zip(relays, ("OPENAI_API_KEY", "GROQ_API_KEY"), strict=True), 1):
        await relay.idle()
        with sqlite3.connect(tmp_path / f"{key}.db") as connection:
            assert connection.execute("SELECT count(*) FROM exchanges").fetchone() == (times,)


def test_the_relay_adds_no_adapter_for_none_to_sqlite3() -> None:
    import relay.storage.database  # noqa: F401

    adapted = {kind for kind, _ in sqlite3.adapters}  # type: ignore[attr-defined]
    assert type(None) not in adapted


def test_secrets_of_relays_that_stopped_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_protected", ())
    monkeypatch.setattr(log, "_stopped", deque(maxlen=log._STOPPED_RELAYS))
    secrets = [log.Secrets(frozenset({f"CANARY-{number}-of-many"})) for number in range(log._STOPPED_RELAYS + 5)]
    for each in secrets:
        log.protect(each)
        log.keep_protecting(each)
    assert log.redacted("CANARY-0-of-many") == "[redacted]"
    del secrets, each
    gc.collect()
    log.protect(log.Secrets(frozenset()))
    assert log.redacted("CANARY-0-of-many CANARY-20-of-many") == "CANARY-0-of-many [redacted]"
    assert len(log._protected) <= log._STOPPED_RELAYS + 1
