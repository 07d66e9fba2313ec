"""Read gateway.yaml, its includes and the environment into a Config.

Owns the order of the steps: read, expand, validate, build. The result is a complete Config, or a
ConfigError with every problem that was found.
"""

from __future__ import annotations

import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError

from relay import log
from relay.core.budgets import BudgetRules
from relay.core.errors import OperatorError
from relay.core.limits import Rule
from relay.core.text import quoted
from relay.core.unified import Unified
from relay.registry import credentials, schema
from relay.registry.aliases import build_unified
from relay.registry.budgets import budget_rules
from relay.registry.build import build_registry
from relay.registry.certificates import (
    Certificate,
    CertificateFiles,
    read_certificate,
    written_paths,
)
from relay.registry.clients import Clients, build_clients
from relay.registry.entries import ProviderEntry, Section
from relay.registry.expansion import Expander
from relay.registry.files import BadPattern, Files
from relay.registry.incomplete_files import InForce, find_lost_files, report_incomplete_files
from relay.registry.limits import limit_rules
from relay.registry.problems import MAX_PROBLEMS, Document, Problem, Where
from relay.registry.proxies import Proxies
from relay.registry.registry import Registry
from relay.registry.validation import validate
from relay.registry.yaml_file import read

_READABLE_BY_OTHERS = stat.S_IRGRP | stat.S_IROTH


class ConfigError(OperatorError):
    """The configuration is refused. `problems` has all problems, in the order of the files."""

    exit_code = 2

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(problem.in_full for problem in problems))
        self.problems = problems

    @property
    def report(self) -> str:
        return f"{self}\n{len(self.problems)} problem(s); the configuration is refused."


@dataclass(frozen=True, slots=True)
class Config:
    """The settings as written, and the objects built from them."""

    path: Path
    settings: schema.GatewayFile
    registry: Registry
    certificate: Certificate | None = None
    limits: tuple[Rule, ...] = ()
    clients: Clients = field(default_factory=Clients)
    budgets: BudgetRules = field(default_factory=BudgetRules)
    unified: Unified = field(default_factory=Unified)
    warnings: tuple[Problem, ...] = ()
    """Possible mistakes, which are accepted."""
    read: InForce = field(default_factory=InForce)
    """The files that the configuration was read from."""

    @property
    def all_limits(self) -> tuple[Rule, ...]:
        """The rules of `limits` and those of all clients of gateway.yaml."""
        own = (client.rights.limits for client in self.clients.by_name.values())
        return (*self.limits, *chain.from_iterable(own))

    @property
    def models(self) -> frozenset[str]:
        """The models in limits and fallbacks, without the patterns of prices."""
        fallbacks = (each for one in self.registry.providers.values() for each in one.fallbacks)
        named = {each.model for each in fallbacks if each.model}
        return frozenset(named.union(*(rule.models for rule in self.all_limits)))

    @property
    def secrets(self) -> frozenset[str]:
        """Every key, token and password in a URL, to be redacted in everything logged or stored."""
        settings = self.settings
        found = {settings.cloudflare.api_key, *settings.tracing.headers.values()}
        found |= {settings.access.admin_token, settings.access.read_token}
        found |= {key for client in settings.clients.values() for key in client.key}
        urls = [settings.redis.url, settings.database]
        for provider in self.registry.providers.values():
            targets = [
                provider.rest, provider.websocket, provider.rest_after, provider.websocket_after,
                *(rule.target for rule in provider.paths),
            ]  # fmt: skip
            urls += [t.proxy.url for t in targets if t and t.proxy]
            for credential in (c for t in targets if t for keys in t.pool if (c := keys.provider)):
                found |= {credential.value, credential.value.rpartition(" ")[2]}
        for url in urls:
            password = urlsplit(url or "").password or ""
            found |= {password, unquote(password)}
        return frozenset(secret for secret in found if secret)

    def log_warnings(self) -> None:
        """Log the warnings."""
        for warning in self.warnings:
            log.warn("config.warning", place=warning.place, message=warning.text)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a configuration is read from, at start and at each reload."""

    config: Path
    env_file: Path | None
    demo_url: str = ""
    """Base URL of the built-in provider, or empty if it does not run."""
    certificate: CertificateFiles | None = None
    """Replaces the certificate of the file."""
    overrides: tuple[tuple[str, str, object], ...] = ()
    """(section, key, value) of settings of the command line, which take precedence."""


def load(sources: Sources, files: Files | None = None, before: Config | None = None) -> Config:
    """Read and check a configuration, from disk or from `files`. Raises ConfigError.

    A reload passes the configuration in force as `before`: then a file that is empty or cut, and
    was not before, is a problem.
    """
    files = files or Files()
    variables = _variables(sources, files)
    paths, documents = _read_all(sources.config, files)
    if before is not None:
        pairs = list(zip(paths, documents, strict=True))
        report_incomplete_files(pairs, before.read, files.snapshot())
    if any(document.data is None for document in documents):
        _raise_if_any(documents)  # otherwise, names in an unreadable file would be unknown
    expander = Expander(variables, sources.config.parent, files)
    templates = [expander.expand(document) for document in documents]
    found = _Found(documents, templates, variables)
    config = found.build(sources, files)
    snapshot = files.snapshot()
    lost = find_lost_files(sources.env_file, before.read, snapshot, paths) if before else ()
    _raise_if_any([*documents, found.outside], list(lost))
    assert config is not None
    in_force = InForce(snapshot, found.with_providers(paths))
    warnings = (*_env_warnings(sources, files, variables), *found.warnings)
    return replace(config, warnings=warnings, read=in_force)


@dataclass(slots=True)
class _Found:
    """The documents of a configuration, from which a Config is built."""

    documents: list[Document]
    templates: list[dict[Where, credentials.Expanded]]
    variables: credentials.Variables
    outside: Document = field(default_factory=lambda: Document("environment"))
    """For the problems of variables that no file refers to, such as HTTPS_PROXY."""

    @property
    def warnings(self) -> list[Problem]:
        return [warning for document in self.documents for warning in document.warnings]

    def with_providers(self, paths: list[Path]) -> frozenset[str]:
        pairs = zip(paths, self.documents, strict=True)
        return frozenset(str(path) for path, document in pairs if _providers(document))

    def build(self, sources: Sources, files: Files) -> Config | None:
        """Build the Config; None if problems of the documents make that impossible."""
        main = self.documents[0]
        names = {*_names(self.documents), "demo"}
        settings = validate(main, schema.GatewayFile)
        others = [validate(document, schema.ProvidersFile) for document in self.documents[1:]]
        if settings is None or None in others:
            return None
        assert isinstance(settings, schema.GatewayFile)
        settings = _overridden(settings, sources.overrides)
        entries = self._entries([settings, *others])
        proxies = Proxies(
            self.variables.values, lambda name, text: self.outside.add_problem((name,), text)
        )
        registry = build_registry(settings, entries, sources.demo_url, names, proxies)
        if settings.cache.store == "redis" and settings.redis.url is None:
            main.add_problem(("cache", "store"), "needs redis.url")
        limits = limit_rules(settings, names, main)
        clients = build_clients(settings, names, main)
        paths = sources.certificate or written_paths(main, settings.tls, sources.config.parent)
        certificate = read_certificate(main, paths, files) if paths else None
        budgets = budget_rules(settings, main)
        unified = build_unified(settings, names, main)
        return Config(
            sources.config, settings, registry, certificate, limits, clients, budgets, unified
        )

    def _entries(
        self, files: list[Any]
    ) -> dict[str, tuple[ProviderEntry, Document, Mapping[Where, credentials.Expanded]]]:
        entries: dict[str, Any] = {}
        for document, file, templates in zip(self.documents, files, self.templates, strict=True):
            for name, entry in file.providers.items():
                if name in entries:
                    other = entries[name][1].file
                    document.add_problem(
                        ("providers", name), f"{other} has a provider of this name too"
                    )
                entries[name] = (entry, document, templates)
        return entries


def _names(documents: list[Document]) -> set[str]:
    """Return the names of all providers, valid or not."""
    return {name for document in documents for name in _providers(document)}


def _providers(document: Document) -> Mapping[str, Any]:
    found = document.data.get("providers") if isinstance(document.data, dict) else None
    return found if isinstance(found, dict) else {}


def _variables(sources: Sources, files: Files) -> credentials.Variables:
    try:
        return credentials.read_variables(sources.env_file, files)
    except credentials.EnvFileProblem as error:
        raise ConfigError([_of_env_file(sources, 1, str(error))]) from error


def _of_env_file(sources: Sources, line: int, message: str) -> Problem:
    name = sources.env_file.name if sources.env_file else ".env"
    return Problem(name, line, 1, (), message)


def _env_warnings(
    sources: Sources, files: Files, variables: credentials.Variables
) -> list[Problem]:
    """Return warnings about `.env`: lines that set nothing, and permissions."""
    text = "sets nothing: a line is NAME=value, and a quote that begins must end"
    found = [_of_env_file(sources, line, text) for line in variables.bad_lines[:MAX_PROBLEMS]]
    path = sources.env_file
    if path is None or not variables.from_file or not files.on_disk:
        return found
    if str(path.parent) == variables.values.get("CREDENTIALS_DIRECTORY"):
        return found  # of systemd: its mode shows an access list, and no other user may enter
    try:
        mode = path.stat().st_mode
    except OSError:
        return found
    if mode & _READABLE_BY_OTHERS:
        command = f"chmod 600 {shlex.quote(str(path))}"
        text = f"other users may read this file (mode {stat.S_IMODE(mode):04o}): {command}"
        found.append(_of_env_file(sources, 1, text))
    return found


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


def _raise_if_any(documents: list[Document], others: list[Problem] | None = None) -> None:
    in_order = (
        sorted(document.problems, key=lambda p: (p.line, p.column)) for document in documents
    )
    if problems := [*(problem for ordered in in_order for problem in ordered), *(others or [])]:
        raise ConfigError(problems)


def _read_all(path: Path, files: Files) -> tuple[list[Path], list[Document]]:
    main = read(path, path.name, files)
    paths, documents = [path], [main]
    includes = main.data.get("include") if isinstance(main.data, dict) else None
    known = {path.resolve()}
    for at in range(len(includes) if isinstance(includes, list) else 0):
        for file in _included(main, path.parent, at, files):
            if (real := file.resolve()) == path.resolve():
                main.add_problem(("include", at), f"{path.name} includes itself")
            if real not in known:
                known.add(real)
                paths.append(file)
                documents.append(read(file, _shown(file, path.parent), files))
    return paths, documents


def _included(main: Document, folder: Path, at: int, files: Files) -> list[Path]:
    pattern = main.data["include"][at]
    if not isinstance(pattern, str):
        return []  # the schema says so
    try:
        found = files.matching(folder, pattern)
    except BadPattern as error:
        main.add_problem(("include", at), str(error))
        return []
    if not found:
        main.add_problem(("include", at), f"no file matches '{quoted(pattern)}'")
    return found


def _shown(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else file.name
