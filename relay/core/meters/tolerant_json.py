"""Decode typed fields from JSON of any content: a field of the wrong type is omitted and counted,
and the others are still decoded.

Owns this decoder, and the bounded types of the fields in the formats' structs.
"""

from __future__ import annotations

from decimal import Decimal
from types import NoneType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_type_hints

import msgspec

from relay.core.fields import UNREADABLE

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
"""A number of tokens, characters or images; no call uses more."""
Seconds = Annotated[float, msgspec.Meta(ge=0, le=10_000_000)]
Money = Decimal
"""US dollars; bounded where it is used."""
_MAX_NAME = 256

T = TypeVar("T", bound=msgspec.Struct)
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_raw_items = msgspec.json.Decoder(list[msgspec.Raw]).decode


class IgnoredFields:
    """Counts the fields that were omitted."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Reader(Generic[T]):
    """Decodes one type of struct; never raises.

    If every field fits, it decodes once; otherwise it decodes field by field.
    """

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._decode = msgspec.json.Decoder(kind).decode
        self._tolerant = _Tolerant(kind)

    def __call__(self, text: bytes, ignored_fields: IgnoredFields) -> T:
        """Decode the fields that fit, and count the others in `ignored_fields`. null gives an empty
        struct.
        """
        try:
            return self._decode(text)
        except UNREADABLE:
            made: T | None = self._tolerant.read(text, ignored_fields)
            return self._kind() if made is None else made


class _Tolerant:
    """Decodes a struct field by field."""

    def __init__(self, kind: type[msgspec.Struct]) -> None:
        self._kind = kind
        hints = get_type_hints(kind, include_extras=True)
        names = zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True)
        self._fields = [(name, encoded, _part(hints[name])) for name, encoded in names]

    def read(self, text: bytes, ignored_fields: IgnoredFields) -> Any:
        """Decode a struct; None for null, or anything that is no object."""
        if text.strip() == b"null":
            return None
        try:
            given = _raw_fields(text)
        except UNREADABLE:
            ignored_fields.count += 1
            return None
        fitting: dict[str, Any] = {}
        for name, encoded, part in self._fields:
            if encoded in given:
                value = part.read(bytes(given[encoded]), ignored_fields)
                if value is not None:
                    fitting[name] = value
        return self._kind(**fitting)


class _Items:
    """Decodes a list of structs item by item."""

    def __init__(self, of: _Tolerant) -> None:
        self._of = of

    def read(self, text: bytes, ignored_fields: IgnoredFields) -> Any:
        try:
            items = [self._of.read(bytes(item), ignored_fields) for item in _raw_items(text)]
        except UNREADABLE:
            ignored_fields.count += 1
            return None
        return [item for item in items if item is not None]


class _Leaf:
    """Decodes a value without parts."""

    def __init__(self, kind: Any) -> None:
        self._decode = msgspec.json.Decoder(kind).decode

    def read(self, text: bytes, ignored_fields: IgnoredFields) -> Any:
        try:
            return self._decode(text)
        except UNREADABLE:
            ignored_fields.count += 1
            return None


def _part(hint: Any) -> _Tolerant | _Items | _Leaf:
    kinds = [each for each in get_args(hint) if each is not NoneType] or [hint]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return _Tolerant(kind) if len(kinds) == 1 else _Leaf(hint)
        inner = get_args(kind)
        if getattr(kind, "__origin__", None) is list and issubclass(inner[0], msgspec.Struct):
            return _Items(_Tolerant(inner[0]))
    return _Leaf(hint)


def text_of(raw: bytes | None) -> str | None:
    """Decode a short string, such as a name or an id; None for anything else."""
    if raw is None or len(raw) > 4 * _MAX_NAME:
        return None
    try:
        found: str = _text(raw)
    except UNREADABLE:
        return None
    return found if is_name(found) else None


def is_name(text: str) -> bool:
    """True if `text` is not empty, and short enough for a name."""
    return 0 < len(text) <= _MAX_NAME


_text = msgspec.json.Decoder(str).decode
_seconds = msgspec.json.Decoder(Seconds).decode


def milliseconds(raw: bytes | None, ignored_fields: IgnoredFields) -> int | None:
    """Decode seconds, a number or a string with one, into milliseconds; None for anything else."""
    if raw is None or raw == b"null":
        return None
    try:
        return round(_seconds(raw.strip(b'"')) * 1000)
    except UNREADABLE:
        ignored_fields.count += 1
        return None


def count_of(raw: bytes | None, ignored_fields: IgnoredFields) -> int | None:
    """Decode a count; None for anything else."""
    if raw is None:
        return None
    try:
        found: int | None = _count(raw)
    except UNREADABLE:
        ignored_fields.count += 1
        return None
    return found


_count = msgspec.json.Decoder(Count | None).decode
_MAX_USD = 1_000_000


def nano_usd(usd: Decimal | None) -> int | None:
    """Convert US dollars to billionths; None for an invalid amount (the price list applies)."""
    if usd is None or not usd.is_finite() or not 0 <= usd <= _MAX_USD:
        return None
    return round(usd * 10**9)
