"""Read fields of JSON objects from outside, in bounded time and memory.

Owns the bounds: an unwanted field is skipped in C without building it; a wanted field is decoded
only if it is small; a body that takes too long to skip is not read. msgspec holds the GIL while it
decodes, so a thread would not keep the event loop running.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

MAX_FIELD_BYTES = 64 * 1024
"""A larger field is not decoded: 64 KiB of `[[],[],...]` take 2 ms, 25 MiB take 2 s and 0.7 GiB."""
MAX_TEXT_BYTES = 1024 * 1024
"""The same limit for a string whose characters are counted."""
LARGE_BYTES = 1024 * 1024
"""Code that reads a larger body yields to the event loop after each pass."""
_ALWAYS_READ_BYTES = 4 * 1024 * 1024
_MARKS = (b",", b"[", b"{")
_MAX_MARKS = 2_000_000
"""Maximum number of `_MARKS` in a body above _ALWAYS_READ_BYTES. There is one mark for each value,
which msgspec skips in 4 to 8 ns; it skips a byte of a string in 0.4 ns, of whitespace or an escape
in 1.5 ns.
"""
_WINDOW_BYTES = 256 * 1024
_MAX_PAIRS = 10_000
UNREADABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""Exceptions of msgspec for text that is no JSON, nested too deeply, or of another type."""

ABSENT = msgspec.Raw()
"""The value of a missing field."""
_decode = msgspec.json.Decoder(Any).decode
_decode_text = msgspec.json.Decoder(str).decode
_skip = msgspec.json.Decoder(msgspec.Raw).decode

Text = bytes | memoryview | msgspec.Raw
T = TypeVar("T", bound=msgspec.Struct)

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BEFORE_JSON = b" \t\n\r\x00\xef\xbb\xbf\xfe\xff"
"""Whitespace, byte order marks, and the zeros of UTF-16 and UTF-32."""
# Escapes of surrogates, paired or not, are replaced by escapes of other characters.
_ODD_WORDS = (
    (b"\\ud", b"\\u0"),
    (b"\\uD", b"\\u0"),
    (b"-Infinity", b" 0       "),
    (b"Infinity", b" 0      "),
    (b"NaN", b" 0 "),
)
STRING_TEXT = rb'(?>[^"\\]++|\\.)*+'
"""Pattern of the text between the quotes of a JSON string. It does not backtrack, so a search takes
time proportional to its text."""
STRING = rb'"' + STRING_TEXT + rb'"'
"""Pattern of a JSON string."""
_LINE_ENDS = b"\t\n\r"
_CONTROLS = bytes(range(0x20))
_QUIET = bytes.maketrans(_CONTROLS, bytes(0x20 if c in _LINE_ENDS else 0x3F for c in _CONTROLS))


def _strict(body: bytes) -> bytes | None:
    """Make text strict that lenient JSON parsers accept and msgspec refuses: a byte order mark, NaN
    and Infinity, lone surrogates, control characters in strings. None if there is none of these.
    All positions stay the same, and only positions may be used: text in strings changes too.
    """
    text = body.translate(_QUIET)
    for odd, strict in _ODD_WORDS:
        text = text.replace(odd, strict)
    if text.startswith(BYTE_ORDER_MARK):
        text = b"   " + text[3:]
    return None if text == body else text


def is_readable(body: bytes) -> bool:
    """True if a pass over this JSON text takes less than 100 ms."""
    return len(body) <= _ALWAYS_READ_BYTES or not has_more(body, _MARKS, _MAX_MARKS)


def has_more(body: bytes, marks: Sequence[bytes], limit: int) -> bool:
    """True if a body contains more than `limit` of these characters."""
    if len(body) <= limit:
        return False
    found = 0
    for start in range(0, len(body), _WINDOW_BYTES):
        end = start + _WINDOW_BYTES
        for mark in marks:
            # Most of a large body is base64, in which `find` is ten times as fast as `count`.
            if body.find(mark, start, end) >= 0:
                found += body.count(mark, start, end)
        if found > limit:
            return True
    return False


# In most text a search by `re` takes a quarter to a half of the time of bytes.find and bytes.count.
_UNICODE_ESCAPE = re.compile(rb"\\u")


def has_unicode_escapes(body: bytes) -> bool:
    """True if a name in this JSON text may be spelled with escapes: `"mod\\u0065l"`."""
    # A search for one byte first: many bodies have none.
    return b"\\" in body and _UNICODE_ESCAPE.search(body) is not None


def occurrences(mark: re.Pattern[bytes], body: bytes) -> int:
    """Return how often a body contains a mark; 2 stands for more."""
    first = mark.search(body)
    if first is None:
        return 0
    return 1 if mark.search(body, first.end()) is None else 2


def may_be_object(body: bytes) -> bool:
    """True for an object in any encoding that a lenient parser may accept as JSON."""
    return body.lstrip(_BEFORE_JSON).startswith(b"{")


def is_value(body: bytes) -> bool:
    """True if this is one JSON value of any type, and readable in bounded time."""
    if not is_readable(body):
        return False
    try:
        _skip(body)
    except UNREADABLE:
        return False
    return True


class Reader(Generic[T]):
    """Reads the fields of an object into a Struct whose fields are all Raw."""

    __slots__ = ("_decode", "_kind")

    def __init__(self, kind: type[T]) -> None:
        self._kind, self._decode = kind, msgspec.json.Decoder(kind).decode

    def read(self, body: bytes) -> T | None:
        """Return the fields, of a repeated name the last; None if this is no readable object."""
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
    """Decode a field; None if it is absent, null, malformed or larger than MAX_FIELD_BYTES."""
    if raw is ABSENT or memoryview(raw).nbytes > MAX_FIELD_BYTES:
        return None
    try:
        return _decode(raw)
    except UNREADABLE:
        return None


def text(raw: msgspec.Raw) -> str | None:
    """Decode a string of up to MAX_TEXT_BYTES; None if it is anything else."""
    if raw is ABSENT or memoryview(raw).nbytes > MAX_TEXT_BYTES:
        return None
    try:
        return _decode_text(raw)
    except UNREADABLE:
        return None


def field(within: Text, *path: str) -> msgspec.Raw:
    """Return the field at a path of names; ABSENT if it is missing."""
    found: Text = within
    for name in path:
        try:
            found = _only(name)(found).value
        except UNREADABLE:
            return ABSENT
    return found if isinstance(found, msgspec.Raw) else ABSENT


@cache
def _only(name: str) -> Any:
    """Return a decoder for one field. Names come from the relay's code, so the cache is small."""
    wanted = msgspec.defstruct("Only", [("value", msgspec.Raw, ABSENT)], rename={"value": name})
    return msgspec.json.Decoder(wanted).decode


# A key without escapes, as nearly all are. `re` is slow at long whitespace, so it is bounded: no
# client writes more.
_SPACE = rb"[ \t\n\r]{0,4096}+"
_OPENS = re.compile(_SPACE + rb"\{" + _SPACE)
_OPENS_ARRAY = re.compile(_SPACE + rb"\[" + _SPACE)
_KEY = re.compile(rb'"([^"\\\x00-\x1f\x80-\xff]{0,256})"' + _SPACE + b":" + _SPACE)
_COLON = re.compile(b":" + _SPACE)
_BLANK = re.compile(_SPACE)
_BEHIND = re.compile(r"JSON is malformed: trailing characters \(byte (\d+)\)")


class Span(NamedTuple):
    """A field of an object: its name, and the start and end of its value in the text."""

    name: str
    start: int
    end: int


def pairs(body: bytes) -> list[tuple[str, msgspec.Raw]] | None:
    """Return names and values in order, with repeated names; None if the object is unreadable or
    has more than 10,000 fields.
    """
    found, view = spans(body), memoryview(body)
    return None if found is None else [(n, msgspec.Raw(view[start:end])) for n, start, end in found]


def spans(body: bytes) -> list[Span] | None:
    """Return names and positions of values, like `pairs`.

    Each byte is read once, and only names are built. An object that only lenient parsers accept is
    read again, up to 4 MiB: making it strict takes 10 ns a byte.
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
    """`text` is `body`, or `body` made strict: names may differ, positions do not."""
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
    """Return the start and end of each value of an array: the first 10,000 that are readable."""
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
    """Return the name that starts at `at`, and the start of its value."""
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
    """Return the position of the next character after the JSON value at `at` and whitespace; None
    if there is no value, or no character after it. msgspec skips values in C, but reports only in
    an error message where it stopped (decision 0006).
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
    """Return the end of a value without trailing whitespace."""
    if view[end - 1] not in b" \t\n\r":
        return end
    return start + len(bytes(view[start:end]).rstrip(b" \t\n\r"))


def _blank(body: bytes, at: int) -> int:
    """Return the position after the whitespace at `at`."""
    blank = _BLANK.match(body, at)
    return blank.end() if blank is not None else at
