"""Parse YAML strictly, with the place of every key and value.

Owns the checks of syntax, aliases, tags, duplicate keys, depth and plain types; it knows nothing of
the keys' meaning. `on`, `no`, `1e3` and dates are strings, as in YAML 1.2's core schema. Time is
bounded: parsing stops at MAX_DEPTH or MAX_VALUES.

A file is parsed by libyaml, in a tenth of the time of PyYAML's own parser; one with a problem is
parsed again by the latter, whose errors yaml_errors.py explains.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from relay.registry.files import Files, TooLarge, Unreadable
from relay.registry.problems import Document, Place, Problem, Where, place_behind
from relay.registry.yaml_errors import excerpt, explain

MAX_DEPTH = 32
MAX_VALUES = 50_000


class _Loader(yaml.SafeLoader):
    """SafeLoader whose plain scalars are null, true/false, numbers, or text."""

    _is_in_plain = False

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Stop at MAX_DEPTH, before PyYAML's scanner spends its time on nested brackets."""
        if self.flow_level >= MAX_DEPTH:
            raise _GivenUp(self.get_mark(), (), "nested too deeply")
        super().fetch_flow_collection_start(token)

    def scan_plain(self) -> Any:
        """Let text without quotes contain a question mark between brackets, as libyaml does."""
        self._is_in_plain = True
        try:
            return super().scan_plain()
        finally:
            self._is_in_plain = False

    def peek(self, index: int = 0) -> str:
        """Return a character ahead; in text without quotes, a letter for a question mark."""
        character = super().peek(index)
        return "x" if self._is_in_plain and character == "?" else character


_FAST: Any = getattr(yaml, "CSafeLoader", None)
"""None where PyYAML was built without libyaml."""
_SLOW_TEXT = re.compile("[\t\x85\u2028\u2029\ufeff!]|[|>][-+0-9]*#")
_RESOLVERS = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":int", ":float"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_implicit_resolvers = _RESOLVERS
_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}
_TEXT_TAGS = ("!", "tag:yaml.org,2002:str")
_ODD_BLANK = re.compile("[^\\S ]|[\u200b\ufeff]")
_TYPOGRAPHIC_QUOTES = ("\u201c", "\u201d", "\u201e", "\u2018", "\u2019")
# Characters that no setting may contain: controls, and lone surrogates, which cannot be encoded.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")


def unfit_character(text: str) -> str:
    """Describe the first character of `text` that no setting may contain; empty without one."""
    found = _UNFIT.search(text)
    return f"contains a control character (U+{ord(found[0]):04X})" if found else ""


def read(path: Path, shown: str, files: Files) -> Document:
    """Parse the file at `path`. Problems are added to the Document, under the name `shown`."""
    document = Document(shown)
    text = _text(path, document, files)
    if text is None:
        return document
    if (faultless := _read_fast(text, shown)) is not None:
        return faultless
    try:
        built = _Builder(_Loader(text), document).build()
        document.data = {} if built is None else built
    except yaml.YAMLError as error:
        place, message = explain(error, text)
        lines = text.splitlines()
        line = lines[place[0] - 1] if place[0] <= len(lines) else ""
        shown_line = excerpt(line, place[1]) if line.strip() else ()
        document.problems.append(Problem(shown, *place, (), message, shown_line))
    except _GivenUp as given_up:
        document.add_problem_at(given_up.place, given_up.where, given_up.message)
    return document


def _read_fast(text: str, shown: str) -> Document | None:
    """Parse a text by libyaml; None if it has a problem, or something that libyaml and PyYAML
    read differently.
    """
    if _FAST is None or _SLOW_TEXT.search(text):
        return None
    document, loader = Document(shown), _FAST(text)
    loader.yaml_implicit_resolvers = _RESOLVERS
    try:
        built = _Builder(loader, document).build()
    except (yaml.YAMLError, _GivenUp, UnicodeEncodeError):
        return None
    document.data = {} if built is None else built
    return None if document.problems else document


def _text(path: Path, document: Document, files: Files) -> str | None:
    try:
        data = files.read(path)
    except Unreadable as error:
        reason = str(error)
        is_whole = reason.startswith("the file")
        document.add_problem((), reason if is_whole else f"cannot be read: {reason}")
        return None
    except TooLarge:
        document.add_problem((), "all configuration files together are larger than 4 MiB")
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = place_behind(data[: error.start].decode("latin-1"))
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = " but UTF-16; save it as UTF-8" if utf16 else ""
        document.add_problem_at(place, (), f"is not UTF-8 text{hint}")
    return None


_SHOWN_PARTS = 4


class _GivenUp(Exception):
    """The file exceeds a bound, and the rest of it is not read."""

    def __init__(self, mark: yaml.Mark | None, where: Where, message: str) -> None:
        super().__init__(message)
        self.place, self.where, self.message = _place(mark), where[:_SHOWN_PARTS], message


def _place(mark: yaml.Mark | None) -> Place:
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)


class _Builder:
    """Builds the data of one file from the events of a loader, in one pass, without a node tree."""

    def __init__(self, loader: Any, document: Document) -> None:
        self._document, self._values, self._loader = document, 0, loader

    def build(self) -> Any:
        """Return the data; an empty file is an empty mapping. Raises yaml.YAMLError, _GivenUp."""
        events = self._loader
        try:
            events.get_event()
            if events.check_event(yaml.StreamEndEvent):
                return {}
            events.get_event()
            data = self._node(())
            events.get_event()
            after = events.get_event()
            if not isinstance(after, yaml.StreamEndEvent):
                message = "a second document begins here; a file must have only one"
                self._document.add_problem_at(_place(after.start_mark), (), message)
            return data
        finally:
            events.dispose()

    def _node(self, where: Where) -> Any:
        event = self._loader.get_event()
        self._document.marks.setdefault(where, _place(event.start_mark))
        self._values += 1
        if len(where) > MAX_DEPTH:
            raise _GivenUp(event.start_mark, where, "nested too deeply")
        if self._values > MAX_VALUES:
            raise _GivenUp(event.start_mark, where, f"the file has more than {MAX_VALUES} values")
        self._refuse_extras(event, where)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(where)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(where)
        return self._scalar(event, where) if isinstance(event, yaml.ScalarEvent) else None

    def _refuse_extras(self, event: Any, where: Where) -> None:
        """Add problems for anchors and aliases, which can expand exponentially, and for tags."""
        place, tag = _place(event.start_mark), getattr(event, "tag", None)
        if event.anchor:
            kind = "aliases" if isinstance(event, yaml.AliasEvent) else "anchors"
            message = f"{kind} are not supported: write the value out"
            self._document.add_problem_at(place, (), message)
        if tag and tag not in _TEXT_TAGS:
            message = "a value that begins with ! needs quotes: tags are not supported"
            self._document.add_problem_at(place, where, message)

    def _sequence(self, where: Where) -> list[Any]:
        built: list[Any] = []
        while not self._loader.check_event(yaml.SequenceEndEvent):
            built.append(self._node((*where, len(built))))
        self._loader.get_event()
        return built

    def _mapping(self, where: Where) -> dict[str, Any]:
        built: dict[str, Any] = {}
        document = self._document
        while not self._loader.check_event(yaml.MappingEndEvent):
            key_event = self._loader.peek_event()
            key = self._key(where)
            if key is None:
                self._node((*where, "?"))
                continue
            place, inner = _place(key_event.start_mark), (*where, key)
            if key in built:
                first = document.marks[inner][0]
                message = f"duplicate key; the first is in line {first}"
                document.add_problem_at(place, inner, message)
                self._node((*where, key, "?"))
                continue
            document.marks[inner] = place
            built[key] = self._node(inner)
        self._loader.get_event()
        return built

    def _key(self, where: Where) -> str | None:
        """Read the next key; None for a refused one."""
        event = self._loader.peek_event()
        place = _place(event.start_mark)
        if not isinstance(event, yaml.ScalarEvent):
            self._node((*where, "?"))
            if not isinstance(event, yaml.AliasEvent):
                message = "a key must be plain text; put one that begins with { or [ in quotes"
                self._document.add_problem_at(place, where, message)
            return None
        self._loader.get_event()
        self._refuse_extras(event, where)
        if not event.value and not event.style:
            self._document.add_problem_at(place, where, "a key is missing before the colon")
        elif unfit := unfit_character(event.value):
            self._document.add_problem_at(place, where, f"the key {unfit}")
        elif found := _ODD_BLANK.search(event.value):
            message = f"the key contains U+{ord(found[0]):04X}, which only looks like a space"
            self._document.add_problem_at(place, where, message)
        else:
            return str(event.value)
        return None

    def _scalar(self, event: Any, where: Where) -> Any:
        value = str(event.value)
        is_plain = not event.style
        if is_plain and value in _BOOLEANS and event.tag is None:
            return _BOOLEANS[value]
        tag = event.tag or self._loader.resolve(yaml.ScalarNode, value, event.implicit)
        try:
            if tag == "tag:yaml.org,2002:null":
                return None
            if tag == "tag:yaml.org,2002:int":
                return int(value)
            if tag == "tag:yaml.org,2002:float":
                return float(value)
        except ValueError:
            return value
        if is_plain and value.startswith(_TYPOGRAPHIC_QUOTES):
            message = f"{value[0]} is not a quote in YAML; write \" or '"
            self._document.add_problem_at(_place(event.start_mark), where, message)
        if unfit := unfit_character(value):
            hint = "; write |- or >- instead of | or >" if event.style in ("|", ">") else ""
            self._document.add_problem_at(_place(event.start_mark), where, unfit + hint)
        return value
