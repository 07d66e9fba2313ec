"""Parse numbers and times in text from outside: headers, queries, responses of providers.

Owns one strict, bounded parser for each. Python's int() and float() accept signs, underscores,
blanks, the digits of any script, `nan` and `inf`, and int() raises for more than 4,300 digits.
"""

from __future__ import annotations

import re
from calendar import monthrange, timegm

from relay.core.errors import BadRequest

_WHOLE = re.compile(r"-?[0-9]{1,16}\Z")
_DECIMAL = re.compile(r"-?[0-9]{1,16}(?:\.[0-9]{0,18})?(?:[eE][+-]?[0-9]{1,2})?\Z")
_DURATION = re.compile(r"([0-9]{1,6})([smhdw])\Z")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_ISO = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[Tt ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,9}))?)?"
    r"([Zz]|[+-][0-9]{2}:?[0-9]{2})?)?\Z"
)
LATEST_S = 253402300799
"""The last second of the year 9999."""


def whole_number(text: str, least: int, most: int) -> int | None:
    """Parse a whole number of at most 16 digits from `least` to `most`; None for anything else."""
    number = int(text) if _WHOLE.match(text) else None
    return number if number is not None and least <= number <= most else None


def header_number(name: str, text: str | None, min_: int, max_: int) -> int | None:
    """Parse the value `text` of the header or parameter `name`; None without one. Raises
    BadRequest.
    """
    if text is None:
        return None
    number = whole_number(text.strip(), min_, max_)
    if number is None:
        raise BadRequest(f"{name} is not a whole number from {min_} to {max_}")
    return number


def decimal_number(text: str, least: float, most: float) -> float | None:
    """Parse a number from `least` to `most`; None for anything else."""
    number = float(text) if _DECIMAL.match(text) else None
    return number if number is not None and least <= number <= most else None


def unix_time_s(text: str, now_s: float) -> float | None:
    """Parse a time into seconds since 1970: an age such as `7d`, `12h` or `90m`, or a date or time
    in ISO 8601 (UTC without a zone). None for anything else, or if outside 1970 to 9999.
    """
    ago_s = duration_s(text)
    when = now_s - ago_s if ago_s is not None else _iso_s(text)
    return when if when is not None and 0 <= when <= LATEST_S else None


def duration_s(text: str) -> int | None:
    """Parse a duration such as `7d`, `12h`, `90m` or `30s`; None for anything else."""
    found = _DURATION.match(text)
    return int(found[1]) * _UNITS_S[found[2]] if found is not None else None


def _iso_s(text: str) -> float | None:
    found = _ISO.match(text)
    if found is None:
        return None
    year, month, day, hour, minute, second = (int(part or 0) for part in found.groups()[:6])
    if not (year and 1 <= month <= 12 and 1 <= day <= monthrange(year, month)[1]):
        return None
    if hour > 23 or minute > 59 or second > 59:
        return None
    at_s = timegm((year, month, day, hour, minute, second)) + float(f"0.{found[7] or 0}")
    return at_s - _zone_s(found[8] or "Z")


def _zone_s(zone: str) -> int:
    """Return the offset of a zone from UTC, in seconds, positive if ahead."""
    if zone in "Zz":
        return 0
    ahead_s = int(zone[1:3]) * 3600 + int(zone[-2:]) * 60
    return -ahead_s if zone[0] == "-" else ahead_s
