"""The programs that `relay connect` sets up: their settings files, and the URL that each needs.

Owns the base URLs, the names of settings, the form of a key and how a URL is shown, and which
environment variable moves a file. How a file is changed is in settings_formats.py, when it is
changed in connections.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from relay.cli.settings_formats import ENV, JSON, TOML, YAML, Format, SettingPath
from relay.core.paths import API

Vendor = Literal["anthropic", "openai", "google-ai-studio"]
"""The provider of gateway.yaml, by whose API a program calls."""

_KEY = re.compile(r"[!-~]+\Z")
_PASSWORD = re.compile(r"//[^/@\s]*@")

BASES: dict[str, tuple[Vendor, str, str]] = {
    "anthropic": ("anthropic", f"{API}/providers/anthropic", "/v1/models?limit=1"),
    "anthropic v1": ("anthropic", f"{API}/providers/anthropic/v1", "/models?limit=1"),
    "openai v1": ("openai", f"{API}/providers/openai/v1", "/models"),
    "google": (
        "google-ai-studio",
        f"{API}/providers/google-ai-studio",
        "/v1beta/models?pageSize=1",
    ),
    "google v1beta": (
        "google-ai-studio",
        f"{API}/providers/google-ai-studio/v1beta",
        "/models?pageSize=1",
    ),
}
"""What a program appends paths to, by name: the provider, the path of the base URL on the relay,
and a GET below it that costs nothing."""


class Base(NamedTuple):
    """In place of a value: the base URL of this name in BASES."""

    name: str


class Key(NamedTuple):
    """In place of a value: the key of the client."""


Value = str | Base | Key


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting in a file of a program, and what it is set to."""

    path: SettingPath
    value: Value

    @property
    def name(self) -> str:
        """The name as it is shown."""
        return ".".join(self.path)


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """A file of a program, and what the relay sets in it."""

    format: Format
    settings: tuple[Setting, ...]
    places: Callable[[Path, Mapping[str, str]], Sequence[Path]]
    """Returns where the file may be, from the home folder and the environment: the first that
    exists is used, else the last."""

    def path(self, home: Path, environment: Mapping[str, str]) -> Path:
        """Return the file that the program reads."""
        places = self.places(home, environment)
        return next((place for place in places if place.exists()), places[-1])


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that is connected. `client` is the name of its client at the relay."""

    title: str
    client: str
    files: tuple[SettingsFile, ...]
    next_command: str
    notes: tuple[str, ...] = ()

    @property
    def bases(self) -> list[str]:
        """The base URLs that the program uses, by their names in BASES."""
        values = [setting.value for file in self.files for setting in file.settings]
        return [value.name for value in values if isinstance(value, Base)]


def _in_folder(variable: str, default: str, *names: str) -> Callable[..., list[Path]]:
    """Files in the folder that a variable names, else in that one below the home folder."""

    def places(home: Path, environment: Mapping[str, str]) -> list[Path]:
        folder = Path(environment.get(variable) or home / default)
        return [folder / name for name in names]

    return places


def _opencode_settings() -> tuple[Setting, ...]:
    bases = {"openai": "openai v1", "anthropic": "anthropic v1", "google": "google v1beta"}
    return tuple(
        setting
        for provider, base in bases.items()
        for setting in (
            Setting(("provider", provider, "options", "baseURL"), Base(base)),
            Setting(("provider", provider, "options", "apiKey"), Key()),
        )
    )


_CODEX = ("model_providers", "relay")
_GEMINI_FOLDER = ".gemini"
TOOLS = {
    "claude": Tool(
        "Claude Code",
        "claude-code",
        (
            SettingsFile(
                JSON,
                (
                    Setting(("env", "ANTHROPIC_BASE_URL"), Base("anthropic")),
                    Setting(("env", "ANTHROPIC_AUTH_TOKEN"), Key()),
                ),
                _in_folder("CLAUDE_CONFIG_DIR", ".claude", "settings.json"),
            ),
        ),
        'claude -p "Say hi"',
    ),
    "codex": Tool(
        "Codex",
        "codex",
        (
            SettingsFile(
                TOML,
                (
                    Setting(("model_provider",), "relay"),
                    Setting((*_CODEX, "name"), "relay"),
                    Setting((*_CODEX, "base_url"), Base("openai v1")),
                    Setting((*_CODEX, "wire_api"), "responses"),
                    Setting((*_CODEX, "experimental_bearer_token"), Key()),
                ),
                _in_folder("CODEX_HOME", ".codex", "config.toml"),
            ),
        ),
        'codex exec --skip-git-repo-check "Say hi"',
    ),
    "gemini": Tool(
        "Gemini CLI",
        "gemini-cli",
        (
            SettingsFile(
                ENV,
                (
                    Setting(("GOOGLE_GEMINI_BASE_URL",), Base("google")),
                    Setting(("GEMINI_API_KEY",), Key()),
                ),
                lambda home, _: [home / _GEMINI_FOLDER / ".env"],
            ),
            SettingsFile(
                JSON,
                (Setting(("security", "auth", "selectedType"), "gemini-api-key"),),
                lambda home, _: [home / _GEMINI_FOLDER / "settings.json"],
            ),
        ),
        'gemini --skip-trust -p "Say hi"',
        (
            "Gemini CLI reads this file in folders that it trusts, unless a .env or .gemini/.env is"
            " nearer.",
        ),
    ),
    "opencode": Tool(
        "opencode",
        "opencode",
        (
            SettingsFile(
                JSON,
                _opencode_settings(),
                lambda home, environment: [
                    Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "opencode" / name
                    for name in ("opencode.jsonc", "opencode.json")
                ],
            ),
        ),
        'opencode run -m openai/gpt-5-mini "Say hi"',
    ),
    "aider": Tool(
        "aider",
        "aider",
        (
            SettingsFile(
                YAML,
                (
                    Setting(("openai-api-base",), Base("openai v1")),
                    Setting(("openai-api-key",), Key()),
                ),
                lambda home, _: [home / ".aider.conf.yml"],
            ),
        ),
        'aider --model openai/gpt-5-mini --message "Say hi"',
    ),
}
"""The programs with a settings file, by the name that `relay connect` takes."""

ENVIRONMENT: dict[str, Value] = {
    "OPENAI_BASE_URL": Base("openai v1"),
    "OPENAI_API_KEY": Key(),
    "ANTHROPIC_BASE_URL": Base("anthropic"),
    "ANTHROPIC_AUTH_TOKEN": Key(),
    "GOOGLE_GEMINI_BASE_URL": Base("google"),
    "GEMINI_API_KEY": Key(),
}
"""What `relay connect env` exports, for any other program."""


def is_key(text: str) -> bool:
    """True if a text can be sent as a key: visible characters of ASCII."""
    return _KEY.match(text) is not None


def without_password(text: str, shown: str) -> str:
    """Return a text with `shown` in place of the password of a URL."""
    return _PASSWORD.sub(f"//{shown}@", text)


def resolved(value: Value, url: str, key: str) -> str:
    """Return the text of a value, for the relay at `url`."""
    if isinstance(value, Base):
        return url + BASES[value.name][1]
    return key if isinstance(value, Key) else value
