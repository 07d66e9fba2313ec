"""Public names that were renamed are not used in the code, configuration, tests or documents."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.processes import ROOT

ROOTS = ("relay", "tests", "docs", "config", "scripts", "web", "gateway.yaml", "README.md", "ARCHITECTURE.md", "SECURITY.md")
SUFFIXES = (".py", ".md", ".yaml", ".js", ".jsx", ".json", ".html", ".conf", ".txt", "")
KEEPS_OLD_NAMES = {
    "relay/core/record.py": "maps stored records",
    "relay/registry/validation.py": "refuses old keys with their new names",
    "relay/storage/migrations/versions/r0001_the_ledger.py": "an old schema",
    "relay/storage/migrations/versions/r0004_transport_and_surface.py": "renames columns",
    "tests/registry/test_mistakes.py": "tests the refusals",
    "tests/storage/test_backup.py": "writes a row of an old schema",
    "tests/storage/test_migrations.py": "creates a database with an old schema",
    "tests/test_names.py": "lists them",
}
OLD_NAMES = {
    "surface, of rest and websocket": r"""\bsurface\b["'`]?[ =:]+["'`]*(?:rest|websocket)\b""",
    "the column surface": r"INSERT INTO \w+ \([^)]*\bsurface\b(?!.*\btransport\b)",
    "own_ms": r"\bown_m?s\b",
    "meter, a key": r"""^\s*meter: [a-z]+$|["']meter["']\s*:|[{,] ?meter: (?!\w+[,)\]])|\bmeter=["']""",
    "jobs, a section": r"""^jobs:|`jobs[:.]|["']jobs["']\s*:\s*\{""",
    "metrics": r"refused_at_the_door|settling_dropped|\brelay_running\b",
    "events": r"""["'`](?:(?:ledger|redis)\.(?:lost|back)|later\.\w+|janitor\.\w+|overload\.refused|ledger\.unwritten|session\.farewell_failed|close\.failed"""
    r"""|files\.(?:exhausted|available)|control\.(?:order_late|unexpected|malformed))["'`]""",
    "away, a state": r"""["'`]away["'`]|`(?:redis|ledger): away`""",
}
EXAMPLES = {
    "surface, of rest and websocket": ['surface="rest"', "logs?surface=websocket", '{"surface": "rest"}'],
    "the column surface": ["INSERT INTO rollups (client, surface, outcome)"],
    "own_ms": ["| `own_ms` | the relay's own |", "exchange.own_s"],
    "meter, a key": ["    meter: openai", '{"meter": "openai"}', "{base_url: x, meter: openai}", 'provider(url, meter="fal")'],
    "jobs, a section": ["jobs: {cache: off}", "`jobs.cache`", '{"jobs": {"cache": "off"}}'],
    "metrics": ["relay_refused_at_the_door_total", "relay_settling_dropped_total", "relay_running"],
    "events": ['"ledger.lost"', "`redis.back`", '"later.failed"', '"janitor.failed"'],
    "away, a state": ['== "away"', "`redis: away`"],
}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """The text of every file that must not contain an old name."""
    found = [ROOT / name for name in ROOTS if (ROOT / name).is_file()]
    for name in ROOTS:
        for folder, folders, files in os.walk(ROOT / name):
            folders[:] = set(folders) - {"node_modules", "__pycache__", "dist"}
            found += [Path(folder, file) for file in files]
    ours = [path for path in found if path.suffix in SUFFIXES]
    names = {str(path.relative_to(ROOT)): path for path in ours if path.stat().st_size < 300_000}
    return {name: path.read_text(errors="replace") for name, path in names.items() if name not in KEEPS_OLD_NAMES}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_no_file_contains_an_old_name(name: str, texts: dict[str, str]) -> None:
    old = re.compile(OLD_NAMES[name], re.MULTILINE)
    assert [example for example in EXAMPLES[name] if not old.search(example)] == [], "the pattern finds its examples"
    assert len(texts) > 400
    found = [f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}" for path, text in texts.items() for match in old.finditer(text)]
    assert found == []
