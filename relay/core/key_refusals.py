"""Whether a provider's error refuses the key that was used.

Owns: the vendors' forms, as tables, for REST bodies, events of a session and close frames. Only
fields that a vendor fills with codes of its own are compared; where a vendor tells in a sentence
alone, that sentence is compared as a whole. So no text of a client's that an error quotes can put a
key into cooldown. What follows is decided in retry_policy.py; how long to wait is retry_after.py's.
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
"""A larger error is not read: it says nothing of its key."""

DEAD_KEY_STATUSES = frozenset({401, 402, 403})
"""By which a provider refuses a key, whatever else it says. 402: DeepSeek, OpenRouter, Deepgram,
Cartesia and others, when the account has no money left."""

DEAD_KEY_CODES = frozenset(
    code.casefold()
    for code in (
        # OpenAI, and those who speak like it. Groq: organization_restricted. Moonshot:
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
"""Compared without regard to case."""

_DEAD_KEY_SENTENCES = re.compile(
    "|".join(
        (
            # Anthropic, as an invalid_request_error
            r"Your credit balance is too low to access the (?:Anthropic|Claude) API\."
            r" Please go to Plans & Billing to upgrade or purchase credits\.",
            # Google, through layers that leave the details out
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
    # OpenAI Realtime and Responses: a response that failed
    ("response", "status_details", "error", "code"),
    ("response", "status_details", "error", "type"),
    ("response", "error", "code"),
)  # fmt: skip
"""Where vendors put a code of their own."""
_SENTENCE_PLACES: tuple[tuple[str, ...], ...] = (
    ("error", "message"), ("error",), ("message",), ("detail",), ("detail", "message"),
)  # fmt: skip


class KeyRefusal(NamedTuple):
    """What an error says about the key."""

    dead: str = ""
    """By which code or status the key is refused; empty if it is not."""
    wait_s: float | None = None
    """How long it must wait, as the body says."""


def read_key_refusal(
    status: int, body: bytes, content_encoding: str, now_unix_s: float
) -> KeyRefusal:
    """What an answer or a refused handshake says; `body` may be compressed, and must be whole."""
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
    return KeyRefusal(dead, wait_in_error_s(error, now_unix_s))


_ERROR = b'rror"'
"""Each vendor's event that refuses a key has a name, or a value, that ends so."""
_ERROR_TYPES = frozenset({"error", "response.done", "response.failed"})


def refusal_in_message(message: bytes) -> str:
    """By which code a message of a session refuses the key; empty if it does not."""
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
"""AssemblyAI: not authorized, insufficient funds, paid-only; and the HTTP statuses moved into the
range for applications, as many do."""
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
    """By which code a provider's close frame refuses the key; empty if it does not. Reasons are
    compared from their first character: what they quote of a client's stands behind it.
    """
    if code in _DEAD_KEY_CLOSES:
        return f"close {code}"
    if code in _CLOSES_WITH_REASON and _DEAD_KEY_REASONS.match(reason):
        return f"close {code}"
    return ""


def _object(text: bytes) -> Mapping[str, Any]:
    """The error object of a body or a message; Gemini's streams that are no SSE begin an array."""
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
