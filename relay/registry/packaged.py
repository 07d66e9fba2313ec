"""The configuration that comes with the relay, and which gateway.yaml a command uses."""

from __future__ import annotations

from pathlib import Path

import relay


def packaged() -> Path:
    """The folder with the gateway.yaml that comes with the relay (docs/decisions/0016)."""
    return Path(relay.__file__).parent / "defaults"


def find_config(given: str | None) -> Path:
    """The gateway.yaml to use: the one named, in this folder, or packaged."""
    if given:
        return Path(given)
    local = Path("gateway.yaml")
    return local if local.exists() else packaged() / "gateway.yaml"
