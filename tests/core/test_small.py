"""Small pure functions: SSE boundaries, peeking, ids, error bodies, credentials."""

from __future__ import annotations

import json
import uuid
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core import error_bodies
from relay.core.credentials import ClientCredential, bare, choose, first_of
from relay.core.errors import CATALOGUE, ProviderNotConfigured, UnknownProvider, UpstreamTimeout
from relay.core.exchange import Caller, Exchange, Request, uuid7
from relay.core.peek import kind_of, model_in_path, peek_body
from relay.core.provider import AuthRule, Credential, Keys, Route, Target
from relay.core.sse import at_boundary
from relay.registry.credentials import mask


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_a_blank_line_is_a_boundary(end: bytes) -> None:
    assert at_boundary((b"data: x" + end)[-4:])
    assert not at_boundary((b"data: x" + end[:-1])[-4:])
    assert at_boundary(b"") and not at_boundary(b"ata:")


@given(st.binary(max_size=200))
def test_peeking_never_raises(body: bytes) -> None:
    for kind in ("application/json", "multipart/form-data; boundary=x", ""):
        peek_body(body, kind)


@pytest.mark.parametrize(
    ("body", "model", "stream"),
    [
        (b'{"model": "gpt-5", "stream": true}', "gpt-5", True), (b' \n{"stream": false}', None, False),
        (b'{"model_id": "eleven_v3"}', "eleven_v3", None), (b'{"model": 5, "stream": "yes"}', None, None),
        (b'{"messages": [{"model": "inner"}], "model": "outer"}', "outer", None), (b'{"model": "x"', None, None),
        (b"[1]", None, None), (b"", None, None), (b'{"a":' * 100_000, None, None), (b"\xff{}", None, None),
    ],
)  # fmt: skip
def test_the_model_and_the_stream_flag_are_read_from_a_body(body: bytes, model: str | None, stream: bool | None) -> None:
    found = peek_body(body, "application/json")
    assert (found.model, found.stream) == (model, stream)


def test_the_model_is_read_from_a_form() -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--b--'
    assert peek_body(form, "multipart/form-data; boundary=b").model == "whisper-1"


def test_the_kind_and_the_model_follow_from_the_endpoint() -> None:
    kinds = {
        "chat/completions": "chat", "v1/messages": "messages", "v1/messages/count_tokens": "count_tokens",
        "v1/text-to-speech/abc/stream": "speech", "v1beta/models/x:streamGenerateContent": "generate",
        "fal-ai/flux": "other", "responses": "responses", "audio/transcriptions": "transcription",
    }  # fmt: skip
    assert {endpoint: kind_of(endpoint) for endpoint in kinds} == kinds
    assert model_in_path("v1/models/gemini-2.5-flash:generateContent") == "gemini-2.5-flash"
    assert model_in_path("chat/completions") is None


@given(st.integers(0, 2**48 * 1_000_000 - 1001), st.integers(0, 2**48 - 1))
def test_ids_are_version_7_and_sort_by_time(ns: int, noise: int) -> None:
    text = uuid7(ns, lambda bits: noise & (1 << bits) - 1)
    parsed = uuid.UUID(text)
    assert (parsed.version, parsed.variant, parsed.int >> 80) == (7, uuid.RFC_4122, ns // 1_000_000)
    assert text < uuid7(ns + 1000, lambda _: 0), "also within a millisecond"


def test_an_exchange_shows_its_state() -> None:
    exchange = Exchange("7f3aaaaa-b", Request("rest", "POST", Caller(""), 0.0, provider="openai", endpoint="chat/completions"))
    assert repr(exchange) == "<Exchange 7f3aaaaa POST openai/chat/completions reading>"
    exchange.response.status = 200
    exchange.finish()
    assert repr(exchange) == "<Exchange 7f3aaaaa POST openai/chat/completions relayed 200>"


def test_errors_have_one_code_each_and_a_status() -> None:
    codes = [error.code for error in CATALOGUE]
    assert len(set(codes)) == len(codes)
    assert all(400 <= error.status <= 599 and (1000 <= error.close_code <= 1014 or 4400 <= error.close_code <= 4499) for error in CATALOGUE)


@pytest.mark.parametrize("format_", ["openai", "anthropic", "google", "elevenlabs", "cohere", "cartesia", "fal", "deepgram", "assemblyai"])
def test_code_and_message_are_where_each_sdk_reads_them(format_: str) -> None:
    error = ProviderNotConfigured("x", ("A_KEY",))
    body = json.loads(error_bodies.error_body(error, format_, "id-1"))
    where = {
        "openai": lambda b: (b["error"]["code"], b["error"]["message"]),
        "anthropic": lambda b: (b["error"]["code"], b["error"]["message"]), "google": lambda b: (b["error"]["details"][0]["reason"], b["error"]["message"]),
        "elevenlabs": lambda b: (b["detail"]["status"], b["detail"]["message"]),
        "cohere": lambda b: (b["code"], b["message"]), "cartesia": lambda b: (b["error_code"], b["message"]), "fal": lambda b: (b["error_type"], b["detail"]),
        "deepgram": lambda b: (b["err_code"], b["err_msg"]), "assemblyai": lambda b: (b["code"], b["error"]),
    }  # fmt: skip
    code, message = where[format_](body)
    assert code == "provider_not_configured" and "A_KEY" in message
    assert error_bodies.error_headers(error) == {"x-relay-error": code, "x-relay-error-source": "relay", "x-should-retry": "false"}
    assert error_bodies.error_event(UpstreamTimeout("x", 1), format_, "chat", "id").endswith(b"\n\n")


def test_an_error_message_truncates_a_long_name() -> None:
    assert len(UnknownProvider("x" * 10_000).message) < 200


GATEWAY = Credential("header", "cf-aig-authorization", "Bearer cf")
OWN = Credential("header", "Authorization", "Bearer own")


def _route(via: str, auth: AuthRule | None, pool: tuple[Keys, ...]) -> Route:
    target = Target(via=via, origin="", host="", port=0, prefix="", auth=auth, pool=pool, gateway_credential=GATEWAY if via == "cloudflare" else None, missing=("K",))  # type: ignore[arg-type]
    return Route(SimpleNamespace(name="p"), target, "", "", "openai")  # type: ignore[arg-type]


BEARER = AuthRule("header", "Authorization", "Bearer ")


@pytest.mark.parametrize(
    ("via", "auth", "pool", "client", "expected"),
    [
        ("direct", BEARER, (Keys(OWN),), ClientCredential("theirs"), ("Bearer theirs", None)),
        ("direct", BEARER, (Keys(OWN),), ClientCredential("", "cf-theirs"), ("Bearer own", None)),
        ("direct", BEARER, (), ClientCredential("theirs"), ("Bearer theirs", None)),
        ("direct", BEARER, (), ClientCredential(), None),
        ("cloudflare", BEARER, (Keys(OWN, GATEWAY),), ClientCredential("theirs"), ("Bearer theirs", "Bearer cf")),
        ("cloudflare", BEARER, (Keys(OWN, GATEWAY),), ClientCredential("", "cf-theirs"), ("Bearer own", "Bearer cf-theirs")),
        ("cloudflare", None, (), ClientCredential("", "cf-theirs"), (None, "Bearer cf-theirs")),
    ],
)  # fmt: skip
def test_a_clients_key_and_its_cloudflare_token_go_to_the_right_place(via: str, auth: AuthRule | None, pool: tuple[Keys, ...], client: ClientCredential, expected: tuple[str | None, str | None] | None) -> None:
    """A token for Cloudflare is sent to Cloudflare only."""
    route = _route(via, auth, pool)
    if expected is None:
        with pytest.raises(ProviderNotConfigured):
            choose(route, client, lambda: first_of(route))
        return
    keys = choose(route, client, lambda: first_of(route))
    assert tuple(key.value if key else None for key in keys) == expected


def test_a_secret_is_extracted_from_its_scheme_and_masked() -> None:
    assert [bare(v) for v in ("Bearer sk-1", "key K", "sk-1", "Token t")] == ["sk-1", "K", "sk-1", "t"]
    assert mask("Bearer sk-0123456789abcdefghij") == "Bearer sk-…ghij"
    assert mask("short") == "…"
