"""Find the fields of a multipart/form-data body, and the positions of their values (RFC 7578).

Owns the parsing of parts and their names. It is strict, because a limit by model must see the same
fields as the provider: a form that parsers may read differently is not read at all.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TYPE = "multipart/form-data"
_MAX_PARTS = 1000
_MAX_HEAD_BYTES = 8 * 1024
_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"\\]{1,200})"|([^\s;,"]{1,200}))', re.IGNORECASE)
_AFTER_DELIMITER = re.compile(rb"[ \t]{0,64}\r\n")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*)", re.DOTALL)
_PARAMETER = re.compile(rb';[ \t]*([A-Za-z*]+)[ \t]*=[ \t]*(?:"((?>[^"\\]|\\.)*+)"|([^\s;"]*))')


class Field(NamedTuple):
    """A field, and the start and end of its value in the body."""

    name: bytes
    start: int
    end: int


def is_form(content_type: str) -> bool:
    """True for the media type of a form."""
    return content_type[: len(TYPE)].lower() == TYPE


def form_fields(body: bytes, content_type: str) -> list[Field] | None:
    """Return all fields in order, with files; None if the form is unreadable or ambiguous."""
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        return None
    delimiter = b"--" + (boundary[1] or boundary[2]).encode("latin-1", "replace")
    at = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    fields: list[Field] = []
    while at >= 0 and body.startswith(delimiter, at):
        at += len(delimiter)
        if body.startswith(b"--", at):
            return fields
        found = _field(body, at, b"\r\n" + delimiter)
        if found is None or len(fields) == _MAX_PARTS:
            return None
        fields.append(found)
        at = found.end + 2
    return None


def _field(body: bytes, at: int, end_mark: bytes) -> Field | None:
    """Read the part whose delimiter ends at `at`."""
    line = _AFTER_DELIMITER.match(body, at)
    if line is None:
        return None
    head_end = body.find(b"\r\n\r\n", line.end() - 2, line.end() + _MAX_HEAD_BYTES)
    if head_end < 0:
        return None
    name = _name(body[line.end() : head_end])
    end = body.find(end_mark, head_end + 2)
    start = head_end + 4
    return None if name is None or end < start else Field(name, start, end)


def _name(head: bytes) -> bytes | None:
    """Return the name of a field from the head of its part; None if it is missing or ambiguous."""
    names = []
    for line in head.split(b"\r\n"):
        header = _HEADER.fullmatch(line)
        if header is None or b"\n" in line or b"\r" in line:
            return None
        if header[1].lower() == b"content-transfer-encoding":
            return None
        if header[1].lower() == b"content-disposition":
            parameters = _PARAMETER.findall(header[2])
            names += [quoted or bare for key, quoted, bare in parameters if key.lower() == b"name"]
            if any(key.lower() == b"name*" for key, _, _ in parameters):
                return None
    return names[0] if len(names) == 1 and b"\\" not in names[0] else None
