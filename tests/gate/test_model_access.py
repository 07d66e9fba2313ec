"""A client with `models`: what its REST calls may name, on every path to a provider."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import FormData
from yarl import URL

from relay.core.access import Client, Rights, TicketTerms
from relay.core.exchange import Caller
from relay.gate.model_access import model_access
from tests.conftest import StartRelay
from tests.relays import Relay, packaged_provider, provider
from tests.upstream.raw import RawUpstream, ok
from tests.upstream.vendors import SEEN, Seen, json_out, openai_chat, vendor

KEY = "team-key-of-the-tests"
MODELS = ["good*", "fal-ai/good*"]
PROVIDERS = ("openai", "anthropic", "google-ai-studio", "cartesia", "elevenlabs", "fal", "deepgram", "assemblyai", "cohere", "azure-openai", "openrouter")


def client(**more: Any) -> dict[str, Any]:
    return {"clients": {"team": {"key": KEY, "models": MODELS} | more}}


Send = Callable[..., Awaitable[str]]


def sending(relay: Relay) -> Send:
    """Send a call with the client's key. Returns "passed", or the code of the refusal."""

    async def send(endpoint: str, data: Any = None, method: str = "POST", name: str = "openai", headers: dict[str, str] | None = None) -> str:
        if isinstance(data, dict | list):
            data, headers = json.dumps(data).encode(), {"Content-Type": "application/json"} | (headers or {})
        sent = {"x-relay-key": KEY} | (headers or {})
        status, answer, _ = await relay.call(method, URL(relay.path(name, endpoint), encoded=True), data=data, headers=sent)
        if status == 200:
            return "passed"
        assert (status, answer["x-should-retry"]) == (403, "false")
        return str(answer["x-relay-error"])

    return send


@pytest.fixture
async def anything(aiohttp_server: Any) -> tuple[str, list[Seen]]:
    """(URL, requests) of a provider that answers every call."""
    server = await aiohttp_server(vendor(("*", "/{path:.*}", json_out)))
    return str(server.make_url("")).rstrip("/"), server.app[SEEN]


@pytest.fixture
async def send(start: StartRelay, anything: tuple[str, list[Seen]], monkeypatch: pytest.MonkeyPatch) -> Send:
    monkeypatch.setenv("AZURE_OPENAI_RESOURCE", "r")
    for name in ("AZURE_OPENAI_API_KEY", "ASSEMBLYAI_API_KEY", "COHERE_API_KEY", "OPENROUTER_API_KEY"):
        monkeypatch.setenv(name, "k-of-a-test")
    url, _ = anything
    entries = {name: packaged_provider(name, url) for name in PROVIDERS}
    entries["fal"]["paths"] = {prefix: f"{url}/{prefix}" for prefix in entries["fal"]["paths"]}
    return sending(await start(client() | {"providers": entries}))


CALLS = [
    ("openai", "chat/completions", '{"model":"{m}"}', ""), ("openai", "v1/responses", '{"model":"{m}"}', ""), ("openai", "responses", '{"model":"good","tools":[{"type":"image_generation","model":"{m}"}]}', ""),
    ("openai", "images/generations", '{"model":"{m}"}', ""), ("openai", "videos", '{"model":"{m}"}', ""), ("openrouter", "chat/completions", '{"model":"good","models":["good-2","{m}"]}', ""),
    ("anthropic", "v1/messages", '{"model":"good","fallbacks":[{"model":"{m}"}]}', ""), ("anthropic", "v1/messages", '{"model":"good","tools":[{"type":"advisor_20260301","name":"a","model":"{m}"}]}', ""),
    ("anthropic", "v1/messages/batches", '{"requests":[{"params":{"model":"good"}},{"params":{"model":"{m}"}}]}', ""), ("google-ai-studio", "v1beta/models/{m}:generateContent", "{}", ""),
    ("google-ai-studio", "v1beta/models/good:batchEmbedContents", '{"requests":[{"model":"models/{m}"}]}', ""), ("google-ai-studio", "v1beta/interactions", '{"agent":"{m}"}', ""),
    ("google-ai-studio", "v1beta/openai/chat/completions", '{"model":"{m}"}', ""), ("cohere", "v2/chat", '{"model":"{m}"}', ""), ("elevenlabs", "v1/text-to-speech/v", '{"text":"a","model_id":"{m}"}', ""),
    ("cartesia", "tts/bytes", '{"model_id":"{m}"}', ""), ("deepgram", "v1/listen", "RIFF", "model={m}"), ("assemblyai", "v2/transcript", '{"speech_models":["good","{m}"]}', ""),
    ("fal", "fal-ai/{m}", '{"prompt":"a"}', ""), ("fal", "queue/fal-ai/{m}", '{"prompt":"a"}', ""), ("fal", "fal-ai/good-llm", '{"model":"{m}"}', ""), ("azure-openai", "{m}/chat/completions", '{"model":"good"}', ""),
]  # fmt: skip


async def test_a_call_may_name_allowed_models_only(send: Send, anything: tuple[str, list[Seen]]) -> None:
    """Each row is called with a model that is not allowed, then with one that is."""

    async def results(model: str) -> list[str]:
        found = []
        for name, endpoint, body, query in CALLS:
            kind = {"Content-Type": "audio/wav" if body == "RIFF" else "application/json"}
            url = f"{endpoint}?{query}".replace("{m}", model).rstrip("?")
            found.append(f"{await send(url, body.replace('{m}', model).encode(), name=name, headers=kind)} {endpoint}")
        return found

    assert await results("bad") == [f"model_not_allowed {row[1]}" for row in CALLS]
    assert not anything[1]
    assert await results("good-1") == [f"passed {row[1]}" for row in CALLS]
    assert [seen.body.decode() for seen in anything[1]] == [row[2].replace("{m}", "good-1") for row in CALLS]


UNNAMED = [
    ("openai", "images/generations", {"prompt": "a"}), ("openai", "images/generations?model=good", {"prompt": "a"}), ("openai", "chat/completions", {"tools": [{"model": "good"}]}), ("openai", "moderations", {"input": "a"}),
    ("openai", "responses", {"prompt": {"id": "p"}}), ("elevenlabs", "v1/text-to-speech/v?model_id=good", {"text": "a"}), ("deepgram", "v1/speak", {"text": "a", "model": "good"}),
    ("google-ai-studio", "v1beta/%6Dodel/bad:generateContent", {"model": "good"}), ("assemblyai", "v2/transcript", {"audio_url": "u", "model": "good"}), ("openai", "chat/completions", {"MODEL": "good"}), ("openai", "chat/completions", {"model": None}),
]  # fmt: skip


async def test_a_call_that_leaves_the_model_to_the_vendor_is_refused(send: Send, anything: tuple[str, list[Seen]]) -> None:
    found = [f"{await send(endpoint, body, name=name)} {endpoint}" for name, endpoint, body in UNNAMED]
    assert found == [f"model_unknown {row[1]}" for row in UNNAMED]
    assert not anything[1]


async def test_escapes_in_a_path_hide_no_model(send: Send) -> None:
    for path in ("v1beta/%6Dodels/bad:generateContent", "v1beta/models/b%61d:generateContent", "v1beta/models/good/models/bad:generateContent"):
        assert await send(path, {"model": "good"}, name="google-ai-studio") == "model_not_allowed", path


DISGUISED = [
    b'{"model":"good","model":"bad"}', b'{"model":"bad","model":"good"}', b'{"model":"good","mod\\u0065l":"bad"}', b'\xef\xbb\xbf{"model":"good"}', b'{"model":"good"}{"model":"bad"}', '{"model":"good"}'.encode("utf-16"), b'{"model":"good","x":NaN}',
]  # fmt: skip


async def test_a_body_that_can_be_read_in_two_ways_is_refused(send: Send, anything: tuple[str, list[Seen]]) -> None:
    for body in DISGUISED:
        assert await send("chat/completions", body, headers={"Content-Type": "application/json"}) == "model_unknown", body
    assert not anything[1]


@pytest.mark.parametrize("body", [b'{"mod\\u0065l":"bad"}', b'{"x":"' + b"a" * 1024 * 1024 + b'",' + b" " * 1024 * 1024 + b'"model":"bad"}'], ids=["escape", "padding"])
async def test_neither_escapes_nor_padding_hide_a_model(send: Send, body: bytes) -> None:
    assert await send("chat/completions", io.BytesIO(body), headers={"Content-Type": "application/json"}) == "model_not_allowed"


async def test_json_of_another_content_type_is_read_as_json(send: Send) -> None:
    for kind in ("text/plain", "application/octet-stream"):
        assert await send("chat/completions", b'{"model":"bad"}', headers={"Content-Type": kind}) == "model_not_allowed"
    assert await send("chat/completions", b'{"model":"bad"}&model=good', headers={"Content-Type": "application/x-www-form-urlencoded"}) == "model_unknown"


async def test_a_chunked_body_is_read_whole(send: Send, anything: tuple[str, list[Seen]]) -> None:
    async def pieces(model: bytes) -> Any:
        for piece in (b'{"mod', b'el":"', model[:1], model[1:], b'"}'):
            yield piece
            await asyncio.sleep(0)

    kind = {"Content-Type": "application/json"}
    assert await send("chat/completions", pieces(b"bad"), headers=kind) == "model_not_allowed"
    assert await send("chat/completions", pieces(b"good"), headers=kind) == "passed"
    assert [seen.body for seen in anything[1]] == [b'{"model":"good"}']


async def test_a_compressed_body_is_decompressed_and_an_unknown_compression_refused(send: Send) -> None:
    def packed(model: str, coding: str = "gzip") -> dict[str, Any]:
        return {"data": gzip.compress(b'{"model":"%s"}' % model.encode()), "headers": {"Content-Type": "application/json", "Content-Encoding": coding}}

    assert await send("chat/completions", **packed("bad")) == "model_not_allowed"
    assert await send("chat/completions", **packed("good")) == "passed"
    assert await send("chat/completions", **packed("good", "secret")) == "model_unknown"
    plain = packed("good")
    del plain["headers"]["Content-Encoding"]
    assert await send("chat/completions", **plain) == "model_unknown"


async def test_a_body_that_is_too_large_to_be_held_is_refused(start: StartRelay, anything: tuple[str, list[Seen]]) -> None:
    document = client() | {"server": {"json_buffer_bytes": 65536, "buffer_bytes": 65536}}
    send = sending(await start(document, openai=provider(anything[0])))
    assert await send("chat/completions", {"model": "good", "x": "a" * 70_000}) == "model_unknown"
    assert await send("chat/completions", {"model": "good", "x": "a" * 50_000}) == "passed"
    assert len(anything[1]) == 1


async def test_a_form_names_one_allowed_model(send: Send) -> None:
    def data(*named: tuple[str, str]) -> FormData:
        form = FormData()
        form.add_field("file", b"RIFF" * 1000, filename="a.wav")
        for name, model in named:
            form.add_field(name, model)
        return form

    assert await send("audio/transcriptions", data(("model", "good"))) == "passed"
    assert await send("audio/transcriptions", data(("model", "bad"))) == "model_not_allowed"
    assert await send("audio/transcriptions", data(("model", "good"), ("Model", "bad"))) == "model_unknown"
    assert await send("audio/transcriptions", data(("model", "good"), ("model", "bad"))) == "model_unknown"
    assert await send("audio/transcriptions", data()) == "model_unknown"


async def test_endpoints_whose_model_is_not_read_must_be_listed(start: StartRelay, send: Send, anything: tuple[str, list[Seen]]) -> None:
    for endpoint in ("files", "batches", "responses/r/cancel", "realtime/client_secrets"):
        assert await send(endpoint, {"model": "good"}) == "endpoint_not_allowed"
    assert await send("responses/r", method="GET") == "endpoint_not_allowed"
    assert await send("models", method="GET") == "passed"
    listed = sending(await start(client(endpoints=["batch", "chat", "responses"]), openai=provider(anything[0])))
    assert await listed("batches", {"input_file_id": "f"}) == "passed"
    assert await listed("responses/r", method="GET") == "passed"
    assert await listed("responses/r", b'{"model":"good","model":"bad"}', method="GET") == "model_unknown"
    assert await listed("batches", b"no JSON") == "passed"
    assert await listed("batches", {"model": "bad"}) == "model_not_allowed"
    assert await listed("chat/completions", {"model": "bad"}) == "model_not_allowed"
    assert await listed("files", b"x") == "endpoint_not_allowed"


async def test_a_fallback_with_a_model_that_is_not_allowed_is_left_out(start: StartRelay, raw: RawUpstream, anything: tuple[str, list[Seen]]) -> None:
    raw.plays(ok(b"{}", status="503 Unavailable"))
    targets = [{"provider": "two", "model": "bad"}, {"provider": "two", "model": "good-2"}]
    document = client() | {"retries": {"max_attempts": 1}}
    relay = await start(document, openai=provider(raw.url, fallback=targets), two=provider(anything[0]))
    assert await sending(relay)("chat/completions", {"model": "good"}) == "passed"
    assert [json.loads(seen.body)["model"] for seen in anything[1]] == ["good-2"]
    status, _, _ = await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "good"})
    assert status == 200 and [json.loads(seen.body)["model"] for seen in anything[1]] == ["good-2", "bad"], "another client has all targets"


async def test_if_no_fallback_is_allowed_the_first_answer_counts(start: StartRelay, raw: RawUpstream, anything: tuple[str, list[Seen]]) -> None:
    raw.plays(ok(b"{}", status="503 Unavailable"))
    other = provider(anything[0])
    azure = {"base_url": f"{anything[0]}/openai/deployments", "auth": {"header": "api-key", "value": "k"}}
    targets = [{"provider": "two", "model": "bad"}, {"provider": "azure", "endpoint": "bad/chat/completions"}]
    relay = await start(client(), openai=provider(raw.url, fallback=targets), two=other, azure=azure)
    status, _, _ = await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "good"}, headers={"x-relay-key": KEY})
    assert status == 503 and not anything[1]


async def test_a_client_gets_no_cached_response_of_a_model_that_it_may_not_use(start: StartRelay, aiohttp_server: Any) -> None:
    server = await aiohttp_server(vendor(("POST", "/{path:.*}", openai_chat)))
    relay = await start(client() | {"cache": {"ttl_s": 60, "scope": "shared"}}, openai=provider(str(server.make_url(""))))

    async def call(model: str, **headers: str) -> tuple[str, str]:
        sent = {"cf-aig-cache-key": "mine"} | headers
        _, answer, body = await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": model}, headers=sent)
        return answer["cf-aig-cache-status"], json.loads(body)["model"]

    assert [await call("bad"), await call("bad")] == [("MISS", "bad"), ("HIT", "bad")]
    assert [await call("good", **{"x-relay-key": KEY}) for _ in range(2)] == [("MISS", "good"), ("HIT", "good")]


async def test_a_refusal_names_the_client_and_the_model_and_has_a_row(start: StartRelay, anything: tuple[str, list[Seen]]) -> None:
    relay = await start(client(), openai=provider(anything[0]))
    status, headers, body = await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "bad"}, headers={"x-relay-key": KEY})
    assert (status, headers["x-relay-error-source"]) == (403, "relay")
    assert json.loads(body)["error"]["message"] == "The client 'team' may not use the model 'bad'."
    [event] = await relay.events()
    assert (event["error"], event["outcome"], event["client"], event["model"]) == ("model_not_allowed", "refused", "team", "bad")


async def test_clients_without_models_pay_nothing(start: StartRelay, anything: tuple[str, list[Seen]], monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*parts: Any) -> Any:
        raise AssertionError("no body is searched")

    monkeypatch.setattr("relay.gate.model_access.models_of_call", search)
    document = {"clients": {"team": {"key": KEY}}}
    send = sending(await start(document, openai=provider(anything[0])))
    assert await send("chat/completions", b'{"model":"a","model":"b"}') == "passed"
    assert await send("files", b"x") == "passed"


async def test_the_record_of_callers_without_a_key_restricts_them_too(start: StartRelay, anything: tuple[str, list[Seen]]) -> None:
    document = {"clients": {"public": {"models": ["good"]}}, "access": {"anonymous": "public"}}
    relay = await start(document, openai=provider(anything[0]))
    for model, expected in (("bad", 403), ("good", 200)):
        assert (await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": model}))[0] == expected


async def test_the_target_header_of_fal_names_the_app(send: Send, anything: tuple[str, list[Seen]]) -> None:
    for app, expected in (("bad", "model_not_allowed"), ("good", "passed")):
        headers = {"x-fal-target-url": f"https://queue.fal.run/fal-ai/{app}".replace("https://queue.fal.run", f"{anything[0]}/queue/")}
        assert await send("proxy", {"prompt": "a"}, name="fal", headers=headers) == expected


def test_the_model_of_a_ticket_must_match_the_record_and_the_ticket() -> None:
    record = Client("team", Rights(models=("gpt-5*",)))
    both = model_access(Caller("team", record=record, terms=TicketTerms("openai", models=("*-mini", "x"))))
    assert both is not None
    assert [both.allows(model) for model in ("gpt-5-mini", "gpt-5", "x", "gpt-4-mini")] == [True, False, False, False]
    ticket = model_access(Caller("team", record=Client("team", Rights()), terms=TicketTerms("openai", models=("x",))))
    assert ticket is not None and ticket.allows("x") and not ticket.allows("y")
    assert model_access(Caller("team", record=Client("team", Rights()), terms=TicketTerms("openai"))) is None
    assert model_access(Caller("127.0.0.1")) is None
