"""The JSON documents of a response, found while its bytes stream: one object, an array of objects,
or an object a line.

Owns: where a document begins and ends, and the fields that a wire format wants of it, each as its
raw JSON. A field is wanted by its place, such as `response.usage`: what stands anywhere else (a
tool's arguments, an echoed schema, text) is skipped. What the fields mean is the formats' business.

The result never depends on how the bytes are cut; memory is bounded; the work on a chunk is
proportional to its size.

"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from relay.core.fields import MAX_FIELD_BYTES, UNREADABLE, is_readable

Document = Mapping[str, bytes]
"""Raw JSON of the wanted fields, by their place: `usage`, `response.usage`; empty of a field that
is longer than MAX_FIELD_BYTES."""

_MAX_KEY_BYTES = 256


Tree = dict[str, Any]
"""Wanted names, each with the Tree of what is wanted within it; an empty one wants it itself."""


class Wanted:
    """Which fields a format wants, as dotted places."""

    __slots__ = ("_level", "tree")

    def __init__(self, *places: str) -> None:
        self.tree: Tree = {}
        for place in places:
            tree = self.tree
            for name in place.split("."):
                tree = tree.setdefault(name, {})
        self._level = _Level(self.tree)

    def of(self, text: bytes) -> Document:
        """The wanted fields of a whole document; none of what is not a JSON object."""
        found: dict[str, bytes] = {}
        if is_readable(text):
            self._level.read(text, "", found)
        return found


_ABSENT = msgspec.Raw()


class _Level:
    """Decodes the wanted fields of one object; every other is skipped without being built."""

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


def _passed_over(levels: int) -> bytes:
    """A pattern for anything that leaves no bracket open, of so many levels."""
    inner = rb"|[\[{]" + _passed_over(levels - 1) + rb"[\]}]" if levels else b""
    return rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+"' + inner + rb")*+"


_BALANCED = re.compile(_passed_over(3), re.DOTALL)
"""Most of a JSON text goes by in one match; each level may read the end of a piece once more."""
_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_SCALAR = re.compile(rb'[^ \t\r\n"\[\]{}:,]++')
_QUOTE, _COMMA, _COLON = b'",:'
_OPEN, _CLOSE = frozenset(b"[{"), frozenset(b"]}")
_FREE_STEPS, _BYTES_A_STEP = 4096, 8
"""A scan may take so many steps in Python for a piece. JSON that needs more (nothing but brackets)
comes from nobody who reports usage: it is given up, for it would block the loop."""


class Scanner:
    """Finds the wanted fields of documents that come in pieces.

    A document is an object at the top, or in an array at the top; any number may follow each
    other. Only the part of a wanted field that is here already is held.
    """

    __slots__ = (
        "_deep", "_expects", "_fields", "_held", "_in_array", "_in_text", "_key", "_levels",
        "_take", "_take_bytes", "_tree", "gave_up",
    )  # fmt: skip

    def __init__(self, wanted: Wanted) -> None:
        self._tree = wanted.tree
        self._in_array = False
        """The documents stand in an array."""
        self._levels: list[tuple[str, Tree]] = []
        """The objects that are open and looked into: the place of each, and what it may hold."""
        self._expects = "value"
        self._key: str | None = None
        self._deep = 0
        """Brackets open within a value that is passed over or taken."""
        self._in_text = False
        self._take: list[bytes] | None = None
        self._take_bytes = 0
        self._held = b""
        self._fields: dict[str, bytes] = {}
        self.gave_up = False
        """It took too many steps: nothing more is read."""

    def feed(self, piece: bytes) -> Sequence[Document]:
        """The documents that this piece completes."""
        text = self._held + piece if self._held else piece
        self._held = b""
        documents: list[Document] = []
        at = len(text) if self.gave_up else 0
        steps = _FREE_STEPS + len(piece) // _BYTES_A_STEP
        while 0 <= at < len(text):
            steps -= 1
            if steps < 0:
                self.gave_up, self._fields = True, {}
                break
            if self._in_text:
                at = self._text(text, at)
            elif self._deep:
                at = self._within(text, at)
            else:
                at = self._token(text, at, documents)
        return documents

    def _text(self, text: bytes, at: int) -> int:
        end = _end_of_text(text, at)
        if end == len(text) or text[end] != _QUOTE:
            self._record(text[at:end])
            self._held = text[end:]  # nothing, or a backslash whose character is not here yet
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
        """One token where keys and their values stand."""
        space = _SPACE.match(text, at)
        assert space is not None
        at = space.end()
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
            found = _STRING.match(text, at)
            if found is None and len(text) - at <= _MAX_KEY_BYTES:
                self._held = text[at:]
                return -1
            if found is not None:
                self._key = _key(found[0])
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
        """The level that an object here opens; None if nothing in it is wanted."""
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
        """Record the value that begins here, if it is wanted."""
        self._take = [] if self._place() is not None else None
        self._take_bytes = 0

    def _place(self) -> str | None:
        """The wanted place of the key that stands here; None if it is not wanted."""
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


def _end_of_text(text: bytes, at: int) -> int:
    """Where the quote stands that ends the text of a string; if it is not here, behind all that is
    here, but for a backslash whose character is not.
    """
    quote = text.find(b'"', at)
    end = quote if quote >= 0 else len(text)
    if text.find(b"\\", at, end) < 0:
        return end
    found = _REST_OF_STRING.match(text, at)
    assert found is not None
    return found.end()


def _key(text: bytes) -> str | None:
    """A key as text; None of one that cannot be wanted."""
    if len(text) > _MAX_KEY_BYTES:
        return None
    if b"\\" not in text:
        return text[1:-1].decode("utf-8", "replace")
    try:
        found: str = msgspec.json.decode(text, type=str)
    except UNREADABLE:
        return None
    return found
