"""The structure of the code: which package may import which, and which names are forbidden."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "relay").rglob("*.py"))

BASE = {"core", "log", "prices", "registry", "storage"}
MIDDLE = {"gate", "upstream", "cache", "ledger"}
GATEWAY = BASE | MIDDLE | {"background", "gateway"}
CALLS = GATEWAY | {"calls", "sessions"}
APPLICATION = CALLS | {"rest", "websocket", "surfaces", "timeouts", "periodic", "access_updates", "demo", "internals", "app"}
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "internals": {"core"},
    "log": {"core", "log_output", "log_pretty"},
    "log_pretty": {"core"},
    "log_output": set(),
    "prices": {"core"},
    "registry": {"core", "log", "prices"},
    "storage": {"core", "log"},
    **dict.fromkeys(MIDDLE, BASE),
    "background": BASE,
    "gateway": BASE | MIDDLE | {"background", "calls", "sessions"},
    "calls": GATEWAY,
    "sessions": GATEWAY | {"calls"},
    "timeouts": CALLS,
    "periodic": CALLS | {"timeouts"},
    "access_updates": CALLS,
    "rest": CALLS,
    "websocket": CALLS,
    "surfaces": CALLS | {"rest", "websocket"},
    "demo": {"core"},
    "app": APPLICATION,
    "client": {"core", "app", "server", "demo", "internals", "registry"},
    "server": APPLICATION,
    "cli": APPLICATION | {"server", "client"},
    "__main__": {"cli", "server"},
    "__init__": set(),
}
"""The packages that each package may import. A package may also import itself."""


def _package(module: Path) -> str:
    parts = module.relative_to(ROOT / "relay").parts
    return parts[0] if len(parts) > 1 else module.stem


def _imported(module: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "relay" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("relay.") and name != "relay.__version__"}
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_a_module_imports_only_packages_of_lower_layers(module: Path) -> None:
    assert _imported(module) <= MAY_IMPORT[_package(module)] | {_package(module)}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_a_module_has_a_docstring(module: Path) -> None:
    assert ast.get_docstring(ast.parse(module.read_text()))


def test_core_is_pure() -> None:
    """core/ uses no aiohttp, no clock, no file and no randomness."""
    forbidden = {"aiohttp", "time", "random", "secrets", "os", "pathlib", "socket", "datetime"}
    for module in (ROOT / "relay/core").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & forbidden, module.name


def test_only_upstream_opens_outbound_sockets() -> None:
    for module in MODULES:
        if _package(module) not in ("upstream", "client"):
            text = module.read_text()
            assert "ClientSession(" not in text and "ws_connect(" not in text, module.name


def test_no_module_has_a_catch_all_name() -> None:
    names = {module.stem for module in MODULES} | {module.parent.name for module in MODULES}
    assert not names & {"utils", "util", "helpers", "common", "manager", "misc"}


@pytest.mark.parametrize("step", ["limits.reserve(", "attempts.open(", "body.let_go()", "plan_transform("])
def test_a_rest_call_is_sent_by_one_function_whether_clients_share_it_or_not(step: str) -> None:
    """The steps that rest.py and calls/caching.py share are in calls/send.py."""
    modules = [ROOT / "relay/rest.py", *(ROOT / "relay/calls").glob("*.py")]
    counts = {module.name: module.read_text().replace(f"def {step}", "").count(step) for module in modules}
    assert {name: count for name, count in counts.items() if count} == {"send.py": 1}
