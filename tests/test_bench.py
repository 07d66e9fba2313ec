"""The benchmark's comparison of two commits: its arithmetic and the tree that it checks out."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT


@pytest.fixture(scope="module")
def compare() -> Any:
    spec = importlib.util.spec_from_file_location("compare", ROOT / "scripts/bench/compare.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["compare"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_launch_counts_as_the_median_of_its_rounds_and_the_spread_is_over_all_launches(compare: Any) -> None:
    launches = [([90.0, 300.0, 110.0], [100.0, 100.0, 100.0]), ([102.0], [100.0]), ([98.0], [100.0]), ([100.0], [100.0]), ([120.0], [100.0])]
    found = compare.ratio(launches)
    assert (found.median, found.quartiles, found.extremes) == (1.02, (1.0, 1.1), (0.98, 1.2))


def test_rounds_are_compared_in_pairs(compare: Any) -> None:
    """A machine that becomes twice as slow between rounds does not change the ratio."""
    assert compare.ratio([([10.0, 20.0, 40.0], [10.0, 20.0, 40.0])]).extremes == (1.0, 1.0)


def test_a_row_of_the_table_has_a_cell_for_each_column(compare: Any) -> None:
    row = compare.row("REST call", [([110.0, 110.0], [100.0, 100.0])] * 5)
    assert row == "| REST call | 100.00 | 110.00 | 1.100 | 1.100 to 1.100 | 1.100 to 1.100 |"
    assert row.count("|") == compare.TABLE.splitlines()[0].count("|")


@pytest.mark.programs
def test_a_commit_with_the_same_packages_runs_on_the_same_python(compare: Any, tmp_path: Path) -> None:
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    tree = compare.checked_out(head, tmp_path)
    assert (tree.folder / "relay/app.py").exists()
    assert not (tree.folder / ".git").exists()
    assert tree.python == sys.executable
    with pytest.raises(subprocess.CalledProcessError):
        (tmp_path / "other").mkdir()
        compare.checked_out("no-such-commit", tmp_path / "other")
