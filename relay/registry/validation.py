"""Validate a document against the schema, and describe its problems.

Owns the validation of as much as possible at once (a wrong provider hides no problem of another),
hints at similar names and at the names that other gateways and SDKs use, and plain words for
pydantic's errors. Messages never quote a value of the file, which may be a secret.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from relay.registry.entries import Section
from relay.registry.problems import Document, Where, hint_at_nearest

_ACCOUNT = ("account_id", "gateway_id", "api_key")
_MAX_KNOWN = 40
_NEAREST_CHARACTERS = 80
_KEY_WITHOUT_SPACE = re.compile(r"\s*([A-Za-z0-9_.-]{1,64}):\S")

_AUTH = 'here it is auth: {header: Authorization, value: "Bearer ${NAME}"}'
_BASE_URL = "here it is base_url"
_CLIENT_KEYS = 'here they are clients: {NAME: {key: "${NAME_KEY}"}}'
_PROVIDER = (
    "here providers: is a mapping of name to {base_url, auth}; each call names its own model"
)

_OF_PROVIDERS: Mapping[str, str] = {
    "apikey": _AUTH, "apikeys": _AUTH, "key": _AUTH, "keys": _AUTH, "token": _AUTH,
    "apitoken": _AUTH, "secret": _AUTH, "authorization": _AUTH, "bearer": _AUTH,
    "credentials": _AUTH,
    "baseurl": _BASE_URL, "apibase": _BASE_URL, "url": _BASE_URL, "endpoint": _BASE_URL,
    "host": _BASE_URL, "baseurls": _BASE_URL, "apiurl": _BASE_URL, "target": _BASE_URL,
    "upstream": _BASE_URL,
    "timeout": "here they are connect_timeout_s, first_byte_timeout_s and idle_timeout_s",
    "maxretries": "here it is retries: {max_attempts: …}",
    "numretries": "here it is retries: {max_attempts: …}",
    "fallbacks": "here it is fallback: [{provider: NAME}]",
    "defaultheaders": "here it is headers", "extraheaders": "here it is headers",
    "customheaders": "here it is headers",
    "litellmparams": _PROVIDER,
    "models": "a provider accepts any model; each call names its own",
    "model": "a provider accepts any model; each call names its own",
    "modellist": _PROVIDER,
}  # fmt: skip
_AT_TOP: Mapping[str, str] = {
    "modellist": _PROVIDER, "litellmparams": _PROVIDER,
    "litellmsettings": _PROVIDER,
    "routersettings": "here it is retries, limits, and fallback at a provider",
    "generalsettings": "here it is server, database and ledger",
    "provider": "here it is providers",
    "virtualkeys": _CLIENT_KEYS, "masterkey": _CLIENT_KEYS, "apikey": _CLIENT_KEYS,
    "apikeys": _CLIENT_KEYS, "keys": _CLIENT_KEYS, "users": _CLIENT_KEYS,
    "host": "here it is server: {host: …}", "port": "here it is server: {port: …}",
    "listen": "here it is server: {host: …, port: …}", "workers": "here it is server: {workers: …}",
    "numworkers": "here it is server: {workers: …}",
    "redisurl": "here it is redis: {url: …}", "databaseurl": "here it is database",
    "db": "here it is database", "loglevel": "here it is log: {level: …}",
    "logging": "here it is log: {level: …}", "loggingsettings": "here it is log: {level: …}",
    "ratelimits": "here it is limits", "ratelimit": "here it is limits",
    "caching": "here it is cache", "cachesettings": "here it is cache",
    "corsorigins": "here it is cors: {origins: […]}", "ssl": "here it is tls",
    "fallbacks": "here it is fallback: [{provider: NAME}] at a provider",
    "baseurl": "it is a key of a provider: providers: {NAME: {base_url: …}}",
    "numretries": "here it is retries: {max_attempts: …}",
    "maxretries": "here it is retries: {max_attempts: …}",
}  # fmt: skip
"""Keys of other gateways and SDKs, in lower case without `-` and `_`, to a hint."""
_RENAMED: Mapping[Where, str] = {
    ("jobs",): "cloudflare.delegate",
    ("providers", "meter"): "format",
}
"""Old keys to their new names; a key of a provider is written without the provider's name."""


def validate(document: Document, model: type[Section]) -> Section | None:
    """Validate a document. Problems are added to it, and the parts with problems are removed, so
    that later checks find the problems of the rest; None if nothing valid remains.
    """
    data = document.data
    if isinstance(data, dict) and isinstance(account := data.get("cloudflare"), dict):
        # An empty variable means the default here, not an empty gateway name.
        data["cloudflare"] = {k: v for k, v in account.items() if v != "" or k not in _ACCOUNT}
    try:
        section = model.model_validate(data)
    except ValidationError as error:
        known = {problem.where for problem in document.problems}
        for detail in error.errors(include_url=False, include_context=False):
            where = _written(document, detail["loc"])
            if where not in known:
                place = _of_schema(detail["loc"])
                document.add_problem(where, describe_error(detail, where, model, place))
    else:
        if not document.problems:
            return section
    return _left(document, model)


def _left(document: Document, model: type[Section]) -> Section | None:
    """Validate the document without the providers and sections that have problems."""
    if not isinstance(document.data, dict):
        return None
    data = dict(document.data)
    if isinstance(data.get("providers"), dict):
        data["providers"] = dict(data["providers"])
    for problem in document.problems:
        if problem.where[:1] == ("providers",) and len(problem.where) > 1:
            if isinstance(data.get("providers"), dict):
                data["providers"].pop(problem.where[1], None)
        elif problem.where[:2] == ("cloudflare", "delegate"):
            data["cloudflare"] = {k: v for k, v in data["cloudflare"].items() if k != "delegate"}
        elif problem.where[:1] == ("cloudflare",):
            return None  # without it, the targets of providers are unknown
        elif problem.where:
            data.pop(str(problem.where[0]), None)
    try:
        return model.model_validate(data)
    except ValidationError:
        return None


_NOT_WRITTEN = frozenset({"[key]", "[word]", "[mapping]"})
"""Parts of pydantic's locations that say what is meant: a key, or one of several forms of a value.
"""


def _written(document: Document, place: Where) -> Where:
    """Return pydantic's location of an error, without the keys that a short form leaves out, and
    cut to the part that the file has.
    """
    parts = _of_schema(place)
    found: Where = ()
    at = 0
    while at < len(parts):
        # `models: {fast: [{…}]}` is short for `models: {fast: {targets: [{…}]}}`.
        steps = range(at, min(at + 2, len(parts)))
        step = next((each for each in steps if (*found, parts[each]) in document.marks), None)
        if step is None:
            break
        found, at = (*found, parts[step]), step + 1
    tail = parts[at:]
    return (*found, *tail) if len(tail) <= 1 else found


def _of_schema(place: Where) -> Where:
    """Return pydantic's location of an error as a path in the schema."""
    return tuple(part for part in place if part not in _NOT_WRITTEN)


def _unknown_key(where: Where, model: type[BaseModel], place: Where) -> str:
    """Describe a key that the schema does not have at `place`."""
    key = str(where[-1])
    if renamed := _RENAMED.get(where[:1] + where[2:] if where[0] == "providers" else where):
        return f"`{key}` was renamed to `{renamed}`"
    plain = re.sub(r"[-_.\s]", "", key[:_NEAREST_CHARACTERS]).lower()
    known = _known_names(place[:-1], model)
    same = [name for name in known if name.replace("_", "") == plain]
    if same:
        return f"unknown key; did you mean '{same[0]}'?"
    if len(where) == 3 and where[0] == "providers" and plain in _OF_PROVIDERS:
        return f"unknown key; {_OF_PROVIDERS[plain]}"
    if len(where) == 1:
        if plain in _AT_TOP:
            return f"unknown key; {_AT_TOP[plain]}"
        if key == "include" and "include" not in known:
            return "unknown key; only gateway.yaml can include files"
    hint = hint_at_nearest(key, known, 0.5)
    return f"unknown key{hint or '; known keys: ' + ', '.join(known[:_MAX_KNOWN])}"


def describe_error(detail: Any, where: Where, model: type[BaseModel], place: Where = ()) -> str:
    """Describe one of pydantic's errors. Only keys of the file are quoted, never values. `place` is
    the path of `where` in the schema, if that is another one.
    """
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(where, model, place or where)
    if kind == "missing":
        return "is missing"
    if kind in _KINDS:
        wanted, is_right = _KINDS[kind]
        return f"{wanted}{_instead(value, where, is_right)}"
    text = str(detail["msg"]).replace("Input should be", "should be")
    if kind == "literal_error" and isinstance(value, str):
        options = re.findall(r"'([^']*)'", text)
        return text + hint_at_nearest(value.lower(), options)
    return text


_KINDS: Mapping[str, tuple[str, str]] = {
    "model_type": ("should be a mapping", "mapping"),
    "model_attributes_type": ("should be a mapping", "mapping"),
    "dict_type": ("should be a mapping", "mapping"),
    "list_type": ("should be a list", "list"),
    "string_type": ("should be text", "text"),
    "int_type": ("should be a whole number", "number"),
    "int_parsing": ("should be a whole number", "number"),
    "int_parsing_size": ("should be a whole number", "number"),
    "int_from_float": ("should be a whole number", "number"),
    "float_type": ("should be a number", "number"),
    "float_parsing": ("should be a number", "number"),
    "bool_type": ("should be true or false", "boolean"),
    "bool_parsing": ("should be true or false", "boolean"),
}
"""Pydantic's type of an error to a message, and the kind of value that is expected."""


def _instead(value: Any, where: Where, wanted: str) -> str:
    """Describe the value in the file, and how to write the expected one."""
    if value is None:
        return ", but is empty; write a value, or remove the key"
    if isinstance(value, dict):
        if wanted == "text" or (value and set(value.values()) == {None}):
            return ", but is a mapping: a value that begins with { needs quotes"
        return f", but is a mapping{_list_hint(wanted)}"
    if isinstance(value, list):
        if where == ("providers",):
            return ", but is a list: write `NAME:` with its keys below, not `- name: NAME`"
        if wanted == "text":
            return ", but is a list: a value that begins with [ needs quotes"
        hint = ": write `key: value`, without the -" if wanted == "mapping" else ""
        return f", but is a list{hint}"
    if isinstance(value, str):
        if wanted in ("mapping", "list") and (found := _KEY_WITHOUT_SPACE.match(value)):
            return f", but is text: a space is missing after `{found[1]}:`"
        return ", but is text" + _list_hint(wanted)
    kind = "true or false" if isinstance(value, bool) else "a number"
    return f", but is {kind}" + (": put it in quotes" if wanted == "text" else "")


def _list_hint(wanted: str) -> str:
    return ": write `- item` lines, or [item, item]" if wanted == "list" else ""


def _known_names(where: Where, model: type[BaseModel]) -> list[str]:
    """Return the keys that the schema has at `where`."""
    whole = _schema_of(model)
    node: Any = whole
    for part in where:
        node = _child(whole, node, part)
    return sorted(_resolved(whole, node).get("properties", {}))


@functools.cache
def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _child(whole: Any, node: Any, part: str | int) -> Any:
    node = _resolved(whole, node)
    if part in node.get("properties", {}):
        return node["properties"][part]
    other = node.get("items") if isinstance(part, int) else node.get("additionalProperties")
    return other if isinstance(other, dict) else {}


def _resolved(whole: Any, node: Any) -> Any:
    """Follow a reference; among alternatives, choose the one that is a section."""
    for option in node.get("anyOf", [node]):
        if "$ref" in option:
            return whole["$defs"][option["$ref"].rpartition("/")[2]]
    return node
