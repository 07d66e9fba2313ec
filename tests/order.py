"""Order the tests for a run in several processes: tests that take seconds come first.

xdist gives each process an equal part of the list, in order. A process that has finished its part
takes tests from the end of another part. A slow test at the end of the list would delay the run.
"""

from __future__ import annotations

import os

import pytest

SLOW = (
    "tests/web/", "tests/e2e/", "tests/sdk/", "tests/server/test_processes", "tests/server/test_supervisor", "tests/test_whole_run", "tests/test_docs", "tests/cli/test_wheel",
    "tests/cli/test_doctor", "tests/ledger/test_crash", "tests/client/", "tests/registry/test_shipped", "tests/registry/test_mutated", "tests/storage/test_migrations", "tests/test_log_output", "tests/test_memory",
    "tests/core/test_large_bodies", "tests/calls/test_bounded_work", "tests/surfaces/test_slow_questions", "tests/gate/test_shared_limits", "tests/upstream/test_faults",
)  # fmt: skip


class SlowFirst:
    """Puts a share of the slow tests at the beginning of the part of each process."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        parts = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        if parts == 1:
            return
        slow = [item for item in items if item.nodeid.startswith(SLOW)]
        quick = [item for item in items if not item.nodeid.startswith(SLOW)]
        items[:] = [
            item for part in range(parts) for each in (slow, quick) for item in each[len(each) * part // parts : len(each) * (part + 1) // parts]
        ]  # fmt: skip
