"""What is wrong with a configuration, and where: the problems of one file, and its data.

Owns: their form and their bounds. Knows nothing of YAML or of what the settings mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from relay.core.text import clean, quoted

MAX_PROBLEMS = 100
"""Of one file; those after are not collected."""

MAX_MESSAGE_CHARACTERS = 1000
_COMPARED_CHARACTERS = 80

Place = tuple[int, int]
"""Line and column, from 1."""
Where = tuple[str | int, ...]
"""A path into the document: `("providers", "openai", "base_url")`."""


def nearest(name: str, known: Collection[str], similarity: float = 0.6) -> str:
    """The known name that is most like this one; empty if none is."""
    near = difflib.get_close_matches(name[:_COMPARED_CHARACTERS], known, 1, similarity)
    return near[0] if near else ""


def hint_at_nearest(name: str, known: Collection[str], similarity: float = 0.6) -> str:
    """`; did you mean 'x'?`, of the known name that is most like this one; empty if none is."""
    near = nearest(name, known, similarity)
    return f"; did you mean '{near}'?" if near else ""


def place_behind(before: str) -> Place:
    """The place of the character that follows this beginning of a text."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the configuration. Lines and columns count from 1."""

    file: str
    line: int
    column: int
    where: Where
    message: str
    excerpt: tuple[str, ...] = ()
    """Of YAML's own errors: the line, and one with a caret."""

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"

    @property
    def place(self) -> str:
        """`gateway.yaml:2:3`."""
        return f"{self.file}:{self.line}:{self.column}"

    @property
    def text(self) -> str:
        """What is wrong with which setting."""
        path = ".".join(quoted(str(part)) for part in self.where)
        text = f"{path + ': ' if path else ''}{clean(self.message, MAX_MESSAGE_CHARACTERS)}"
        return "".join(each if each.isprintable() else "\ufffd" for each in text)

    @property
    def in_full(self) -> str:
        """With the line of the file, where there is one; for a terminal."""
        return "\n    ".join([str(self), *self.excerpt])


@dataclass(slots=True)
class Document:
    """A file's data and where each part of it stands."""

    file: str
    data: Any = None
    marks: dict[Where, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def add_problem(self, where: Where, message: str) -> None:
        """Add a problem at `where`, or at the nearest place above it that the file has."""
        self._add(self.problems, self._at(where), where, message)

    def warn(self, where: Where, message: str) -> None:
        """Add a warning there: what may be a mistake, but is taken."""
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
