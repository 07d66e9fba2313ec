"""From `${NAME}` to a value: the environment, `.env`, secret files, and which credential a call
gets.

Owns: what counts as set, template expansion, and taking a credential out of a client's request.
Never logs or shows a value; messages name variables only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dotenv import dotenv_values

_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PLACEHOLDER = re.compile(r"your[_-]|<.*>\Z|changeme\Z|x{3,}\Z", re.IGNORECASE)


class EnvFileProblem(Exception):
    """The `.env` file is there but cannot be read."""


def environment(env_file: Path | None) -> dict[str, str]:
    """The variables in force: those of `env_file`, overridden by the process's own."""
    values: dict[str, str] = {}
    if env_file is not None and env_file.exists():
        try:
            with env_file.open(encoding="utf-8") as stream:
                values = {
                    k: v for k, v in dotenv_values(stream=stream, interpolate=False).items() if v
                }
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise EnvFileProblem(f"{env_file.name}: cannot be read: {reason}") from error
    return values | dict(os.environ)


def is_set(value: str | None) -> bool:
    """False for what a copied example leaves behind: nothing, blanks, `your_account_id`,
    `<key>`.
    """
    return bool(value and value.strip()) and not _PLACEHOLDER.match(value.strip())  # type: ignore[union-attr]


@dataclass(frozen=True, slots=True)
class Expanded:
    """A template with its references replaced. `text` is complete only if `missing` and `bad` are
    empty.
    """

    text: str = field(repr=False)
    names: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    bad: str = ""
    scheme: str = ""
    """The text before the first reference: `Bearer `."""


def expand(template: str, variables: Mapping[str, str], folder: Path) -> Expanded:
    """Replace `${NAME}`, `${NAME:-default}` and `${file:PATH}` in `template`.

    Relative secret files are read from `folder`; one newline at their end is not part of the
    secret.
    """
    names: list[str] = []
    missing: list[str] = []
    bad: list[str] = []

    def value(match: re.Match[str]) -> str:
        reference = match.group(1)
        if reference.startswith("file:"):
            names.append(reference)
            text = _secret_file(folder, reference.removeprefix("file:"))
            if text is None:
                missing.append(reference)
            return text or ""
        name, has_default, default = reference.partition(":-")
        if not _NAME.match(name):
            bad.append(f"'${{{reference}}}' is not ${{NAME}}, ${{NAME:-default}} or ${{file:PATH}}")
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


def _secret_file(folder: Path, name: str) -> str | None:
    try:
        text = (folder / name).read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if is_set(text) else None


def mask(secret: str) -> str:
    """What may be shown of a secret: its scheme and a hint of its ends, or only that it is
    there.
    """
    scheme, space, value = secret.rpartition(" ")
    hint = f"{value[:3]}…{value[-4:]}" if len(value) >= 20 else "…"
    return f"{scheme}{space}{hint}"
