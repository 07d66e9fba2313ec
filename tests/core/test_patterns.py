"""Regular expressions find the same in every Python that the relay supports.

Python before 3.11.5, which Debian 12 has, loses its place where a possessive loop over a group
ends (python/cpython#106052): `(?:ab|c)*+` may match beyond its last whole iteration, `(?>ab|c)*+`
does not.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import relay
from tests.processes import ROOT

ONE_CHARACTER = {op.IN, op.LITERAL, op.NOT_LITERAL, op.ANY}


def _patterns(module: str) -> Iterator[re.Pattern[Any]]:
    """The patterns in a module's variables: themselves, of bound methods, in collections."""
    for value in vars(importlib.import_module(module)).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        for each in values:
            pattern = getattr(each, "__self__", each)
            if isinstance(pattern, re.Pattern):
                yield pattern


def _loops(pattern: re.Pattern[Any]) -> Iterator[Any]:
    """What the possessive loops of a pattern repeat."""
    return _loops_in(parser.parse(pattern.pattern, pattern.flags))


def _loops_in(parsed: Any) -> Iterator[Any]:
    for code, argument in parsed:
        if code is op.POSSESSIVE_REPEAT:
            yield argument[2]
        for part in argument if isinstance(argument, list | tuple) else (argument,):
            for each in part if isinstance(part, list) else (part,):
                if isinstance(each, parser.SubPattern):
                    yield from _loops_in(each)


def _is_safe(repeated: Any) -> bool:
    return len(repeated) == 1 and (repeated[0][0] in ONE_CHARACTER or repeated[0][0] is op.ATOMIC_GROUP)


def _unsafe(pattern: re.Pattern[Any]) -> bool:
    return not all(map(_is_safe, _loops(pattern)))


def test_a_possessive_loop_repeats_one_character_or_an_atomic_group() -> None:
    names = [each.name for each in pkgutil.walk_packages(relay.__path__, "relay.") if ".migrations" not in each.name and each.name != "relay.__main__"]
    found = {pattern for name in names for pattern in _patterns(name)}
    loops = [pattern for pattern in found if any(repeated[0][0] not in ONE_CHARACTER for repeated in _loops(pattern))]
    written = sum(len(re.findall(r"\)[*+?]\+", path.read_text())) for path in (ROOT / "relay").rglob("*.py"))
    assert len(loops) >= 6 and written >= 5, "the search finds nothing"
    assert [pattern.pattern for pattern in found if _unsafe(pattern)] == []


def test_the_check_finds_a_loop_over_a_group() -> None:
    assert all(map(_unsafe, map(re.compile, ["(?:ab|c)*+", "x(?:ab)?+", "((?:ab|c)++)", "(?=(?:ab|c)*+)", "(?>(?:ab)*+b)"])))
    assert not any(map(_unsafe, map(re.compile, ["[ab]*+", "a++", "(?>ab|c)*+", r"\s*+(?:ab|c)*", ".?+"])))
