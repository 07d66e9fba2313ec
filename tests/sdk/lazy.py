"""Import the SDKs of vendors on first use.

Their imports take seconds together, and each test process collects every test module.
"""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """A module that is imported when its first attribute is read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        # pytest reads some private names of every global of a test module.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)
