"""Search a JSON document for the models that it names.

Owns the rule by which a field names a model, and the bounds of the search. Vendors add fields, so
the rule is general: every field whose name ends in `model` names one, at any depth, but for the
data of the client's own application. named_models.py searches requests and messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from relay.core.fields import has_more
from relay.core.text import quoted

Where = Literal["path", "query", "body", "form", "message"]


class Named(NamedTuple):
    """A model that a request names."""

    where: Where
    field: str
    """The field, as in `session.audio.input.transcription.model`; lists add nothing to it."""
    model: str


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The result for a request that may name a model which the relay does not see."""

    reason: str
    """What is wrong, as a sentence without its full stop."""


Found = tuple[Named, ...] | Unreadable

_ENDINGS = ("model", "models", "modelid", "modelids", "modelname", "llm", "llms")
"""A field whose folded name ends in one of these names a model."""
_MORE_NAMES: Mapping[str, frozenset[str]] = {
    # OpenRouter and Perplexity; Azure's sockets.
    "openai": frozenset({"fallbacks", "route", "preset", "deployment"}),
    "anthropic": frozenset({"fallbacks"}),  # with "default" Anthropic chooses
    "google": frozenset({"agent"}),  # of an interaction
    "elevenlabs": frozenset({"order"}),  # of backup_llm_config
    # The id of a stored configuration; the other half of an old model's name.
    "deepgram": frozenset({"agent", "tier"}),
}
"""More folded names, by wire format."""
_WITHIN = frozenset({"id", "name"})
"""The fields that name a model in an object that is the value of such a field. If the field's name
is a plural, all of them do."""
_PLURALS = ("models", "llms")

_DATA = frozenset(
    {
        "metadata", "clientmetadata", "labels", "dynamicvariables", "usage", "svgusage",
        "schema", "inputschema", "responseschema", "responsejsonschema", "parametersjsonschema",
    }
)  # fmt: skip
"""Folded names of fields with data or schemas of the client's application, or with the usage that a
vendor reported. No vendor reads a model there."""
_MORE_DATA: Mapping[str, frozenset[str]] = {"cohere": frozenset({"documents", "outputs"})}
_NOTHING: Mapping[str, Any] = {}
_DATA_OF_TYPES: Mapping[str, Mapping[str, frozenset[str]]] = {
    "anthropic": {"input": frozenset({"tool_use", "server_tool_use", "mcp_tool_use"})},
    "google": {
        "arguments": frozenset({"function_call"}), "result": frozenset({"function_result"}),
    },
}  # fmt: skip
"""Such fields in objects whose `type` is one of these, by wire format: arguments and results of
functions."""
_FUNCTION = {"parameters": "name"}
_DATA_BESIDE: Mapping[str, Mapping[str, str]] = {
    "openai": {**_FUNCTION, "arguments": "name", "variables": "id"},
    "google": {**_FUNCTION, "args": "name", "response": "name"},
}
"""Such fields in objects that have this other field, and no `type` but `function`: functions, calls
of functions, and the variables of a stored prompt. Formats that are not listed have functions."""
_WITHOUT_DATA = frozenset({"fal"})
"""Formats whose bodies are the input of any app."""

MAX_CONTAINERS, MAX_COMMAS, MAX_FIELDS = 150_000, 500_000, 50_000
"""Maximum numbers of objects and arrays, of commas, and of fields of objects: with these, a search
takes less than 100 ms. The first two are counted in the text, strings included."""
_MAX_MODELS = 1000
_MAX_KEY_CHARS = 64
_MAX_PREFIX_CHARS = 256
_MAX_SORTED = 4096


_NO_LETTERS = re.compile(r"[\W_]+")


def fold(name: str) -> str:
    """Return a field's name as the most tolerant parser compares it: Go's ignores the case, that of
    Protocol Buffers accepts `modelId` for `model_id`, and one in C ends a name at a NUL.
    """
    folded = name.casefold()
    return folded if folded.isalnum() else _NO_LETTERS.sub("", folded)


Object = tuple[tuple[str, Any], ...]
"""A parsed object: its members in order, with repeated names. A list is an array."""
Sort = Literal["name", "data", "maybe_data", "other"]


class Sorter:
    """Sorts the fields of a wire format by their names."""

    __slots__ = ("_beside", "_data", "_names", "_of_types", "_sorted", "known")

    def __init__(self, format_: str) -> None:
        has_data = format_ not in _WITHOUT_DATA
        self._names = _MORE_NAMES.get(format_, frozenset())
        self._data = _DATA | _MORE_DATA.get(format_, frozenset()) if has_data else frozenset()
        self._of_types = _DATA_OF_TYPES.get(format_, _NOTHING)
        self._beside = _DATA_BESIDE.get(format_, _FUNCTION) if has_data else _NOTHING
        self._sorted: dict[str, Sort] = {}
        self.known = self._sorted.get
        """Returns what `sort` has returned for a name; None for one that it does not remember."""

    def sort(self, name: str) -> Sort:
        """Return what a field of this name contains."""
        if len(name) > _MAX_KEY_CHARS:
            return "other"
        sort = self._sorted.get(name) or self._sort(fold(name))
        if len(self._sorted) < _MAX_SORTED:
            self._sorted[name] = sort
        return sort

    def _sort(self, folded: str) -> Sort:
        if folded.endswith(_ENDINGS) or folded in self._names:
            return "name"
        if folded in self._data:
            return "data"
        return "maybe_data" if folded in self._of_types or folded in self._beside else "other"

    def is_data(self, name: str, members: Object) -> bool:
        """True if a field that is "maybe_data" contains data in this object."""
        folded = fold(name)
        types = {text for name, text in members if fold(name) == "type" and text.__class__ is str}
        of_types, beside = self._of_types.get(folded), self._beside.get(folded)
        if of_types is not None and types and types <= of_types:
            return True
        if beside is None or not types <= {"function"}:
            return False
        return any(name == beside and value.__class__ is str for name, value in members)


sorter = lru_cache(32)(Sorter)
"""Return the Sorter of a wire format."""


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


_nothing: Any = {}.get
_parse = json.JSONDecoder(
    object_pairs_hook=tuple,
    # Numbers name nothing, and it takes long to convert one of many digits.
    parse_int=_nothing,
    parse_float=_nothing,
    parse_constant=_refuse_constant,
).decode


def search_json(where: Where, format_: str, text: bytes) -> Found:
    """Return the models that a JSON document names."""
    if has_more(text, (b"[", b"{"), MAX_CONTAINERS) or has_more(text, (b",",), MAX_COMMAS):
        return Unreadable("its JSON has too many values to be checked")
    try:
        root = _parse(text.decode())
    except (ValueError, RecursionError):
        return Unreadable("it is not strict JSON in UTF-8, or its JSON is nested too deeply")
    return search(where, format_, root)


def search(where: Where, format_: str, root: Any) -> Found:
    """Return the models that a parsed document names."""
    return _Search(where, format_).run(root)


class _Search:
    """One walk through a document, which visits each object and array once."""

    __slots__ = ("_count", "_format", "_found", "_left", "_sorter", "_where")

    def __init__(self, where: Where, format_: str) -> None:
        self._where, self._format, self._sorter = where, format_, sorter(format_)
        self._found: list[Named] = []
        self._left: list[tuple[str, Any]] = []
        self._count = 0

    def run(self, root: Any) -> Found:
        left = self._left
        left.append(("", [root]))
        while left:
            prefix, values = left.pop()
            for value in filter(None, values):
                if value.__class__ is tuple:
                    problem = self._visit(prefix, value)
                    if problem is not None:
                        return problem
                elif value.__class__ is list:
                    left.append((prefix, value))
            if len(self._found) > _MAX_MODELS:
                return Unreadable("it names too many models to be checked")
        return tuple(self._found)

    def _visit(self, prefix: str, members: Object) -> Unreadable | None:
        """Take the models of an object, and note its values to be visited."""
        self._count += len(members)
        if self._count > MAX_FIELDS:
            return Unreadable("its JSON has too many fields to be checked")
        known, sort, is_data = self._sorter.known, self._sorter.sort, self._sorter.is_data
        seen: set[str] | None = None
        for name, value in members:
            kind = known(name) or sort(name)
            if kind == "name":
                seen = set() if seen is None else seen
                if (folded := fold(name)) in seen:
                    return Unreadable(f"an object in its JSON has '{quoted(name)}' twice")
                seen.add(folded)
                self._take(prefix + name, value)
            elif kind == "data" or (kind == "maybe_data" and is_data(name, members)):
                continue
            if value and value.__class__ is not str:
                # The bound keeps long names from being copied for each object below them.
                nested = f"{prefix}{name}." if len(prefix) + len(name) < _MAX_PREFIX_CHARS else "…"
                self._left.append((nested, value if value.__class__ is list else (value,)))
        return None

    def _take(self, field: str, value: Any) -> None:
        """Take the models of the value of a field that names models."""
        several = fold(field).endswith(_PLURALS)
        for each in _flat(value):
            if len(self._found) > _MAX_MODELS:
                return
            if each.__class__ is str:
                self._found += named(self._where, field, each, self._format)
                continue
            for name, inner in each:
                if inner.__class__ is str and (several or fold(name) in _WITHIN):
                    self._found += named(self._where, f"{field}.{name}", inner, self._format)


def _flat(value: Any) -> Iterator[Any]:
    """Yield the texts and objects of a value, with those in arrays."""
    left = [value]
    while left:
        each = left.pop()
        if each.__class__ is list:
            left += reversed(each)
        elif each.__class__ in (str, tuple):
            yield each


_GOOGLE_PREFIX = re.compile(
    r"\A(?:models|(?:projects/[^/]+/locations/[^/]+/)?publishers/google/models)/"
)
_PRESET = "@preset/"


def named(where: Where, field: str, value: str, format_: str) -> list[Named]:
    """Return the models of the value of a field: none if it is empty. OpenRouter's `model@preset/x`
    names two; the preset may contain further models.
    """
    if not value:
        return []
    if format_ == "google":
        return [Named(where, field, _GOOGLE_PREFIX.sub("", value, count=1))]
    if format_ == "openai" and _PRESET in value:
        model, _, preset = value.partition(_PRESET)
        names = [Named(where, field, model)] if model else []
        return [*names, Named(where, field, _PRESET + preset)]
    if format_ == "openai" and fold(field).endswith("preset"):
        value = _PRESET + value
    return [Named(where, field, value)]
