"""Read how long a provider asks to wait: from Retry-After, the body of an error, or its rate limit
headers.

Owns the parsers of these forms, with bounds. retry_policy.py chooses among them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from relay.core.numbers import decimal_number, unix_time_s, whole_number

Header = Callable[[str], str | None]
"""The value of a header, by its name."""

MAX_WAIT_S = 366 * 86400
_MAX_DATE_CHARACTERS = 64
_MAX_DETAILS = 32


def retry_after_s(header: Header, now_unix_s: float) -> float | None:
    """Return the seconds of `retry-after-ms`, or of Retry-After as a number or a date (RFC 9110
    10.2.3). None if missing, negative, malformed or more than a year; a past date gives 0.
    """
    in_ms = (header("retry-after-ms") or "").strip()
    if (ms := decimal_number(in_ms, 0, MAX_WAIT_S * 1000)) is not None:
        return ms / 1000
    if (given := header("retry-after")) is None or len(given) > _MAX_DATE_CHARACTERS:
        return None
    if (seconds := decimal_number(given.strip(), 0, MAX_WAIT_S)) is not None:
        return seconds
    try:
        wait_s = parsedate_to_datetime(given).timestamp() - now_unix_s
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return max(0.0, wait_s) if wait_s <= MAX_WAIT_S else None


def details(error: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Return google.rpc.Status.details of an error."""
    inner = error.get("error")
    found = inner.get("details") if isinstance(inner, dict) else None
    if isinstance(found, list):
        yield from (each for each in found[:_MAX_DETAILS] if isinstance(each, dict))


def wait_in_error_s(error: Mapping[str, Any], now_unix_s: float) -> float | None:
    """Return the seconds in Google's RetryInfo, or Codex's `resets_in_seconds` or `resets_at`."""
    for detail in details(error):
        kind = detail.get("@type")
        if isinstance(kind, str) and kind.endswith("google.rpc.RetryInfo"):
            given = detail.get("retryDelay")
            return duration_s(given) if isinstance(given, str) else None
    inner = error.get("error")
    if not isinstance(inner, dict):
        return None
    if (seconds := _number(inner.get("resets_in_seconds"), MAX_WAIT_S)) is not None:
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
    """Parse `37s`, `1.5s`, `6m0s` or `20ms` into seconds; None for others, or more than a year."""
    found = _DURATION.match(text) if text else None
    if found is None:
        return None
    parts = zip(found.groups(), _UNITS_S, strict=True)
    seconds = sum(float(part) * unit for part, unit in parts if part)
    return seconds if seconds <= MAX_WAIT_S else None


def reset_s(text: str, now_unix_s: float) -> float | None:
    """Return the seconds until a reset: from a duration, seconds, RFC 3339, or a Unix time in
    seconds or milliseconds.
    """
    text = text.strip()
    number = decimal_number(text, 0, 1e14)
    if number is None:
        if (duration := duration_s(text)) is not None:
            return duration
        at_s = unix_time_s(text, now_unix_s) if len(text) > 9 else None
        return None if at_s is None else _until(at_s, now_unix_s)
    if number >= _EPOCH_MS:
        return _until(number / 1000, now_unix_s)
    if number >= _EPOCH_S:
        return _until(number, now_unix_s)
    return number if number <= MAX_WAIT_S else None


def _until(at_s: float, now_unix_s: float) -> float | None:
    wait_s = at_s - now_unix_s
    return max(0.0, wait_s) if wait_s <= MAX_WAIT_S else None


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
"""Pairs of headers: what remains of a limit, and when it is reset."""
_UNIFIED = "anthropic-ratelimit-unified"


def reset_headers_s(header: Header, now_unix_s: float) -> float | None:
    """Return the seconds until all exhausted limits are reset; None if no header says."""
    resets = [header(reset) for left, reset in _RESETS if is_zero(header(left))]
    if header(f"{_UNIFIED}-status") == "rejected":
        resets.append(header(f"{_UNIFIED}-reset"))
    waits_s = [reset_s(text, now_unix_s) for text in resets if text]
    return max((wait_s for wait_s in waits_s if wait_s is not None), default=None)


def is_zero(text: str | None) -> bool:
    """True for the number 0."""
    return text is not None and whole_number(text.strip(), 0, 0) == 0
