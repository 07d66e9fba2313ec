"""Change single values in the text of a JSON file, and leave all other bytes as they are.

Owns JSON with comments and trailing commas: opencode and Gemini CLI accept both in their settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_MAX_DEPTH = 100
_TOKEN = re.compile(
    r"(?P<skip>[ \t\r\n]+|//[^\n]*|/\*.*?\*/)"
    r'|(?P<text>"(?:[^"\\\x00-\x1f]|\\.)*")'
    r"|(?P<mark>[{}\[\],:])"
    r"|(?P<word>[-+.\w]+)",
    re.DOTALL,
)
_REST_OF_LINE = re.compile(r"[ \t]*(?://[^\n]*|/\*[^\n]*?\*/)?[ \t]*(?=\r?\n)")


class NotJson(ValueError):
    """The text is not an object of JSON; `line` says where it ends to be one."""

    def __init__(self, line: int) -> None:
        super().__init__(f"line {line} is not JSON")


class _Token(NamedTuple):
    text: str
    start: int
    end: int


@dataclass(slots=True)
class _Node:
    """A value and its place in the text."""

    value: Any
    start: int
    end: int
    members: list[_Member] | None = None
    """The members of an object; None for any other value."""


@dataclass(slots=True)
class _Member:
    name: str
    start: int
    node: _Node
    comma: int | None = None
    """The place of the comma that follows."""


@dataclass(slots=True)
class _Parser:
    text: str
    tokens: list[_Token] = field(default_factory=list)
    at: int = 0

    def parse(self) -> _Node:
        place = 0
        while place < len(self.text):
            found = _TOKEN.match(self.text, place)
            if found is None:
                raise self._error(place)
            if found.lastgroup != "skip":
                self.tokens.append(_Token(found[0], found.start(), found.end()))
            place = found.end()
        node = self._value(0)
        if node.members is None or self.at < len(self.tokens):
            raise self._error(self.tokens[min(self.at, len(self.tokens) - 1)].start)
        return node

    def _error(self, place: int) -> NotJson:
        return NotJson(self.text.count("\n", 0, place) + 1)

    def _next(self) -> _Token:
        if self.at == len(self.tokens):
            raise self._error(len(self.text))
        self.at += 1
        return self.tokens[self.at - 1]

    def _value(self, depth: int) -> _Node:
        token = self._next()
        if depth > _MAX_DEPTH:
            raise self._error(token.start)
        if token.text == "{":
            return self._object(token, depth)
        if token.text == "[":
            return self._array(token, depth)
        try:
            return _Node(json.loads(token.text), token.start, token.end)
        except ValueError:
            raise self._error(token.start) from None

    def _object(self, opening: _Token, depth: int) -> _Node:
        members: list[_Member] = []
        while (token := self._next()).text != "}":
            if (members and members[-1].comma is None) or not token.text.startswith('"'):
                raise self._error(token.start)
            if self._next().text != ":":
                raise self._error(token.start)
            name = _Node(None, token.start, token.end)
            try:
                name.value = json.loads(token.text)
            except ValueError:
                raise self._error(token.start) from None
            member = _Member(name.value, token.start, self._value(depth + 1))
            members.append(member)
            member.comma = self._comma()
        value = {member.name: member.node.value for member in members}
        return _Node(value, opening.start, token.end, members)

    def _array(self, opening: _Token, depth: int) -> _Node:
        values: list[Any] = []
        comma: int | None = 0
        while self.at < len(self.tokens) and self.tokens[self.at].text != "]":
            if comma is None:
                raise self._error(self.tokens[self.at].start)
            values.append(self._value(depth + 1).value)
            comma = self._comma()
        return _Node(values, opening.start, self._next().end)

    def _comma(self) -> int | None:
        if self.at < len(self.tokens) and self.tokens[self.at].text == ",":
            return self._next().start
        return None


def parse(text: str) -> dict[str, Any]:
    """Return the object in `text`; an empty text is an empty object. Raises NotJson."""
    value: dict[str, Any] = _Parser(text).parse().value if text.strip() else {}
    return value


def with_value(text: str, path: Sequence[str], value: Any) -> str:
    """Return `text` with `value` at `path`; objects on the way are made. Raises NotJson, and
    KeyError for a value on the way that is no object.
    """
    if not text.strip():
        text = "{}\n"
    node = _Parser(text).parse()
    for depth, name in enumerate(path):
        if node.members is None:
            raise KeyError(".".join(path[:depth]))
        found = _member(node, name)
        if found is None:
            return _inserted(text, node, path[depth:], value)
        node = found.node
    return text[: node.start] + json.dumps(value, ensure_ascii=False) + text[node.end :]


def without_value(text: str, path: Sequence[str]) -> str:
    """Return `text` without the member at `path`; unchanged if there is none. Raises NotJson."""
    node = _Parser(text).parse()
    for name in path[:-1]:
        found = _member(node, name)
        if found is None:
            return text
        node = found.node
    found = _member(node, path[-1])
    if found is None or node.members is None:
        return text
    start, end = found.start, found.node.end
    if found.comma is not None:
        end = found.comma + 1
    line = text.rfind("\n", 0, start) + 1
    rest = re.compile(r"[ \t]*\r?\n").match(text, end)
    if not text[line:start].strip() and rest is not None:
        start, end = line, rest.end()
    text = text[:start] + text[end:]
    index = node.members.index(found)
    if found.comma is None and index > 0 and (comma := node.members[index - 1].comma) is not None:
        text = text[:comma] + text[comma + 1 :]
    return text


def _member(node: _Node, name: str) -> _Member | None:
    """Return the member of an object that counts, which is the last one of its name."""
    members = node.members or ()
    return next((member for member in reversed(members) if member.name == name), None)


def _inserted(text: str, node: _Node, path: Sequence[str], value: Any) -> str:
    for name in reversed(path[1:]):
        value = {name: value}
    end_of_line = "\r\n" if "\r\n" in text else "\n"
    line = text.rfind("\n", 0, node.start) + 1
    outer = text[line : node.start]
    outer = outer[: len(outer) - len(outer.lstrip())]
    if not node.members:
        inner = outer + _indent(text)
        member = _written(path[0], value, inner, text)
        inside = text[node.start + 1 : node.end - 1].rstrip()  # a comment
        added = f"{{{inside}{end_of_line}{inner}{member}{end_of_line}{outer}}}"
        return text[: node.start] + added + text[node.end :]
    last = node.members[-1]
    at = last.node.end if last.comma is None else last.comma + 1
    line = text.rfind("\n", 0, last.start) + 1
    inner = text[line : last.start]
    if inner.strip() or line <= node.start:
        separator = " "
        inner = outer
    else:
        separator = end_of_line + inner
    member = _written(path[0], value, inner, text)
    rest = _REST_OF_LINE.match(text, at)
    after = rest.end() if rest is not None and separator != " " else at
    comma = "," if last.comma is None else ""
    return text[:at] + comma + text[at:after] + separator + member + text[after:]


def _indent(text: str) -> str:
    """The indentation of the file's first member that has a line of its own."""
    found = re.search(r'^([ \t]+)"', text, re.MULTILINE)
    return found[1] if found is not None else "  "


def _written(name: str, value: Any, indent: str, text: str) -> str:
    step = _indent(text)
    written = json.dumps(value, ensure_ascii=False, indent=step).replace("\n", "\n" + indent)
    if "\r\n" in text:
        written = written.replace("\n", "\r\n")
    return f"{json.dumps(name, ensure_ascii=False)}: {written}"
