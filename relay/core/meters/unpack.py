"""Undo the codings of compressed bodies: of responses beside their way down, so that their usage
can be read; of whole requests and stored bodies step by step.

Owns: the codings, and the bounds: what unpacks to too much at once, or in all, is left unread.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from typing import Any

import brotli

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_BROKEN = (zlib.error, brotli.error, zstd.ZstdError, EOFError)
_MAX_CODINGS = 3
"""Of one body, one upon the other."""
_MAX_BETWEEN_BYTES = 32 * 1024 * 1024
_MAX_UNPACKED_BYTES = 256 * 1024 * 1024
_STEP_BYTES = 4 * 1024 * 1024
"""What one chunk may unpack to: reading more than that would hold up the loop."""


class Unpacker:
    """Unpacks an answer beside its way down, up to a bound; nothing follows a broken byte."""

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
        except _BROKEN:
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
_MAX_MEMBERS = 64
"""Of gzip, or frames of zstd, in one body: each costs a copy of what follows."""
_DECODERS: dict[str, Any] = {
    "gzip": lambda: zlib.decompressobj(wbits=47),  # either header
    "x-gzip": lambda: zlib.decompressobj(wbits=47),
    "deflate": lambda: zlib.decompressobj(wbits=47),
    "br": brotli.Decompressor,
    "zstd": lambda: zstd.ZstdDecompressor(options=_SMALL_WINDOW),
}


def coding_of(content_encoding: str | None) -> str:
    """The codings of a body by its Content-Encoding, in lower case; empty if it has none."""
    coding = (content_encoding or "").strip().lower()
    return "" if coding == "identity" else coding


class CannotUnpack(ValueError):
    """A body is in a coding that is not known here, or broken."""


class CutShort(CannotUnpack):
    """The end is missing, or too far away."""


def steps(data: bytes, content_encoding: str, step_bytes: int = _STEP_BYTES) -> Iterator[bytes]:
    """A body unpacked, about `step_bytes` a step, without the GIL. Raises CannotUnpack."""
    pieces: Iterator[bytes] = iter((data,))
    codings = [each.strip() for each in content_encoding.lower().split(",")]
    codings = [coding for coding in codings if coding not in ("", "identity")]
    if len(codings) > _MAX_CODINGS:
        raise CannotUnpack
    for left, coding in enumerate(reversed(codings), 1 - len(codings)):
        pieces = _undone(pieces, coding, step_bytes)
        pieces = _bounded(pieces) if left else pieces
    return pieces


def _bounded(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """What lies between two codings is compressed still, so no longer than a body may be: without
    a bound one would make gigabytes of which the next makes nothing.
    """
    room = _MAX_BETWEEN_BYTES
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            raise CutShort
        yield piece


def _undone(packed: Iterator[bytes], coding: str, step_bytes: int) -> Iterator[bytes]:
    if coding not in _DECODERS:
        raise CannotUnpack
    decoder: Any = None
    members = 0
    try:
        for chunk in packed:
            rest: bytes | None = chunk or None
            while rest is not None:
                if decoder is None:
                    decoder, members = _decoder(coding, rest), members + 1
                    if members > _MAX_MEMBERS:
                        raise CutShort
                piece = _step(coding, decoder, rest, step_bytes)
                if piece:
                    yield piece
                rest = _rest(coding, decoder, len(piece) >= step_bytes)
                if _is_at_end(decoder):
                    # Another member or frame may follow.
                    rest, decoder = getattr(decoder, "unused_data", b"") or None, None
    except _BROKEN as error:
        raise CannotUnpack from error
    if decoder is not None:
        raise CutShort


def _decoder(coding: str, start: bytes) -> Any:
    """Some write `deflate` without the header of RFC 1950 that it is to have."""
    if coding == "deflate" and (start[0] & 0x0F != 8 or int.from_bytes(start[:2]) % 31):
        return zlib.decompressobj(wbits=-15)
    return _DECODERS[coding]()


def _rest(coding: str, decoder: Any, full: bool) -> bytes | None:
    """What a decoder is to be given next for more of its last input; None if there is no more."""
    if coding == "br":
        return b"" if full or not decoder.can_accept_more_data() else None
    if coding == "zstd":
        return None if decoder.needs_input else b""
    tail: bytes = decoder.unconsumed_tail
    return tail if tail or full else None


def unpack(data: bytes, content_encoding: str, max_bytes: int) -> tuple[bytes, bool] | None:
    """At most `max_bytes` of `data` unpacked, and whether that is all; None if it cannot be."""
    unpacked = bytearray()
    try:
        for piece in steps(data, content_encoding, min(max_bytes + 1, _STEP_BYTES)):
            unpacked += piece
            if len(unpacked) > max_bytes:
                return bytes(unpacked[:max_bytes]), False
    except CutShort:
        return bytes(unpacked), False
    except CannotUnpack:
        return None
    return bytes(unpacked), True


def _is_at_end(decoder: Any) -> bool:
    return bool(decoder.is_finished() if hasattr(decoder, "is_finished") else decoder.eof)


def unpacker(content_encoding: str) -> Unpacker | None:
    """None for what is not compressed, or not in a coding known here."""
    coding = coding_of(content_encoding)
    return Unpacker(coding) if coding in _DECODERS else None
