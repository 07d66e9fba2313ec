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


def bound(kind: str, body: Any, format_: str = "openai", content_type: str = "application/json", length: int = 0) -> CallBound:
    text = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return bound_of(SentCall(kind, text, len(text) // 4, length=length or len(text)), format_, text, content_type=content_type)


FORM = "multipart/form-data; boundary=x"


def form(*parts: str) -> bytes:
    """A form: the head of each part after `form-data; `, a blank line, and its value."""
    return "".join(f"--x\r\nContent-Disposition: form-data; {part}\r\n" for part in parts).encode() + b"--x--\r\n"


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
        ("chat", {"max_output_tokens": 1}, (None, 1)),
        ("chat", {"max_output_tokens": 1, "max_tokens": 7}, (7, 1)),
        ("chat", {"max_tokens_to_sample": 1}, (None, 1)),
        ("chat", {"generationConfig": {"maxOutputTokens": 1}}, (None, 1)),
        ("chat", {"max_tokens": " 2e1 "}, (20, 1)),
        ("completion", {"max_completion_tokens": 1}, (None, 1)),
        ("messages", {"max_tokens_to_sample": 1}, (None, 1)),
        ("completion", {"max_tokens": 7, "prompt": "one"}, (7, 1)),
        ("completion", {"max_tokens": 7, "prompt": ["one", "two", "three"]}, (7, 3)),
        ("completion", {"max_tokens": 7, "n": 2, "prompt": ["one", "two", "three"]}, (7, 6)),
        ("completion", {"max_tokens": 7, "prompt": [1, 2, 3]}, (7, 1)),
        ("completion", {"max_tokens": 7, "prompt": [[1, 2], [3]]}, (7, 2)),
        ("completion", {"prompt": ["one", "two"]}, (None, 2)),
        ("completion", {"max_tokens": 7, "prompt": ["x" * 40_000] * 2}, (7, 2)),
        ("completion", {"max_tokens": 7, "prompt": [1] * 40_000}, (7, 1)),
        ("completion", b'{"max_tokens": 7, "prompt": ["one", "two"], "prompt": "one"}', (7, 2)),
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


@pytest.mark.parametrize(
    ("format_", "kind", "output"),
    [("cohere", "chat", 7), ("cohere", "other", 7), ("anthropic", "other", 8), ("google", "other", 9), ("fal", "other", None), ("openai", "batch", None)],
)
def test_a_format_has_its_own_fields_for_the_bound(format_: str, kind: str, output: int | None) -> None:
    body = {"max_completion_tokens": 70, "max_tokens": 7, "max_tokens_to_sample": 8, "generationConfig": {"maxOutputTokens": 9}}
    assert bound(kind, body, format_).output_tokens == output


MANY = b'"a": 1,' * 10_001


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("generate", '{"generationConfig": {"candidateCount": 8}}'.encode("utf-16")),
        ("generate", '{"generationConfig": {"candidateCount": 8}}'.encode("utf-32-be")),
        ("generate", b'{"generationConfig": {' + MANY + b'"candidateCount": 8}}'),
        ("generate", b"{'generationConfig': {'candidateCount': 8}}"),
        ("chat", b'{"max_tokens": 70,' + MANY + b'"max_tokens": 7}'),
        ("completion", b"{" + MANY + b'"prompt": ["a", "b"]}'),
        ("chat", b"{" + b",".join(b'"service_tier": "%d"' % n for n in range(20)) + b"}"),
        ("image", b"{" + MANY + b'"n": 8}'),
        ("image", b"--x\r\n\r\n"),
    ],
)
def test_a_body_whose_limits_cannot_be_read_is_told_apart(kind: str, body: bytes) -> None:
    assert not bound(kind, body).is_read


@pytest.mark.parametrize("kind", ["chat", "completion", "responses", "messages", "generate", "interactions", "embeddings", "speech", "image"])
def test_a_body_that_the_relay_does_not_hold_cannot_be_read(kind: str) -> None:
    assert not bound_of(SentCall(kind), "openai", None).is_read


@pytest.mark.parametrize("body", [b"", b"{}", b'{"generationConfig": null}', b'{"generationConfig": 5}', b'{"a": "\\u00e9"}'])
def test_a_body_without_limits_is_read(body: bytes) -> None:
    assert bound("generate", body).is_read


def test_speech_is_bounded_by_its_characters_in_every_format() -> None:
    for format_, name in (("openai", "input"), ("elevenlabs", "text"), ("cartesia", "transcript"), ("deepgram", "text")):
        assert bound("speech", {name: "héllo"}, format_).characters == 5


def test_speech_whose_text_is_not_found_is_bounded_by_the_size_of_the_body() -> None:
    body = b'{"text": 5}'
    assert bound("speech", body, "elevenlabs").characters == len(body)


@pytest.mark.parametrize("body", [b'{"text": "xxxx", "text": "x"}', b'{"text": "x", "text": "xxxx"}', b'{"te\\u0078t": "xxxx", "text": "x"}'])
def test_speech_whose_text_is_repeated_is_bounded_by_the_longest(body: bytes) -> None:
    assert bound("speech", body, "elevenlabs").characters == 4


def test_a_transcription_is_bounded_by_the_size_of_its_audio() -> None:
    assert bound("transcription", b"RIFF", content_type="audio/wav", length=40_000).audio_ms == 10_000
    assert bound("transcription", form('name="file"; filename="url.mp3"\r\n\r\nx'), content_type=FORM, length=40_000).audio_ms == 10_000


def test_a_transcription_is_bounded_by_the_size_of_its_decompressed_audio() -> None:
    assert bound("transcription", b"x" * 40_000, content_type="audio/wav", length=100).audio_ms == 10_000


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"url": "https://example.com/a.mp3"}', "application/json"),
        (b' {"url": "https://example.com/a.mp3"}', "application/json"),
        (b'\xef\xbb\xbf{"url": "https://example.com/a.mp3"}', "audio/mp3"),
        ('{"url": "https://example.com/a.mp3"}'.encode("utf-16"), "application/json"),
        (b"url=https://example.com/a.mp3", "application/x-www-form-urlencoded"),
        (form('name="url"\r\n\r\nhttps://example.com/a.mp3'), FORM),
        (form('name="cloud_storage_url"\r\n\r\nhttps://example.com/a.mp3'), FORM),
        (form('name="file_id"\r\n\r\nfile-1'), FORM),
        (form('name=URL\r\nContent-Type: text/plain\r\n\r\nhttps://example.com/a.mp3'), FORM),
        (form('name*=utf-8\'\'%75rl\r\n\r\nhttps://example.com/a.mp3'), FORM),
        (form('name="url"\r\n\r\nhttps://example.com/a.mp3'), ""),
        (form('name="file"\r\n\r\nx'), "multipart/form-data"),
    ],
)
def test_audio_that_the_provider_fetches_is_bounded_by_an_hour(body: bytes, content_type: str) -> None:
    assert bound("transcription", body, content_type=content_type).audio_ms == 3_600_000


def test_audio_of_unknown_length_is_bounded_by_an_hour_at_least() -> None:
    assert bound_of(SentCall("transcription"), "deepgram", None).audio_ms == 3_600_000
    assert bound_of(SentCall("transcription", length=40_000_000), "deepgram", None).audio_ms == 10_000_000


@pytest.mark.parametrize(
    ("body", "images"),
    [
        (b'{"n": 4}', 4),
        (b'{"prompt": "x"}', 1),
        (b' {"n": 4}', 4),
        (b'\xef\xbb\xbf{"n": 4}', 4),
        (b'{"n": "4"}', 4),
        (b'{"n": 4.0}', 4),
        (b'{"n": 4, "parameters": {}}', 4),
        (b'{"n": 4, "n": 1}', 4),
        (b'{"\\u006e": 4}', 4),
        (b'{"n": 0}', 1),
        (b'{"parameters": {"sampleCount": 4}}', 4),
        (b'{"parameters": {"sampleCount": 4}, "parameters": {}}', 4),
        (b'{"config": {"numberOfImages": 4}}', 4),
        (b'{"num_images": 4}', 4),
        (b'{"batch_size": 4}', 4),
    ],
)
def test_images_are_bounded_by_the_highest_number_that_a_provider_may_read(body: bytes, images: int) -> None:
    assert bound("image", body).images == images


@pytest.mark.parametrize(
    "parts",
    [
        ['name="n"\r\n\r\n4'],
        ['name="n"\r\nContent-Type: text/plain\r\n\r\n4'],
        ["name=n\r\n\r\n4"],
        ['name="n"\r\n\r\n 4.0'],
        ['name="n"\r\n\r\n4', 'name="n"\r\n\r\n1'],
        ['name="image"; filename="a.png"\r\n\r\n' + "x" * 100_000, 'name="n"\r\n\r\n4'],
    ],
)
def test_images_of_a_form_are_bounded_however_it_is_written(parts: list[str]) -> None:
    assert bound("image", form(*parts), content_type=FORM).images == 4


@pytest.mark.parametrize("name", ["num_images", "numImages", "numberOfImages", "sampleCount", "batch_size", "n"])
def test_units_of_an_app_are_bounded_by_its_images(name: str) -> None:
    assert bound("other", {"prompt": "x", name: 4}, "fal").units == 4
    assert bound("other", {"prompt": "x"}, "fal").units == 1


@pytest.mark.parametrize(
    ("body", "tiers"),
    [
        ({"service_tier": "priority"}, ("priority",)),
        ({"service_tier": "auto"}, ()),
        ({"service_tier": "default"}, ()),
        ({"speed": "fast"}, ("fast",)),
        ({"service_tier": 5}, ()),
        ({"service_tier": "flex", "speed": "fast"}, ("flex", "fast")),
        (b'{"service_tier": "priority", "service_tier": "default"}', ("priority",)),
        (b'{"service_tier": "priority", "service_tier": "flex"}', ("flex", "priority")),
        (b'{"speed": "fast", "speed": "standard"}', ("fast",)),
    ],
)
def test_every_service_tier_that_a_call_names_may_price_it(body: Any, tiers: tuple[str, ...]) -> None:
    assert bound("chat", body).service_tiers == tiers


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
        (CallBound(1000, 0, text=b'{"\\u0063ache_control":{}}'), 1000 * 10_000),  # and as audio
        (CallBound(1000, 0, text=b'{"text":"\\u00e9\\u003c\\n"}'), 1000 * 1000),
        (CallBound(1000, 100, text=b'{"mimeType":"Audio/mp3"}'), 1000 * 10_000 + 100 * 20_000),
        (CallBound(1000, 100, text=b'{"mimeType":"\\u0061udio/mp3"}'), 1000 * 10_000 + 100 * 20_000),
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


@pytest.mark.parametrize("kind", ["embeddings", "completion"])
def test_input_that_may_be_tokens_is_bounded_by_their_number(kind: str) -> None:
    assert bound(kind, b'{"input":[' + b"1," * 999 + b"1]}").input_tokens == 1000


def test_other_calls_of_a_vendor_of_speech_are_bounded_by_the_size_of_the_body() -> None:
    body = b'{"inputs":[{"text":"Hello"}]}'
    assert bound("other", body, "elevenlabs").characters == len(body)
    assert bound("other", body, "openai").characters == 0
