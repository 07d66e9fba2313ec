"""Find the JSON objects that tell usage in bytes that come in pieces, however they are cut.

Owns: that search, and the unpacking of compressed answers beside their way down. A chunk without
the needle costs one search; nothing is parsed but the objects found.
"""

from __future__ import annotations

import re
import sys
import zlib
from typing import Any

import brotli

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_MAX_OBJECT_BYTES = 8 * 1024
_MAX_UNPACKED_BYTES = 64 * 1024 * 1024
_STEP_BYTES = 1024 * 1024
_LONGEST_NEEDLE = 48
"""A needle that is cut between two chunks begins in so many bytes of the first."""

_TEXT = rb'"(?:[^"\\]|\\.)*+"'


def _object(depth: int) -> bytes:
    """A pattern for an object with `depth` levels of objects in it; texts may hold any brace."""
    inner = _object(depth - 1) + b"|" if depth else b""
    return rb"\{(?:[^{}\"]++|" + inner + _TEXT + rb")*+\}"


_WHOLE_OBJECT = re.compile(_object(3), re.DOTALL)


class Needle:
    """What is looked for: the objects behind a key. `key` is its text, such as `usage`."""

    __slots__ = ("begins", "key")

    def __init__(self, key: str) -> None:
        self.key = f'"{key}"'.encode()
        self.begins = re.compile(self.key + rb"\s*:\s*(?=\{)")


class Scan:
    """The objects behind a key, in pieces."""

    __slots__ = ("_held", "_needle")

    def __init__(self, needle: Needle) -> None:
        self._needle, self._held = needle, b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The objects that this chunk completes."""
        needle, held = self._needle, self._held
        text = held + chunk if held else chunk
        at, objects, done = text.find(needle.key), _NOTHING, 0
        while at >= 0:
            found = needle.begins.match(text, at)
            if found is None:
                at = text.find(needle.key, at + 1)
                continue
            end = end_of_object(text, found.end())
            if end < 0:
                self._held = text[at:] if len(text) - at <= _MAX_OBJECT_BYTES else b""
                return objects
            objects = [*objects, text[found.end() : end]]
            done, at = end, text.find(needle.key, end)
        # No key is cut in two behind the end of a line or an object.
        whole = text.endswith((b"\n", b"}"))
        self._held = b"" if whole else text[max(done, len(text) - _LONGEST_NEEDLE) :]
        return objects


_NOTHING: list[bytes] = []


def end_of_object(text: bytes, start: int) -> int:
    """Behind the object that begins at `start`; -1 if it is not whole."""
    depth, at = 1, start + 1
    while depth:
        close = text.find(b"}", at)
        if close < 0:
            return -1
        opened = text.find(b"{", at, close)
        depth += 1 if opened >= 0 else -1
        at = (opened if opened >= 0 else close) + 1
    if text.count(b'"', start, at) % 2 == 0 and b"\\" not in text[start:at]:
        return at
    # Braces or escapes within texts, which are rare in such objects, take a slower look.
    found = _WHOLE_OBJECT.match(text, start)
    return found.end() if found is not None else -1


class Unpacker:
    """A compressed answer, unpacked beside its way down, up to a bound; what is broken or past it
    is nothing.
    """

    __slots__ = ("_coding", "_decoder", "_room")

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._decoder: Any = _DECODERS[coding]()
        self._room = _MAX_UNPACKED_BYTES

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


_DECODERS: dict[str, Any] = {
    "gzip": lambda: zlib.decompressobj(wbits=47),  # either header
    "x-gzip": lambda: zlib.decompressobj(wbits=47),
    "deflate": lambda: zlib.decompressobj(wbits=47),
    "br": brotli.Decompressor,
    "zstd": zstd.ZstdDecompressor,
}


def unpacker(content_encoding: str) -> Unpacker | None:
    """None for what is not compressed, or not in a coding known here."""
    coding = content_encoding.strip().lower()
    return Unpacker(coding) if coding in _DECODERS else None
