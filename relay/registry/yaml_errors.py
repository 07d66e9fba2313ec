"""Explain PyYAML's errors: what is wrong in a line, and how to write it.

Owns the messages, their places, and the masked excerpt of a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import yaml

from relay.registry.problems import Place, place_behind

_SHOWN_CHARACTERS = 100
_BEFORE_COLUMN = 60


@dataclass(frozen=True, slots=True)
class _Seen:
    """One of PyYAML's errors, with the lines of the file."""

    lines: list[str]
    problem: str
    context: str
    at: Place
    began: Place
    """The beginning of the construct that could not be parsed."""

    @property
    def line(self) -> str:
        return self.line_at(self.at[0])

    @property
    def before(self) -> str:
        return self.line[: self.at[1] - 1]

    @property
    def first(self) -> str:
        """The character at the error; empty at the end of a line."""
        return self.line[self.at[1] - 1 : self.at[1]]

    @property
    def opening(self) -> str:
        """The first character of the construct that could not be parsed."""
        return self.line_at(self.began[0])[self.began[1] - 1 : self.began[1]]

    def line_at(self, number: int) -> str:
        return self.lines[number - 1] if 0 < number <= len(self.lines) else ""


_Explanation = tuple[Place, str]
_BLANKS = re.compile(r"\s*")
_KEY_WITHOUT_SPACE = re.compile(r"\s*(?:- )?([A-Za-z0-9_.-]{1,64}):[^\s:/]")
_QUOTE_BEFORE = re.compile(r"([\"'])\s*\Z")
_BRACE_BEFORE = re.compile(r"[}\]]\S*\s*\Z")


def explain(error: yaml.YAMLError, text: str) -> tuple[Place, str]:
    """Return the place and the message of an error."""
    lines = text.splitlines()
    if isinstance(error, yaml.reader.ReaderError):
        return _control_character(error, text)
    if not isinstance(error, yaml.MarkedYAMLError):
        return (1, 1), "is not valid YAML"
    mark = error.problem_mark or error.context_mark
    began = error.context_mark or mark
    seen = _Seen(
        lines, error.problem or "", error.context or "",
        (mark.line + 1, mark.column + 1) if mark else (1, 1),
        (began.line + 1, began.column + 1) if began else (1, 1),
    )  # fmt: skip
    for pattern, words in _WORDS:
        if re.match(pattern, f"{seen.context}|{seen.problem}", re.DOTALL):
            return words(seen)
    return seen.at, f"is not valid YAML: {seen.problem}"


def _control_character(error: yaml.reader.ReaderError, text: str) -> _Explanation:
    place = place_behind(text[: error.position])
    code = error.character if isinstance(error.character, int) else ord(error.character[0])
    return place, f"there is a control character (U+{code:04X}) here; remove it"


def _tab(seen: _Seen) -> _Explanation:
    if seen.before.strip():
        return seen.at, "there is a tab here; use spaces"
    return seen.at, "the line is indented with a tab; YAML allows only spaces"


def _unclosed_brace(seen: _Seen) -> _Explanation:
    return seen.began, f"the {seen.opening} that begins here is not closed"


def _within_braces(seen: _Seen) -> _Explanation:
    if seen.before.endswith("$") and seen.first == "{":
        place = seen.at[0], seen.at[1] - 1
        return place, 'between { } or [ ] a ${NAME} needs quotes: "${NAME}"'
    if seen.at[0] != seen.began[0]:
        return _unclosed_brace(seen)
    return seen.at, "a comma is missing before this, or a value with , : { } [ ] needs quotes"


def _second_colon(seen: _Seen) -> _Explanation:
    for number in (seen.at[0] - 1, seen.at[0]):
        line = seen.line_at(number)
        if found := _KEY_WITHOUT_SPACE.match(line):
            place = number, found.end(1) + 1
            return place, f"a space is missing after `{found[1]}:`"
    indent = _indent(seen.line)
    above = seen.line_at(seen.at[0] - 1)
    if ":" not in seen.before and indent > _indent(above) and ":" in above:
        place = seen.at[0], indent + 1
        return place, (
            "the line is indented deeper than the one above, which has a value already:"
            " both are keys of one mapping, so indent them alike"
        )
    if ":" not in seen.before and above.strip() and ":" not in above:
        return (seen.at[0] - 1, _indent(above) + 1), "a colon is missing after this key"
    return seen.at, "a second `: ` in one line; if it belongs to the value, put the value in quotes"


def _indent(line: str) -> int:
    found = _BLANKS.match(line)
    return found.end() if found else 0


def _missing_colon(seen: _Seen) -> _Explanation:
    line = seen.line_at(seen.began[0])
    if found := _KEY_WITHOUT_SPACE.match(line):
        return (seen.began[0], found.end(1) + 1), f"a space is missing after `{found[1]}:`"
    if line.lstrip().startswith("-"):
        return seen.began, "a space is missing after the -"
    return seen.began, "a colon is missing after this key, or the line above is not finished"


def _not_beside(seen: _Seen) -> _Explanation:
    """Explain text that does not fit the other lines of its mapping or list."""
    if _QUOTE_BEFORE.search(seen.before):
        return seen.at, (
            "text follows a closing quote: an earlier quote is not closed, or the value contains"
            " quotes; within '…' a quote is written twice"
        )
    if _BRACE_BEFORE.search(seen.before):
        return seen.at, (
            "text follows a closing } or ]; put a value that begins with { or [ in quotes"
        )
    if seen.first in ("}", "]"):
        return seen.at, f"this {seen.first} closes nothing"
    if "'-'" in seen.problem or "'?'" in seen.problem:
        return seen.at, (
            "a list (`- item`) and a mapping (`key: value`) have the same indentation;"
            " indent one of them differently"
        )
    return seen.at, (
        "the line's indentation matches no line above; keys of one mapping are indented alike"
    )


def _content(seen: _Seen) -> _Explanation:
    if seen.first == ",":
        return seen.at, "a value is missing before this comma"
    return seen.at, f"this {seen.first} closes nothing; put a value that begins with it in quotes"


_NO_ESCAPE = (
    "within double quotes \\ begins an escape, and this is none:"
    " write \\\\ for a backslash, or use single quotes"
)
_LIST_BEHIND_KEY = (
    "a list cannot begin on the line of its key; put `- item` on the next line, or write [item]"
)
_DIRECTIVE = "a line that begins with % is a directive, which is not supported; remove it"
_WORDS: tuple[tuple[str, Callable[[_Seen], _Explanation]], ...] = (
    (r".*\|found character '\\t'", _tab),
    (r".*\|found character '\\ufeff'", lambda seen: (seen.at, "there is a byte order mark here")),
    (
        r".*\|found character",
        lambda seen: (seen.at, f"a value cannot begin with {seen.first}; put it in quotes"),
    ),
    (
        r"while scanning a quoted scalar\|",
        lambda seen: (seen.began, "the quote that begins here is not closed"),
    ),
    (r"while scanning a double-quoted scalar\|", lambda seen: (seen.at, _NO_ESCAPE)),
    (r"while parsing a flow (?:mapping|sequence)\|.*'<stream end>'", _unclosed_brace),
    (r"while parsing a flow (?:mapping|sequence)\|expected ','", _within_braces),
    (r".*\|mapping values are not allowed", _second_colon),
    (r".*\|could not find expected ':'", _missing_colon),
    (r"while parsing a block (?:mapping|collection)\|expected <block end>", _not_beside),
    (r".*\|expected the node content, but found '<stream end>'", _unclosed_brace),
    (r".*\|expected the node content", _content),
    (r".*\|sequence entries are not allowed", lambda seen: (seen.at, _LIST_BEHIND_KEY)),
    (
        r"while scanning (?:an alias|an anchor|a block scalar)\|",
        lambda seen: (seen.began, f"a value that begins with {seen.opening} needs quotes"),
    ),
    (
        r"\|(?:found incompatible YAML|expected '<document start>')|while scanning a directive\|",
        lambda seen: (seen.at, _DIRECTIVE),
    ),
)
"""Patterns of `context|problem` to explanations; the first match is used."""


_REFERENCE = r"\$\{[A-Za-z_][^}\s]{0,200}\}"
_KEY = r"[A-Za-z0-9_-]+[\"']?:(?=\s|\Z)"
_MAY_BE_SECRET = re.compile(rf"({_REFERENCE}|{_KEY})|(?<=://)[^/@\s]*@|[A-Za-z0-9_~+=-]{{8,}}")
_IN_SECRET = re.compile(rf"({_REFERENCE}|{_KEY}|(?:Bearer|Key|Token)\b)|[^\s{{}}\[\],\"'#]+")
_SECRET_KEY = re.compile(
    r"(?:auth|value|key|token|secret|password|url|database|headers)\w*[\"']?:(?=\s)", re.IGNORECASE
)


def excerpt(line: str, column: int) -> tuple[str, str]:
    """Return a line of the file, with possible secrets as asterisks, and a caret under `column`."""
    shown = _masked(line)
    start = max(0, column - 1 - _BEFORE_COLUMN) if len(shown) > _SHOWN_CHARACTERS else 0
    shown = shown[start : start + _SHOWN_CHARACTERS]
    shown = "".join(each if each.isprintable() else " " for each in shown)
    return shown, " " * min(column - 1 - start, len(shown)) + "^"


def _masked(line: str) -> str:
    """Mask every word after the key of a secret, and every long word with a digit."""
    telling = _SECRET_KEY.search(line)
    cut = telling.end() if telling else len(line)
    return _MAY_BE_SECRET.sub(_mask_mixed, line[:cut]) + _IN_SECRET.sub(_mask, line[cut:])


def _mask(found: re.Match[str]) -> str:
    return found[0] if found[1] else "*" * len(found[0])


def _mask_mixed(found: re.Match[str]) -> str:
    text = found[0]
    mixed = any(each.isdigit() for each in text) and any(each.isalpha() for each in text)
    return _mask(found) if mixed or text.endswith("@") else text
