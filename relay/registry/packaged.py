"""Find the configuration in the package, and the gateway.yaml that a command uses."""

from __future__ import annotations

from pathlib import Path

import relay


def packaged() -> Path:
    """Return the folder of the packaged gateway.yaml (docs/decisions/0016)."""
    return Path(relay.__file__).parent / "defaults"


def find_config(given: str | None) -> Path:
    """Return the gateway.yaml to use: the given one, that in this folder, or the packaged one."""
    if given:
        return Path(given)
    local = Path("gateway.yaml")
    return local if local.exists() else packaged() / "gateway.yaml"
