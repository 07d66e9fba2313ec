"""YAML read strictly, with the place of every key and value remembered.

Owns: the file's size, syntax, aliases, duplicate keys, plain types. Knows nothing of what the keys
mean. Strings stay strings: `on`, `no`, `1e3` and dates are text here, as in YAML 1.2's core schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_FILE_BYTES = 1024 * 1024
MAX_DEPTH = 32

Where = tuple[str | int, ...]
"""A path into the document: `("providers", "openai", "base_url")`."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the configuration. Lines and columns count from 1."""

    file: str
    line: int
    column: int
    where: Where
    message: str

    def __str__(self) -> str:
        path = ".".join(map(str, self.where))
        return f"{self.file}:{self.line}:{self.column}: {path + ': ' if path else ''}{self.message}"


@dataclass(slots=True)
class Document:
    """A file's data and where each part of it stands."""

    file: str
    data: Any = None
    marks: dict[Where, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def complain(self, where: Where, message: str) -> None:
        """Add a problem at `where`, or at the nearest place above it that the file has."""
        known = where
        while known and known not in self.marks:
            known = known[:-1]
        line, column = self.marks.get(known, (1, 1))
        problem = Problem(self.file, line, column, where, message)
        if problem not in self.problems:
            self.problems.append(problem)


class _Loader(yaml.SafeLoader):
    """SafeLoader whose plain scalars are null, true/false, numbers, or text."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.endswith((":null", ":int", ":float", ":merge"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_BOOLEANS: Mapping[str, bool] = {"true": True, "True": True, "false": False, "False": False}


def read(path: Path, shown: str) -> Document:
    """Parse the file at `path`; problems are collected under the name `shown`, never raised."""
    document = Document(shown)
    text = _text(path, document)
    if text is None:
        return document
    try:
        node = _compose(text, document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        document.problems.append(
            Problem(shown, line, column, (), error.problem or "not valid YAML")
        )
        return document
    except yaml.YAMLError as error:
        document.complain((), f"not valid YAML: {str(error).splitlines()[0]}")
        return document
    document.data = {} if node is None else _build(node, (), document)
    return document


def _text(path: Path, document: Document) -> str | None:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            document.complain((), "the file is larger than 1 MiB")
            return None
        return path.read_text("utf-8")
    except OSError as error:
        document.complain((), f"cannot be read: {error.strerror or error}")
    except UnicodeDecodeError:
        document.complain((), "is not UTF-8 text")
    return None


def _compose(text: str, document: Document) -> yaml.Node | None:
    """The node tree, unless aliases or anchors (bombs, and hard to read) are in it."""
    for event in yaml.parse(text, Loader=_Loader):
        if getattr(event, "anchor", None):
            mark = event.start_mark
            assert mark is not None
            kind = "aliases" if isinstance(event, yaml.AliasEvent) else "anchors"
            message = f"{kind} are not taken: write the value out"
            document.problems.append(
                Problem(document.file, mark.line + 1, mark.column + 1, (), message)
            )
    return None if document.problems else yaml.compose(text, Loader=_Loader)


def _build(node: yaml.Node, where: Where, document: Document) -> Any:
    document.marks.setdefault(where, (node.start_mark.line + 1, node.start_mark.column + 1))
    if len(where) > MAX_DEPTH:
        document.complain(where, "nested too deeply")
        return None
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(node, where, document)
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*where, at), document) for at, child in enumerate(node.value)]
    return _scalar(node)


def _build_mapping(node: yaml.MappingNode, where: Where, document: Document) -> dict[str, Any]:
    built: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        inner = (*where, key)
        mark = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        if key in built:
            first = document.marks[inner][0]
            document.problems.append(
                Problem(document.file, *mark, inner, f"given twice; the first is in line {first}")
            )
            continue
        document.marks[inner] = mark
        built[key] = _build(value_node, inner, document)
    return built


def _scalar(node: yaml.Node) -> Any:
    value, plain = node.value, getattr(node, "style", None) is None
    if plain and value in _BOOLEANS:
        return _BOOLEANS[value]
    try:
        if node.tag == "tag:yaml.org,2002:null":
            return None
        if node.tag == "tag:yaml.org,2002:int":
            return int(value)
        if node.tag == "tag:yaml.org,2002:float":
            return float(value)
    except ValueError:
        return str(value)
    return str(value)
