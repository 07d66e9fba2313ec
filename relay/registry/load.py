"""Read gateway.yaml, its includes and the environment, and check them as one.

Owns: the order of reading, expansion of `${…}`, all messages with file, line and column.
Either a whole Config comes out, or ConfigError with every problem found; nothing in between.
"""

from __future__ import annotations

import difflib
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import relay
from relay.core.limits import Rule
from relay.registry import credentials, schema
from relay.registry.build import build_registry
from relay.registry.entries import ProviderEntry, Section
from relay.registry.limits import limit_rules
from relay.registry.proxies import Proxies
from relay.registry.registry import Registry
from relay.registry.yamlfile import Document, Problem, Where, read

_ACCOUNT = ("account_id", "gateway_id", "api_key")


class ConfigError(Exception):
    """The configuration is refused. `problems` are complete, in the order of the files."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Certificate:
    """The PEM files that the relay serves TLS with."""

    chain: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the relay is told: the settings as written, and the registry made of its
    providers.
    """

    path: Path
    settings: schema.GatewayFile
    registry: Registry
    certificate: Certificate | None = None
    limits: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a configuration comes from; kept so that a reload reads the same places."""

    config: Path
    env_file: Path | None
    demo_url: str = ""
    """Base URL of the running built-in provider, or empty if it does not run."""
    certificate: Certificate | None = None
    """Instead of the one that the file names."""
    overrides: tuple[tuple[str, str, object], ...] = ()
    """(section, key, value) of settings that the command line gives: they win over the file."""


def packaged() -> Path:
    """The folder with the gateway.yaml that comes with the relay: the checkout, or the wheel's
    copy.
    """
    inside = Path(relay.__file__).parent / "defaults"
    return inside if inside.is_dir() else Path(relay.__file__).parent.parent


def find_config(given: str | None) -> Path:
    """The gateway.yaml to use: the one named, else the one in this folder, else the packaged
    one.
    """
    if given:
        return Path(given)
    local = Path("gateway.yaml")
    return local if local.exists() else packaged() / "gateway.yaml"


def load(sources: Sources) -> Config:
    """Read and check everything. Raises ConfigError."""
    try:
        variables = credentials.environment(sources.env_file)
    except credentials.EnvFileProblem as error:
        name = sources.env_file.name if sources.env_file else ".env"
        raise ConfigError([Problem(name, 1, 1, (), str(error).partition(": ")[2])]) from error
    documents = _read_all(sources.config)
    unset = {
        at: _expand(document, variables, sources.config.parent)
        for at, document in enumerate(documents)
    }
    main = documents[0]
    settings = _validated(main, schema.GatewayFile)
    files = [_validated(document, schema.ProvidersFile) for document in documents[1:]]
    _raise_if_any(documents)
    assert isinstance(settings, schema.GatewayFile)
    settings = _overridden(settings, sources.overrides)
    entries: dict[str, tuple[ProviderEntry, Document, Mapping[Where, credentials.Expanded]]] = {}
    for at, (document, file) in enumerate(zip(documents, [settings, *files], strict=True)):
        for name, entry in file.providers.items():  # type: ignore[union-attr]
            if name in entries:
                other = entries[name][1].file
                document.complain(
                    ("providers", name), f"a provider of this name stands in {other} too"
                )
            entries[name] = (entry, document, unset[at])
    outside = Document("environment")
    documents.append(outside)
    proxies = Proxies(variables, lambda name, text: outside.complain((name,), text))
    registry = build_registry(settings, entries, sources.demo_url, proxies)
    if settings.cache.store == "redis" and settings.redis.url is None:
        main.complain(("cache", "store"), "needs redis.url")
    limits = limit_rules(settings, {*entries, "demo"}, main)
    certificate = sources.certificate or _certificate(main, settings.tls, sources.config.parent)
    _raise_if_any(documents)
    return Config(sources.config, settings, registry, certificate, limits)


def _overridden(
    settings: schema.GatewayFile, overrides: tuple[tuple[str, str, object], ...]
) -> schema.GatewayFile:
    changed: dict[str, Section] = {}
    for section, key, value in overrides:
        now = changed.get(section, getattr(settings, section))
        try:
            changed[section] = type(now).model_validate(now.model_dump() | {key: value})
        except ValidationError as error:
            text = str(error.errors()[0]["msg"])
            raise ConfigError([Problem("command line", 1, 1, (section, key), text)]) from error
    return settings.model_copy(update=changed)


def _certificate(main: Document, tls: schema.Tls, folder: Path) -> Certificate | None:
    """The files under `tls:`, relative to gateway.yaml, tried out: a relay must not start to find
    them wrong.
    """
    if tls.certificate is None and tls.key is None:
        return None
    if tls.certificate is None or tls.key is None:
        main.complain(("tls",), "needs both certificate and key")
        return None
    found = Certificate(folder / tls.certificate, folder / tls.key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(found.chain, found.key)
    except ssl.SSLError as error:
        reason = (error.reason or "not PEM").lower().replace("_", " ")
        main.complain(("tls", "certificate"), f"does not make a certificate with tls.key: {reason}")
    except OSError as error:
        at = "key" if found.chain.is_file() else "certificate"
        main.complain(("tls", at), f"cannot be read: {error.strerror}")
    return found


def json_schema() -> dict[str, Any]:
    """The JSON Schema of gateway.yaml, for editors."""
    return schema.GatewayFile.model_json_schema()


def _raise_if_any(documents: list[Document]) -> None:
    in_order = (
        sorted(document.problems, key=lambda p: (p.line, p.column)) for document in documents
    )
    if problems := [problem for ordered in in_order for problem in ordered]:
        raise ConfigError(problems)


def _read_all(path: Path) -> list[Document]:
    main = read(path, path.name)
    documents = [main]
    includes = main.data.get("include") if isinstance(main.data, dict) else None
    for at, pattern in enumerate(includes if isinstance(includes, list) else []):
        found = sorted(path.parent.glob(pattern)) if isinstance(pattern, str) and pattern else []
        if not found:
            main.complain(("include", at), f"no file matches '{pattern}'")
        documents += [read(file, _shown(file, path.parent)) for file in found]
    return documents


def _shown(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else file.name


def _expand(
    document: Document, variables: Mapping[str, str], folder: Path
) -> dict[Where, credentials.Expanded]:
    """Expand every text of the document in place.

    Inside a provider's `auth` a missing variable leaves that provider unconfigured: those templates
    are returned, by place, for the registry. Anywhere else it is a problem.
    """
    templates: dict[Where, credentials.Expanded] = {}
    for where, holder, key in list(_texts(document.data, ())):
        expanded = credentials.expand(holder[key], variables, folder)
        if expanded.bad:
            document.complain(where, expanded.bad)
        if _is_auth(where):
            templates[where] = expanded
        elif expanded.missing:
            names = ", ".join(expanded.missing)
            document.complain(where, f"{names} is not set; set it, or write ${{NAME:-default}}")
        else:
            holder[key] = expanded.text
    return templates


def _is_auth(where: Where) -> bool:
    return where[0] == "providers" and "auth" in where[2:] and "value" in where


def _texts(node: Any, where: Where) -> Iterator[tuple[Where, Any, Any]]:
    pairs = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in pairs:
        if isinstance(value, str):
            yield (*where, key), node, key
        else:
            yield from _texts(value, (*where, key))


def _validated(document: Document, model: type[Section]) -> Section | None:
    data = document.data
    if data is None or (document.problems and not isinstance(data, dict)):
        return None
    if isinstance(data, dict) and isinstance(account := data.get("cloudflare"), dict):
        # An empty variable means the default here, not an empty gateway name.
        data["cloudflare"] = {k: v for k, v in account.items() if v != "" or k not in _ACCOUNT}
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False):
            document.complain(detail["loc"], _worded(detail, detail["loc"], model))
    return None


def _worded(detail: Any, where: Where, model: type[Section]) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = known_names(where[:-1], model)
        near = difflib.get_close_matches(str(where[-1]), known, 1, 0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
        return f"unknown key; {hint}"
    if kind == "missing":
        return "is missing"
    if kind == "model_type":
        return "should be a mapping"
    return str(detail["msg"]).replace("Input should be", "should be")


def known_names(where: Where, model: type[Section]) -> list[str]:
    """The keys that the schema has at `where`."""
    whole = model.model_json_schema()
    node: Any = whole
    for part in where:
        node = _child(whole, node, part)
    return sorted(_resolved(whole, node).get("properties", {}))


def _child(whole: Any, node: Any, part: str | int) -> Any:
    node = _resolved(whole, node)
    if part in node.get("properties", {}):
        return node["properties"][part]
    other = node.get("items") if isinstance(part, int) else node.get("additionalProperties")
    return other if isinstance(other, dict) else {}


def _resolved(whole: Any, node: Any) -> Any:
    """Follow a reference; of alternatives take the one that is a section."""
    for option in node.get("anyOf", [node]):
        if "$ref" in option:
            return whole["$defs"][option["$ref"].rpartition("/")[2]]
    return node
