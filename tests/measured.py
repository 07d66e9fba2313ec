"""Measure the coverage of relay/ in each process that runs tests.

This module is a plugin of pytest that `make cover` loads. It is named in PYTEST_PLUGINS, which the
workers of pytest-xdist inherit and read before any conftest.py imports relay. `coverage run` would
measure only the controller, which runs no tests.
"""

from __future__ import annotations

import coverage

_measured = coverage.Coverage()  # configured in setup.cfg
_measured.start()


def pytest_unconfigure() -> None:
    _measured.stop()
    _measured.save()
