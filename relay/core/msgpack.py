"""Parse MessagePack in bounded time, for the messages of fal's realtime client.

Owns the parse. Objects become tuples of their members, so that repeated names are seen; numbers and
extensions become None. The format: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_VALUES = 50_000
MAX_DEPTH = 64
MAX_TEXT_BYTES = 4096
LONG_TEXT = "\ufffd" * MAX_TEXT_BYTES
"""Stands for every longer text, and for longer binary data."""


class BadMessagePack(ValueError):
    """The data is not one MessagePack value, or exceeds a bound."""


_TEXTS: Mapping[int, int] = {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC4: 1, 0xC5: 2, 0xC6: 4}
"""Texts and binary data: the bytes of their length."""
_EXTENSIONS: Mapping[int, int] = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_ARRAYS: Mapping[int, int] = {0xDC: 2, 0xDD: 4}
_MAPS: Mapping[int, int] = {0xDE: 2, 0xDF: 4}
_SIZES: Mapping[int, int] = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1,
    0xD1: 2, 0xD2: 4, 0xD3: 8, 0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17,
}  # fmt: skip
"""Values of a fixed size, in bytes."""


def parse_msgpack(data: bytes) -> Any:
    """Return the value: a text, a list, a tuple of members, or None. Raises BadMessagePack."""
    parser = _Parser(data)
    value = parser.value(0)
    if parser.at != len(data):
        raise BadMessagePack("there is more after the value")
    return value


class _Parser:
    __slots__ = ("_count", "_data", "at")

    def __init__(self, data: bytes) -> None:
        self._data, self.at, self._count = data, 0, 0

    def value(self, depth: int) -> Any:
        """Parse the value at the current position."""
        self._count += 1
        if self._count > MAX_VALUES or depth > MAX_DEPTH:
            raise BadMessagePack("there are too many values, or they are nested too deeply")
        first = self._take(1)[0]
        if first <= 0x7F or first >= 0xE0:
            return None
        if first <= 0x8F:
            return self._map(first & 0x0F, depth)
        if first <= 0x9F:
            return [self.value(depth + 1) for _ in range(first & 0x0F)]
        if first <= 0xBF:
            return self._text(first & 0x1F)
        return self._long(first, depth)

    def _long(self, first: int, depth: int) -> Any:
        if (size := _TEXTS.get(first)) is not None:
            return self._text(self._length(size))
        if (size := _ARRAYS.get(first)) is not None:
            return [self.value(depth + 1) for _ in range(self._length(size))]
        if (size := _MAPS.get(first)) is not None:
            return self._map(self._length(size), depth)
        if (size := _EXTENSIONS.get(first)) is not None:
            self._take(self._length(size) + 1)
            return None
        if (size := _SIZES.get(first)) is not None:
            self._take(size)
            return None
        raise BadMessagePack(f"{first:#x} begins no value")

    def _map(self, length: int, depth: int) -> tuple[tuple[str, Any], ...]:
        members = []
        for _ in range(length):
            name = self.value(depth + 1)
            members.append((name if isinstance(name, str) else "", self.value(depth + 1)))
        return tuple(members)

    def _length(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _text(self, length: int) -> str:
        text = self._take(length)
        # To replace the bytes of an image takes 100 ns each.
        return text.decode("utf-8", "replace") if length <= MAX_TEXT_BYTES else LONG_TEXT

    def _take(self, size: int) -> bytes:
        start = self.at
        self.at += size
        if self.at > len(self._data):
            raise BadMessagePack("it is truncated")
        return self._data[start : self.at]
