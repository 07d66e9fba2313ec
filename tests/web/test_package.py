"""The npm package that `npm pack` builds from web/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import relay
from tests.processes import ROOT, output
from tests.tools import need
from tests.web.test_client import WEB

pytestmark = pytest.mark.programs

PACKED = {
    "LICENSE",
    "README.md",
    "package.json",
    "dist/components/AIGatewayChat.d.ts",
    "dist/components/AIGatewayChat.jsx",
    "dist/utils/AIGatewayClient.d.ts",
    "dist/utils/AIGatewayClient.js",
}


def _targets(exports: Any) -> set[str]:
    if isinstance(exports, str):
        return {exports.removeprefix("./")}
    return set().union(*map(_targets, exports.values()))


async def test_the_package_has_exactly_the_client_and_the_component_with_their_types(
    tmp_path: Path,
) -> None:
    need("npm")
    shutil.copy(ROOT / "LICENSE", tmp_path)
    web = shutil.copytree(WEB, tmp_path / "web", ignore=shutil.ignore_patterns("node_modules"))
    printed = await output(
        "npm", "pack", "--dry-run", "--json", cwd=web, env={"HOME": str(tmp_path)}
    )
    (packed,) = json.loads(printed[printed.index("[\n") :])
    assert {file["path"] for file in packed["files"]} == PACKED
    assert packed["version"] == relay.__version__
    exports = json.loads((web / "package.json").read_text())["exports"]
    assert _targets(exports) == PACKED - {"LICENSE", "README.md"}, "each export is packed"
    assert not (web / "dist").exists(), "no build output is left"
