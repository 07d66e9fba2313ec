"""Decompress bodies: responses while they stream, for reading their usage; complete requests and
stored bodies in steps.

Owns the content codings and the bounds: a body that decompresses to too much, at once or in total,
is not read to its end.
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
"""Maximum number of nested codings of a body."""
_MAX_BETWEEN_BYTES = 32 * 1024 * 1024
_MAX_UNPACKED_BYTES = 256 * 1024 * 1024
_STEP_BYTES = 4 * 1024 * 1024
"""Maximum size to which one chunk may decompress; reading more would block the event loop."""
_MAX_RATIO = 64
"""To how many times its size a chunk may decompress that is larger than 64 KiB: as several smaller
ones may."""


class Unpacker:
    """Decompresses a response while it streams, up to a bound or the first malformed byte."""

    __slots__ = ("_coding", "_decoder", "_room")

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._decoder: Any = _DECODERS[coding]()
        self._room = _MAX_UNPACKED_BYTES

    @property
    def gave_up(self) -> bool:
        """True if the rest of the response is not read."""
        return self._room <= 0

    def feed(self, chunk: bytes) -> bytes:
        """Return the decompressed chunk."""
        if self._room <= 0:
            return b""
        most = max(_STEP_BYTES, len(chunk) * _MAX_RATIO)
        try:
            text = _step(self._coding, self._decoder, chunk, min(self._room, most))
        except _BROKEN:
            self._room = 0
            return b""
        # A full step means a decompression bomb or a very large text: not worth reading for usage.
        self._room = 0 if len(text) >= most else self._room - len(text)
        return text


def _step(coding: str, decoder: Any, chunk: bytes, most: int) -> bytes:
    if coding == "br":
        return bytes(decoder.process(chunk, output_buffer_limit=most))
    if coding == "zstd":
        return bytes(decoder.decompress(chunk, most)) if not decoder.eof else b""
    return bytes(decoder.decompress(chunk, most))


_SMALL_WINDOW: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 23}
"""8 MiB, the maximum for HTTP (RFC 9659). The library's default allows a frame to use 128 MiB."""
_MAX_MEMBERS = 64
"""Maximum number of gzip members, or zstd frames, in a body: each costs a copy of the rest."""
_DECODERS: dict[str, Any] = {
    "gzip": lambda: zlib.decompressobj(wbits=47),  # either header
    "x-gzip": lambda: zlib.decompressobj(wbits=47),
    "deflate": lambda: zlib.decompressobj(wbits=47),
    "br": brotli.Decompressor,
    "zstd": lambda: zstd.ZstdDecompressor(options=_SMALL_WINDOW),
}


def coding_of(content_encoding: str | None) -> str:
    """Return the codings in Content-Encoding, in lower case; empty if the body has none."""
    coding = (content_encoding or "").strip().lower()
    return "" if coding == "identity" else coding


class CannotUnpack(ValueError):
    """A body has an unknown coding, or is malformed."""


class CutShort(CannotUnpack):
    """A body is truncated, or too large."""


def steps(data: bytes, content_encoding: str, step_bytes: int = _STEP_BYTES) -> Iterator[bytes]:
    """Decompress a body in steps of about `step_bytes`, without the GIL. Raises CannotUnpack."""
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
    """Limit the data between two codings, which is still compressed, to the size of a body. Without
    a limit, the outer coding could produce gigabytes that the inner one discards.
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
    """Return a decoder. Some senders of `deflate` omit the header of RFC 1950 that it requires."""
    if coding == "deflate" and (start[0] & 0x0F != 8 or int.from_bytes(start[:2]) % 31):
        return zlib.decompressobj(wbits=-15)
    return _DECODERS[coding]()


def _rest(coding: str, decoder: Any, full: bool) -> bytes | None:
    """Return the next input for a decoder that has more output for its last input, else None."""
    if coding == "br":
        return b"" if full or not decoder.can_accept_more_data() else None
    if coding == "zstd":
        return None if decoder.needs_input else b""
    tail: bytes = decoder.unconsumed_tail
    return tail if tail or full else None


def unpack(data: bytes, content_encoding: str, max_bytes: int) -> tuple[bytes, bool] | None:
    """Decompress at most `max_bytes`, and return whether that is everything; None if `data` is
    malformed or has an unknown coding.
    """
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
    """Return an Unpacker; None for a body that is not compressed, or has an unknown coding."""
    coding = coding_of(content_encoding)
    return Unpacker(coding) if coding in _DECODERS else None
