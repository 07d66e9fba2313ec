"""What a call can use at most: of every kind, in every format."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec
import pytest

from relay.core.bounds import bound_of
from relay.core.meters.sent_call import SentCall
from relay.core.pricing import Rates, tariff
from relay.core.usage import CallBound


def bound(kind: str, body: Any, format_: str = "openai", length: int | None = None) -> CallBound:
    text = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return bound_of(SentCall(kind, text, len(text) // 4), format_, text, len(text) if length is None else length)


@pytest.mark.parametrize(
    ("kind", "body", "output"),
    [
        ("chat", {"max_tokens": 7}, (7, 1)),
        ("chat", {"max_completion_tokens": 8, "max_tokens": 7, "n": 3}, (8, 3)),
        ("completion", {"max_tokens": 7, "best_of": 4}, (7, 4)),
        ("responses", {"max_output_tokens": 9, "max_tokens": 1}, (9, 1)),
        ("responses", {"max_tokens": 1}, (None, 1)),
        ("messages", {"max_tokens": 7, "max_completion_tokens": 1}, (7, 1)),
        ("generate", {"generationConfig": {"maxOutputTokens": 7, "candidateCount": 2}}, (7, 2)),
        ("generate", {"generation_config": {"max_output_tokens": 7, "candidate_count": 2}}, (7, 2)),
        ("generate", {"generationConfig": {"maxOutputTokens": 7}, "generation_config": {"maxOutputTokens": 70}}, (70, 1)),
        ("generate", {"max_tokens": 7}, (None, 1)),
        ("chat", {"max_tokens": True}, (None, 1)),
        ("chat", {"max_tokens": 0}, (None, 1)),
        ("chat", {"max_tokens": [7]}, (None, 1)),
        ("chat", {"messages": "{'max_tokens': 7}"}, (None, 1)),
        ("chat", b"[]", (None, 1)),
        ("other", {"max_tokens": 7}, (7, 1)),
        ("other", {"num_generations": 3}, (None, 3)),
        ("generate", {"generationConfig": {"candidateCount": 2}}, (None, 2)),
        ("chat", b'{"\\u006dax_tokens": 7}', (7, 1)),
        ("chat", b'{"\\u006e": 3}', (None, 3)),
        ("embeddings", {"max_tokens": 7}, (0, 1)),
        ("chat", b'{"max_tokens": 70, "max_tokens": 7}', (70, 1)),
        ("chat", b'{"max_tokens": 70, "max\\u005ftokens": 7}', (70, 1)),
        ("chat", b'{"n": 3, "n": 1, "max_tokens": 7}', (7, 3)),
        ("generate", b'{"generationConfig": {"maxOutputTokens": 70}, "generationConfig": {"maxOutputTokens": 7}}', (70, 1)),
        ("generate", b'{"generationConfig": {"maxOutputTokens": 70, "candidateCount": 2, "maxOutputTokens": 7}}', (70, 2)),
    ],
)
def test_the_output_of_a_text_is_bounded_by_the_field_of_its_format(kind: str, body: Any, output: tuple[int | None, int]) -> None:
    found = bound(kind, body)
    assert (found.output_tokens, found.answers) == output


def test_speech_is_bounded_by_its_characters_in_every_format() -> None:
    for format_, name in (("openai", "input"), ("elevenlabs", "text"), ("cartesia", "transcript"), ("deepgram", "text")):
        assert bound("speech", {name: "héllo"}, format_).characters == 5


def test_speech_whose_text_is_not_found_is_bounded_by_the_size_of_the_body() -> None:
    body = b'{"text": 5}'
    assert bound("speech", body, "elevenlabs").characters == len(body)


def test_a_transcription_is_bounded_by_the_size_of_its_audio() -> None:
    assert bound("transcription", b"--x", length=40_000).audio_ms == 10_000
    assert bound("transcription", {"url": "https://example.com/a.mp3"}).audio_ms == 3_600_000


def test_images_are_bounded_by_their_number() -> None:
    assert bound("image", {"n": 4}).images == 4
    assert bound("image", {"prompt": "x"}).images == 1


@pytest.mark.parametrize(
    ("body", "tier"),
    [({"service_tier": "priority"}, "priority"), ({"service_tier": "auto"}, ""), ({"service_tier": "default"}, ""), ({"speed": "fast"}, "fast"), ({"service_tier": 5}, ""), (b'{"service_tier": "priority", "service_tier": "default"}', "priority")],
)
def test_the_service_tier_that_a_call_asks_for_prices_it(body: Any, tier: str) -> None:
    assert bound("chat", body).service_tier == tier


RATES = tariff(
    Rates(1, 2, cache_write=3, cache_write_1h=5, reasoning=4, input_audio=10, output_audio=20, characters=7, image=1, page=Decimal("0.002")),  # type: ignore[arg-type]
    audio_is_text=False,
)


@pytest.mark.parametrize(
    ("called", "nano"),
    [
        (CallBound(1000, 100), 1000 * 1000 + 100 * 4000),
        (CallBound(1000, 100, answers=2), 1000 * 1000 + 200 * 4000),
        (CallBound(1000, None), 1000 * 1000 + 50 * 4000),
        (CallBound(1000, 0, text=b'{"cache_control":{}}'), 1000 * 5000),
        (CallBound(1000, 100, may_hold_audio=True), 1000 * 10_000 + 100 * 20_000),
        (CallBound(0, 0, characters=1000), 1000 * 7000),
        (CallBound(0, 0, images=3), 3 * 10**9),
        (CallBound(0, 0, units=1), 1000 * 2 * 10**6),
    ],
)
def test_a_bound_costs_the_highest_rate_that_may_apply(called: CallBound, nano: int) -> None:
    assert RATES.bound_nano_usd(called, 50) == nano


def test_a_call_of_which_nothing_has_a_price_has_no_bound() -> None:
    assert tariff(Rates(characters=7), audio_is_text=False).bound_nano_usd(CallBound(1000, 100), 50) is None  # type: ignore[arg-type]
    assert tariff(Rates(), audio_is_text=False).bound_nano_usd(CallBound(1000, 100, characters=5), 50) is None
    assert tariff(Rates(0, 0), audio_is_text=False).bound_nano_usd(CallBound(1000, 100), 50) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [Rates(1, 2), Rates(1, 2, cache_read=0, reasoning=2, input_audio=1, input_image=3, call=1)])  # type: ignore[arg-type]
def test_the_rates_of_a_plain_tariff_bound_every_call_as_the_whole_formula_does(given: Rates) -> None:
    whole = tariff(given, audio_is_text=False)
    rates = whole.plain_rates
    assert rates is not None
    for text in (b"{}", b'{"cache_control":{}}', b'{"modalities":["audio"]}'):
        for input_tokens, output_tokens, answers in ((1001, 333, 3), (7, 50, 1), (0, 0, 1)):
            nano = rates.nano_usd(input_tokens, output_tokens * answers)
            assert nano == whole.bound_nano_usd(CallBound(input_tokens, output_tokens, answers, units=1, text=text), 50)


@pytest.mark.parametrize("name", ["cache_write", "cache_write_1h", "input_audio", "output_audio", "image", "characters", "audio_hour", "unit", "page"])
def test_a_tariff_by_which_more_than_tokens_costs_is_not_plain(name: str) -> None:
    assert tariff(Rates(1, 2, **{name: 5}), audio_is_text=False).plain_rates is None  # type: ignore[arg-type]
