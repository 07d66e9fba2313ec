"""Compressed answers, unpacked beside their way down so that their usage can be read.

Owns: the codings, and the bounds: what unpacks to too much at once, or in all, is left unread.
"""

from __future__ import annotations

import sys
import zlib
from typing import Any

import brotli

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_MAX_UNPACKED_BYTES = 256 * 1024 * 1024
_STEP_BYTES = 4 * 1024 * 1024
"""What one chunk may unpack to: reading more than that would hold up the loop."""


class Unpacker:
    """A compressed answer, unpacked beside its way down, up to a bound; what is broken or past it
    is nothing.
    """

    __slots__ = ("_coding", "_decoder", "_room")

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._decoder: Any = _DECODERS[coding]()
        self._room = _MAX_UNPACKED_BYTES

    @property
    def gave_up(self) -> bool:
        """The rest is left unread."""
        return self._room <= 0

    def feed(self, chunk: bytes) -> bytes:
        """What this chunk unpacks to."""
        if self._room <= 0:
            return b""
        try:
            text = _step(self._coding, self._decoder, chunk, min(self._room, _STEP_BYTES))
        except (zlib.error, brotli.error, zstd.ZstdError, EOFError):
            self._room = 0
            return b""
        # A step that is full has more to come than a usage is worth: a bomb, or a very large text.
        self._room = 0 if len(text) >= _STEP_BYTES else self._room - len(text)
        return text


def _step(coding: str, decoder: Any, chunk: bytes, most: int) -> bytes:
    if coding == "br":
        return bytes(decoder.process(chunk, output_buffer_limit=most))
    if coding == "zstd":
        return bytes(decoder.decompress(chunk, most)) if not decoder.eof else b""
    return bytes(decoder.decompress(chunk, most))


_SMALL_WINDOW: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 23}
"""8 MiB, the most that HTTP allows (RFC 9659): by default a frame may ask for 128."""
_MOST_MEMBERS = 64
"""Of gzip, or frames of zstd, in one body: each costs a copy of what follows."""
_DECODERS: dict[str, Any] = {
    "gzip": lambda: zlib.decompressobj(wbits=47),  # either header
    "x-gzip": lambda: zlib.decompressobj(wbits=47),
    "deflate": lambda: zlib.decompressobj(wbits=47),
    "br": brotli.Decompressor,
    "zstd": lambda: zstd.ZstdDecompressor(options=_SMALL_WINDOW),
}


def unpack(data: bytes, content_encoding: str, most_bytes: int) -> tuple[bytes, bool] | None:
    """`data` unpacked, `most_bytes` at most, and whether that is all of it. None for a coding that
    is not known here, and for what is broken.
    """
    coding = content_encoding.strip().lower()
    if coding not in _DECODERS:
        return None
    decoder: Any = _DECODERS[coding]()
    unpacked = bytearray()
    try:
        for _ in range(_MOST_MEMBERS):
            unpacked += _step(coding, decoder, data, most_bytes - len(unpacked))
            if not _is_at_end(decoder):
                return bytes(unpacked[:most_bytes]), False
            data = getattr(decoder, "unused_data", b"")
            if not data or len(unpacked) >= most_bytes:
                return bytes(unpacked[:most_bytes]), not data and len(unpacked) <= most_bytes
            decoder = _DECODERS[coding]()  # another member or frame follows
    except (zlib.error, brotli.error, zstd.ZstdError, EOFError):
        return None
    return bytes(unpacked[:most_bytes]), False


def _is_at_end(decoder: Any) -> bool:
    return bool(decoder.is_finished() if hasattr(decoder, "is_finished") else decoder.eof)


def unpacker(content_encoding: str) -> Unpacker | None:
    """None for what is not compressed, or not in a coding known here."""
    coding = content_encoding.strip().lower()
    return Unpacker(coding) if coding in _DECODERS else None
