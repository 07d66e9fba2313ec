"""What an error says about its key: dead, limited until a time, or nothing."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.key_refusals import (
    MAX_ERROR_BYTES,
    read_key_refusal,
    refusal_in_close,
    refusal_in_message,
)
from relay.core.retry_after import duration_s, reset_headers_s, reset_s
from relay.core.retry_policy import (
    RetryRules,
    fallback_cause,
    is_repeatable,
    key_cooldown_s,
    result_of_answer,
)

NOW = 1_800_000_000.0


def body(document: Any) -> bytes:
    return json.dumps(document).encode()


def google(reason: str, **error: Any) -> dict[str, Any]:
    detail = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason, "domain": "googleapis.com"}
    return {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "", "details": [detail]} | error}


DEAD: dict[str, tuple[int, Any]] = {
    "no key": (401, {}),
    "no money": (402, {"error": {"message": "Insufficient Balance", "code": "invalid_request_error"}}),
    "forbidden": (403, "no JSON"),
    "Gemini, invalid": (400, google("API_KEY_INVALID", message="API key expired. Please renew the API key.")),
    "Gemini, in an array": (400, [google("API_KEY_INVALID")]),
    "Gemini, without details": (400, {"error": {"code": 400, "message": "API key not valid. Please pass a valid API key.", "status": "INVALID_ARGUMENT"}}),
    "OpenAI, no quota": (429, {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}}),
    "OpenAI, hard limit": (400, {"error": {"type": "invalid_request_error", "code": "billing_hard_limit_reached"}}),
    "OpenAI, invalid": (400, {"error": {"code": "invalid_api_key"}}),
    "Groq": (400, {"error": {"message": "Organization has been restricted.", "type": "invalid_request_error", "code": "organization_restricted"}}),
    "Anthropic, no credit": (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade or purchase credits."}}),
    "Anthropic, billing": (400, {"type": "error", "error": {"type": "billing_error", "message": "x"}}),
    "xAI": (400, {"code": "Client specified an invalid argument", "error": "Incorrect API key provided: sk***gA. You can obtain an API key from https://console.x.ai."}),
    "ElevenLabs, quota": (401, {"detail": {"status": "quota_exceeded", "message": "x"}}),
    "ElevenLabs, as a 400": (400, {"detail": {"status": "invalid_api_key", "message": "x"}}),
    "AssemblyAI": (400, {"error": "Your current account balance is negative. Please top up to continue using the API."}),
    "Alibaba": (400, {"code": "Arrearage", "message": "Access denied"}),
}  # fmt: skip


@pytest.mark.parametrize("vendor", DEAD)
def test_a_dead_key_is_recognised_in_each_vendors_error(vendor: str) -> None:
    status, document = DEAD[vendor]
    assert read_key_refusal(status, body(document), "", NOW).dead
    result = result_of_answer(status, {}.get, NOW, body(document))
    assert result.is_key_refused and fallback_cause(result, RetryRules()) and is_repeatable(result, RetryRules(), "POST")
    assert key_cooldown_s(result, 1) == 300


def test_a_compressed_error_is_read() -> None:
    packed = gzip.compress(body(google("API_KEY_INVALID")))
    assert read_key_refusal(400, packed, "gzip", NOW).dead == "API_KEY_INVALID"
    assert read_key_refusal(400, packed[:-20], "gzip", NOW).dead == ""


NO_CREDIT = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade or purchase credits."
NOT_DEAD: dict[str, tuple[int, Any]] = {
    "a prompt that names a code": (400, {"error": {"message": "Invalid value: 'invalid_api_key'", "type": "invalid_request_error", "code": "invalid_value"}}),
    "a model that is a sentence": (400, {"error": {"message": f"{NO_CREDIT} is not a valid model ID", "type": "invalid_request_error"}}),
    "a sentence that is quoted": (400, {"error": {"message": f"invalid model: {NO_CREDIT}", "type": "invalid_request_error"}}),
    "a code at another place": (400, {"error": {"code": "invalid_value", "param": "insufficient_quota"}, "input": {"code": "invalid_api_key"}}),
    "a plain limit": (429, {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "You exceeded your current quota."}}),
    "a server error": (500, {"error": {"code": "invalid_api_key"}}),
    "not JSON": (400, "invalid_api_key"),
}  # fmt: skip


@pytest.mark.parametrize("why", NOT_DEAD)
def test_text_from_a_client_does_not_make_a_key_dead(why: str) -> None:
    status, document = NOT_DEAD[why]
    assert read_key_refusal(status, body(document), "", NOW).dead == ""


def test_a_large_error_is_not_read() -> None:
    large = body(google("API_KEY_INVALID") | {"pad": "x" * MAX_ERROR_BYTES})
    assert read_key_refusal(400, large, "", NOW) == ("", None, "")


def retry(delay: str) -> dict[str, Any]:
    return {"error": {"code": 429, "details": [{"@type": "type.googleapis.com/google.rpc.QuotaFailure"}, {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]}}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (retry("39s"), 39), (retry("1.5s"), 1.5), (retry("soon"), None), (retry(""), None), (retry("9" * 30 + "s"), None),
        ({"error": {"resets_in_seconds": 7200}}, 7200), ({"error": {"resets_in_seconds": "12"}}, 12), ({"error": {"resets_in_seconds": -1, "resets_at": NOW + 90}}, 90),
        ({"error": {"resets_at": int(NOW) - 5}}, 0), ({"error": {"resets_at": 1e300}}, None), ({"error": {"resets_in_seconds": True}}, None),
        ({"error": "x"}, None), ([], None), ({}, None),
    ],
)  # fmt: skip
def test_a_wait_is_read_from_the_body(document: Any, expected: float | None) -> None:
    assert read_key_refusal(429, body(document), "", NOW).wait_s == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6m0s", 360), ("1s", 1), ("20ms", 0.02), ("2m59.56s", 179.56), ("1h2m3s", 3723), ("1d2h", 93600), ("37s", 37),
        ("", None), ("s", None), ("6", None), ("-1s", None), ("1s1s", None), ("9" * 40 + "s", None), ("999999h", None), ("6m 0s", None),
    ],
)  # fmt: skip
def test_a_duration_is_read_within_its_bounds(text: str, expected: float | None) -> None:
    found = duration_s(text)
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("33.5", 33.5), ("6m0s", 360), (str(int(NOW) + 60), 60), (str(int(NOW + 60) * 1000), 60), ("2027-01-15T08:01:00Z", 60), ("2020-01-15T08:01:00Z", 0), ("9" * 30, None), ("1d", 86400), ("never", None), ("nan", None)],
)
def test_a_reset_is_read_as_a_duration_or_a_time(text: str, expected: float | None) -> None:
    assert reset_s(text, NOW) == expected


RESETS: list[tuple[dict[str, str], float | None]] = [
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "9h"}, 360),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "9s"}, 9),
    ({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "6m0s"}, None),
    ({"x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "9"}, None),
    ({"anthropic-ratelimit-input-tokens-remaining": "0", "anthropic-ratelimit-input-tokens-reset": "2027-01-15T08:00:30Z"}, 30),
    ({"anthropic-ratelimit-unified-status": "rejected", "anthropic-ratelimit-unified-reset": str(int(NOW) + 1800)}, 1800),
    ({"anthropic-ratelimit-unified-status": "allowed", "anthropic-ratelimit-unified-reset": str(int(NOW) + 1800)}, None),
    ({"ratelimit-remaining": "0", "ratelimit-reset": "30"}, 30),
    ({}, None),
]


@pytest.mark.parametrize(("headers", "expected"), RESETS)
def test_a_reset_time_counts_if_nothing_remains(headers: dict[str, str], expected: float | None) -> None:
    assert reset_headers_s(headers.get, NOW) == expected
    assert result_of_answer(429, headers.get, NOW).retry_after_s == expected
    assert result_of_answer(400, headers.get, NOW).retry_after_s is None


def test_retry_after_overrides_the_body_and_the_body_overrides_a_reset() -> None:
    reset = {"ratelimit-remaining": "0", "ratelimit-reset": "30"}
    assert result_of_answer(429, reset.get, NOW, body(retry("39s"))).retry_after_s == 39
    assert result_of_answer(429, (reset | {"retry-after": "7"}).get, NOW, body(retry("39s"))).retry_after_s == 7


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["error", "code", "details", "@type", "retryDelay", "resets_at", "type", "detail", "message"]), inner, max_size=4), max_leaves=20), st.integers(400, 599))
def test_reading_an_error_never_raises(document: Any, status: int) -> None:
    text = json.dumps(document).encode()
    refusal = read_key_refusal(status, text, "", NOW)
    assert refusal.wait_s is None or refusal.wait_s >= 0
    refusal_in_message(text)


MESSAGES: dict[str, Any] = {
    "OpenAI Realtime": {"type": "error", "event_id": "e", "error": {"type": "invalid_request_error", "code": "invalid_api_key", "message": "x"}},
    "OpenAI Realtime, no quota": {"type": "error", "error": {"type": "insufficient_quota", "code": "insufficient_quota"}},
    "OpenAI, a response that failed": {"type": "response.done", "response": {"status": "failed", "status_details": {"type": "failed", "error": {"type": "insufficient_quota", "code": "insufficient_quota"}}}},
    "ElevenLabs, speech": {"message": "x", "error": "invalid_api_key", "code": 1008},
    "ElevenLabs, transcription": {"message_type": "quota_exceeded", "error": "x"},
    "Cartesia": {"type": "error", "status_code": 401, "title": "x", "error_code": None},
    "AssemblyAI": {"type": "Error", "error_code": 4001, "error": "Not Authorized"},
    "AssemblyAI, v3": {"type": "Error", "error_code": 1008, "error": "Unauthorized Connection: Missing Authorization header"},
    "Deepgram": {"type": "Error", "err_code": "INVALID_AUTH", "err_msg": "Invalid credentials."},
}  # fmt: skip


@pytest.mark.parametrize("vendor", MESSAGES)
def test_an_event_that_refuses_the_key_is_recognised(vendor: str) -> None:
    assert refusal_in_message(body(MESSAGES[vendor]))


HARMLESS: list[Any] = [
    {"type": "error", "error": {"type": "invalid_request_error", "code": "invalid_value", "message": "invalid_api_key"}},
    {"type": "response.output_text.done", "code": "invalid_api_key", "text": "error"},
    {"type": "conversation.item.created", "item": {"error": {"code": "invalid_api_key"}}},
    {"type": "Error", "error_code": 1008, "error": "Unauthorized Connection: Too many concurrent sessions"},
    {"type": "Error", "error_code": 3008, "error": "Session Expired"},
    {"type": "error", "status_code": 429, "error_code": "concurrency_limited"},
    {"type": "response.done", "response": {"status": "completed", "status_details": None}},
    "error",
]


@pytest.mark.parametrize("message", HARMLESS)
def test_an_event_that_does_not_refuse_the_key_is_ignored(message: Any) -> None:
    assert refusal_in_message(body(message)) == ""


@pytest.mark.parametrize(
    ("code", "reason", "refuses"),
    [
        (3000, "invalid_request_error.invalid_api_key", True), (3000, "invalid_request_error.invalid_model", False),
        (1007, "API key not valid. Please pass a valid API key.", True), (1008, "API key expired. Please renew the API key.", True),
        (1007, "Request contains an invalid argument.", False), (1008, "models/API key not valid is not found", False),
        (1011, "You exceeded your current quota, please check your plan and billing details. For more", True),
        (1008, "This request exceeds your quota of 10000. You have 3 credits remaining", True),
        (1008, "Have not received a new text input within the timeout of 20 seconds.", False), (1008, "", False),
        (1008, "Unauthorized Connection: Too many concurrent sessions", False),
        (4001, "", True), (4003, "x", True), (4401, "", True), (4403, "", True), (4002, "Insufficient Funds", True),
        (1000, "API key not valid", False), (4408, "", False), (None, "", False),
    ],
)  # fmt: skip
def test_a_close_that_refuses_the_key_is_recognised(code: int | None, reason: str, refuses: bool) -> None:
    assert bool(refusal_in_close(code, reason)) is refuses


# The wrong key of a pool --------------------------------------------------------------------------

PREVIOUS, ENCRYPTED = "previous_response_not_found", "invalid_encrypted_content"
WRONG_KEY: dict[str, tuple[int, str, str | None, str]] = {
    "OpenAI, a response": (400, "Previous response with id 'resp_0f09a2' not found.", PREVIOUS, PREVIOUS),
    "OpenAI, a response, as a 404": (404, "x", PREVIOUS, PREVIOUS),
    "a response without a code": (400, "Previous response with id 'resp_0f09a2' not found.", None, PREVIOUS),
    "OpenAI, encrypted content": (400, "The encrypted content gAAA...DQ== could not be verified.", ENCRYPTED, ENCRYPTED),
    "Azure, encrypted content": (400, "The encrypted content for item rs_0af934 could not be verified.", None, ENCRYPTED),
    "encrypted content, with a reason": (400, "The encrypted content gAAA...wXBV could not be verified. Reason: Encrypted content could not be decrypted or parsed.", None, ENCRYPTED),
    "OpenAI, an item": (404, "Item with id 'rs_68b' not found.", None, "item_not_found"),
}  # fmt: skip


def refused(message: str, code: str | None) -> bytes:
    return body({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}})


@pytest.mark.parametrize("what", WRONG_KEY)
def test_an_id_or_encrypted_content_that_another_key_may_know_is_detected(what: str) -> None:
    status, message, code, expected = WRONG_KEY[what]
    found = read_key_refusal(status, refused(message, code), "", NOW)
    assert (found.wrong_key, found.dead) == (expected, "")


NOT_THE_KEY: dict[str, tuple[int, str, str | None]] = {
    "an item that was not stored": (404, "Item with id 'rs_68b' not found. Items are not persisted when `store` is set to false. Try again with `store` set to true, or remove this item from your input.", None),
    "a prompt that quotes the error": (400, "Invalid value: 'The encrypted content gAAA...DQ== could not be verified.'", None),
    "another error": (400, "Unknown parameter: 'x'.", "unknown_parameter"),
    "an unknown model": (404, "The model 'x' does not exist.", "model_not_found"),
    "a status after which the call may have been executed": (500, "x", PREVIOUS),
    "a 429": (429, "x", PREVIOUS),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_THE_KEY)
def test_no_other_error_is_taken_for_one_of_the_key(what: str) -> None:
    status, message, code = NOT_THE_KEY[what]
    assert read_key_refusal(status, refused(message, code), "", NOW).wrong_key == ""


def test_a_wrong_key_has_no_cooldown() -> None:
    ended = result_of_answer(400, {}.get, NOW, refused("x", PREVIOUS))
    assert (ended.wrong_key, ended.error, key_cooldown_s(ended, 1)) == (PREVIOUS, PREVIOUS, 0)
