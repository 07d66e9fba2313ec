"""Two trees of the relay compared: the files and the Python of the other one, and the ratios of what
was measured of both. `scripts/bench/run --against COMMIT` measures.
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
    """`commit` as a tree below `folder`: with this Python where both want the same packages, or else
    with an environment of its own."""
    tree = folder / "tree"
    tree.mkdir()
    files = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", str(tree)], check=True, input=files)
    # Code that a process compiled itself lies in its memory otherwise than code that it loaded.
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(tree / "relay"), str(ROOT / "relay")], check=True)
    if _packages(tree / LOCK) == _packages(ROOT / LOCK):
        return Tree(tree)
    print(f"{commit} wants other packages ({LOCK}): making an environment with them", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv/bin/python")
    install = ("install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", "-r", str(tree / LOCK))
    subprocess.run([python, "-m", "pip", *install], check=True)
    return Tree(tree, python)


def _packages(lock: Path) -> set[str]:
    """What a lock names, whatever the order and the hashes."""
    return {line.partition(" \\")[0] for line in lock.read_text().splitlines() if "==" in line}


Launch = tuple[Sequence[float], Sequence[float]]
"""What one launch gave of both, round by round: the new tree's values and the old one's."""


@dataclass(frozen=True)
class Ratio:
    """New over old, over several launches."""

    median: float
    quartiles: tuple[float, float]
    extremes: tuple[float, float]


def ratio(launches: Sequence[Launch]) -> Ratio:
    """A launch counts with the median of its rounds: both halves of a round were measured within
    seconds of each other, and a process costs a little more or less for as long as it lives."""
    found = [statistics.median(new / old for new, old in zip(*launch, strict=True)) for launch in launches]
    lower, _, upper = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return Ratio(statistics.median(found), (lower, upper), (min(found), max(found)))


def row(title: str, launches: Sequence[Launch]) -> str:
    """A line of the table: medians of both, and what their ratio says."""
    new, old = (statistics.median(value for launch in launches for value in launch[at]) for at in (0, 1))
    told = ratio(launches)
    spread = " | ".join(f"{low:.3f} to {high:.3f}" for low, high in (told.quartiles, told.extremes))
    return f"| {title} | {old:.2f} | {new:.2f} | {told.median:.3f} | {spread} |"


TABLE = "| | before | now | now / before, median | its quartiles | lowest to highest launch |\n|---|---|---|---|---|---|"
