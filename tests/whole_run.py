"""Check a whole run: no credential in anything that a relay wrote, and no skipped test in CI.

Owns what these checks collect, in one process or several: a worker of pytest-xdist sends its part
to the controller through `workeroutput`, and only the controller decides.
"""

from __future__ import annotations

import io
import os
import re
from typing import Any

import pytest

SHOWN_CHARACTERS = 500

# Part of every credential in the tests. No log line, error body or repr may contain it (WholeRun).
CANARY = "CANARY"
# Keys and tickets that the relay makes, which no test can choose: each is a leak as well.
_MADE = re.compile(r"(?:rk|rt)_[A-Za-z0-9_-]{32}(?![A-Za-z0-9_-])")


def canary(name: str) -> str:
    """A credential that cannot be mistaken for any other text."""
    return f"{CANARY}-{name}-7d1f"


class LogStream(io.StringIO):
    """Keeps its log lines for the test, and the lines of all streams for the check of a run."""

    everything: list[str] = []

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.buffer = self

    def write(self, line: Any) -> int:
        text = line.decode() if isinstance(line, bytes) else line
        self.lines += text.splitlines()
        LogStream.everything.append(text)
        return len(text)

    def isatty(self) -> bool:
        return False


def _is_controller(config: pytest.Config) -> bool:
    """Whether this process is the controller of pytest-xdist, which runs no tests itself."""
    return hasattr(config.option, "dist") and config.option.dist != "no" and not hasattr(config, "workerinput")


class WholeRun:
    """Collects skipped tests, leaked credentials, and workers that died without a report."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._is_controller = _is_controller(config)
        self._skipped: dict[str, str] = {}
        self._leaks: list[str] = []
        self._lost_workers: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def _note(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        # The controller receives the reports of its workers again, except those of whole modules.
        if not self._is_controller and report.skipped and not hasattr(report, "wasxfail"):
            assert isinstance(report.longrepr, tuple)
            self._skipped[report.nodeid] = str(report.longrepr[2])

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        """Take over what a worker of pytest-xdist has collected, at its end."""
        output = getattr(node, "workeroutput", {})
        if "leaks" not in output:
            self._lost_workers.append(str(node.gateway.id))
            return
        self._leaks += output["leaks"]
        self._skipped |= output["skipped"]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._leaks += [_shown(text, at) for text in LogStream.everything if (at := _secret_at(text)) >= 0]
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput |= {"leaks": self._leaks, "skipped": self._skipped}
            return
        for problem in self._problems():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            print(f"\n{problem}")

    def _problems(self) -> list[str]:
        found = []
        if self._skipped and os.environ.get("FORBID_SKIPS"):
            found.append("FORBID_SKIPS: tests were skipped")
        if self._leaks:
            found.append(f"CANARY: {len(self._leaks)} log lines or error bodies hold a credential, such as:\n{self._leaks[0]}")
        if self._lost_workers:
            found.append(f"the log lines of the test processes {', '.join(self._lost_workers)} are lost: they ended early")
        return found

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """List the skipped tests at the end."""
        for nodeid, reason in self._skipped.items():
            terminalreporter.write_line(f"SKIPPED: {nodeid}: {reason}", yellow=True)


def _secret_at(text: str) -> int:
    """The place of a credential; -1 if there is none."""
    made = _MADE.search(text)
    return made.start() if made else text.find(CANARY)


def _shown(text: str, at: int) -> str:
    """An excerpt around the credential, encoded so that another process can receive it."""
    at = max(0, at - SHOWN_CHARACTERS // 2)
    return text[at : at + SHOWN_CHARACTERS].encode(errors="backslashreplace").decode()
