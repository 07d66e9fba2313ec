"""Every snippet of docs/sdks.md runs unchanged with only the packages of its install line.

The providers are stand-ins.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.isolated import NODE_COMMAND, link_node_modules, python_command
from tests.ledger.test_ledger import rows
from tests.processes import ROOT, output
from tests.sdk.conftest import Front
from tests.sdk.test_node import NODE, need_packages

pytestmark = pytest.mark.programs

TEXT = (ROOT / "docs/sdks.md").read_text()


@dataclass(frozen=True)
class Snippet:
    title: str
    install_line: str
    language: str
    code: str


def snippets(text: str) -> list[Snippet]:
    """The code blocks, each with its heading and the install line in front of it."""
    found = []
    for section in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]:
        for language, code in re.findall(r"^```(python|js)\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            [install_line] = re.findall(r"^```sh\n([^\n]*)\n```", section, re.MULTILINE)
            found.append(Snippet(section.partition("\n")[0], install_line, language, code))
    return found


ALL = {snippet.title: snippet for snippet in snippets(TEXT)}
OWN = ("The Python client", "The JavaScript client", "Within your own aiohttp application")  # test_docs.py has the first and the last
SDKS = [snippet for title, snippet in ALL.items() if title not in OWN]


async def run(snippet: Snippet, front: Front, folder: Path) -> str:
    """Run a snippet in `folder` with only the packages of its install line.

    Returns what it prints.
    """
    plain, tls = front.url.partition("://")[2], front.tls_url.partition("://")[2]
    code = snippet.code.replace("127.0.0.1:8787", plain).replace("localhost:8443", tls)
    env = {"SSL_CERT_FILE": str(front.authority), "NODE_EXTRA_CA_CERTS": str(front.authority), "RELAY_URL": front.url}
    if snippet.language == "python":
        command, script = python_command(snippet.install_line, folder / "packages"), folder / "snippet.py"
    else:
        need_packages(NODE)
        link_node_modules(snippet.install_line, NODE, folder)
        command, script = NODE_COMMAND, folder / "snippet.mjs"
    script.write_text(code)
    return await output(*command, str(script), env=env, cwd=folder)


def test_no_snippet_is_left_out() -> None:
    assert len(ALL) == len(re.findall(r"^```(?:python|js)$", TEXT, re.MULTILINE)) == 21
    assert [sum(snippet.language == language for snippet in SDKS) for language in ("python", "js")] == [11, 7]


# Only through nginx: test_python.py and test_node.py run the same calls also without it.
@pytest.mark.parametrize("front", ["nginx"], indirect=True)
@pytest.mark.parametrize("snippet", SDKS, ids=[snippet.title for snippet in SDKS])
async def test_a_snippet_runs_with_only_its_install_line(front: Front, snippet: Snippet, tmp_path: Path) -> None:
    assert (await run(snippet, front, tmp_path)).strip()
    front.check_credentials()
    if "metadata" in snippet.title:
        [row] = await rows(front.relay)
        assert row["metadata"] == {"team": "search", "user": "u-17"} and row["event_id"] == "order-4711"


@pytest.mark.parametrize("front", ["bare"], indirect=True)
@pytest.mark.parametrize(
    ("title", "install_line", "missing"),
    [
        ("OpenAI (Python)", "pip install openai", "openai[realtime]"),
        ("The Python client", "pip install openai", "No module named 'relay'"),
        ("OpenAI (Node)", "npm install openai", "Cannot find package 'ws'"),
    ],
)
async def test_a_snippet_fails_if_its_install_line_lacks_a_package(front: Front, title: str, install_line: str, missing: str, tmp_path: Path) -> None:
    snippet = ALL[title]
    with pytest.raises(AssertionError, match=re.escape(missing)):
        await run(Snippet(title, install_line, snippet.language, snippet.code), front, tmp_path)


async def test_the_javascript_client(front: Front, tmp_path: Path) -> None:
    """In Node, RELAY_URL takes the place of the origin of the page."""
    shutil.copy(ROOT / "web/AIGatewayClient.js", tmp_path)
    (tmp_path / "package.json").write_text(json.dumps({"type": "module"}))
    out = await run(ALL["The JavaScript client"], front, tmp_path)
    assert "response.done" in out and "Hello wörld" in out and "[DONE]" in out
