"""Detect errors in which a provider refuses the key of the call, or does not know with this key
what it knows with another one.

Owns tables of the vendors' errors: REST bodies, events of a session and close frames. Only fields
with the vendor's own codes are compared; a vendor that has only a sentence is matched by the whole
sentence. So no text of a client that an error quotes can put a key into cooldown. The consequences
are decided in retry_policy.py, and waiting times are read in retry_after.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from relay.core.fields import MAX_FIELD_BYTES, value
from relay.core.meters.unpack import coding_of, unpack
from relay.core.retry_after import details, wait_in_error_s

MAX_ERROR_BYTES = MAX_FIELD_BYTES
"""Larger errors are not read: none of the known ones is so large."""

DEAD_KEY_STATUSES = frozenset({401, 402, 403})
"""Statuses that always refuse the key. 402 is from DeepSeek, OpenRouter, Deepgram, Cartesia and
others, if the account has no credit left."""

DEAD_KEY_CODES = frozenset(
    code.casefold()
    for code in (
        # OpenAI, and compatible vendors. Groq: organization_restricted. Moonshot:
        # exceeded_current_quota_error. Alibaba: Arrearage, InvalidApiKey.
        "invalid_api_key", "incorrect_api_key", "insufficient_quota", "billing_not_active",
        "billing_hard_limit_reached", "account_deactivated", "access_terminated",
        "organization_restricted", "exceeded_current_quota_error", "Arrearage", "InvalidApiKey",
        # Anthropic
        "authentication_error", "billing_error",
        # google.api.ErrorReason
        "API_KEY_INVALID", "API_KEY_SERVICE_BLOCKED", "API_KEY_HTTP_REFERRER_BLOCKED",
        "API_KEY_IP_ADDRESS_BLOCKED", "API_KEY_ANDROID_APP_BLOCKED", "API_KEY_IOS_APP_BLOCKED",
        "BILLING_DISABLED", "CONSUMER_INVALID", "CONSUMER_SUSPENDED",
        # ElevenLabs, Cartesia
        "quota_exceeded", "auth_error", "payment_required", "insufficient_funds",
        "insufficient_credits",
        # Deepgram
        "INVALID_AUTH", "ASR_PAYMENT_REQUIRED",
    )
)  # fmt: skip
"""Codes that refuse the key, compared without regard to case."""

_DEAD_KEY_SENTENCES = re.compile(
    "|".join(
        (
            # Anthropic, as an invalid_request_error
            r"Your credit balance is too low to access the (?:Anthropic|Claude) API\."
            r" Please go to Plans & Billing to upgrade or purchase credits\.",
            # Google, through layers that omit the details
            r"API key not valid\. Please pass a valid API key\.",
            r"API key not found\. Please pass a valid API key\.",
            r"API key expired\. Please renew the API key\.",
            # xAI, as a 400 whose code is `Client specified an invalid argument`
            r"Incorrect API key provided(?:: \S{1,64})?\."
            r" You can obtain an API key from https://console\.x\.ai\.?",
            # AssemblyAI
            r"Your current account balance is negative\."
            r" Please top up to continue using the API\.",
            r"Not authorized", r"Insufficient funds",
        )
    ),
    re.IGNORECASE,
)  # fmt: skip

_PLACES: tuple[tuple[str, ...], ...] = (
    ("error", "code"), ("error", "type"), ("error", "status"),
    ("detail", "status"), ("detail", "code"), ("detail", "type"),
    ("code",), ("error_code",), ("err_code",), ("message_type",), ("error",),
    # OpenAI Realtime and Responses: a failed response
    ("response", "status_details", "error", "code"),
    ("response", "status_details", "error", "type"),
    ("response", "error", "code"),
)  # fmt: skip
"""Fields in which vendors send a code of their own."""
_SENTENCE_PLACES: tuple[tuple[str, ...], ...] = (
    ("error", "message"), ("error",), ("message",), ("detail",), ("detail", "message"),
)  # fmt: skip


class KeyRefusal(NamedTuple):
    """What an error says about the key."""

    dead: str = ""
    """The code or status that refuses the key; empty if the error does not refuse it."""
    wait_s: float | None = None
    """Waiting time in the body."""
    wrong_key: str = ""
    """The code of an error for an id or for encrypted content that another key may have made."""


def read_key_refusal(
    status: int, body: bytes, content_encoding: str, now_unix_s: float
) -> KeyRefusal:
    """Read an error response to a call or a handshake. `body` is complete, perhaps compressed."""
    dead = str(status) if status in DEAD_KEY_STATUSES else ""
    if status < 400 or not body:
        return KeyRefusal(dead)
    if coding := coding_of(content_encoding):
        unpacked = unpack(body, coding, MAX_ERROR_BYTES)
        if unpacked is None or not unpacked[1]:
            return KeyRefusal(dead)
        body = unpacked[0]
    error = _object(body)
    if status < 500:
        dead = _code(error) or _sentence(error) or dead
    wrong_key = _wrong_key(error) if status in _WRONG_KEY_STATUSES and not dead else ""
    return KeyRefusal(dead, wait_in_error_s(error, now_unix_s), wrong_key)


_WRONG_KEY_STATUSES = frozenset({400, 404})
_NOT_FOUND, _NOT_VERIFIED = "previous_response_not_found", "invalid_encrypted_content"
_WRONG_KEY_SENTENCES = (
    # OpenAI, and Azure, which sends no code
    (re.compile(r"Previous response with id '[\w-]{1,250}' not found\."), _NOT_FOUND),
    (re.compile(r"Item with id '[\w-]{1,250}' not found\."), "item_not_found"),
    (
        re.compile(
            r"The encrypted content (?:for item )?[\w.=-]{1,250} could not be verified\."
            r"(?: Reason: [^\n]{1,250})?"
        ),
        _NOT_VERIFIED,
    ),
)
"""Matched as a whole. The sentence about an item that was not stored goes on, and matches none: no
key knows that item."""


def _wrong_key(error: Mapping[str, Any]) -> str:
    code = _at(error, ("error", "code"))
    if code in (_NOT_FOUND, _NOT_VERIFIED):
        return str(code)
    message = _at(error, ("error", "message"))
    if not isinstance(message, str):
        return ""
    return next((name for form, name in _WRONG_KEY_SENTENCES if form.fullmatch(message)), "")


_ERROR = b'rror"'
"""The end of a name or value that every vendor's refusing event has."""
_ERROR_TYPES = frozenset({"error", "response.done", "response.failed"})


def refusal_in_message(message: bytes) -> str:
    """Return the code by which a message of a session refuses the key; empty if it does not."""
    error = _object(message) if _ERROR in message else {}
    kind = error.get("type")
    if kind is not None and (not isinstance(kind, str) or kind.casefold() not in _ERROR_TYPES):
        return ""
    if (code := _code(error) or _sentence(error)) != "":
        return code
    texts = [text for name in ("error", "message") if isinstance(text := error.get(name), str)]
    for name in ("status_code", "error_code", "code"):  # Cartesia; AssemblyAI; ElevenLabs
        number = error.get(name)
        if type(number) is int and (
            number in DEAD_KEY_STATUSES or refusal_in_close(number, *texts[:1])
        ):
            return str(number)
    return ""


_DEAD_KEY_CLOSES = frozenset({4001, 4002, 4003, 4401, 4402, 4403})
"""AssemblyAI: not authorized, insufficient funds, paid-only; and the HTTP statuses plus 4000, which
many vendors use."""
_CLOSES_WITH_REASON = frozenset({1002, 1007, 1008, 1011, 3000, 3003})
_DEAD_KEY_REASONS = re.compile(
    "|".join(
        (
            # OpenAI: 3000 `invalid_request_error.invalid_api_key`
            r"(?:[a-z_]+\.)?(?:invalid_api_key|insufficient_quota|account_deactivated"
            r"|billing_hard_limit_reached|quota_exceeded|auth_error|payment_required)\Z",
            # Google: 1007 and 1008
            r"API key (?:not valid|not found|expired)\b", r"Your API key was reported as leaked\b",
            r"You exceeded your current quota, please check your plan and billing details\b",
            # ElevenLabs: 1008
            r"This request exceeds your (?:API key )?quota\b", r"Invalid API key\b",
            # AssemblyAI, Deepgram and others
            r"(?:Not authorized|Insufficient funds|Payment required)\b",
            r"Unauthorized\b(?!.*\bconcurrent\b)",
            r"(?:Missing|Invalid) (?:authorization|authentication|credentials)\b",
            r"Missing bearer or basic authentication\b",
        )
    ),
    re.IGNORECASE,
)  # fmt: skip


def refusal_in_close(code: int | None, reason: str = "") -> str:
    """Return the code by which a provider's close frame refuses the key; empty if it does not.
    Reasons are matched at their start, because text of the client can follow only later.
    """
    if code in _DEAD_KEY_CLOSES:
        return f"close {code}"
    if code in _CLOSES_WITH_REASON and _DEAD_KEY_REASONS.match(reason):
        return f"close {code}"
    return ""


def _object(text: bytes) -> Mapping[str, Any]:
    """Return the error object of a body or a message. Gemini's streams without SSE are an array."""
    found = value(msgspec.Raw(text)) if len(text) <= MAX_ERROR_BYTES else None
    if isinstance(found, list) and found:
        found = found[0]
    return found if isinstance(found, dict) else {}


def _at(within: object, place: tuple[str, ...]) -> object:
    for name in place:
        within = within.get(name) if isinstance(within, dict) else None
    return within


def _code(error: Mapping[str, Any]) -> str:
    for place in _PLACES:
        found = _at(error, place)
        if isinstance(found, str) and found.casefold() in DEAD_KEY_CODES:
            return found
    for detail in details(error):
        found = detail.get("reason")
        if isinstance(found, str) and found.casefold() in DEAD_KEY_CODES:
            return found
    return ""


def _sentence(error: Mapping[str, Any]) -> str:
    for place in _SENTENCE_PLACES:
        found = _at(error, place)
        if isinstance(found, str) and _DEAD_KEY_SENTENCES.fullmatch(found.strip()):
            return found.strip().partition(":")[0].partition(".")[0]
    return ""
