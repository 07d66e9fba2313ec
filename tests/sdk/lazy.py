"""Vendors' SDKs as modules that are imported with their first use: together they take seconds, and
each test process collects every test module.
"""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """Stands for a module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest asks every global of a test module for some such names
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)
