"""Name what a reload changed, for its answer, the log and `relay reload`.

Owns the comparison of two configurations. Values are never shown: they may be secrets. Which
changes need a restart is decided in restart.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from relay.registry.load import Config

_OTHERWISE_COMPARED = frozenset({"include", "providers"})
"""Sections that the registry is built from, whose providers are compared instead."""


class Reloaded(NamedTuple):
    """The result of a reload. Both lists hold names, such as `limits` or `server.port`."""

    changed: list[str]
    """Settings and providers that differ from those in force before."""
    needs_restart: list[str]
    """Changed settings that keep their values until the next start."""


def changed_names(before: Config, after: Config) -> list[str]:
    """The settings and providers that differ between two configurations in force."""
    settings = list(_changed_settings(before.settings, after.settings))
    if before.certificate != after.certificate and "tls.certificate" not in settings:
        settings.append("tls.certificate")
    return settings + list(_changed_providers(before, after))


def _changed_settings(before: BaseModel, after: BaseModel, prefix: str = "") -> Iterator[str]:
    for name in type(before).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if old == new or (not prefix and name in _OTHERWISE_COMPARED):
            continue
        if isinstance(old, BaseModel) and isinstance(new, BaseModel):
            yield from _changed_settings(old, new, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _changed_providers(before: Config, after: Config) -> Iterator[str]:
    old, new = before.registry.providers, after.registry.providers
    for name in sorted({*old, *new}):
        was, now = old.get(name), new.get(name)
        if was != now:
            yield f"providers.{name}{_kind_of_change(was, now)}"


def _kind_of_change(was: Any, now: Any) -> str:
    return " (added)" if was is None else " (removed)" if now is None else ""
