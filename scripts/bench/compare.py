"""Compare two versions of the relay: check out the other one, and compute ratios of measurements.

`scripts/bench/run --against COMMIT` does the measurements.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LOCK = f"requirements/py{sys.version_info.major}.{sys.version_info.minor}.txt"


@dataclass(frozen=True)
class Tree:
    """The files of one version of the relay, and the Python that runs them."""

    folder: Path
    python: str = sys.executable


HERE = Tree(ROOT)


def checked_out(commit: str, folder: Path) -> Tree:
    """Check out `commit` below `folder`.

    It runs on this Python if both versions lock the same packages, or else on a new environment.
    """
    tree = folder / "tree"
    tree.mkdir()
    files = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", str(tree)], check=True, input=files)
    # Both trees load compiled code: code that a process compiles itself has another memory layout.
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(tree / "relay"), str(ROOT / "relay")], check=True)
    if _packages(tree / LOCK) == _packages(ROOT / LOCK):
        return Tree(tree)
    print(f"{commit} locks other packages ({LOCK}): creating an environment with them", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv/bin/python")
    install = ("install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", "-r", str(tree / LOCK))
    subprocess.run([python, "-m", "pip", *install], check=True)
    return Tree(tree, python)


def _packages(lock: Path) -> set[str]:
    """The packages of a lock file, without order and hashes."""
    return {line.partition(" \\")[0] for line in lock.read_text().splitlines() if "==" in line}


Launch = tuple[Sequence[float], Sequence[float]]
"""The values of one launch, by round: those of the new tree and those of the old one."""


@dataclass(frozen=True)
class Ratio:
    """New over old, over several launches."""

    median: float
    quartiles: tuple[float, float]
    extremes: tuple[float, float]


def ratio(launches: Sequence[Launch]) -> Ratio:
    """Compute the ratio of each launch as the median over its rounds.

    Both halves of a round are measured within seconds of each other; a process is a little faster
    or slower for its whole life, so each launch counts once.
    """
    found = [statistics.median(new / old for new, old in zip(*launch, strict=True)) for launch in launches]
    lower, _, upper = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return Ratio(statistics.median(found), (lower, upper), (min(found), max(found)))


def row(title: str, launches: Sequence[Launch]) -> str:
    """A row of the table: the medians of both trees and the distribution of their ratio."""
    new, old = (statistics.median(value for launch in launches for value in launch[at]) for at in (0, 1))
    found = ratio(launches)
    spread = " | ".join(f"{low:.3f} to {high:.3f}" for low, high in (found.quartiles, found.extremes))
    return f"| {title} | {old:.2f} | {new:.2f} | {found.median:.3f} | {spread} |"


TABLE = "| | before | now | now / before, median | its quartiles | lowest to highest launch |\n|---|---|---|---|---|---|"
