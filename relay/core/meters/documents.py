"""Find fields in the JSON documents of a response while it streams: one object, an array of
objects, or lines with an object each.

Owns the start and end of documents, and the fields that a wire format wants, as raw JSON. A field
is wanted at a path such as `response.usage`: the same name anywhere else (in a tool's arguments, an
echoed schema, a text) is skipped. The readers of the formats interpret the fields.

The result does not depend on chunk boundaries, memory is bounded, and the work for a chunk is
proportional to its size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from relay.core.fields import MAX_FIELD_BYTES, STRING, STRING_TEXT, UNREADABLE, is_readable

Document = Mapping[str, bytes]
"""Path of each wanted field, such as `usage` or `response.usage`, to its raw JSON, which is empty
for a field that is longer than MAX_FIELD_BYTES."""

_MAX_KEY_BYTES = 256


Tree = dict[str, Any]
"""Wanted names, each with the Tree of the names in it; an empty Tree wants the field itself."""


class Wanted:
    """The fields that a format wants, as dotted paths."""

    __slots__ = ("_level", "tree")

    def __init__(self, *places: str) -> None:
        self.tree: Tree = {}
        for place in places:
            tree = self.tree
            for name in place.split("."):
                tree = tree.setdefault(name, {})
        self._level = _Level(self.tree)

    def of(self, text: bytes) -> Document:
        """Return the wanted fields of a complete document; empty if it is no JSON object."""
        found: dict[str, bytes] = {}
        if is_readable(text):
            self._level.read(text, "", found)
        return found


_ABSENT = msgspec.Raw()


class _Level:
    """Decodes the wanted fields of one object; others are skipped without building them."""

    __slots__ = ("_decode", "_inner", "_names")

    def __init__(self, tree: Tree) -> None:
        self._names = tuple(tree)
        self._inner = {name: _Level(inner) for name, inner in tree.items() if inner}
        fields = [(f"f{at}", msgspec.Raw, _ABSENT) for at in range(len(tree))]
        rename = {f"f{at}": name for at, name in enumerate(tree)}
        self._decode = msgspec.json.Decoder(
            msgspec.defstruct("Fields", fields, rename=rename)
        ).decode

    def read(self, text: bytes, prefix: str, found: dict[str, bytes]) -> None:
        try:
            values = msgspec.structs.astuple(self._decode(text))
        except UNREADABLE:
            return
        for name, value in zip(self._names, values, strict=True):
            if value is _ABSENT:
                continue
            raw = bytes(value)
            if name in self._inner:
                self._inner[name].read(raw, f"{prefix}{name}.", found)
            else:
                found[prefix + name] = raw if len(raw) <= MAX_FIELD_BYTES else b""


def _balanced(levels: int) -> bytes:
    """Return a pattern for JSON text without open brackets, nested up to `levels`."""
    inner = rb"|[\[{]" + _balanced(levels - 1) + rb"[\]}]" if levels else b""
    return rb'(?>[^"\[\]{}]++|' + STRING + inner + rb")*+"


_BALANCED = re.compile(_balanced(3), re.DOTALL)
"""Skips most of a JSON text in one match; each level may read the end of a chunk once more."""
_REST_OF_STRING = re.compile(STRING_TEXT, re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*+")
_KEY = re.compile(rb"(" + STRING + rb")(?>[ \t\r\n]*+:)?+", re.DOTALL)
_SCALAR = re.compile(rb'[^ \t\r\n"\[\]{}:,]++')
_QUOTE, _COMMA, _COLON = b'",:'
_OPEN, _CLOSE = frozenset(b"[{"), frozenset(b"]}")
_BYTES_A_STEP, _SPARE_BYTES, _FREE_BYTES = 3, 12_288, 192
"""Limit of the steps in Python: one for three bytes, which members with names and values never
need, however the text is cut into chunks. JSON that needs more has almost only brackets, and no
usage: the scan stops, because it would block the event loop. Beyond that limit, dense parts may use
up what the parts before them have left, up to _SPARE_BYTES, and a chunk as much as _FREE_BYTES more
would need, since each chunk begins with a step of its own."""


class Scanner:
    """Finds the wanted fields of documents in chunks.

    A document is an object at the top level, or in an array at the top level; any number may follow
    each other. Only the received part of a wanted field is buffered.
    """

    __slots__ = (
        "_deep", "_expects", "_fields", "_held", "_in_array", "_in_text", "_key", "_levels",
        "_spare_bytes", "_take", "_take_bytes", "_tree", "gave_up",
    )  # fmt: skip

    def __init__(self, wanted: Wanted) -> None:
        self._tree = wanted.tree
        self._in_array = False
        """True if the documents are items of an array."""
        self._levels: list[tuple[str, Tree]] = []
        """The open objects that may have wanted fields: the path and Tree of each."""
        self._expects = "value"
        self._key: str | None = None
        self._deep = 0
        """Number of open brackets in the value that is skipped or recorded."""
        self._in_text = False
        self._take: list[bytes] | None = None
        self._take_bytes = 0
        self._held = b""
        self._fields: dict[str, bytes] = {}
        self._spare_bytes = _SPARE_BYTES
        """Bytes of earlier chunks that no step has used up."""
        self.gave_up = False
        """True after too many steps: nothing more is read."""

    def feed(self, piece: bytes) -> Sequence[Document]:
        """Return the documents that this chunk completes."""
        text = self._held + piece if self._held else piece
        self._held = b""
        documents: list[Document] = []
        at = len(text) if self.gave_up else 0
        left = self._spare_bytes + len(piece) + _FREE_BYTES
        while 0 <= at < len(text):
            left -= _BYTES_A_STEP
            if left < 0:
                self.gave_up, self._fields = True, {}
                break
            if self._in_text:
                at = self._text(text, at)
            elif self._deep:
                at = self._within(text, at)
            else:
                at = self._token(text, at, documents)
        self._spare_bytes = min(max(left - _FREE_BYTES, 0), _SPARE_BYTES)
        return documents

    def _text(self, text: bytes, at: int) -> int:
        end = _end_of_text(text, at)
        if end == len(text) or text[end] != _QUOTE:
            self._record(text[at:end])
            self._held = text[end:]  # empty, or a backslash whose character follows
            return -1
        self._record(text[at : end + 1])
        self._in_text = False
        self._ends_scalar()
        return end + 1

    def _within(self, text: bytes, at: int) -> int:
        found = _BALANCED.match(text, at)
        assert found is not None
        end = found.end()
        if end == len(text):
            self._record(text[at:end])
            return end
        byte = text[end]
        self._record(text[at : end + 1])
        if byte == _QUOTE:
            self._in_text = True
        elif byte in _OPEN:
            self._deep += 1
        else:
            self._deep -= 1
            self._ends_scalar()
        return end + 1

    def _token(self, text: bytes, at: int, documents: list[Document]) -> int:
        """Read one token outside strings and skipped values, with the comma before it."""
        at = _after_space(text, at)
        if text[at : at + 1] == b",":
            self._expects = "key" if self._levels else "value"
            at = _after_space(text, at + 1)
        if at == len(text):
            return at
        byte = text[at]
        if byte == _QUOTE:
            return self._string(text, at)
        if byte in _OPEN:
            self._opens(byte)
            return at + 1
        if byte in _CLOSE:
            self._closes(documents)
            return at + 1
        if byte in (_COMMA, _COLON):
            self._expects = "key" if byte == _COMMA and self._levels else "value"
            return at + 1
        scalar = _SCALAR.match(text, at)
        assert scalar is not None
        if scalar.end() == len(text) and len(text) - at <= _MAX_KEY_BYTES:
            self._held = text[at:]
            return -1
        self._begin_value()
        self._record(scalar[0])
        self._end_value()
        return scalar.end()

    def _string(self, text: bytes, at: int) -> int:
        if self._expects == "key":
            found = _KEY.match(text, at)
            if found is None and len(text) - at <= _MAX_KEY_BYTES:
                self._held = text[at:]
                return -1
            if found is not None:
                self._key = _key(found[1])
                if found.end() > found.end(1):
                    self._expects = "value"
                return found.end()
            self._key = None
        else:
            self._begin_value()
        self._record(text[at : at + 1])
        self._in_text = True
        return at + 1

    def _opens(self, byte: int) -> None:
        if byte == _OPEN_ARRAY and not self._levels and not self._in_array:
            self._in_array = True
            return
        inner = self._level_of() if byte != _OPEN_ARRAY else None
        if inner is not None:
            self._levels.append(inner)
            self._key, self._expects = None, "key"
            return
        self._begin_value()
        self._record(bytes((byte,)))
        self._deep = 1

    def _level_of(self) -> tuple[str, Tree] | None:
        """Return path and Tree of an object that starts here; None if nothing in it is wanted."""
        if not self._levels:
            return "", self._tree
        place, tree = self._levels[-1]
        if self._key is None or not (inner := tree.get(self._key)):
            return None
        return f"{place}{self._key}.", inner

    def _closes(self, documents: list[Document]) -> None:
        if not self._levels:
            self._in_array = False
            return
        self._levels.pop()
        self._key, self._expects = None, "comma"
        if not self._levels:
            documents.append(self._fields)
            self._fields, self._expects = {}, "value"

    def _begin_value(self) -> None:
        """Start to record the value that begins here, if it is wanted."""
        self._take = [] if self._place() is not None else None
        self._take_bytes = 0

    def _place(self) -> str | None:
        """Return the path of the current key if its value is wanted, otherwise None."""
        if self._key is None or not self._levels:
            return None
        place, tree = self._levels[-1]
        return place + self._key if tree.get(self._key) == {} else None

    def _record(self, part: bytes) -> None:
        if self._take is None:
            return
        self._take_bytes += len(part)
        if self._take_bytes > MAX_FIELD_BYTES:
            self._take = None
        else:
            self._take.append(part)

    def _ends_scalar(self) -> None:
        if not self._deep and not self._in_text:
            self._end_value()

    def _end_value(self) -> None:
        if self._expects == "key":
            return  # a key too long to be wanted
        place = self._place()
        if place is not None:
            self._fields[place] = b"".join(self._take) if self._take is not None else b""
        self._key, self._take, self._expects = None, None, "comma"


_OPEN_ARRAY = b"["[0]


def _after_space(text: bytes, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


def _end_of_text(text: bytes, at: int) -> int:
    """Return the position of the quote that ends a string. If the text has no such quote, return
    its end, without a backslash whose character is missing.
    """
    quote = text.find(b'"', at)
    end = quote if quote >= 0 else len(text)
    if text.find(b"\\", at, end) < 0:
        return end
    found = _REST_OF_STRING.match(text, at)
    assert found is not None
    return found.end()


def _key(text: bytes) -> str | None:
    """Decode a key; None for a key that cannot be wanted."""
    if len(text) > _MAX_KEY_BYTES:
        return None
    if b"\\" not in text:
        return text[1:-1].decode("utf-8", "replace")
    try:
        found: str = msgspec.json.decode(text, type=str)
    except UNREADABLE:
        return None
    return found
