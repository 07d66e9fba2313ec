"""GET /v1/models: aliases and the providers' models, in the shape that the client asks for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pytest
from aiohttp import web
from yarl import URL

from relay.demo.provider import MODELS
from tests.conftest import StartRelay
from tests.processes import serve
from tests.relays import HANG_GUARD_S, Relay, packaged_provider

KEY = "sk-local-lists-0123456789abcdef"
LISTED = {
    "/openai/v1/models": {"object": "list", "data": [{"id": "gpt-99-secret"}, {"id": "gpt-5"}]},
    "/anthropic/v1/models": {"data": [{"type": "model", "id": "claude-99"}], "has_more": False},
    "/google-ai-studio/v1beta/models": {"models": [{"name": "models/gemini-99"}]},
}


class Lists:
    """Stand-ins whose lists arrive when `answers` is set."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.answers.set()
        self.asked: list[str] = []
        self.versions: list[str] = []
        """The versions of Codex for which a list was asked."""
        self.described: list[dict[str, Any]] = []
        self.raw: bytes | None = None
        """Answers everything, if it is set."""
        self.status, self.gated = 200, ""
        """Paths with this wait for `answers`."""

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        if self.raw is not None:
            return web.Response(body=self.raw, content_type="application/json")
        if "client_version" in request.query:
            self.versions.append(request.query["client_version"])
            return web.json_response({"models": self.described} if self.described else LISTED[request.path])
        if self.gated in request.path:
            await self.answers.wait()
        return web.json_response(LISTED.get(request.path, {"error": "x"}), status=self.status)


@pytest.fixture
async def lists(aiohttp_server: Any) -> Lists:
    made = Lists()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    made.url = str((await aiohttp_server(app)).make_url("")).rstrip("/")  # type: ignore[attr-defined]
    return made


async def served(start: StartRelay, lists: Lists, **document: Any) -> Relay:
    entries = {name: packaged_provider(name, f"{lists.url}/{name}") for name in ("openai", "anthropic", "google-ai-studio")}  # type: ignore[attr-defined]
    return await start({"models": {"best": "openai/gpt-5"}, "providers": entries} | document)


async def get(relay: Relay, path: str = "models", **headers: str) -> tuple[int, Any]:
    status, _, body = await relay.call("GET", URL(f"{relay.url}/v1/{path}", encoded=True), headers=headers)
    return status, json.loads(body)


async def ids(relay: Relay, **headers: str) -> list[str]:
    _, answer = await get(relay, **headers)
    return [each["id"] for each in answer["data"]]


async def until_listed(relay: Relay, model: str, **headers: str) -> None:
    async with asyncio.timeout(HANG_GUARD_S):
        while model not in await ids(relay, **headers):
            await asyncio.sleep(0.01)


async def test_the_lists_of_all_providers_follow_the_aliases(start: StartRelay, lists: Lists) -> None:
    relay = await served(start, lists)
    for model in ("gpt-99-secret", "claude-99", "gemini-99"):
        await until_listed(relay, model)
    found = await ids(relay)
    assert found == [
        "best", "gpt-99-secret", "openai/gpt-99-secret", "gpt-5", "openai/gpt-5",
        "claude-99", "anthropic/claude-99", "gemini-99", "google-ai-studio/gemini-99",
    ]  # fmt: skip
    assert await get(relay, "models/openai/gpt-5") == (200, {"id": "openai/gpt-5", "object": "model", "created": 0, "owned_by": "openai"})
    assert (await get(relay, "models/no-such"))[0] == 404


async def test_a_model_may_be_named_with_an_escaped_slash(start: StartRelay, lists: Lists) -> None:
    """As OpenAI's and Anthropic's SDKs send it."""
    relay = await served(start, lists, models={"team/best": "openai/gpt-5"})
    status, answer = await get(relay, "models/team%2Fbest")
    assert (status, answer.get("id")) == (200, "team/best")


async def test_a_list_that_does_not_arrive_holds_up_no_answer(start: StartRelay, lists: Lists) -> None:
    lists.answers.clear()
    relay = await served(start, lists)
    assert "gpt-5" in await ids(relay), "the public price list has it"
    lists.answers.set()


async def test_each_list_is_fetched_once_in_ten_minutes(start: StartRelay, lists: Lists) -> None:
    relay = await served(start, lists)
    now = [relay.gateway.clock()]
    relay.gateway.model_lists._clock = lambda: now[0]
    await until_listed(relay, "gemini-99")
    await until_listed(relay, "claude-99")
    assert sorted(lists.asked) == sorted(LISTED)
    now[0] += 601
    await ids(relay)
    async with asyncio.timeout(HANG_GUARD_S):
        while len(lists.asked) < 6:
            await asyncio.sleep(0.01)


async def test_a_failed_list_leaves_the_public_one_and_is_logged(start: StartRelay, lists: Lists) -> None:
    lists.status = 500
    relay = await served(start, lists)
    await ids(relay)
    await relay.events("models.list_failed", 3)
    assert "gpt-5" in await ids(relay)


async def test_a_model_of_a_fetched_list_picks_its_provider(start: StartRelay, lists: Lists) -> None:
    relay = await served(start, lists)
    await until_listed(relay, "gpt-99-secret")
    await relay.call("POST", f"{relay.url}/v1/chat/completions", json={"model": "gpt-99-secret", "messages": []})
    assert lists.asked[-1] == "/openai/v1/chat/completions"


async def chat(relay: Relay, model: str) -> tuple[int, bytes]:
    status, _, body = await relay.call("POST", f"{relay.url}/v1/chat/completions", json={"model": model, "messages": []})
    return status, body


async def test_the_first_call_waits_for_the_list_that_has_its_model(start: StartRelay, lists: Lists) -> None:
    """Else each worker would answer 404 after each start, which no SDK tries again."""
    relay = await served(start, lists)
    lists.answers.clear()
    calls = [asyncio.create_task(chat(relay, model)) for model in ("gpt-99-secret", "no-such-model")]
    async with asyncio.timeout(HANG_GUARD_S):
        while len(lists.asked) < 3:
            await asyncio.sleep(0.01)
    assert not any(call.done() for call in calls)
    lists.answers.set()
    (known, _), (unknown, body) = await asyncio.gather(*calls)
    assert (known, unknown) == (200, 404) and b"model_not_found" in body
    assert lists.asked.count("/openai/v1/chat/completions") == 1


async def test_a_model_that_the_price_list_has_does_not_wait(start: StartRelay, lists: Lists) -> None:
    relay = await served(start, lists)
    lists.gated = "models"
    lists.answers.clear()
    assert (await chat(relay, "gpt-5"))[0] == 200
    lists.answers.set()


async def test_the_first_session_waits_for_the_list_too(start: StartRelay, lists: Lists) -> None:
    relay = await served(start, lists)
    status, headers, _ = await relay.call("GET", f"{relay.url}/v1/realtime?model=gpt-99-secret")
    assert (status, headers["x-relay-error"]) == (426, "upgrade_required")


async def test_a_list_that_does_not_arrive_delays_an_unknown_model_by_a_bounded_time(start: StartRelay, lists: Lists, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.upstream.model_lists._FIRST_S", 0.05)
    relay = await served(start, lists)
    lists.answers.clear()
    assert (await chat(relay, "gpt-99-secret"))[0] == 404
    lists.answers.set()


async def test_a_list_that_cannot_be_fetched_delays_nothing(start: StartRelay, lists: Lists) -> None:
    lists.status = 500
    relay = await served(start, lists)
    for _ in range(2):
        assert (await chat(relay, "gpt-99-secret"))[0] == 404


async def test_the_built_in_provider_is_known_at_once(tmp_path: Path) -> None:
    served_relay = await serve(tmp_path, {"demo": {"enabled": True}, "providers": {}})
    async with aiohttp.ClientSession() as client:
        async with client.get(f"{served_relay.url}/v1/models") as answer:
            assert {each["id"] for each in (await answer.json())["data"]} >= set(MODELS)
        async with client.post(f"{served_relay.url}/v1/chat/completions", json={"model": "demo-chat", "messages": [{"role": "user", "content": "hi"}]}) as answer:
            assert answer.status == 200
    await served_relay.stop()


async def test_anthropics_shape_for_its_sdk_and_claude_code(start: StartRelay, lists: Lists) -> None:
    relay = await served(start, lists)
    await until_listed(relay, "claude-99")
    _, answer = await get(relay, "models?limit=1000", **{"anthropic-version": "2023-06-01"})
    assert answer["data"][0] == {"type": "model", "id": "best", "display_name": "best", "created_at": "1970-01-01T00:00:00Z"}
    status, answer_of_none = await get(relay, "models/no-such", **{"anthropic-version": "2023-06-01"})
    assert (status, answer_of_none["type"]) == (404, "error")
    assert (answer["has_more"], answer["first_id"], answer["last_id"]) == (False, "best", answer["data"][-1]["id"])


async def test_anthropics_sdk_pages_through_the_list(start: StartRelay, lists: Lists) -> None:
    relay = await served(start, lists)
    for model in ("gpt-99-secret", "claude-99", "gemini-99"):
        await until_listed(relay, model)
    whole = await ids(relay)
    async with anthropic.AsyncAnthropic(api_key="any", base_url=relay.url) as client:
        assert [model.id async for model in client.models.list(limit=2)] == whole
        page = await client.models.list(limit=3, before_id=whole[-1])
        assert ([model.id for model in page.data], page.has_more) == (whole[-4:-1], True)


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "after_id=no-such", "before_id="])
async def test_a_page_that_does_not_exist_is_refused(start: StartRelay, lists: Lists, query: str) -> None:
    relay = await served(start, lists)
    status, answer = await get(relay, f"models?{query}", **{"anthropic-version": "2023-06-01"})
    assert status == 400 and query.partition("=")[0] in answer["error"]["message"]


async def test_a_client_sees_what_it_may_use(start: StartRelay, lists: Lists) -> None:
    clients = {"web": {"key": KEY, "providers": ["openai"], "models": ["gpt-5*", "best"]}}
    relay = await served(start, lists, access={"mode": "required"}, clients=clients)
    headers = {"Authorization": f"Bearer {KEY}"}
    assert (await get(relay))[0] == 401
    assert set(await ids(relay, **headers)) >= {"best", "gpt-5"}
    await until_listed(relay, "gpt-5", **headers)
    assert not [each for each in await ids(relay, **headers) if "claude" in each or "gemini" in each]


def _described(slug: str) -> dict[str, Any]:
    return {"slug": slug, "display_name": slug.upper(), "base_instructions": f"You are {slug}.", "visibility": "list", "priority": 1}


async def codex_models(relay: Relay, version: str = "0.171.0", **headers: str) -> list[dict[str, Any]]:
    status, answer = await get(relay, f"models?client_version={version}", **headers)
    assert status == 200 and list(answer) == ["models"]
    found: list[dict[str, Any]] = answer["models"]
    return found


async def until_described(relay: Relay, **headers: str) -> list[dict[str, Any]]:
    async with asyncio.timeout(HANG_GUARD_S):
        while not (found := await codex_models(relay, **headers)):
            await asyncio.sleep(0.01)
    return found


async def test_codex_gets_the_descriptions_of_the_provider_and_an_alias_that_of_its_target(start: StartRelay, lists: Lists) -> None:
    lists.described = [_described("gpt-5"), _described("gpt-99-secret"), {"slug": 7}, {}]
    relay = await served(start, lists)
    assert await codex_models(relay) == [], "the first answer does not wait"
    await until_listed(relay, "gpt-99-secret")
    found = await until_described(relay)
    assert found == [_described("gpt-5") | {"slug": "best", "display_name": "best"}, _described("gpt-99-secret"), _described("gpt-5")]
    assert lists.versions == ["0.171.0"], "one provider, once"


async def test_codex_sees_what_its_client_may_use(start: StartRelay, lists: Lists) -> None:
    lists.described = [_described("gpt-5"), _described("gpt-5-mini"), _described("o9")]
    clients = {"web": {"key": KEY, "providers": ["openai"], "models": ["gpt-5", "best"]}}
    relay = await served(start, lists, access={"mode": "required"}, clients=clients)
    found = await until_described(relay, Authorization=f"Bearer {KEY}")
    assert [each["slug"] for each in found] == ["best", "gpt-5"]


async def test_a_model_that_its_provider_does_not_describe_is_left_to_codex(start: StartRelay, lists: Lists) -> None:
    """OpenAI's usual list has no descriptions, and the relay invents no instructions."""
    relay = await served(start, lists)
    assert await codex_models(relay) == []
    async with asyncio.timeout(HANG_GUARD_S):
        while not lists.versions:
            await asyncio.sleep(0.01)
    await until_listed(relay, "gpt-99-secret")
    assert await codex_models(relay) == []


@pytest.mark.parametrize("version", ["", "1.2.3%26limit=1", "x", "1.2.3.4.5", "9" * 7, "-1"])
async def test_nothing_is_fetched_for_a_text_that_is_no_version(start: StartRelay, lists: Lists, version: str) -> None:
    relay = await served(start, lists)
    assert await codex_models(relay, version) == []
    await until_listed(relay, "gpt-99-secret")
    assert lists.versions == []


async def test_any_number_of_versions_keeps_a_bounded_number_of_lists(start: StartRelay, lists: Lists) -> None:
    lists.described = [_described("gpt-5")]
    relay = await served(start, lists)
    now = [relay.gateway.clock()]
    known = relay.gateway.codex_lists
    known._clock = lambda: now[0]
    provider = relay.gateway.registry.providers["openai"]
    for number in range(100):
        known.of(provider, f"1.{number}")
        await asyncio.gather(*known._fetches.tasks.values())
    assert len(known._known) == len(lists.versions) == 32
    now[0] += 601
    known.of(provider, "2.0")
    await asyncio.gather(*known._fetches.tasks.values())
    assert len(known._known) == 1 and known.of(provider, "2.0")["gpt-5"] == _described("gpt-5")


@pytest.mark.parametrize("query", ["", "?client_version=1.0"])
async def test_a_list_that_is_nested_too_deeply_is_logged_as_failed(start: StartRelay, lists: Lists, query: str) -> None:
    lists.raw = b'{"models":[{"slug":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}"
    relay = await served(start, lists)
    await get(relay, f"models{query}")
    failed = await relay.events("models.list_failed", 4 if query else 3)
    assert {each["cause"] for each in failed} == {"RecursionError"}
