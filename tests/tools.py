"""Skip tests whose programs are not installed."""

from __future__ import annotations

import shutil

import pytest


def need(tool: str) -> None:
    """Skip the test if a program is not installed, and name it.

    CI installs every program and forbids skips, so a skip fails there (tests/whole_run.py).
    """
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed: scripts/install-test-tools installs it")
