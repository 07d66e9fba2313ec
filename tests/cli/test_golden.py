"""Golden files: the output of `relay explain` and the bodies of errors.

`make golden` rewrites them; read the diff.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from relay.cli.explain import explain
from relay.core import error_bodies
from relay.core.errors import ConfigInvalid, ProviderNotConfigured, UnknownProvider, UpstreamTimeout
from relay.registry.load import Sources, load
from tests.core.meters.usage_table import BEGIN, END, text_with_table
from tests.processes import ROOT

GOLDEN = Path(__file__).parent.parent / "golden"
CALLS = [
    ("POST", "/api/v1/ai-gateway/providers/openai/v1/chat/completions"), ("WS", "/api/v1/ai-gateway/ws/openai"),
    ("POST", "/api/v1/ai-gateway/providers/google-ai-studio/v1beta/models/gemini-2.5-flash:generateContent?key=theirs"),
    ("WS", "/api/v1/ai-gateway/ws/google-ai-studio"), ("WS", "/api/v1/ai-gateway/ws/elevenlabs"), ("WS", "/api/v1/ai-gateway/ws/cartesia"),
    ("GET", "/api/v1/ai-gateway/providers/fal/queue/fal-ai/flux/requests/1/status"), ("POST", "/api/v1/ai-gateway/providers/anthropic/v1/messages"),
    ("POST", "/api/v1/ai-gateway/providers/google-ai-studio/v1beta/openai/chat/completions"),
]  # fmt: skip
ERRORS = [
    ProviderNotConfigured("openai", ("OPENAI_API_KEY",)), UnknownProvider("opnai", "openai"),
    UpstreamTimeout("before its response began", 300), ConfigInvalid(("gateway.yaml:1:1: sever: unknown key; did you mean 'server'?",)),
]  # fmt: skip
ENV = {
    "direct": "OPENAI_API_KEY=sk-0123456789abcdefghijklmnop\nELEVENLABS_API_KEY=sk_0123456789abcdefghijklmnop\n",
    "cloudflare": "OPENAI_API_KEY=sk-0123456789abcdefghijklmnop\nCARTESIA_API_KEY=sk_car_0123456789abcdef\nCLOUDFLARE_ACCOUNT_ID=acct\nCLOUDFLARE_API_KEY=cf-0123456789abcdefghij\n",
}


def _compare(name: str, text: str) -> None:
    """Compare a text with its golden file, or write the file with GOLDEN=write."""
    file = GOLDEN / name
    if os.environ.get("GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.read_text() == text


@pytest.mark.parametrize("route", ENV)
def test_explain(route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.endswith("_API_KEY") or name.startswith(("CLOUDFLARE_", "FAL_KEY", "RELAY_")):
            monkeypatch.delenv(name)
    (tmp_path / ".env").write_text(ENV[route])
    config = load(Sources(ROOT / "gateway.yaml", tmp_path / ".env"))
    _compare(f"explain-{route}.txt", "\n".join(f"$ relay explain {method} '{path}'\n{explain(config, method, path)}\n" for method, path in CALLS))


def test_error_bodies_match_their_golden_file() -> None:
    shown = [
        f"{error.status} {error.code} for {format_}\n{json.dumps(json.loads(error_bodies.error_body(error, format_, 'the-id')), indent=1)}\n{error_bodies.error_event(error, format_, 'chat', 'the-id').decode()}"
        for error in ERRORS
        for format_ in ("openai", "anthropic", "google", "elevenlabs")
    ]
    _compare("errors.txt", "\n".join(shown))


def test_the_table_of_usage_fields_in_the_documents_is_current() -> None:
    file = ROOT / "docs/ledger.md"
    text = file.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    if os.environ.get("GOLDEN") == "write":
        file.write_text(text_with_table(text))
    assert file.read_text() == text_with_table(text)
