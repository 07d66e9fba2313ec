"""Estimate the input tokens of a request body: of text by its length, of images by the vendors'
rules.

Owns the search for base64 media in a body, the size of an image from its first bytes, and the
rules. Time is bounded: the body is searched, never decoded as a whole.

Sources of the rules: developers.openai.com/api/docs/guides/images-vision (32-pixel patches),
platform.claude.com/docs/en/build-with-claude/vision (28-pixel patches),
ai.google.dev/gemini-api/docs/tokens (tiles of 258).
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from relay.core.usage import BYTES_PER_TOKEN

PLAIN_BYTES = 16 * 1024
"""A shorter body counts as text: media in it would be too small to matter."""
_MARKS = (b";base64,", b'data":')
_VALUE = re.compile(rb'(?:;base64,|data":\s*")([A-Za-z0-9+/_-]{64})')
_MAX_MARKS = 1000
_MAX_SEARCHED_BYTES = 8 * 1024 * 1024
"""Maximum text between media that is searched; the rest counts as text."""
_MAX_IMAGES = 32
"""The size of further images is not read."""
_HEAD_CHARACTERS = 96 * 1024
"""Enough for the size of a JPEG, which may follow EXIF data."""
_MIN_CHARACTERS = 1024
_BYTES_A_TOKEN_OF_SOUND = 400
"""Audio and documents: 32 tokens per second of an MP3 at 128 kbit/s, 258 per page of 100 kB."""


_MAX_UNKNOWN = 20_000


class Size(NamedTuple):
    """The size of an image, in pixels."""

    width: int
    height: int


def input_tokens(body: bytes, format_: str) -> int:
    """Estimate the tokens of a request body, for a provider with this wire format."""
    if len(body) <= PLAIN_BYTES:
        return len(body) // BYTES_PER_TOKEN
    text_bytes, tokens = len(body), 0
    for at, blob in enumerate(_blobs(body)):
        text_bytes -= blob.end - blob.start
        head = body[blob.start : min(blob.end, blob.start + _HEAD_CHARACTERS)]
        size = image_size(_decoded(head)) if at < _MAX_IMAGES else None
        if size is not None:
            tokens += image_tokens(size, format_)
        else:
            blob_bytes = (blob.end - blob.start) * 3 // 4
            tokens += min(_MAX_UNKNOWN, blob_bytes // _BYTES_A_TOKEN_OF_SOUND)
    return max(0, text_bytes) // BYTES_PER_TOKEN + tokens


class _Blob(NamedTuple):
    start: int
    end: int


def _blobs(body: bytes) -> Iterator[_Blob]:
    """Find base64: after `;base64,` of a data URL, or as the value of `data` or `file_data`."""
    for mark in _MARKS:
        start = searched = 0
        for _ in range(_MAX_MARKS):
            at = body.find(mark, start, start + _MAX_SEARCHED_BYTES - searched)
            if at < 0:
                break
            searched += at - start
            found = _VALUE.match(body, at)
            start = at + len(mark)
            if found is None:
                continue
            end = body.find(b'"', found.end())
            start = len(body) if end < 0 else end
            if start - found.start(1) >= _MIN_CHARACTERS:
                yield _Blob(found.start(1), start)


def _decoded(text: bytes) -> bytes:
    whole = text[: len(text) // 4 * 4].translate(_URL_SAFE)
    try:
        return base64.b64decode(whole)
    except (binascii.Error, ValueError):
        return b""


_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def image_tokens(size: Size, format_: str) -> int:
    """Return the tokens of an image by the vendor's rule; OpenAI's rule is the default."""
    if format_ == "anthropic":
        return min(4784, -(-size.width // 28) * -(-size.height // 28))
    if format_ == "google":
        if size.width <= 384 and size.height <= 384:
            return 258
        return 258 * min(64, -(-size.width // 768) * -(-size.height // 768))
    return min(2500, -(-size.width // 32) * -(-size.height // 32))


def image_size(start: bytes) -> Size | None:
    """Read the size from the first bytes of a PNG, GIF, WebP or JPEG; None for anything else."""
    if start.startswith(b"\x89PNG\r\n\x1a\n") and len(start) >= 24:
        return Size(*struct.unpack(">II", start[16:24]))
    if start.startswith((b"GIF87a", b"GIF89a")) and len(start) >= 10:
        return Size(*struct.unpack("<HH", start[6:10]))
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP" and len(start) >= 30:
        return _webp(start)
    return _jpeg(start) if start.startswith(b"\xff\xd8") else None


def _webp(start: bytes) -> Size | None:
    """Read the size of a WebP (developers.google.com/speed/webp/docs/riff_container)."""
    kind = start[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(start[at : at + 3], "little") + 1 for at in (24, 27))
        return Size(width, height)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", start[26:30])
        return Size(width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        return Size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    return None


_SIZELESS = frozenset({0xC4, 0xC8, 0xCC})


def _jpeg(start: bytes) -> Size | None:
    """Read the size from the frame header (ISO 10918-1 B.2.2), which follows other segments."""
    at = 2
    while at + 9 <= len(start) and start[at] == 0xFF:
        marker = start[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in _SIZELESS:
            height, width = struct.unpack(">HH", start[at + 5 : at + 9])
            return Size(width, height)
        at += 2 + max(2, int.from_bytes(start[at + 2 : at + 4], "big"))
    return None


AUDIO_START_BYTES = 4096
"""How much of an upload `audio_ms` reads."""
_WAV = b"WAVEfmt "
_RATE_AT = 20
"""Where the bytes per second are behind the beginning of _WAV, as a number of 32 bits."""
_WAV_RATES = range(1_000, 10_000_000)
_COMPRESSED_BYTES_PER_S = 16_000
"""128 kbit/s, as most recorders write."""


def audio_ms(start: bytes, length: int) -> int:
    """Estimate the length of the audio in an upload of `length` bytes: by the header of a WAV file,
    else by the rate of common compressed files. 0 for a body that only names the audio by its URL.
    """
    if not start or start.lstrip()[:1] == b"{":
        return 0
    rate = _COMPRESSED_BYTES_PER_S
    if (at := start.find(_WAV, 0, AUDIO_START_BYTES)) >= 0:
        named = int.from_bytes(start[at + _RATE_AT : at + _RATE_AT + 4], "little")
        rate = named if named in _WAV_RATES else rate
    return length * 1000 // rate
