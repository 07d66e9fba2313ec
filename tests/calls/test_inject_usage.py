"""`inject_usage`: a stream whose client does not request usage reports it to the relay alone."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay.registry.load import Sources, load
from tests.conftest import StartRelay
from tests.relays import packaged_provider, provider
from tests.upstream.raw import CLOSE, LAST_CHUNK, SILENCE, SSE_HEAD, RawUpstream, chunk, head, ok

ROOT = Path(__file__).parent.parent.parent
FILTER = b'data: {"choices": [], "id": "", "model": "", "prompt_filter_results": [{"prompt_index": 0}]}\n\n'
DELTA = b'data: {"model": "m-2026", "choices": [{"delta": {"content": "hi"}}], "usage": null}\n\n'
USAGE = b'data: {"model": "m-2026", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}\n\n'
FINISH = b'data: {"model": "m-2026", "choices": [{"finish_reason": "stop"}], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\n'
DONE = b"data: [DONE]\n\n"
WITH, WITHOUT = FILTER + DELTA + USAGE + DONE, FILTER + DELTA + DONE
REPORTED = {"input_tokens": 7, "output_tokens": 3}
BODY = b'{ "model":"m", "stream" : true, "n":1.50 }\n'
BODY_WITH_OPTION = b'{ "model":"m", "stream" : true, "n":1.50 ,"stream_options":{"include_usage":true}}\n'
REFUSAL = b'{"error":{"message":"Extra inputs are not permitted, field: \'stream_options\'"}}'
JSON = "Content-Type: application/json"


def streams(raw: RawUpstream, *pieces: bytes) -> None:
    """Play an SSE response of these chunks."""
    raw.plays(SSE_HEAD, *map(chunk, pieces), LAST_CHUNK)


def refuses(raw: RawUpstream, status: str = "400 Bad Request", body: bytes = REFUSAL, *headers: str) -> None:
    raw.plays(ok(body, JSON, *headers, status=status))


async def post(relay: Any, name: str = "openai", endpoint: str = "chat/completions", data: bytes = BODY, **headers: str) -> tuple[int, Any, bytes]:
    names = {key.replace("_", "-"): value for key, value in headers.items()}
    answer: tuple[int, Any, bytes] = await relay.call("POST", relay.path(name, endpoint), data=data, headers=names)
    return answer


# The request


@pytest.mark.parametrize("endpoint", ["chat/completions", "v1/chat/completions", "completions", "my-deployment/chat/completions"])
async def test_usage_is_requested_and_removed_from_the_response_to_the_client(endpoint: str, start: StartRelay, raw: RawUpstream) -> None:
    streams(raw, WITH)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    assert (await post(relay, endpoint=endpoint, Accept_Encoding="gzip", Content_MD5="x"))[2] == WITHOUT
    (arrived,) = raw.arrived
    assert arrived.body == BODY_WITH_OPTION and arrived.header("Content-Length") == [str(len(BODY_WITH_OPTION))]
    assert arrived.header("Accept-Encoding") == ["identity"] and not arrived.header("Content-MD5")
    (line,) = await relay.events()
    assert line["usage"] == REPORTED and line["model_answered"] == "m-2026" and line["bytes_down"] == len(WITHOUT)


@pytest.mark.parametrize(
    "body",
    [b'{"stream": true, "stream_options": {"include_usage": true}}', b'{"stream": true, "stream_options": {"include_usage": false}}', b'{"stream": false}', b'{"model": "m"}', b"[1]", b'{"stream": true', b'{"stream": true, "stream_options": {}, "stream_options": {}}', b""],
    ids=["requests usage", "refuses usage", "no stream", "no stream field", "no object", "truncated", "options twice", "empty"],
)
async def test_a_call_that_needs_no_option_is_forwarded_unchanged(body: bytes, start: StartRelay, raw: RawUpstream) -> None:
    streams(raw, WITH)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    assert (await post(relay, data=body))[2] == WITH and raw.arrived[0].body == body


@pytest.mark.parametrize(("method", "endpoint", "format_"), [("POST", "responses", "openai"), ("PUT", "chat/completions", "openai"), ("POST", "v1/messages", "anthropic"), ("POST", "v2/chat", "cohere")])
async def test_no_other_call_gets_the_option(method: str, endpoint: str, format_: str, start: StartRelay, raw: RawUpstream) -> None:
    streams(raw, WITH)
    relay = await start(openai=provider(raw.url, inject_usage=True, format=format_))
    assert (await relay.call(method, relay.path("openai", endpoint), data=BODY))[2] == WITH and raw.arrived[0].body == BODY


async def test_other_stream_options_stay(start: StartRelay, raw: RawUpstream) -> None:
    streams(raw, WITH)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    await post(relay, data=b'{"stream_options":{"include_obfuscation":false},"stream":true}')
    assert raw.arrived[0].body == b'{"stream_options":{"include_obfuscation":false,"include_usage":true},"stream":true}'


# The response


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("size", [1, 40, 151])
async def test_the_usage_event_is_removed_however_it_is_split(size: int, end: bytes, start: StartRelay, raw: RawUpstream) -> None:
    whole = WITH.replace(b"\n", end)
    streams(raw, *(whole[at : at + size] for at in range(0, len(whole), size)))
    relay = await start(openai=provider(raw.url, inject_usage=True))
    assert (await post(relay))[2] == WITHOUT.replace(b"\n", end)
    assert (await relay.events())[0]["usage"] == REPORTED


async def test_usage_on_a_chunk_with_choices_stays(start: StartRelay, raw: RawUpstream) -> None:
    streams(raw, DELTA, FINISH, DONE)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    assert (await post(relay))[2] == DELTA + FINISH + DONE
    assert (await relay.events())[0]["usage"] == REPORTED


@pytest.mark.parametrize("padding", [0, 70_000], ids=["small", "large"])
async def test_the_usage_event_is_removed_from_a_response_that_arrives_at_once(padding: int, start: StartRelay, raw: RawUpstream) -> None:
    more = b": " + b"x" * padding + b"\n\n"
    raw.plays(ok(more + WITH, "Content-Type: text/event-stream", 'ETag: "1"'))
    relay = await start(openai=provider(raw.url, inject_usage=True))
    _, headers, body = await post(relay)
    assert body == more + WITHOUT and "Content-Length" not in headers and "ETag" not in headers
    assert (await relay.events())[0]["usage"] == REPORTED


async def test_a_compressed_stream_is_relayed_unchanged_and_metered(start: StartRelay, raw: RawUpstream) -> None:
    packed = gzip.compress(WITH)
    raw.plays(head("Content-Type: text/event-stream", "Content-Encoding: gzip", "Transfer-Encoding: chunked"), chunk(packed), LAST_CHUNK)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    assert (await post(relay))[2] == packed
    assert (await relay.events())[0]["usage"] == REPORTED


async def test_an_unfinished_event_with_a_choice_is_forwarded_at_once(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    beginning, rest = DELTA[:70], DELTA[70:]
    raw.plays(SSE_HEAD, chunk(beginning), gate, chunk(rest + USAGE + DONE), LAST_CHUNK)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    async with relay.client.post(relay.path("openai", "chat/completions"), data=BODY) as answer:
        assert await answer.content.readexactly(len(beginning)) == beginning
        gate.set()
        assert await answer.read() == rest + DONE


@pytest.mark.parametrize("cut", [20, len(USAGE) - 1])
async def test_buffered_bytes_are_forwarded_when_the_provider_disconnects(cut: int, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(DELTA), chunk(USAGE[:cut]), CLOSE)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    got = b""
    async with relay.client.post(relay.path("openai", "chat/completions"), data=BODY) as answer:
        with pytest.raises(Exception, match=r"not enough data|payload|closed"):
            while True:
                got += await answer.content.readany()
    assert got == DELTA + USAGE[:cut]
    (line,) = await relay.events()
    assert line["outcome"] == "failed" and line["usage"]["estimated"]


async def test_a_stream_that_is_drained_is_metered_once(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(DELTA), gate, chunk(USAGE), chunk(DONE), LAST_CHUNK)
    relay = await start(openai=provider(raw.url, inject_usage=True, on_disconnect="drain"))
    async with relay.client.post(relay.path("openai", "chat/completions"), data=BODY) as answer:
        await answer.content.readany()
    gate.set()
    (line,) = await relay.events()
    assert (line["outcome"], line["usage"]) == ("client_gone", REPORTED)


async def test_the_usage_event_is_removed_from_a_shared_stream_and_not_cached(start: StartRelay, raw: RawUpstream) -> None:
    finish = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": null}\n\n'
    streams(raw, FILTER, DELTA, finish, USAGE + DONE)
    relay = await start({"cache": {"coalesce": True, "ttl_s": 60}}, openai=provider(raw.url, inject_usage=True))
    for _ in range(2):
        assert (await post(relay))[2] == FILTER + DELTA + finish + DONE
    missed, hit = await relay.events(count=2)
    assert missed["usage"] == REPORTED and hit["cache"] == "HIT" and "usage" not in hit


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in pieces"])
async def test_urls_in_a_stream_with_the_option_are_rewritten(at_once: bool, start: StartRelay, raw: RawUpstream) -> None:
    link = b'data: {"choices": [{"next_url": "%b/x"}]}\n\n'
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(link % raw.url.encode() + USAGE[:50]), gate, chunk(USAGE[50:] + DONE), LAST_CHUNK)
    relay = await start(openai=provider(raw.url, inject_usage=True, rewrite={"fields": {"": ["next_url"]}}))
    rewritten = link % relay.path("openai").rstrip("/").encode()
    if at_once:
        gate.set()
    async with relay.client.post(relay.path("openai", "chat/completions"), data=BODY) as answer:
        assert await answer.content.readexactly(len(rewritten)) == rewritten
        gate.set()
        assert await answer.read() == DONE
    assert (await relay.events())[0]["usage"] == REPORTED


# Which providers


async def test_a_provider_without_the_setting_does_not_get_the_option(start: StartRelay, raw: RawUpstream) -> None:
    streams(raw, WITH)
    relay = await start(openai=provider(raw.url))
    assert (await post(relay))[2] == WITH and raw.arrived[0].body == BODY


async def test_false_at_the_top_level_disables_the_option_everywhere(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"", status="503 Unavailable"))
    streams(raw, WITH)
    relay = await start({"inject_usage": False}, openai=provider(raw.url, inject_usage=True, fallback=[{"provider": "other"}]), other=provider(raw.url))
    assert (await post(relay))[2] == WITH and [arrived.body for arrived in raw.arrived] == [BODY, BODY]


@pytest.mark.parametrize(("own", "injects"), [({}, True), ({"inject_usage": True}, True), ({"inject_usage": False}, False), ({"format": "cohere", "formats": {"*": "cohere"}}, False)], ids=["no setting", "true", "false", "another format"])
async def test_a_fallback_follows_its_own_setting_or_that_of_the_provider_it_replaces(own: dict[str, Any], injects: bool, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"", status="503 Unavailable"))
    streams(raw, WITH)
    relay = await start(
        openai=provider(raw.url, inject_usage=True, fallback=[{"provider": "other", "model": "o"}]), other=provider(raw.url, **own)
    )
    assert (await post(relay))[2] == (WITHOUT if injects else WITH)
    first, second = raw.arrived
    assert first.body == BODY_WITH_OPTION
    assert second.body == (BODY_WITH_OPTION if injects else BODY).replace(b'"m"', b'"o"')
    assert second.header("Content-Length") == [str(len(second.body))]


async def test_a_fallback_with_true_gets_the_option_if_the_first_provider_does_not(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"", status="503 Unavailable"))
    streams(raw, WITH)
    relay = await start(openai=provider(raw.url, fallback=[{"provider": "other"}]), other=provider(raw.url, inject_usage=True))
    assert (await post(relay))[2] == WITHOUT and [arrived.body for arrived in raw.arrived] == [BODY, BODY_WITH_OPTION]


SHIPPED = {
    "openai": True, "anthropic": True, "azure-openai": True, "deepseek": True, "grok": True, "ollama": True, "vllm": True,
    "google-ai-studio": False, "cohere": False, "groq": False, "mistral": False, "openrouter": False, "perplexity": False,
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
async def test_the_shipped_providers_that_need_the_option_get_it(name: str, start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    streams(raw, WITH)
    entry = packaged_provider(name, raw.url) | {"client_credentials": "allow"}
    entry["base_url"], entry["cloudflare"] = entry["base_url"].replace("${AZURE_OPENAI_RESOURCE}", "r"), None
    relay = await start({"providers": {name: entry}})
    _, _, body = await post(relay, name, "chat/completions", Authorization="Bearer theirs", x_api_key="theirs", api_key="theirs", x_goog_api_key="theirs")
    assert (body, raw.arrived[0].body) == ((WITHOUT, BODY_WITH_OPTION) if SHIPPED[name] else (WITH, BODY))


def test_every_shipped_provider_in_openais_format_has_the_setting() -> None:
    documents = [yaml.safe_load(file.read_text()) for file in (ROOT / "gateway.yaml", *(ROOT / "config/providers").glob("*.yaml"))]
    entries = {name: entry for document in documents for name, entry in document["providers"].items()}
    reported = {name: entry["inject_usage"] for name, entry in entries.items() if "inject_usage" in entry}
    assert reported == SHIPPED
    assert {name for name, entry in entries.items() if entry.get("format", "openai") == "openai"} <= reported.keys()


def test_the_demo_provider_gets_the_option(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("{}")
    registry = load(Sources(tmp_path / "gateway.yaml", None, "http://127.0.0.1:9/v1")).registry
    assert registry.match_rest("demo", "chat/completions").injects_usage


# A provider that refuses


@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable Entity"])
async def test_a_provider_that_refuses_the_option_is_called_again_without_it_and_never_gets_it_again(status: str, start: StartRelay, raw: RawUpstream) -> None:
    refuses(raw, status)
    streams(raw, DELTA + FINISH + DONE)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    for _ in range(2):
        code, headers, body = await post(relay)
        assert (code, body) == (200, DELTA + FINISH + DONE) and "x-relay-error-source" not in headers
    assert [arrived.body for arrived in raw.arrived] == [BODY_WITH_OPTION, BODY, BODY]
    first, second = await relay.events(count=2)
    assert [(each["status"], each["error"]) for each in first["attempts"]] == [(int(status[:3]), "stream_options_refused"), (200, "")]
    assert "attempts" not in second and first["usage"] == REPORTED
    (reported,) = await relay.events("inject_usage.refused")
    assert (reported["provider"], reported["model"], reported["level"]) == ("openai", "m", "warning")


async def test_a_refusal_is_remembered_for_its_model_until_a_reload(start: StartRelay, raw: RawUpstream) -> None:
    refuses(raw)
    streams(raw, DELTA)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    await post(relay)
    await post(relay, data=BODY.replace(b'"m"', b'"other"'))
    relay.gateway.replace(relay.gateway.config)
    await post(relay)
    assert [b"stream_options" in arrived.body for arrived in raw.arrived] == [True, False, True, True]


async def test_the_second_attempt_uses_the_same_key(start: StartRelay, raw: RawUpstream) -> None:
    refuses(raw)
    streams(raw, DELTA)
    auth = {"header": "Authorization", "value": ["Bearer ${OPENAI_API_KEY}", "Bearer ${GROQ_API_KEY}"], "pool": "weight", "weights": [1e9, 1e-9]}
    relay = await start(openai={"base_url": raw.url, "inject_usage": True, "auth": auth})
    assert (await post(relay))[0] == 200
    assert raw.arrived[0].header("Authorization") == raw.arrived[1].header("Authorization")


async def test_a_refusal_of_the_call_itself_reaches_the_client_whole(start: StartRelay, raw: RawUpstream) -> None:
    body = json.dumps({"error": {"message": "bad temperature", "pad": "x" * 200_000}}).encode()
    raw.plays(head(JSON, "Transfer-Encoding: chunked", status="400 Bad Request"), *(chunk(body[at : at + 10_000]) for at in range(0, len(body), 10_000)), LAST_CHUNK)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    status, headers, got = await post(relay)
    assert (status, got, headers["x-relay-error-source"]) == (400, body, "provider")
    assert [arrived.body for arrived in raw.arrived] == [BODY_WITH_OPTION]
    assert [each["status"] for each in (await relay.events())[0]["attempts"]] == [400]
    await post(relay)
    assert raw.arrived[1].body == BODY_WITH_OPTION


@pytest.mark.parametrize("body", [b"", b'{"error":"no"}'])
async def test_a_small_refusal_reaches_the_client_with_its_length(body: bytes, start: StartRelay, raw: RawUpstream) -> None:
    refuses(raw, body=body)
    for coalesce in (False, True):
        relay = await start({"cache": {"coalesce": coalesce}}, openai=provider(raw.url, inject_usage=True))
        status, headers, got = await post(relay)
        assert (status, got, headers["x-relay-error-source"]) == (400, body, "provider")
        assert headers["Content-Length"] == str(len(body))


async def test_a_refusal_without_the_option_too_reaches_the_client_and_is_not_remembered(start: StartRelay, raw: RawUpstream) -> None:
    refuses(raw)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    assert (await post(relay))[::2] == (400, REFUSAL)
    assert (await post(relay))[::2] == (400, REFUSAL)
    assert [arrived.body for arrived in raw.arrived] == [BODY_WITH_OPTION, BODY, BODY_WITH_OPTION, BODY]


async def test_a_compressed_refusal_is_read(start: StartRelay, raw: RawUpstream) -> None:
    refuses(raw, "400 Bad Request", gzip.compress(REFUSAL), "Content-Encoding: gzip")
    streams(raw, DELTA)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    assert (await post(relay))[::2] == (200, DELTA)


async def test_a_refusal_that_names_the_option_beyond_the_size_limit_reaches_the_client(start: StartRelay, raw: RawUpstream) -> None:
    body = b"x" * 300_000 + REFUSAL
    refuses(raw, body=body)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    assert (await post(relay))[::2] == (400, body) and len(raw.arrived) == 1


async def test_a_refusal_that_breaks_off_is_an_upstream_disconnect(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head(JSON, "Content-Length: 100", status="400 Bad Request"), b'{"error":', CLOSE)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    with pytest.raises(Exception, match=r"not enough data|payload|closed"):
        await post(relay)
    (line,) = await relay.events()
    assert (line["outcome"], line["error"]) == ("failed", "upstream_disconnected") and len(raw.arrived) == 1


async def test_a_refusal_that_never_ends_is_ended_by_the_periodic_sweep(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(head(JSON, "Content-Length: 100", status="400 Bad Request"), b"{", SILENCE)
    relay = await start(openai=provider(raw.url, inject_usage=True, first_byte_timeout_s=0.2))
    assert (await post(relay))[0] == 504
    await asyncio.wait_for(raw.closed.wait(), 10)


async def test_a_fallback_that_refuses_the_option_is_called_again_without_it(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"", status="503 Unavailable"))
    refuses(raw)
    streams(raw, DELTA)
    relay = await start(openai=provider(raw.url, inject_usage=True, fallback=[{"provider": "other", "model": "o"}]), other=provider(raw.url))
    assert (await post(relay))[::2] == (200, DELTA)
    assert [b"stream_options" in arrived.body for arrived in raw.arrived] == [True, True, False]
    assert ("other", "o") in relay.gateway.usage_refusals and ("openai", "m") not in relay.gateway.usage_refusals
    (line,) = await relay.events()
    assert [each["status"] for each in line["attempts"]] == [503, 400, 200]
