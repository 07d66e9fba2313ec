"""Change single settings in the text of a program's file, and leave everything else in it.

Owns the formats: JSON with comments, TOML, .env files, and YAML whose settings are at the top. The
text is changed, not written anew, so comments, order and white space stay. Each change is proved:
the new text must parse to the old settings with that change, else it is refused.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import yaml
from dotenv import dotenv_values

from relay.cli import json_text

SettingPath = tuple[str, ...]
ABSENT = None
"""In place of the value of a setting that a file does not have."""


class NotUnderstood(ValueError):
    """The text cannot be parsed, or cannot be changed with certainty; says where or why."""


@dataclass(frozen=True, slots=True)
class Format:
    """How the settings of a file are read and changed."""

    name: str
    _parse: Callable[[str], Any]
    _with_value: Callable[[str, SettingPath, Any], str]
    _without_value: Callable[[str, SettingPath], str]

    def parse(self, text: str) -> dict[str, Any]:
        """Return the settings of `text`. Raises NotUnderstood."""
        try:
            settings = self._parse(text)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise NotUnderstood(_reason(error, self.name)) from None
        if settings is None:
            return {}
        if not isinstance(settings, dict):
            raise NotUnderstood(f"it has no settings by name, as {self.name} should")
        return settings

    def changed(self, text: str, changes: Mapping[SettingPath, Any]) -> str:
        """Return `text` with these values; ABSENT removes a setting. Raises NotUnderstood."""
        for path, value in changes.items():
            expected = copy.deepcopy(self.parse(text))
            if value_at(expected, path) == value:
                continue
            _put(expected, path, value)
            try:
                if value is ABSENT:
                    text = self._without_value(text, path)
                else:
                    text = self._with_value(text, path, value)
                proved = _without_empty(self.parse(text)) == _without_empty(expected)
            except (KeyError, NotUnderstood):
                proved = False
            if not proved:
                raise NotUnderstood(f"{'.'.join(path)} is written in a form that is not changed")
        return text


def value_at(settings: Mapping[str, Any], path: SettingPath) -> Any:
    """Return the value of a setting, ABSENT if there is none."""
    value: Any = settings
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return ABSENT
        value = value[name]
    return value


def _put(settings: dict[str, Any], path: SettingPath, value: Any) -> None:
    """Set or remove a value; an object on the way that is empty without it stays. Raises
    NotUnderstood.
    """
    for name in path[:-1]:
        settings = settings.setdefault(name, {})
        if not isinstance(settings, dict):
            raise NotUnderstood(f"{name} is not a group of settings")
    if value is ABSENT:
        settings.pop(path[-1], None)
    else:
        settings[path[-1]] = value


def _without_empty(value: Any) -> Any:
    """Return settings without empty groups: TOML has no place for some of them."""
    if not isinstance(value, dict):
        return value
    kept = {name: _without_empty(each) for name, each in value.items()}
    return {name: each for name, each in kept.items() if each != {}}


def _reason(error: Exception, name: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1} is not {name}"
    if isinstance(error, json_text.NotJson):
        return str(error)
    found = re.search(r"\(at (line \d+)", str(error))
    return f"{found[1]} is not {name}" if found is not None else f"it is not {name}"


def _end_of_line(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _appended(text: str, line: str) -> str:
    end = _end_of_line(text)
    if text and not text.endswith("\n"):
        text += end
    return text + line + end


# TOML -------------------------------------------------------------------------------------------

_HEADER = re.compile(r"[ \t]*\[")
_TOML_STRING = r'("(?:[^"\\\r\n]|\\.)*"|\'[^\'\r\n]*\')'


def _is_header_of(line: str, table: Sequence[str]) -> bool:
    name = r"[ \t]*\.[ \t]*".join(rf"[\"']?{re.escape(part)}[\"']?" for part in table)
    return re.match(rf"[ \t]*\[[ \t]*{name}[ \t]*\][ \t]*(?:#.*)?\r?$", line) is not None


def _range_of(lines: Sequence[str], table: Sequence[str]) -> tuple[int, int] | None:
    """The lines of a table without its header; None if there is no such table."""
    first = 0
    if table:
        found = (number for number, line in enumerate(lines, 1) if _is_header_of(line, table))
        if (first := next(found, 0)) == 0:
            return None
    after = (number for number in range(first, len(lines)) if _HEADER.match(lines[number]))
    return first, next(after, len(lines))


def _toml_line(lines: Sequence[str], within: tuple[int, int], name: str) -> int | None:
    pattern = re.compile(rf"[ \t]*[\"']?{re.escape(name)}[\"']?[ \t]*=")
    return next((number for number in range(*within) if pattern.match(lines[number])), None)


def _toml_with_value(text: str, path: SettingPath, value: Any) -> str:
    table, name = path[:-1], path[-1]
    # A string of JSON is a string of TOML, except that TOML has no \/ and wants DEL escaped.
    written = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    lines, end = _lines(text), _end_of_line(text)
    if (within := _range_of(lines, table)) is None:
        header = f"[{'.'.join(table)}]"
        text = _appended(text, f"{end}{header}" if text.strip() else header)
        return _appended(text, f"{name} = {written}")
    if (number := _toml_line(lines, within, name)) is not None:
        pattern = rf"([^=]*=[ \t]*){_TOML_STRING}"
        lines[number] = re.sub(pattern, lambda found: found[1] + written, lines[number], count=1)
        return "".join(lines)
    used = [n for n in range(*within) if lines[n].strip() and not lines[n].lstrip().startswith("#")]
    at = used[-1] + 1 if used else within[0]
    if at and not lines[at - 1].endswith("\n"):
        lines[at - 1] += end
    lines.insert(at, f"{name} = {written}{end}")
    if not table and at + 1 < len(lines) and _HEADER.match(lines[at + 1]):
        lines.insert(at + 1, end)
    return "".join(lines)


def _toml_without_value(text: str, path: SettingPath) -> str:
    lines = _lines(text)
    if _range_of(lines, path) is not None:
        return _without_table(text, path)
    within = _range_of(lines, path[:-1])
    number = _toml_line(lines, within, path[-1]) if within is not None else None
    if number is not None:
        del lines[number]
    return "".join(lines)


def _without_table(text: str, table: SettingPath) -> str:
    lines = _lines(text)
    if (within := _range_of(lines, table)) is None:
        return text
    first = within[0] - 1
    if first and not lines[first - 1].strip():
        first -= 1
    kept = [line for line in lines[within[0] : within[1]] if line.lstrip().startswith("#")]
    return "".join([*lines[:first], *kept, *lines[within[1] :]])


# .env -------------------------------------------------------------------------------------------

_PLAIN = re.compile(r"[\w.:/@%+,-]*\Z", re.ASCII)


def _env_parse(text: str) -> dict[str, Any]:
    return dict(dotenv_values(stream=StringIO(text), interpolate=False))


def _env_line(lines: Sequence[str], name: str) -> int | None:
    """The line that counts, which is the last one of its name."""
    pattern = re.compile(rf"[ \t]*(?:export[ \t]+)?{re.escape(name)}[ \t]*=")
    return next((n for n in reversed(range(len(lines))) if pattern.match(lines[n])), None)


def _env_with_value(text: str, path: SettingPath, value: Any) -> str:
    [name] = path
    quote = "\\'"
    plain = _PLAIN.match(value) is not None
    line = f"{name}={value}" if plain else f"{name}='{value.replace(chr(39), quote)}'"
    lines = _lines(text)
    if (number := _env_line(lines, name)) is None:
        return _appended(text, line)
    lines[number] = line + (_end_of_line(text) if lines[number].endswith("\n") else "")
    return "".join(lines)


def _env_without_value(text: str, path: SettingPath) -> str:
    lines = _lines(text)
    if (number := _env_line(lines, path[0])) is not None:
        del lines[number]
    return "".join(lines)


# YAML -------------------------------------------------------------------------------------------


def _yaml_line(lines: Sequence[str], name: str) -> int | None:
    pattern = re.compile(rf"[\"']?{re.escape(name)}[\"']?[ \t]*:(?:\s|$)")
    return next((n for n, line in enumerate(lines) if pattern.match(line)), None)


def _yaml_with_value(text: str, path: SettingPath, value: Any) -> str:
    [name] = path
    line = f"{name}: {json.dumps(value)}"
    lines = _lines(text)
    if (number := _yaml_line(lines, name)) is None:
        return _appended(text, line)
    lines[number] = line + (_end_of_line(text) if lines[number].endswith("\n") else "")
    return "".join(lines)


def _yaml_without_value(text: str, path: SettingPath) -> str:
    lines = _lines(text)
    if (number := _yaml_line(lines, path[0])) is not None:
        del lines[number]
    return "".join(lines)


JSON = Format("JSON", json_text.parse, json_text.with_value, json_text.without_value)
TOML = Format("TOML", tomllib.loads, _toml_with_value, _toml_without_value)
ENV = Format("a .env file", _env_parse, _env_with_value, _env_without_value)
YAML = Format("YAML", yaml.safe_load, _yaml_with_value, _yaml_without_value)
FORMATS = {each.name: each for each in (JSON, TOML, ENV, YAML)}
