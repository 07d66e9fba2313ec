"""Programs that tests start and that may not be installed."""

from __future__ import annotations

import shutil

import pytest


def need(tool: str) -> None:
    """Skip, loudly, where a program is not installed; in CI, which installs it, fail instead."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed: scripts/install-test-tools installs it")
