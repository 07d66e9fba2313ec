"""A transcription whose response reports no usage: the length of its audio is estimated."""

from __future__ import annotations

import struct
from typing import Any

import aiohttp
import pytest

from relay.core.media import audio_ms
from tests.conftest import StartRelay
from tests.relays import Relay, provider
from tests.upstream.raw import RawUpstream, ok

TEN_S = bytes(320_000)
"""16,000 samples a second of 16 bits, one channel."""
HEADER = b"RIFF" + struct.pack("<I", 36 + len(TEN_S)) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16) + b"data" + struct.pack("<I", len(TEN_S))
COMPRESSED = b"ID3" + bytes(159_997)


async def transcribe(relay: Relay, audio: bytes) -> dict[str, Any]:
    """Upload a file as OpenAI's SDKs do. Returns the record of the call."""
    form = aiohttp.FormData()
    form.add_field("model", "whisper-1")
    form.add_field("file", audio, filename="a.wav", content_type="audio/wav")
    await relay.call("POST", relay.path("openai", "audio/transcriptions"), data=form)
    [record] = await relay.events()
    return record


@pytest.mark.parametrize("kind", ["text/plain", "application/x-subrip", "text/vtt", "application/json"])
async def test_the_audio_of_a_wav_file_has_the_length_that_its_header_says(start: StartRelay, raw: RawUpstream, kind: str) -> None:
    raw.plays(ok(b'{"text": "hi"}' if kind == "application/json" else b"hi", f"Content-Type: {kind}"))
    record = await transcribe(await start(openai=provider(raw.url)), HEADER + TEN_S)
    assert record["usage"]["estimated"] and 10_000 <= record["usage"]["audio_ms"] < 10_050
    assert record["cost_nano_usd"] == pytest.approx(10 / 60 * 0.006 * 1e9, rel=0.01)


@pytest.mark.parametrize("buffer_bytes", [1024 * 1024, 16 * 1024], ids=["held", "streamed"])
@pytest.mark.parametrize(("audio", "expected_s"), [(HEADER + TEN_S, 10), (COMPRESSED, 10)], ids=["wav", "compressed"])
async def test_an_upload_that_is_streamed_is_estimated_as_one_that_is_held(
    start: StartRelay, raw: RawUpstream, buffer_bytes: int, audio: bytes, expected_s: int
) -> None:
    raw.plays(ok(b"hi", "Content-Type: text/plain"))
    record = await transcribe(await start({"server": {"buffer_bytes": buffer_bytes}}, openai=provider(raw.url)), audio)
    assert record["usage"] == {"audio_ms": pytest.approx(expected_s * 1000, abs=50), "estimated": True}


async def test_a_raw_upload_is_estimated_too(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"hi", "Content-Type: text/plain"))
    relay = await start(mine=provider(raw.url) | {"format": "openai"})
    await relay.call("POST", relay.path("mine", "speech-to-text"), data=HEADER + TEN_S, headers={"Content-Type": "audio/wav"})
    [record] = await relay.events()
    assert record["usage"]["audio_ms"] == pytest.approx(10_000, abs=5)


async def test_audio_behind_a_url_stays_unknown(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"hi", "Content-Type: text/plain"))
    relay = await start(openai=provider(raw.url))
    await relay.call("POST", relay.path("openai", "audio/transcriptions"), json={"model": "whisper-1", "url": "https://example.com/a.mp3"})
    [record] = await relay.events()
    assert record["usage"] == {"incomplete": True}


async def test_a_refused_transcription_used_nothing(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b'{"error": {"message": "no"}}', "Content-Type: application/json").replace(b"200 OK", b"400 Bad Request"))
    record = await transcribe(await start(openai=provider(raw.url)), HEADER + TEN_S)
    assert record["status"] == 400 and not record.get("usage")


@pytest.mark.parametrize(
    ("begin", "expected_ms"),
    [(b"", 0), (b" {}", 0), (HEADER[:30], 10_000), (HEADER[:28] + b"\0\0\0\0", 20_000), (HEADER[:28] + b"\xff\xff\xff\xff", 20_000), (b"OggS", 20_000)],
)
def test_a_header_that_cannot_be_is_ignored(begin: bytes, expected_ms: int) -> None:
    assert audio_ms(begin, 320_000) == expected_ms
