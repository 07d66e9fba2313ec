"""What a provider's error says of the key that was used: that it is dead, or how long it must wait.

Owns: the vendors' forms, as tables, for REST bodies, events of a session and close frames. Only
fields that a vendor fills with codes of its own are compared; where a vendor tells in a sentence
alone, that sentence is compared as a whole. So no text of a client's that an error quotes can put a
key into cooldown. What follows is decided in policy.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from relay.core.fields import MOST_FIELD_BYTES, value
from relay.core.meters.unpack import unpack
from relay.core.numbers import decimal_number, unix_time_s, whole_number

Header = Callable[[str], str | None]
"""The value of a header, by its name."""

MOST_ERROR_BYTES = MOST_FIELD_BYTES
"""A larger error is not read: it says nothing of its key."""
MOST_WAIT_S = 366 * 86400
_MOST_DETAILS = 32

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


class Said(NamedTuple):
    """What an error says of the key."""

    dead: str = ""
    """By which code or status the key is refused; empty if it is not."""
    wait_s: float | None = None
    """How long it must wait, as the body says."""


_NOTHING = Said()


def of_answer(status: int, body: bytes, content_encoding: str, now_unix_s: float) -> Said:
    """What the answer to a call, or a refused handshake, says. `body` may be compressed, and is not
    read unless it is whole.
    """
    dead = str(status) if status in DEAD_KEY_STATUSES else ""
    if status < 400 or not body:
        return Said(dead)
    if content_encoding and content_encoding.strip().lower() != "identity":
        unpacked = unpack(body, content_encoding, MOST_ERROR_BYTES)
        if unpacked is None or not unpacked[1]:
            return Said(dead)
        body = unpacked[0]
    error = _object(body)
    if status < 500:
        dead = _code(error) or _sentence(error) or dead
    return Said(dead, _told_wait_s(error, now_unix_s))


_ERROR_TYPES = frozenset({"error", "response.done", "response.failed"})


def of_message(message: bytes) -> str:
    """By which code a message of a session refuses the key; empty if it does not."""
    said = _object(message)
    kind = said.get("type")
    if kind is not None and (not isinstance(kind, str) or kind.casefold() not in _ERROR_TYPES):
        return ""
    if (code := _code(said) or _sentence(said)) != "":
        return code
    texts = [text for name in ("error", "message") if isinstance(text := said.get(name), str)]
    for name in ("status_code", "error_code", "code"):  # Cartesia; AssemblyAI; ElevenLabs
        number = said.get(name)
        if type(number) is int and (number in DEAD_KEY_STATUSES or of_close(number, *texts[:1])):
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


def of_close(code: int | None, reason: str = "") -> str:
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
    found = value(msgspec.Raw(text)) if len(text) <= MOST_ERROR_BYTES else None
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
    for detail in _details(error):
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


def _details(error: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """google.rpc.Status.details."""
    found = _at(error, ("error", "details"))
    if isinstance(found, list):
        yield from (each for each in found[:_MOST_DETAILS] if isinstance(each, dict))


# How long to wait ------------------------------------------------------------------------------


def _told_wait_s(error: Mapping[str, Any], now_unix_s: float) -> float | None:
    for detail in _details(error):
        kind = detail.get("@type")
        if isinstance(kind, str) and kind.endswith("google.rpc.RetryInfo"):
            given = detail.get("retryDelay")
            return duration_s(given) if isinstance(given, str) else None
    inner = error.get("error")
    if not isinstance(inner, dict):
        return None
    if (seconds := _number(inner.get("resets_in_seconds"), MOST_WAIT_S)) is not None:
        return seconds
    at_s = _number(inner.get("resets_at"), 1e11)
    return None if at_s is None else _until(at_s, now_unix_s)


def _number(given: object, most: float) -> float | None:
    if isinstance(given, str):
        return decimal_number(given.strip(), 0, most)
    number = given if type(given) in (int, float) else None
    return float(number) if number is not None and 0 <= number <= most else None  # type: ignore[operator,arg-type]


_DURATION = re.compile(
    r"(?:(\d{1,4})d)?(?:(\d{1,5})h)?(?:(\d{1,6})m(?!s))?(?:(\d{1,9}(?:\.\d{1,9})?)s)?"
    r"(?:(\d{1,9}(?:\.\d{1,9})?)ms)?\Z"
)
_UNITS_S = (86400.0, 3600.0, 60.0, 1.0, 0.001)
_EPOCH_S, _EPOCH_MS = 1_000_000_000, 1_000_000_000_000


def duration_s(text: str) -> float | None:
    """`37s`, `1.5s`, `6m0s`, `20ms` in seconds; None for anything else, or for more than a year."""
    found = _DURATION.match(text) if text else None
    if found is None:
        return None
    parts = zip(found.groups(), _UNITS_S, strict=True)
    seconds = sum(float(part) * unit for part, unit in parts if part)
    return seconds if seconds <= MOST_WAIT_S else None


def reset_s(text: str, now_unix_s: float) -> float | None:
    """Seconds until a reset that is told as a duration, as seconds, or as a time: RFC 3339, or
    seconds or milliseconds since 1970. None for anything else.
    """
    text = text.strip()
    number = decimal_number(text, 0, 1e14)
    if number is None:
        if (told_s := duration_s(text)) is not None:
            return told_s
        at_s = unix_time_s(text, now_unix_s) if len(text) > 9 else None
        return None if at_s is None else _until(at_s, now_unix_s)
    if number >= _EPOCH_MS:
        return _until(number / 1000, now_unix_s)
    if number >= _EPOCH_S:
        return _until(number, now_unix_s)
    return number if number <= MOST_WAIT_S else None


def _until(at_s: float, now_unix_s: float) -> float | None:
    wait_s = at_s - now_unix_s
    return max(0.0, wait_s) if wait_s <= MOST_WAIT_S else None


_RESETS = (
    *(
        (f"x-ratelimit-remaining-{what}", f"x-ratelimit-reset-{what}")
        for what in (
            "requests", "tokens", "project-requests", "project-tokens",  # OpenAI, Groq
            "requests-day", "tokens-minute",  # Cerebras
        )
    ),
    *(
        (f"anthropic-ratelimit-{what}-remaining", f"anthropic-ratelimit-{what}-reset")
        for what in ("requests", "tokens", "input-tokens", "output-tokens")
    ),
    ("x-ratelimit-remaining", "x-ratelimit-reset"),  # OpenRouter
    ("ratelimit-remaining", "ratelimit-reset"),  # draft-ietf-httpapi-ratelimit-headers-07
)  # fmt: skip
"""Headers that tell how much is left of a limit, and when there is more."""
_UNIFIED = "anthropic-ratelimit-unified"


def reset_headers_s(header: Header, now_unix_s: float) -> float | None:
    """Seconds until all limits of which nothing is left are reset; None if no header tells."""
    resets = [header(reset) for left, reset in _RESETS if is_zero(header(left))]
    if header(f"{_UNIFIED}-status") == "rejected":
        resets.append(header(f"{_UNIFIED}-reset"))
    told = [reset_s(text, now_unix_s) for text in resets if text]
    return max((wait_s for wait_s in told if wait_s is not None), default=None)


def is_zero(text: str | None) -> bool:
    """True for a count of nothing."""
    return text is not None and whole_number(text.strip(), 0, 0) == 0
