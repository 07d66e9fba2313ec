"""Expand `${NAME}` from the environment, `.env` and secret files.

Owns the reading of variables, the decision whether a value counts as set, the expansion of a
template, and the masked form of a secret. Messages name variables, and never show their values.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dotenv.parser import parse_stream

from relay.core.text import quoted
from relay.registry.files import Files, TooLarge, Unreadable

_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PLACEHOLDER = re.compile(r"your[_-]|<.*>\Z|changeme\Z|x{3,}\Z", re.IGNORECASE)


class EnvFileProblem(Exception):
    """The `.env` file exists but cannot be read; the text says why."""


@dataclass(frozen=True, slots=True)
class Variables:
    """The variables that `${NAME}` may refer to."""

    values: Mapping[str, str] = field(repr=False)
    unquoted: frozenset[str] = frozenset()
    """Environment variables whose values had quotes, which were removed."""
    from_file: frozenset[str] = frozenset()
    """Variables that the `.env` file sets."""
    bad_lines: tuple[int, ...] = ()
    """Numbers of lines of the `.env` file that set nothing and are no comments."""


def read_variables(env_file: Path | None, files: Files) -> Variables:
    """Read the variables of `env_file` and of the environment, which takes precedence. Raises
    EnvFileProblem.
    """
    given: dict[str, str] = {}
    bad: list[int] = []
    for binding in parse_stream(io.StringIO(_env_text(env_file, files))):
        if binding.error:
            bad.append(binding.original.line)
        elif binding.key is not None and binding.value:
            given[binding.key] = binding.value
    own = dict(os.environ)
    unquoted = {name: text for name in own if (text := _without_quotes(own[name])) is not None}
    return Variables(given | own | unquoted, frozenset(unquoted), frozenset(given), tuple(bad))


def _env_text(env_file: Path | None, files: Files) -> str:
    if env_file is None:
        return ""
    try:
        return files.read(env_file).decode("utf-8-sig")
    except TooLarge:
        text = "all configuration files together are larger than 4 MiB"
        raise EnvFileProblem(text) from None
    except Unreadable as error:
        if error.number == errno.ENOENT:
            return ""
        raise EnvFileProblem(f"cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise EnvFileProblem("cannot be read: it is not UTF-8 text") from error


def _without_quotes(value: str) -> str | None:
    """Remove the quotes that `docker run --env-file` keeps around a value; None without quotes."""
    text = value.strip()
    if len(text) >= len('""') and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return None


def is_set(value: str | None) -> bool:
    """False for an empty value, and for placeholders such as `your_account_id` or `<key>`."""
    return bool(value and value.strip()) and not _PLACEHOLDER.match(value.strip())  # type: ignore[union-attr]


@dataclass(frozen=True, slots=True)
class Expanded:
    """An expanded template. `text` is complete only if `missing` and `bad` are empty."""

    text: str = field(repr=False)
    names: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    bad: str = ""
    scheme: str = ""
    """The text before the first reference: `Bearer `."""


def expand(
    template: str, variables: Mapping[str, str], folder: Path, files: Files | None = None
) -> Expanded:
    """Replace `${NAME}`, `${NAME:-default}` and `${file:PATH}` in `template`.

    Paths of secret files are relative to `folder`; newlines at the end of a file are removed.
    """
    files = files or Files()
    names: list[str] = []
    missing: list[str] = []
    bad: list[str] = []

    def value(match: re.Match[str]) -> str:
        reference = match.group(1)
        if reference.startswith("file:"):
            names.append(reference)
            text = _secret_file(folder / reference.removeprefix("file:"), files)
            if text is None:
                missing.append(reference)
            return text or ""
        name, has_default, default = reference.partition(":-")
        if not _NAME.match(name):
            forms = "${NAME}, ${NAME:-default} or ${file:PATH}"
            bad.append(f"'${{{quoted(reference)}}}' is not {forms}")
            return ""
        names.append(name)
        found = variables.get(name)
        if is_set(found):
            return found.strip()  # type: ignore[union-attr]
        if not has_default:
            missing.append(name)
        return default

    text = _REFERENCE.sub(value, template)
    if "${" in _REFERENCE.sub("", template):
        bad.append("a '${' is not closed")
    first = _REFERENCE.search(template)
    scheme = template[: first.start()] if first else ""
    return Expanded(text, tuple(names), tuple(missing), bad[0] if bad else "", scheme)


def _secret_file(path: Path, files: Files) -> str | None:
    try:
        text = files.read(path).decode("utf-8").rstrip("\r\n")
    except (Unreadable, TooLarge, UnicodeDecodeError):
        return None
    return text if is_set(text) else None


def mask(secret: str) -> str:
    """Mask a secret but for its scheme, and a few characters at its ends if it is long."""
    scheme, space, value = secret.rpartition(" ")
    hint = f"{value[:3]}…{value[-4:]}" if len(value) >= 20 else "…"
    return f"{scheme}{space}{hint}"
