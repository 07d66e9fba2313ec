"""Every snippet of the README for an SDK or a client runs as it stands, against the stand-in providers."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, output
from tests.sdk.conftest import Front
from tests.sdk.test_node import NODE, need_packages

pytestmark = pytest.mark.programs

README = (ROOT / "README.md").read_text()
SDKS = README[README.index("## Official SDKs") : README.index("## URLs")]
CLIENTS = README[README.index("## Our own clients") : README.index("## Official SDKs")]


def _named(kind: str, text: str) -> dict[str, str]:
    """Blocks by the line that introduces them."""
    found = re.findall(rf"^(\w[\w ]*)[^\n]*:\n\n```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {name.strip(): code for name, code in found}


PYTHON, NODE_SDKS = _named("python", SDKS), _named("js", SDKS)


def _here(code: str, front: Front) -> str:
    plain, tls = front.url.partition("://")[2], front.tls_url.partition("://")[2]
    return code.replace("127.0.0.1:8787", plain).replace("localhost:8443", tls)


async def _run(front: Front, *command: str) -> str:
    trust = {"SSL_CERT_FILE": str(front.authority), "NODE_EXTRA_CA_CERTS": str(front.authority)}
    return await output(*command, env={"PYTHONPATH": str(ROOT), "RELAY_URL": front.url} | trust)


def test_no_snippet_is_left_out() -> None:
    assert len(PYTHON) == SDKS.count("```python") == 7
    assert len(NODE_SDKS) == SDKS.count("```js") == 6


# What works through nginx works without it too (test_python.py, test_node.py): once is enough.
@pytest.mark.parametrize("front", ["nginx"], indirect=True)
@pytest.mark.parametrize("name", PYTHON)
async def test_python(front: Front, name: str) -> None:
    assert (await _run(front, sys.executable, "-c", _here(PYTHON[name], front))).strip()
    front.check_credentials()


@pytest.mark.parametrize("front", ["nginx"], indirect=True)
@pytest.mark.parametrize("name", NODE_SDKS)
async def test_node(front: Front, name: str) -> None:
    need_packages(NODE)
    script = NODE / f".readme-{os.getpid()}.mjs"  # one that no other test process writes
    script.write_text(_here(NODE_SDKS[name], front))
    try:
        assert (await _run(front, "node", str(script))).strip()
    finally:
        script.unlink()
    front.check_credentials()


async def test_the_javascript_client(front: Front, tmp_path: Path) -> None:
    """In Node, where the page's origin is RELAY_URL."""
    need_packages(NODE)
    [code] = re.findall(r"^```js\n(.*?)^```", CLIENTS, re.MULTILINE | re.DOTALL)
    script = NODE / f".readme-{os.getpid()}.mjs"
    script.write_text(code.replace("./AIGatewayClient.js", "../../../web/AIGatewayClient.js"))
    try:
        out = await _run(front, "node", str(script))
    finally:
        script.unlink()
    assert "response.done" in out and "Hello wörld" in out and "[DONE]" in out
