"""Responses to calls by an alias or prefix of `/v1` are cached for the model that they mean."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.conftest import StartRelay
from tests.relays import Relay, provider
from tests.upstream.raw import RawUpstream, ok

pytestmark = pytest.mark.usefixtures("no_lists")

ANSWER = ok(b'{"choices": [{"index": 0, "message": {"content": "42"}, "finish_reason": "stop"}]}', "Content-Type: application/json")
FAILED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream) -> Relay:
    entries = {name: provider(f"{raw.url}/{name}") for name in ("openai", "grok")}
    models = {"fast": "grok/grok-4", "two": ["openai/gpt-5", "grok/grok-4"]}
    return await start({"cache": {"ttl_s": 3600}, "models": models, "providers": entries})


async def status_of(relay: Relay, model: str, **headers: str) -> str | None:
    body: dict[str, Any] = {"model": model, "messages": []}
    status, found, _ = await relay.call("POST", f"{relay.url}/v1/chat/completions", json=body, headers=headers)
    assert status == 200
    return found.get("cf-aig-cache-status")  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", ["fast", "grok/grok-4", "openai/gpt-5"])
async def test_a_call_by_an_alias_or_prefix_is_served_from_the_cache(relay: Relay, raw: RawUpstream, model: str) -> None:
    raw.plays(ANSWER)
    assert [await status_of(relay, model) for _ in range(3)] == ["MISS", "HIT", "HIT"]
    assert len(raw.arrived) == 1


async def test_two_models_do_not_share_a_response(relay: Relay, raw: RawUpstream) -> None:
    raw.plays(ANSWER)
    assert [await status_of(relay, model) for model in ("grok/grok-4", "grok/grok-3", "openai/grok-4")] == ["MISS"] * 3


@pytest.mark.parametrize("own_key", [False, True])
async def test_an_alias_that_a_reload_gives_another_model_is_asked_again(relay: Relay, raw: RawUpstream, own_key: bool) -> None:
    raw.plays(ANSWER)
    headers = {"cf-aig-cache-key": "mine"} if own_key else {}
    await status_of(relay, "fast", **headers)
    file = relay.folder / "gateway.yaml"
    document = yaml.safe_load(file.read_text())
    document["models"]["fast"] = "grok/grok-5"
    file.write_text(yaml.safe_dump(document))
    await relay.call("POST", f"{relay.url}/api/v1/ai-gateway/providers/reload")
    assert [await status_of(relay, "fast", **headers) for _ in range(2)] == ["MISS", "HIT"]


async def test_what_the_next_target_of_an_alias_answers_is_not_cached_for_the_first(relay: Relay, raw: RawUpstream) -> None:
    raw.scripts[:] = [(FAILED,), (ANSWER,), (ANSWER,)]
    assert await status_of(relay, "two") == "MISS"
    assert await status_of(relay, "two") == "MISS"
    assert [each.target.split("/")[1] for each in raw.arrived] == ["openai", "grok", "openai"]
