"""The shape of the code: who may import whom, how large things may get, which names there are not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "relay").rglob("*.py"))

LINES = {"body", "caching", "call", "collecting", "dialing", "files", "gateway", "janitor", "later", "metering", "pump", "recording", "response", "rest", "rewrite", "sending", "session", "stream", "taps", "websocket"}
BELOW_LINES = {"core", "registry", "storage", "gate", "upstream", "cache", "ledger"}
MAY_IMPORT: dict[str, set[str]] = {
    "core": {"core"},
    "registry": {"core", "registry"},
    "storage": {"core", "storage"},
    "gate": {"core", "registry", "storage", "gate"},
    "upstream": {"core", "registry", "storage", "upstream"},
    "cache": {"core", "registry", "storage", "cache"},
    "ledger": {"core", "registry", "storage", "ledger"},
    "demo": {"core", "demo_realtime"},
    "demo_realtime": {"core"},
    "surfaces": BELOW_LINES | LINES | {"surfaces"},
    "app": BELOW_LINES | LINES | {"surfaces", "demo"},
    "doctor": {"core", "registry", "storage", "upstream", "client"},
    "explain": {"core", "registry", "upstream", "app"},
    "report": {"core", "registry", "storage", "ledger"},
    "banner": {"registry", "app"},
    "client": {"core", "client", "inprocess"},  # the last within from_config alone
    "inprocess": {"app", "connection", "demo", "registry"},
    "connection": BELOW_LINES | LINES | {"surfaces", "half_close"},
    "half_close": {"upstream"},
    "listen": {"core", "registry"},
    "tls": {"core", "registry"},
    "server": BELOW_LINES | LINES | {"surfaces", "app", "listen", "tls", "control", "connection", "signals"},
    "control": {"ledger"},
    "signals": set(),
    "supervisor": {"core", "registry", "ledger", "demo", "listen", "control", "signals"},
    "reloading": {"registry"},
    "worker": {"registry", "ledger", "control", "listen", "server"},
    "cli": {"core", "registry", "ledger", "storage", "listen", "server", "worker", "reloading", "supervisor", "control", "demo", "banner", "explain", "tls", "doctor", "report"},
    "__main__": {"cli", "signals"},
    "__init__": set(),
} | dict.fromkeys(LINES, BELOW_LINES | LINES)  # fmt: skip


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
def test_a_module_imports_only_what_lies_below_it(module: Path) -> None:
    assert _imported(module) <= MAY_IMPORT[_package(module)]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_a_module_says_what_it_owns(module: Path) -> None:
    assert ast.get_docstring(ast.parse(module.read_text()))


def test_core_is_pure() -> None:
    """No aiohttp, no clock, no file, no randomness of its own."""
    forbidden = {"aiohttp", "time", "random", "secrets", "os", "pathlib", "socket", "datetime"}
    for module in (ROOT / "relay/core").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & forbidden, module.name


def test_only_upstream_opens_outbound_sockets() -> None:
    for module in MODULES:
        if _package(module) not in ("upstream", "client"):
            assert "ClientSession(" not in module.read_text(), module.name


def test_there_are_no_drawers() -> None:
    names = {module.stem for module in MODULES} | {module.parent.name for module in MODULES}
    assert not names & {"utils", "util", "helpers", "common", "manager", "misc"}
