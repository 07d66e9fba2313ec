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
_MAX_OBJECT_MARKS = 2_000
"""So many braces and texts."""
_PLAIN_MARKS = 64
"""So many braces, to find its end by braces alone."""
_LONGEST_NEEDLE = 48
"""A needle that is cut between two chunks begins in so many bytes of the first."""
_FEW_BYTES = 4 * 1024
_MOST_OBJECTS = 64
"""Of a larger chunk only so many objects are read, the last ones: no answer tells its usage more
often, and the last one holds.
"""

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
    """The objects behind a key, in pieces. Each byte is looked at a fixed number of times."""

    __slots__ = ("_begun", "_held", "_needle")

    def __init__(self, needle: Needle) -> None:
        self._needle, self._held = needle, b""
        self._begun: _Begun | None = None

    def feed(self, chunk: bytes) -> list[bytes]:
        """The objects that this chunk completes; of very many the last ones."""
        needle, held = self._needle, self._held
        text = held + chunk if held else chunk
        objects, done = _NOTHING, 0
        if self._begun is not None:
            done = self._begun.go_on(chunk, 0)
            if done < 0:
                return _NOTHING
            objects = [self._begun.text] if self._begun.text else _NOTHING
            self._begun = None
        at = text.find(needle.key, done)
        if at >= 0 and len(text) > _FEW_BYTES:
            at = _one_of_the_last(needle.key, text, at)
        while at >= 0:
            found = needle.begins.match(text, at)
            if found is None:
                at = text.find(needle.key, at + 1)
                continue
            start = found.end()
            done = end_of_object(text, start)
            if done >= 0:
                told = text[start:done]
            else:
                begun = _Begun()
                done = begun.go_on(text, start)
                if done < 0:
                    self._begun, self._held = begun, b""
                    return objects
                told = begun.text
            if told:
                objects = [*objects, told]
            at = text.find(needle.key, done)
        # No key is cut in two behind the end of a line or an object.
        self._held = (
            b"" if text.endswith((b"\n", b"}")) else text[max(done, len(text) - _LONGEST_NEEDLE) :]
        )
        return objects


_NOTHING: list[bytes] = []


def _one_of_the_last(key: bytes, text: bytes, at: int) -> int:
    """Where the first of the last so many keys is, the first one of all being at `at`."""
    first = end = len(text)
    for _ in range(_MOST_OBJECTS):
        end = text.rfind(key, at, end)
        if end < 0:
            break
        first = end
    return first


class _Begun:
    """An object that is not all here yet, or that only a closer look finds the end of."""

    __slots__ = ("_depth", "_escaped", "_in_text", "_marks", "_seen", "text")

    def __init__(self) -> None:
        self._depth = self._marks = 0
        self._in_text = self._escaped = False
        self._seen = bytearray()
        self.text = b""
        """The object, once it is whole; empty if it is too large for one that tells usage."""

    def go_on(self, text: bytes, start: int) -> int:
        """Read on from `start`: where the object ends, or where it was given up; -1 if the text
        ends before it does.
        """
        stop = min(len(text), start + _MAX_OBJECT_BYTES - len(self._seen))
        at = start
        if self._escaped and at < stop:
            self._escaped, at = False, at + 1
        while at < stop and self._marks < _MAX_OBJECT_MARKS:
            self._marks += 1
            if self._in_text:
                at = self._read_text(text, at, stop)
            elif (found := _MARK.search(text, at, stop)) is None:
                at = stop
            else:
                at = found.end()
                mark = found[0]
                self._in_text = mark == b'"'
                self._depth += _DEEPER.get(mark, 0)
                if not self._depth:
                    self.text = bytes(self._seen) + text[start:at]
                    return at
        self._seen += text[start:at]
        whole = len(self._seen) < _MAX_OBJECT_BYTES and self._marks < _MAX_OBJECT_MARKS
        return -1 if whole else at

    def _read_text(self, text: bytes, at: int, stop: int) -> int:
        found = _IN_TEXT.match(text, at, stop)
        at = found.end() if found is not None else at
        if at == stop:
            return at
        # A quote ends it; a backslash that is the last byte escapes what comes next.
        self._in_text = text[at] != _QUOTE
        self._escaped = self._in_text
        return at + 1


_MARK = re.compile(rb'[{}"]')
_IN_TEXT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_DEEPER = {b"{": 1, b"}": -1}
_QUOTE = ord('"')


def end_of_object(text: bytes, start: int) -> int:
    """Behind the object that begins at `start`; -1 if it is not whole, or not a plain and small one
    such as usage is told by.
    """
    stop, depth, at = start + _MAX_OBJECT_BYTES, 1, start + 1
    for _ in range(_PLAIN_MARKS):
        close = text.find(b"}", at, stop)
        if close < 0:
            return -1
        opened = text.find(b"{", at, close)
        depth += 1 if opened >= 0 else -1
        at = (opened if opened >= 0 else close) + 1
        if not depth:
            break
    else:
        return -1
    if text.count(b'"', start, at) % 2 == 0 and b"\\" not in text[start:at]:
        return at
    # Braces or escapes within texts, which are rare in such objects, take a slower look.
    found = _WHOLE_OBJECT.match(text, start, stop)
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
