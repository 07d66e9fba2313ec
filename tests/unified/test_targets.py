"""The model of a call to /v1 picks its provider, and nothing else of the call is changed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.relays import Relay, packaged_provider, provider
from tests.upstream.raw import RawUpstream, ok

pytestmark = pytest.mark.usefixtures("no_lists")

ANSWER = b'{"id":"x","object":"chat.completion","model":"m","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n'
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%s\r\n--b--\r\n'
)


async def post(relay: Relay, endpoint: str, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    """POST to /v1. Returns the status and the JSON of the response."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | headers
    status, _, answer = await relay.call("POST", f"{relay.url}/v1/{endpoint}", data=data, headers=sent)
    return status, json.loads(answer)


def error(answer: dict[str, Any]) -> str:
    return str(answer["error"].get("code") or answer["error"]["type"])


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream) -> Relay:
    """A relay whose providers are all at `raw`, each below a path of its own."""
    raw.scripts[:] = [(ok(ANSWER),)]
    entries = {name: packaged_provider(name, f"{raw.url}/{name}") for name in ("openai", "anthropic", "google-ai-studio", "groq")}
    models = {
        "fast": "groq/llama-3.3-70b",
        "best": ["openai/gpt-5", "anthropic/claude-opus-4-5"],
        "spoken": {"targets": ["anthropic/claude-opus-4-5", {"provider": "openai", "model": "gpt-5"}]},
    }
    return await start({"models": models, "unified": {"order": ["openai", "anthropic", "google-ai-studio", "groq"]}, "providers": entries})


def asked(raw: RawUpstream) -> list[tuple[str, dict[str, Any]]]:
    """What arrived at the providers: target and body."""
    return [(each.target, json.loads(each.body)) for each in raw.arrived]


@pytest.mark.parametrize(
    ("model", "target", "replaced"),
    [
        ("groq/llama-3.3-70b", "/groq/openai/v1/chat/completions", "llama-3.3-70b"),
        ("openai/ft:gpt-4o:a/b", "/openai/v1/chat/completions", "ft:gpt-4o:a/b"),
        ("fast", "/groq/openai/v1/chat/completions", "llama-3.3-70b"),
        ("best", "/openai/v1/chat/completions", "gpt-5"),
        ("gpt-4o-mini", "/openai/v1/chat/completions", "gpt-4o-mini"),
        ("claude-sonnet-4-5", "/anthropic/v1/chat/completions", "claude-sonnet-4-5"),
        ("gemini-2.5-flash", "/google-ai-studio/v1beta/openai/chat/completions", "gemini-2.5-flash"),
    ],
)
async def test_an_alias_a_prefix_or_a_list_picks_the_provider(relay: Relay, raw: RawUpstream, model: str, target: str, replaced: str) -> None:
    status, _ = await post(relay, "chat/completions", {"model": model, "messages": []})
    assert status == 200
    assert asked(raw) == [(target, {"model": replaced, "messages": []})]
    [event] = await relay.events()
    assert (event["surface"], event["model"]) == ("unified", replaced)
    assert target.startswith(f"/{event['provider']}/") and event["usage"]["input_tokens"] == 3


async def test_only_the_bytes_of_the_model_are_changed(relay: Relay, raw: RawUpstream) -> None:
    body = b'{ "messages":[{"role":"user","content":"\\u00e9 {\\"model\\":\\"x\\"}"}],\n  "model" : "fast" ,"seed":1.0 }'
    assert (await post(relay, "chat/completions", body))[0] == 200
    [arrived] = raw.arrived
    assert arrived.body == body.replace(b'"fast"', b'"llama-3.3-70b"')


async def test_the_model_of_a_form_picks_the_provider_too(relay: Relay, raw: RawUpstream) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert (await post(relay, "audio/transcriptions", FORM % b"openai/whisper-1", **headers))[0] == 200
    [arrived] = raw.arrived
    assert (arrived.target, arrived.body) == ("/openai/v1/audio/transcriptions", FORM % b"whisper-1")


async def test_anthropic_messages_and_their_count_go_to_anthropic(relay: Relay, raw: RawUpstream) -> None:
    for endpoint in ("messages?beta=true", "messages/count_tokens"):
        assert (await post(relay, endpoint, {"model": "claude-opus-4-5", "messages": []}))[0] == 200
    assert [target for target, _ in asked(raw)] == ["/anthropic/v1/messages?beta=true", "/anthropic/v1/messages/count_tokens"]


async def test_the_next_target_of_an_alias_follows_a_failed_one(relay: Relay, raw: RawUpstream) -> None:
    raw.scripts[:] = [(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n",), (ok(ANSWER),)]
    assert (await post(relay, "chat/completions", {"model": "best", "messages": []}))[0] == 200
    assert [(target, body["model"]) for target, body in asked(raw)] == [
        ("/openai/v1/chat/completions", "gpt-5"), ("/anthropic/v1/chat/completions", "claude-opus-4-5"),
    ]  # fmt: skip


async def test_an_order_may_name_the_built_in_provider_while_it_does_not_run(start: StartRelay, raw: RawUpstream) -> None:
    raw.scripts[:] = [(ok(ANSWER),)]
    relay = await start({"unified": {"order": ["demo", "openai"]}, "providers": {"openai": provider(f"{raw.url}/openai")}})
    assert (await post(relay, "chat/completions", {"model": "gpt-5", "messages": []}))[0] == 200


async def test_an_alias_by_weight_chooses_by_the_weights(start: StartRelay, raw: RawUpstream) -> None:
    raw.scripts[:] = [(ok(ANSWER),)]
    entries = {"openai": provider(f"{raw.url}/openai"), "groq": provider(f"{raw.url}/groq")}
    targets = ["openai/gpt-5", {"provider": "groq", "model": "llama", "weight": 1e12}]
    relay = await start({"models": {"half": {"order": "weight", "targets": targets}}, "providers": entries})
    assert (await post(relay, "chat/completions", {"model": "half", "messages": []}))[0] == 200
    assert [(target, body["model"]) for target, body in asked(raw)] == [("/groq/chat/completions", "llama")]


async def test_an_alias_has_the_name_that_a_provider_has_too(start: StartRelay, raw: RawUpstream) -> None:
    raw.scripts[:] = [(ok(ANSWER),)]
    relay = await start({"models": {"gpt-5": "groq/gpt-5"}, "providers": {"openai": provider(f"{raw.url}/openai"), "groq": provider(f"{raw.url}/groq")}})
    assert (await post(relay, "chat/completions", {"model": "gpt-5", "messages": []}))[0] == 200
    assert asked(raw) == [("/groq/chat/completions", {"model": "gpt-5", "messages": []})]


async def test_a_target_without_the_endpoint_is_left_out(relay: Relay, raw: RawUpstream) -> None:
    assert (await post(relay, "responses", {"model": "spoken", "input": "x"}))[0] == 200
    assert asked(raw) == [("/openai/v1/responses", {"model": "gpt-5", "input": "x"})]


REFUSED = [
    ("chat/completions", {"model": "gpt-99", "messages": []}, 200, ""),
    ("chat/completions", {"model": "fsat", "messages": []}, 404, "model_not_found"),
    ("chat/completions", {"messages": []}, 400, "model_missing"),
    ("chat/completions", b'{"model":"fast","model":"best","messages":[]}', 400, "model_missing"),
    ("chat/completions", {"model": "fast", "input": "x"}, 400, "wrong_body"),
    ("responses", {"model": "claude-opus-4-5", "input": "x"}, 400, "endpoint_not_supported"),
    ("embeddings", {"model": "anthropic/claude-opus-4-5", "input": "x"}, 400, "endpoint_not_supported"),
    ("nothing/here", {"model": "fast"}, 404, "unknown_route"),
]


@pytest.mark.parametrize(("endpoint", "body", "status", "code"), REFUSED[1:])
async def test_a_call_without_a_target_is_refused_before_anything_is_sent(relay: Relay, raw: RawUpstream, endpoint: str, body: Any, status: int, code: str) -> None:
    refused, answer = await post(relay, endpoint, body)
    assert (refused, error(answer)) == (status, code) and not asked(raw)


async def test_a_refusal_says_what_would_work(relay: Relay) -> None:
    _, answer = await post(relay, "responses", {"model": "claude-opus-4-5", "input": "x"})
    assert answer["error"]["message"] == "anthropic does not have /v1/responses. Send 'claude-opus-4-5' to /v1/chat/completions or /v1/messages."
    _, answer = await post(relay, "chat/completions", {"model": "claude-opus-4", "messages": []})
    _, answer = await post(relay, "chat/completions", {"model": "bset", "messages": []})
    assert answer["error"]["message"] == "There is no model 'bset'. Did you mean 'best'?"
    _, answer = await post(relay, "messages", {"messages": []})
    assert answer["type"] == "error", "in the format of the endpoint"


CLIENT_KEY = "sk-local-unified-0123456789abcdef"


def as_client(**record: Any) -> dict[str, Any]:
    return {"access": {"mode": "required"}, "clients": {"web": {"key": CLIENT_KEY} | record}}


@pytest.mark.parametrize(
    ("record", "model", "status"),
    [
        ({"models": ["gpt-5*"]}, "openai/gpt-5", 200),
        ({"models": ["gpt-5*"]}, "best", 200),
        ({"models": ["best"]}, "best", 200),
        ({"models": ["best"]}, "openai/gpt-5", 403),
        ({"models": ["gpt-5*"]}, "fast", 403),
        ({"models": ["gpt-5*"]}, "openai/gpt-4o", 403),
        ({"providers": ["openai"]}, "best", 200),
        ({"providers": ["openai"]}, "fast", 403),
    ],
)
async def test_an_alias_or_a_prefix_does_not_get_around_a_clients_rights(start: StartRelay, raw: RawUpstream, record: dict[str, Any], model: str, status: int) -> None:
    raw.scripts[:] = [(ok(ANSWER),)]
    entries = {"openai": provider(raw.url), "groq": provider(raw.url)}
    relay = await start({"models": {"fast": "groq/llama", "best": "openai/gpt-5"}, "providers": entries} | as_client(**record))
    refused, answer = await post(relay, "chat/completions", {"model": model, "messages": []}, Authorization=f"Bearer {CLIENT_KEY}")
    assert refused == status, answer
    assert len(asked(raw)) == (status == 200)


async def test_a_client_without_a_key_is_refused_before_its_body_is_read(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"providers": {"openai": provider(raw.url)}} | as_client())
    never = asyncio.Event()

    async def body() -> Any:
        yield b'{"model":'
        await never.wait()

    async with relay.client.post(f"{relay.url}/v1/chat/completions", data=body()) as answer:
        assert answer.status == 401
