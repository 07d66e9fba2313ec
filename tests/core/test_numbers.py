"""Numbers and times from outside are read within bounds; malformed ones are ignored or refused."""

from __future__ import annotations

import datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.caching import CacheRules, requested_ttl_s
from relay.core.errors import BadRequest
from relay.core.meters.answer_meter import read_whole
from relay.core.meters.openai import usage_of
from relay.core.meters.sent_call import SentCall
from relay.core.meters.tolerant_json import IgnoredFields
from relay.core.numbers import LATEST_S, decimal_number, unix_time_s, whole_number
from relay.core.retry_after import retry_after_s
from relay.core.retry_policy import RetryRules, request_timeout_s, requested_rules
from relay.core.usage import total

MALFORMED = [
    "", " ", "-", "--1", "-+1", "+1", "1_000", "1 ", " 1", "1\n", "\u0661\u0662", "\uff11", "\u00b2", "0x10", "1e3x", "nan", "inf", "-inf", "Infinity", "1,5",
    "9" * 17, "9" * 5000, "-" + "9" * 5000, "0" * 5000, "1" + "0" * 5000 + ".5", "1.5.5", ".5", "one", "1e999", "1e-999", "1\x00",
]  # fmt: skip
NOW = 1_790_000_000.0


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_number_is_none(text: str) -> None:
    assert whole_number(text, -(10**15), 10**15) is None
    assert decimal_number(text, -1e15, 1e15) is None


@given(st.text(max_size=30))
def test_reading_a_number_or_time_never_raises(text: str) -> None:
    for value in (whole_number(text, -5, 5), decimal_number(text, -5, 5)):
        assert value is None or -5 <= value <= 5
    when = unix_time_s(text, NOW)
    assert when is None or 0 <= when <= LATEST_S


@given(st.integers(-(10**15) + 1, 10**15 - 1), st.integers(-100, 100), st.integers(-100, 100))
def test_a_whole_number_is_read_within_its_bounds(number: int, least: int, most: int) -> None:
    assert whole_number(str(number), -(10**15), 10**15) == number
    assert whole_number(str(number), least, most) == (number if least <= number <= most else None)


def test_a_decimal_number_is_read_within_its_bounds() -> None:
    read = [decimal_number(text, -10, 10) for text in ("0", "-0.5", "1.", "1e1", "1E-3", "10.0", "10.01", "-11")]
    assert read == [0, -0.5, 1, 10, 0.001, 10, None, None]


def test_a_time_is_an_age_or_iso_8601() -> None:
    assert [unix_time_s(text, NOW) for text in ("0s", "90m", "12h", "7d", "2w")] == [NOW, NOW - 5400, NOW - 43200, NOW - 7 * 86400, NOW - 14 * 86400]
    assert unix_time_s("1970-01-01", NOW) == 0 and unix_time_s("9999-12-31T23:59:59Z", NOW) == LATEST_S
    for text in ("2026-11-24", "2026-11-24T12:30", "2026-11-24 12:30:15", "2026-11-24T12:30:15.25Z", "2026-02-28T23:59:59+14:00", "2024-02-29T00:00-0530"):
        when = datetime.datetime.fromisoformat(text)
        assert unix_time_s(text, NOW) == (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()


@given(st.datetimes(datetime.datetime(1970, 1, 2), datetime.datetime(9999, 12, 30)), st.integers(-14 * 60, 14 * 60))
def test_any_time_is_read_as_python_reads_it(when: datetime.datetime, zone_min: int) -> None:
    when = when.replace(tzinfo=datetime.timezone(datetime.timedelta(minutes=zone_min)))
    read = unix_time_s(when.isoformat(), NOW)
    assert read is not None and abs(read - when.timestamp()) < 1e-4


@pytest.mark.parametrize("text", [
    "999999w", "99999999d", "-5d", "5y", "d", "\u0665d", "0000-01-01", "0001-01-01", "1969-12-31", "9999-99-99", "2026-02-30", "2026-1-1", "2026-11-24T24:00",
    "2026-11-24T12:60", "9999-12-31T23:59:59-01:00", "1970-01-01T00:00:00+01:00", "2026-W01-1", "yesterday", "now", "2026-11-24T12:30:15." + "9" * 5000, "9" * 5000,
])  # fmt: skip
def test_a_malformed_time_is_none(text: str) -> None:
    assert unix_time_s(text, NOW) is None


@pytest.mark.parametrize("name", ["cf-aig-max-attempts", "cf-aig-retry-delay", "cf-aig-request-timeout", "cf-aig-cache-ttl"])
@pytest.mark.parametrize("text", [text for text in MALFORMED if text.strip() not in ("", "1")] + ["-1", "1.5"])
def test_a_malformed_number_in_a_control_header_is_a_bad_request_that_names_the_header(name: str, text: str) -> None:
    header = {name: text}.get
    with pytest.raises(BadRequest, match=name):
        requested_rules(header, RetryRules())
        request_timeout_s(header)
        requested_ttl_s(header, CacheRules(), "chat")


@pytest.mark.parametrize("text", [*MALFORMED, "-1", "99999999999", "Fri, 31 Dec 9999 23:59:59 GMT", "Wed, 21 Oct 2015 07:28:00 +" + "9" * 20, "9" * 30 + " Oct 2015"])
def test_a_malformed_retry_after_is_ignored(text: str) -> None:
    for name in ("retry-after", "retry-after-ms"):
        assert retry_after_s({name: text}.get, NOW) in ({None, 1.0, 0.001} if text.strip() == "1" else {None})


@given(st.text(max_size=80))
def test_reading_retry_after_never_raises(text: str) -> None:
    wait = retry_after_s({"retry-after": text}.get, NOW)
    assert wait is None or 0 <= wait <= 366 * 86400


def test_a_duration_or_a_cost_out_of_bounds_is_ignored() -> None:
    for duration, audio_ms in ((b"9" * 60, None), (b"2.5", 2500)):
        meter = read_whole("deepgram", SentCall("transcription", endpoint="v1/listen"), {}.get, b'{"metadata": {"duration": %b}}' % duration)
        assert meter is not None
        usage = total(meter.parts)
        assert (usage.audio_ms if usage is not None and usage.audio_ms else None) == audio_ms
    for cost in ("1e999990", "1e30", "-1", "9" * 4000):
        usage = usage_of(b'{"prompt_tokens": 1, "completion_tokens": 1, "cost": %b}' % cost.encode(), IgnoredFields())
        assert usage is None or usage.billed_nano_usd is None, cost
    usage = usage_of(b'{"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.25}', IgnoredFields())
    assert usage is not None and usage.billed_nano_usd == Decimal("0.25") * 10**9
