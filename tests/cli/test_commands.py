"""The command line: `check`, `explain`, `schema`, `init` and options of `serve`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from relay.cli.main import COMMANDS, main
from tests.processes import ROOT
from tests.relays import KEYS, provider, write_config
from tests.whole_run import CANARY


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an environment without keys."""
    monkeypatch.chdir(tmp_path)
    for name in (*KEYS, "CLOUDFLARE_ACCOUNT_ID", "CLOUDFLARE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_check_lists_the_providers_and_their_missing_variables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / ".env").write_text(f"OPENAI_API_KEY={KEYS['OPENAI_API_KEY']}\n")
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert "openai            ready" in out and "not configured: set FAL_KEY" in out and "no problems" in out
    assert CANARY not in out


def test_check_prints_every_problem_and_exits_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "gateway.yaml").write_text("sever: {}\nserver: {port: x}\n")
    assert main(["check"]) == 2
    err = capsys.readouterr().err
    assert "gateway.yaml:1:1" in err and "gateway.yaml:2:10" in err and "2 problem(s); the configuration is refused." in err
    assert main(["check", "--config", "nowhere.yaml"]) == 2
    assert main(["check", "--env-file", "nowhere.env"]) == 2
    assert "nowhere.env:1:1: there is no such file" in capsys.readouterr().err


def test_check_finds_included_files_relative_to_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "gateway.yaml").write_text("a mistake here: 1\n")
    other = folder / "staging"
    (other / "more").mkdir(parents=True)
    (other / "relay.yaml").write_text("include: [more/*.yaml]\n")
    (other / "more/one.yaml").write_text("providers:\n  one: {base_url: https://one.example.com}\n")
    assert main(["check", "staging/relay.yaml"]) == 0
    out = capsys.readouterr().out
    assert "one  ready" in out and out.endswith("staging/relay.yaml: no problems, 1 providers.\n")
    (other / "more/one.yaml").write_text("providers:\n  one: {base_url: nowhere}\n")
    assert main(["check", "staging/relay.yaml"]) == 2
    assert "more/one.yaml:2:9: providers.one.base_url" in capsys.readouterr().err
    assert main(["check", "staging"]) == main(["check", "nowhere.yaml"]) == 2


def test_an_env_file_that_cannot_be_accessed_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """A file below a folder of another user fails alike, but root can read every folder."""
    name = "x" * 300
    assert main(["check", "--env-file", name]) == 2
    assert capsys.readouterr().err.startswith(f"{name}:1:1: cannot be read: File name too long\n")


def test_explain_masks_secrets_and_calls_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / ".env").write_text("OPENAI_API_KEY=sk-0123456789abcdefghijklmnop\nCLOUDFLARE_ACCOUNT_ID=acct\nCLOUDFLARE_API_KEY=cf-0123456789abcdefghij\n")
    assert main(["explain", "POST", "/api/v1/ai-gateway/providers/openai/v1/chat/completions?x=1"]) == 0
    out = capsys.readouterr().out
    assert "sends        POST https://gateway.ai.cloudflare.com/v1/acct/default/openai/chat/completions?x=1" in out
    assert "header Authorization: Bearer sk-…mnop   (from OPENAI_API_KEY)" in out and "cf-…ghij" in out
    assert "0123456789" not in out
    assert main(["explain", "WS", "/api/v1/ai-gateway/ws/openai"]) == 0
    assert "subprotocols realtime" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [("GET", "/api/v1/ai-gateway/providers/opnai/x", "unknown_provider"), ("GET", "/x", "unknown_route"), ("GET", "/api/v1/ai-gateway/providers/openai/../x", "bad_path"), ("GET", "/api/v1/ai-gateway/ws/openai", "upgrade_required"), ("WS", "/api/v1/ai-gateway/ws/anthropic", "websocket_not_supported")],
)
def test_explain_shows_the_error_of_a_call_that_would_be_refused(folder: Path, capsys: pytest.CaptureFixture[str], method: str, path: str, code: str) -> None:
    assert main(["explain", method, path]) == 1
    assert code in capsys.readouterr().err


def test_explain_shows_a_provider_that_is_not_configured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "GET", "/api/v1/ai-gateway/providers/fal/queue/x"]) == 0
    out = capsys.readouterr().out
    assert "refused      503 provider_not_configured: set FAL_KEY" in out and "https://queue.fal.run/x" in out


def test_explain_names_the_limits_the_cache_and_the_timeouts_of_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    limits = [{"requests": 9, "name": "all"}, {"requests": 9, "name": "theirs", "providers": ["other"]}]
    write_config(tmp_path, {"limits": limits, "cache": {"ttl_s": 60}, "upstream": {"keepalive_s": 15}, "providers": {name: provider("https://api.example.com") for name in ("openai", "other")}})
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "GET", "/api/v1/ai-gateway/providers/openai/x"]) == 0
    out = capsys.readouterr().out
    assert "limits       all\n" in out and "cache        60 s, client\n" in out
    assert "timeouts     connect 10 s, first byte 600 s, idle 300 s, keepalive 15 s\n" in out


def test_the_table_of_commands_lists_every_command_module() -> None:
    modules = {file.stem for file in (ROOT / "relay/cli").glob("*.py") if "\ndef run(" in file.read_text()}
    assert modules == set(COMMANDS)


@pytest.mark.programs
def test_commands_without_the_ledger_do_not_import_the_database() -> None:
    """Imports delay each command: those of the whole relay take more than a second.

    The supervisor of `serve` does not import the relay either; its workers do.
    """
    code = "import sys; from relay.cli.main import build_parser; [(build_parser(names.split()), print(*sys.modules)) for names in sys.argv[1:]]"
    in_turn = [sys.executable, "-c", code, "init", "check reload schema", "explain", "serve"]
    lines = subprocess.run(in_turn, check=True, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    init, small, explain, serve = (set(line.split()) for line in lines)
    assert "pydantic" not in init and "aiohttp" not in small
    whole = {"sqlalchemy", "alembic", "redis", "relay.app", "relay.gateway"}
    assert not (whole | {"uvloop"}) & explain and not whole & serve


def test_schema_is_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert "providers" in json.loads(capsys.readouterr().out)["properties"]


def test_init_writes_the_files_and_keeps_existing_ones(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "gateway.yaml").write_text("mine: 1")
    assert main(["init"]) == 0
    assert (folder / "gateway.yaml").read_text() == "mine: 1"
    assert (folder / ".env.example").read_text() == (ROOT / ".env.example").read_text()
    assert len(list((folder / "config/providers").glob("*.yaml"))) == len(list((ROOT / "config/providers").glob("*.yaml")))
    assert "kept   gateway.yaml" in capsys.readouterr().out


def test_the_command_line_overrides_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(folder, {"server": {"port": 1}})
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "--port", "70000"])
    assert main(["serve", "--host", "0.0.0.0"]) == 1
    assert "--open" in capsys.readouterr().err


def test_the_env_example_lists_exactly_the_documented_variables(folder: Path) -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines if line and not line.startswith("#")]
    assert names == ["CLOUDFLARE_ACCOUNT_ID", "CLOUDFLARE_GATEWAY_ID", "CLOUDFLARE_API_KEY", "OPENAI_API_KEY", "GOOGLE_AI_API_KEY", "CARTESIA_API_KEY", "ELEVENLABS_API_KEY", "FAL_KEY"]
    assert all(line.endswith("=") for line in lines if line and not line.startswith("#"))
