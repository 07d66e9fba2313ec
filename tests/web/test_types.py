"""The types of web/AIGatewayClient.js and web/AIGatewayChat.jsx, checked by TypeScript."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from relay.core.errors import CATALOGUE
from tests.processes import output
from tests.sdk.test_node import need_packages
from tests.web.test_client import WEB

pytestmark = pytest.mark.programs

TSC = str(WEB / "node_modules/.bin/tsc")
COPIED = {
    "components": ("AIGatewayChat.jsx", "AIGatewayChat.d.ts"),
    "utils": ("AIGatewayClient.js", "AIGatewayClient.d.ts"),
}


async def test_the_client_and_the_component_match_their_types() -> None:
    need_packages(WEB)
    await output(TSC, cwd=WEB, env={})


async def test_a_strict_app_with_copies_of_the_four_files_compiles(tmp_path: Path) -> None:
    need_packages(WEB)
    app = tmp_path / "app"
    shutil.copytree(WEB / "test/app", app)
    for folder, names in COPIED.items():
        (app / "src" / folder).mkdir()
        for name in names:
            shutil.copy(WEB / name, app / "src" / folder)
    (app / "node_modules").symlink_to(WEB / "node_modules")
    await output(TSC, cwd=app, env={})


def test_the_types_list_every_error_code_of_the_relay() -> None:
    declared = re.search(
        r"type RelayErrorCode =([^;]+);", (WEB / "AIGatewayClient.d.ts").read_text()
    )
    assert declared is not None
    assert set(re.findall(r'"(\w+)"', declared[1])) == {error.code for error in CATALOGUE}


def test_the_example_has_the_four_files_where_users_copy_them() -> None:
    assert '"../utils/AIGatewayClient"' in (WEB / "AIGatewayChat.jsx").read_text()
    for folder, names in COPIED.items():
        for name in names:
            assert (WEB / "examples/react/src" / folder / name).resolve() == WEB / name
