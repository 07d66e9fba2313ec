"""Coverage of relay/ in each process that runs tests: a plugin of pytest, loaded by `make cover`.

It is named in PYTEST_PLUGINS, which workers of pytest-xdist inherit and read before any conftest.py
imports relay; `coverage run` would measure the controller alone, which runs no tests.
"""

from __future__ import annotations

import coverage

_measured = coverage.Coverage()  # what is measured, and how: setup.cfg
_measured.start()


def pytest_unconfigure() -> None:
    _measured.stop()
    _measured.save()
