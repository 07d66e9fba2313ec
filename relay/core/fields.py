"""Read the fields of JSON objects that clients and providers write, in bounded time and memory.

Owns: what is read at all, and how: a field that nobody asks for is skipped in C and never built; a
field is decoded only if it is small; a body that takes too long even to skip is not read. msgspec
holds the GIL while it decodes, so a thread would not keep the event loop running.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

MAX_FIELD_BYTES = 64 * 1024
"""A larger field is not decoded: 64 KiB of `[[],[],...]` take 2 ms, 25 MiB take 2 s and 0.7 GiB."""
MAX_TEXT_BYTES = 1024 * 1024
"""The same for a text whose characters are counted: a string is decoded in one piece."""
LARGE_BYTES = 1024 * 1024
"""After each pass over a larger body the event loop gets its turn."""
_ALWAYS_READ_BYTES = 4 * 1024 * 1024
_MARKS = (b",", b"[", b"{")
_MAX_MARKS = 2_000_000
"""How many of these a larger body may have. There is one for each value, which msgspec skips in 4
to 8 ns; a byte of a string takes it 0.4 ns, of whitespace or an escape 1.5 ns.
"""
_WINDOW_BYTES = 256 * 1024
_MAX_PAIRS = 10_000
UNREADABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""What msgspec raises for text that is no JSON, too deep, or of another type than was asked for."""

ABSENT = msgspec.Raw()
"""A field that is not there."""
_decode = msgspec.json.Decoder(Any).decode
_decode_text = msgspec.json.Decoder(str).decode
_skip = msgspec.json.Decoder(msgspec.Raw).decode

Text = bytes | memoryview | msgspec.Raw
T = TypeVar("T", bound=msgspec.Struct)

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Escapes of surrogates, paired or not, become those of other characters.
_ODD_WORDS = (
    (b"\\ud", b"\\u0"),
    (b"\\uD", b"\\u0"),
    (b"-Infinity", b" 0       "),
    (b"Infinity", b" 0      "),
    (b"NaN", b" 0 "),
)
_LINE_ENDS = b"\t\n\r"
_CONTROLS = bytes(range(0x20))
_QUIET = bytes.maketrans(_CONTROLS, bytes(0x20 if c in _LINE_ENDS else 0x3F for c in _CONTROLS))


def _strict(body: bytes) -> bytes | None:
    """JSON text that other readers take and msgspec refuses, made strict with every place kept: a
    byte order mark, NaN and Infinity, lone surrogates, control characters in strings. None if it
    has none of these. Only places may be read in it: words within strings are changed too.
    """
    text = body.translate(_QUIET)
    for odd, strict in _ODD_WORDS:
        text = text.replace(odd, strict)
    if text.startswith(BYTE_ORDER_MARK):
        text = b"   " + text[3:]
    return None if text == body else text


def is_readable(body: bytes) -> bool:
    """True if a pass over this JSON text takes less than 100 ms, whatever stands in it."""
    if len(body) <= _ALWAYS_READ_BYTES:
        return True
    marks = 0
    for start in range(0, len(body), _WINDOW_BYTES):
        end = start + _WINDOW_BYTES
        for mark in _MARKS:
            # Most of a large body is base64, in which `find` is ten times as fast as `count`.
            if body.find(mark, start, end) >= 0:
                marks += body.count(mark, start, end)
        if marks > _MAX_MARKS:
            return False
    return True


def is_value(body: bytes) -> bool:
    """True if this is one JSON value of any kind, as far as it can be read."""
    if not is_readable(body):
        return False
    try:
        _skip(body)
    except UNREADABLE:
        return False
    return True


class Reader(Generic[T]):
    """Reads the fields of an object that a Struct with nothing but Raw fields names."""

    __slots__ = ("_decode", "_kind")

    def __init__(self, kind: type[T]) -> None:
        self._kind, self._decode = kind, msgspec.json.Decoder(kind).decode

    def read(self, body: bytes) -> T | None:
        """The last field of each name; None of what is no object, or cannot be read."""
        if not is_readable(body):
            return None
        try:
            return self._decode(body)
        except UNREADABLE:
            names, found = self._kind.__struct_fields__, pairs(body)
        if found is None:
            return None
        return self._kind(**{name: raw for name, raw in found if name in names})


def value(raw: msgspec.Raw) -> Any:
    """A field, decoded; None if it is absent, null, broken or larger than MAX_FIELD_BYTES."""
    if raw is ABSENT or memoryview(raw).nbytes > MAX_FIELD_BYTES:
        return None
    try:
        return _decode(raw)
    except UNREADABLE:
        return None


def text(raw: msgspec.Raw) -> str | None:
    """A string, even a long one; None if it is anything else."""
    if raw is ABSENT or memoryview(raw).nbytes > MAX_TEXT_BYTES:
        return None
    try:
        return _decode_text(raw)
    except UNREADABLE:
        return None


def field(within: Text, *path: str) -> msgspec.Raw:
    """The field behind these names, one within the other; ABSENT if it is not there."""
    found: Text = within
    for name in path:
        try:
            found = _only(name)(found).value
        except UNREADABLE:
            return ABSENT
    return found if isinstance(found, msgspec.Raw) else ABSENT


@cache
def _only(name: str) -> Any:
    """A decoder of an object that looks at one field. Names are the relay's own, so few."""
    wanted = msgspec.defstruct("Only", [("value", msgspec.Raw, ABSENT)], rename={"value": name})
    return msgspec.json.Decoder(wanted).decode


# A key without escapes, as nearly all are; the whitespace is JSON's, of which nobody writes more
# than this, and `re` is slow at.
_SPACE = rb"[ \t\n\r]{0,4096}+"
_OPENS = re.compile(_SPACE + rb"\{" + _SPACE)
_OPENS_ARRAY = re.compile(_SPACE + rb"\[" + _SPACE)
_KEY = re.compile(rb'"([^"\\\x00-\x1f\x80-\xff]{0,256})"' + _SPACE + b":" + _SPACE)
_COLON = re.compile(b":" + _SPACE)
_BLANK = re.compile(_SPACE)
_BEHIND = re.compile(r"JSON is malformed: trailing characters \(byte (\d+)\)")


class Span(NamedTuple):
    """A field of an object: its name, and where its value begins and ends in the text."""

    name: str
    start: int
    end: int


def pairs(body: bytes) -> list[tuple[str, msgspec.Raw]] | None:
    """Names and values in order, repeated ones too; None if unreadable or more than 10,000."""
    found, view = spans(body), memoryview(body)
    return None if found is None else [(n, msgspec.Raw(view[start:end])) for n, start, end in found]


def spans(body: bytes) -> list[Span] | None:
    """The same with the places of the values.

    Each byte is looked at once, and nothing but names is built. An object that only lenient readers
    take is looked at again, if it has no more than 4 MiB: making it strict takes 10 ns a byte.
    """
    if not is_readable(body):
        return None
    found = _spans(body, body)
    if found is None and body.startswith(BYTE_ORDER_MARK):
        found = _spans(body, b"   " + body[3:])
    if found is None and len(body) <= _ALWAYS_READ_BYTES and (text := _strict(body)) is not None:
        return _spans(body, text)
    return found


def _spans(body: bytes, text: bytes) -> list[Span] | None:
    """`text` is `body` itself or made strict: its names may be changed, its places are not."""
    opening = _OPENS.match(text)
    if opening is None:
        return None
    view, at = memoryview(text), opening.end()
    found: list[Span] = []
    more = body[at : at + 1] != b"}"
    while more:
        if len(found) == _MAX_PAIRS or (key := _key(body, view, at)) is None:
            return None
        name, at = key
        end = _behind_value(view, at)
        if end is None or body[end : end + 1] not in (b",", b"}"):
            return None
        found.append(Span(name, at, _trimmed(view, at, end)))
        more = body[end : end + 1] == b","
        at = _blank(body, end + 1) if more else end
    return found if _blank(body, at + 1) == len(body) else None


def items(body: bytes) -> list[tuple[int, int]]:
    """Where the values of an array begin and end: the first 10,000, or as many as can be read."""
    opening = _OPENS_ARRAY.match(body)
    found: list[tuple[int, int]] = []
    view, at = memoryview(body), opening.end() if opening is not None else len(body)
    while len(found) < _MAX_PAIRS and (end := _behind_value(view, at)) is not None:
        found.append((at, _trimmed(view, at, end)))
        if body[end : end + 1] != b",":
            break
        at = _blank(body, end + 1)
    return found


def _key(body: bytes, view: memoryview, at: int) -> tuple[str, int] | None:
    """The name that begins at `at`, and where its value does."""
    plain = _KEY.match(body, at)
    if plain is not None:
        return plain[1].decode("ascii"), plain.end()
    end = _behind_value(view, at)
    colon = _COLON.match(body, end) if end is not None else None
    if end is None or colon is None or end - at > MAX_FIELD_BYTES:
        return None
    try:
        return _decode_text(body[at:end]), colon.end()
    except UNREADABLE:
        return None


def _behind_value(view: memoryview, at: int) -> int | None:
    """Where the text goes on behind the JSON value at `at`, whitespace skipped; None if there is
    no value, or nothing behind it. msgspec skips values at the speed of C, and tells only in its
    error where it stopped (decision 0006).
    """
    try:
        _skip(view[at:])
    except msgspec.DecodeError as error:
        behind = _BEHIND.match(str(error))
        return at + int(behind[1]) - 1 if behind is not None else None
    except UNREADABLE:
        return None
    return None


def _trimmed(view: memoryview, start: int, end: int) -> int:
    """The end of a value without the whitespace behind it."""
    if view[end - 1] not in b" \t\n\r":
        return end
    return start + len(bytes(view[start:end]).rstrip(b" \t\n\r"))


def _blank(body: bytes, at: int) -> int:
    """Behind the whitespace at `at`."""
    blank = _BLANK.match(body, at)
    return blank.end() if blank is not None else at
