"""The problems of a configuration file, with line and column.

Owns Document, the data and problems of one file, the form of a problem, and the bounds of its text.
It knows nothing of YAML or of the settings.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from relay.core.text import clean, quoted

MAX_PROBLEMS = 100
"""Maximum number of problems of a file; further ones are dropped."""

MAX_MESSAGE_CHARACTERS = 1000
_COMPARED_CHARACTERS = 80

Place = tuple[int, int]
"""Line and column, from 1."""
Where = tuple[str | int, ...]
"""A path into the document: `("providers", "openai", "base_url")`."""


def nearest(name: str, known: Collection[str], similarity: float = 0.6) -> str:
    """Return the known name that is most similar to `name`, or empty."""
    near = difflib.get_close_matches(name[:_COMPARED_CHARACTERS], known, 1, similarity)
    return near[0] if near else ""


def hint_at_nearest(name: str, known: Collection[str], similarity: float = 0.6) -> str:
    """Return `; did you mean 'x'?` with the most similar known name, or empty."""
    near = nearest(name, known, similarity)
    return f"; did you mean '{near}'?" if near else ""


def check_provider(name: str, known: Collection[str], where: Where, document: Document) -> None:
    """Add a problem for the name of a provider that gateway.yaml does not have."""
    if name not in known:
        hint = hint_at_nearest(name, known, 0.5)
        document.add_problem(where, f"there is no such provider{hint}")


def place_behind(before: str) -> Place:
    """Return the place of the character after `before`, the beginning of a text."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a configuration. Lines and columns count from 1."""

    file: str
    line: int
    column: int
    where: Where
    message: str
    excerpt: tuple[str, ...] = ()
    """For errors in YAML syntax: the line, and a second one with a caret."""

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"

    @property
    def place(self) -> str:
        """`gateway.yaml:2:3`."""
        return f"{self.file}:{self.line}:{self.column}"

    @property
    def text(self) -> str:
        """The setting and what is wrong with it."""
        path = ".".join(quoted(str(part)) for part in self.where)
        text = f"{path + ': ' if path else ''}{clean(self.message, MAX_MESSAGE_CHARACTERS)}"
        return "".join(each if each.isprintable() else "\ufffd" for each in text)

    @property
    def in_full(self) -> str:
        """The problem with its excerpt, for a terminal."""
        return "\n    ".join([str(self), *self.excerpt])


@dataclass(slots=True)
class Document:
    """The data of a file, the place of each part, and the problems."""

    file: str
    data: Any = None
    marks: dict[Where, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def add_problem(self, where: Where, message: str) -> None:
        """Add a problem at `where`, or at the nearest parent that the file has."""
        self._add(self.problems, self._at(where), where, message)

    def warn(self, where: Where, message: str) -> None:
        """Add a warning at `where`, about a possible mistake that is accepted."""
        self._add(self.warnings, self._at(where), where, message)

    def add_problem_at(self, place: Place, where: Where, message: str) -> None:
        """Add a problem at a line and column."""
        self._add(self.problems, place, where, message)

    def _at(self, where: Where) -> Place:
        known = where
        while known and known not in self.marks:
            known = known[:-1]
        return self.marks.get(known, (1, 1))

    def _add(self, to: list[Problem], place: Place, where: Where, message: str) -> None:
        problem = Problem(self.file, *place, where, message)
        if len(to) < MAX_PROBLEMS and problem not in to:
            to.append(problem)
