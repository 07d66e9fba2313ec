"""What calls reserve under a budget, through a running relay: no spelling of a call makes it less
than what the provider may bill.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from tests.conftest import StartRelay
from tests.relays import Relay, provider
from tests.upstream.raw import RawUpstream, ok

PRICE: dict[str, Any] = {
    "openai": [
        {"models": ["cheap"], "input_per_mtok": 0, "output_per_mtok": 1},
        {"models": ["painter"], "per_image": 1},
        {"input_per_mtok": 0, "output_per_mtok": 1000},
    ],
    "google": [{"models": ["m"], "input_per_mtok": 0, "output_per_mtok": 1000}],
    "anthropic": [{"input_per_mtok": 0, "output_per_mtok": 1000}, {"service_tier": "fast", "input_per_mtok": 0, "output_per_mtok": 10_000}],
    "deepgram": [{"audio_per_hour": 1}],
    "fal": [{"per_unit": 1}],
    "elevenlabs": [{"characters_per_million": 1_000_000}],
}
"""An output token costs 0.001 US dollars; a character, unit, image and hour of audio cost 1."""
LIMITS = {"generationConfig": {"maxOutputTokens": 10, "candidateCount": 8}}


async def reserved(start: StartRelay, raw: RawUpstream, folder: Path, call: tuple[str, str], body: Any, base: str = "", **headers: str) -> tuple[float | str, Relay]:
    """The US dollars that a call reserves, or the error that refuses it. `call` is the wire format
    and the endpoint, `base` the path of the provider's base URL.
    """
    raw.plays(ok(b"{}", "Content-Type: application/json"))
    format_, endpoint = call
    document = {"database": str(folder / "relay.db"), "budgets": {"rules": [{"usd": 1_000_000, "period": "day"}]}}
    relay = await start(document, p=provider(raw.url + base, format=format_, pricing=PRICE[format_]))
    found: list[float | str] = []
    opens = relay.gateway.attempts.open

    async def noting(attempt: Any) -> Any:
        found.append(attempt.exchange.budget.reserved_nano / 1e9)
        return await opens(attempt)

    relay.gateway.attempts.open = noting  # type: ignore[method-assign]
    data = io.BytesIO(body) if isinstance(body, bytes) else body
    if isinstance(body, dict):
        data = json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    url = URL(relay.path("p", endpoint), encoded=True)
    _, answered, _ = await relay.call("POST", url, data=data, headers=sent)
    return (found or [answered["x-relay-error"]])[0], relay


GEMINI = ("google", "models/m:generateContent")


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(body), 100_000):
        yield body[at : at + 100_000]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (json.dumps(LIMITS).encode("utf-16"), {}),
        (json.dumps(LIMITS).encode("utf-32-le"), {}),
        (json.dumps(LIMITS).encode(), {"Content_Encoding": "aws-chunked"}),
        (json.dumps(LIMITS).encode(), {"Content_Encoding": "zz"}),
        (json.dumps(LIMITS).encode() + b" " * 1_100_000, {"Content_Type": "text/plain"}),
        (b'{"generationConfig": {' + b'"a": 1,' * 10_001 + b'"maxOutputTokens": 10}}', {}),
    ],
)
async def test_a_call_whose_limits_cannot_be_read_is_refused(start: StartRelay, raw: RawUpstream, tmp_path: Path, body: bytes, headers: dict[str, str]) -> None:
    assert (await reserved(start, raw, tmp_path, GEMINI, body, **headers))[0] == "limits_unknown"
    assert not raw.arrived


async def test_a_stream_of_which_the_limits_cannot_be_read_is_refused(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    body = chunks(json.dumps(LIMITS).encode() + b" " * 1_100_000)
    assert (await reserved(start, raw, tmp_path, GEMINI, body, Content_Type="text/plain"))[0] == "limits_unknown"


async def test_a_warning_budget_refuses_no_call_whose_limits_cannot_be_read(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    raw.plays(ok(b"{}", "Content-Type: application/json"))
    rule = {"usd": 1, "period": "day", "mode": "warn"}
    relay = await start({"database": str(tmp_path / "relay.db"), "budgets": {"rules": [rule]}}, p=provider(raw.url, format="google", pricing=PRICE["google"]))
    status, _, _ = await relay.call("POST", relay.path("p", GEMINI[1]), data=json.dumps(LIMITS).encode("utf-16"))
    assert status == 200


async def test_a_compressed_body_reserves_what_its_text_asks_for(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    body = gzip.compress(json.dumps(LIMITS).encode())
    assert (await reserved(start, raw, tmp_path, GEMINI, body, Content_Encoding="gzip"))[0] == 0.08


async def test_a_limit_of_another_format_does_not_lower_what_a_call_reserves(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    body = {"model": "m", "messages": [], "max_output_tokens": 1, **LIMITS}
    assert (await reserved(start, raw, tmp_path, ("openai", "chat/completions"), body))[0] == 8.192


async def test_each_prompt_of_a_legacy_completion_reserves_its_answer(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    body = {"model": "m", "prompt": ["a", "b", "c"], "max_tokens": 10}
    assert (await reserved(start, raw, tmp_path, ("openai", "completions"), body))[0] == 0.03


async def test_the_dearest_of_all_service_tiers_that_a_call_names_is_reserved(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    body = {"model": "m", "messages": [], "max_tokens": 10, "service_tier": "flex", "speed": "fast"}
    assert (await reserved(start, raw, tmp_path, ("anthropic", "v1/messages"), body))[0] == 0.1


@pytest.mark.parametrize(
    ("body", "usd"),
    [
        ({"model": "cheap", "models": ["cheap", "dear"], "max_tokens": 10}, 0.01),
        ({"models": ["cheap", "dear"], "max_tokens": 10}, 0.01),
        ({"model": "cheap", "fallbacks": [{"model": "dear"}], "max_tokens": 10}, 0.01),
        (b'{"model": "cheap", "\\u006dodels": ["dear"], "max_tokens": 10}', 0.01),
        ({"model": "cheap", "models": ["cheap"], "max_tokens": 10}, 0.00001),
        ({"model": "cheap", "models": None, "max_tokens": 10}, 0.00001),
        ({"model": "cheap", "models": [f"model {number}" for number in range(17)]}, "model_unknown"),
    ],
)
async def test_the_dearest_of_the_models_that_may_answer_is_reserved(start: StartRelay, raw: RawUpstream, tmp_path: Path, body: Any, usd: float | str) -> None:
    assert (await reserved(start, raw, tmp_path, ("openai", "chat/completions"), body))[0] == usd


async def test_a_model_that_may_answer_and_has_no_price_is_refused_like_any_other(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    budgets = {"rules": [{"usd": 1, "period": "day"}], "unpriced": "refuse"}
    relay = await start({"database": str(tmp_path / "relay.db"), "budgets": budgets}, p=provider(raw.url, pricing=PRICE["openai"][:1]))
    body = {"model": "cheap", "models": ["unheard-of"]}
    status, headers, _ = await relay.call("POST", relay.path("p", "chat/completions"), json=body)
    assert (status, headers["x-relay-error"]) == (403, "price_unknown")


@pytest.mark.parametrize("base", ["", "/openai/deployments"])
async def test_the_deployment_in_the_path_of_azure_prices_a_call_whatever_its_body_names(start: StartRelay, raw: RawUpstream, tmp_path: Path, base: str) -> None:
    endpoint = ("" if base else "openai/deployments/") + "dear/chat/completions"
    found, relay = await reserved(start, raw, tmp_path, ("openai", endpoint), {"model": "cheap", "max_tokens": 10}, base=base)
    assert found == 0.01
    assert (await relay.events())[0]["model"] == "dear"


async def test_audio_of_unknown_length_reserves_an_hour(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    body = chunks(bytes(1_500_000))
    assert (await reserved(start, raw, tmp_path, ("deepgram", "v1/listen?model=nova-3"), body, Content_Type="audio/mp3"))[0] == 1


async def test_audio_that_is_decompressed_reserves_its_whole_length(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    body = gzip.compress(bytes(4000 * 900))
    assert (await reserved(start, raw, tmp_path, ("deepgram", "v1/listen?model=nova-3"), body, Content_Type="audio/l16", Content_Encoding="gzip"))[0] == 0.25


async def test_each_image_of_an_app_reserves_a_unit(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    assert (await reserved(start, raw, tmp_path, ("fal", "fal-ai/flux/dev"), {"prompt": "x", "num_images": 4}))[0] == 4


@pytest.mark.parametrize(
    "endpoint",
    ["models/m:generateContent", "models/%6d:generateContent", "v1beta/%6Dodels/m:generateContent", "models/m%3AgenerateContent", "models/m:generateConten%74", "models%2Fm:generateContent", "models/m:generateContent/"],
)
async def test_a_path_with_escapes_reserves_as_much_as_one_without_and_is_sent_as_it_is(start: StartRelay, raw: RawUpstream, tmp_path: Path, endpoint: str) -> None:
    assert (await reserved(start, raw, tmp_path, ("google", endpoint), LIMITS))[0] == 0.08
    assert raw.arrived[0].target.endswith(endpoint)


@pytest.mark.parametrize("endpoint", ["v1/text-to-speech/anna", "v1/text-to-speec%68/anna", "v1/text-to-speech%2Fanna", "v1/text-to-speech/anna/"])
async def test_speech_at_a_path_with_escapes_reserves_its_characters(start: StartRelay, raw: RawUpstream, tmp_path: Path, endpoint: str) -> None:
    assert (await reserved(start, raw, tmp_path, ("elevenlabs", endpoint), {"model_id": "m", "text": "Hello"}))[0] == 5


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b' {"model": "painter", "n": "4"}', "application/json"),
        (b'{"model": "painter", "n": 4, "prompt": "' + b"x" * 70_000 + b'"}', "application/json"),
        (b'--x\r\nContent-Disposition: form-data; name=n\r\nContent-Type: text/plain\r\n\r\n4\r\n--x\r\nContent-Disposition: form-data; name="model"\r\n\r\npainter\r\n--x--', "multipart/form-data; boundary=x"),
    ],
)
async def test_the_images_that_a_call_reserves_are_charged_if_the_response_reports_none(
    start: StartRelay, raw: RawUpstream, tmp_path: Path, body: bytes, content_type: str
) -> None:
    found, relay = await reserved(start, raw, tmp_path, ("openai", "images/generations"), body, Content_Type=content_type)
    await relay.idle()
    assert relay.gateway.leases is not None
    (account,) = relay.gateway.leases._accounts.values()
    assert (found, account.charged.total_nano) == (4, 4_000_000_000)
