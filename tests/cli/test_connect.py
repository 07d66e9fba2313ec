"""`relay connect`: the settings files of programs, the key, `--dry-run` and `--undo`."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import stat
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay.cli.agent_tools import TOOLS
from relay.cli.main import main
from relay.storage.access import AccessStore
from relay.storage.access_rows import KeyRow
from relay.storage.database import Database, database_url, try_out
from tests.relays import CLIENT_KEY, provider, write_config

URL = "http://127.0.0.1:8787"
BASE = f"{URL}/api/v1/ai-gateway/providers"
PLACES = {
    "claude": ".claude/settings.json", "codex": ".codex/config.toml", "gemini": ".gemini/.env", "opencode": ".config/opencode/opencode.json",
    "aider": ".aider.conf.yml",
}  # fmt: skip
OTHERS = {
    "claude": '{\n  "model": "opus", // mine\n  "env": {"ANTHROPIC_BASE_URL": "https://old.example", "X": "1"}\n}\n',
    "codex": '# mine\nmodel = "gpt-5" # m\nmodel_provider = "old"\n\n[profiles.a]\nmodel = "o3"\n',
    "gemini": "# mine\nexport GEMINI_API_KEY='old key'\nOTHER=1\n",
    "opencode": '{\n\t// mine\n\t"theme": "x",\n\t"provider": {"openai": {"options": {"timeout": 5,}}},\n}\n',
    "aider": "# mine\nmodel: gpt-5\nopenai-api-key: old\n",
}


class Here:
    """A folder with a relay's gateway.yaml, and the home folder of a user."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.home, self._capsys = folder, folder / "home", capsys
        self.home.mkdir()
        for name in [name for name in os.environ if name.startswith(("XDG_", "CLAUDE", "CODEX", "RELAY_", "GEMINI"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.chdir(folder)

    def configure(self, **more: Any) -> None:
        write_config(self.folder, {"database": "keys.db", "providers": {"openai": provider("http://127.0.0.1:1")}} | more)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run `relay connect`. Returns the exit code, and what it printed."""
        code = main(["connect", *arguments])
        printed = self._capsys.readouterr()
        return code, printed.out, printed.err

    def connect(self, *arguments: str) -> str:
        code, out, errors = self.run(*arguments)
        assert code == 0, errors
        return out + errors

    def refused(self, *arguments: str) -> str:
        before = self.files()
        code, _, errors = self.run(*arguments)
        assert code == 1 and errors.startswith("relay: ")
        assert self.files() == before
        return errors

    def files(self) -> dict[str, str]:
        """The text of every file in the home folder, without the records."""
        found = (path for path in self.home.rglob("*") if path.is_file() and ".local" not in path.parts)
        return {str(path.relative_to(self.home)): path.read_text() for path in found}

    def write(self, place: str, text: str, mode: int = 0o644) -> Path:
        path = self.home / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def stored_keys(self) -> list[KeyRow]:
        async def read() -> list[KeyRow]:
            database = Database(database_url(str(self.folder / "keys.db")))
            try:
                return list(await AccessStore(database).keys())
            finally:
                await database.close()

        return asyncio.run(read())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], migrated_sqlite: Path) -> Here:
    if not migrated_sqlite.exists():
        asyncio.run(try_out(str(migrated_sqlite)))
    made = Here(tmp_path, monkeypatch, capsys)
    shutil.copy(migrated_sqlite, tmp_path / "keys.db")
    made.configure()
    return made


def _without_comments(text: str) -> Any:
    from relay.cli.json_text import parse

    return parse(text)


PARSE: dict[str, Callable[[str], Any]] = {"claude": _without_comments, "opencode": _without_comments, "codex": tomllib.loads, "aider": yaml.safe_load}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Files ---------------------------------------------------------------------------------------


def test_a_new_file_has_the_base_url_and_a_new_key_and_is_for_its_owner_alone(here: Here) -> None:
    said = here.connect("claude")
    [key] = here.stored_keys()
    path = here.home / ".claude/settings.json"
    settings = json.loads(path.read_text())["env"]
    assert settings["ANTHROPIC_BASE_URL"] == f"{BASE}/anthropic" and settings["ANTHROPIC_AUTH_TOKEN"].startswith("rk_")
    assert mode(path) == 0o600 and key.client == "claude-code"
    assert f"Claude Code now calls the relay at {URL}." in said and 'Try it: claude -p "Say hi"' in said and key.id in said
    assert settings["ANTHROPIC_AUTH_TOKEN"] not in said
    records = list((here.home / ".local/state").rglob("*.json"))
    assert [mode(record) for record in records] == [0o600] and mode(records[0].parent) == 0o700


def test_codex_has_a_provider_of_its_own(here: Here) -> None:
    here.connect("codex")
    settings = tomllib.loads((here.home / ".codex/config.toml").read_text())
    key = settings["model_providers"]["relay"].pop("experimental_bearer_token")
    assert settings == {"model_provider": "relay", "model_providers": {"relay": {"name": "relay", "base_url": f"{BASE}/openai/v1", "wire_api": "responses"}}}
    assert key.startswith("rk_")


def test_gemini_has_variables_and_the_kind_of_credential(here: Here) -> None:
    here.connect("gemini")
    lines = (here.home / ".gemini/.env").read_text().splitlines()
    assert lines[0] == f"GOOGLE_GEMINI_BASE_URL={BASE}/google-ai-studio" and lines[1].startswith("GEMINI_API_KEY=rk_")
    assert json.loads((here.home / ".gemini/settings.json").read_text()) == {"security": {"auth": {"selectedType": "gemini-api-key"}}}


def test_opencode_has_three_providers_and_aider_has_openai(here: Here) -> None:
    here.connect("opencode")
    found = json.loads((here.home / PLACES["opencode"]).read_text())["provider"]
    bases = {name: each["options"]["baseURL"] for name, each in found.items()}
    assert bases == {"openai": f"{BASE}/openai/v1", "anthropic": f"{BASE}/anthropic/v1", "google": f"{BASE}/google-ai-studio/v1beta"}
    here.connect("aider")
    assert yaml.safe_load((here.home / PLACES["aider"]).read_text())["openai-api-base"] == f"{BASE}/openai/v1"


@pytest.mark.parametrize("tool", TOOLS)
def test_other_settings_and_comments_stay_and_undo_restores_every_byte(here: Here, tool: str) -> None:
    path = here.write(PLACES[tool], OTHERS[tool], 0o640)
    here.connect(tool)
    text = path.read_text()
    assert "mine" in text and "old" not in text and mode(path) == 0o600
    backup = path.with_name(path.name + ".before-relay")
    assert backup.read_text() == OTHERS[tool]
    here.connect(tool, "--undo")
    assert here.files() == {PLACES[tool]: OTHERS[tool]} and mode(path) == 0o640


@pytest.mark.parametrize("tool", TOOLS)
def test_connecting_twice_changes_nothing_the_second_time(here: Here, tool: str) -> None:
    here.write(PLACES[tool], OTHERS[tool])
    here.connect(tool)
    before, times = here.files(), {path: path.stat().st_mtime_ns for path in here.home.rglob("*")}
    assert "already; nothing was changed" in here.connect(tool)
    assert here.files() == before and {path: path.stat().st_mtime_ns for path in here.home.rglob("*")} == times
    assert len(here.stored_keys()) == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_undo_removes_a_file_that_was_not_there_and_revokes_the_key(here: Here, tool: str) -> None:
    here.connect(tool)
    here.connect(tool, "--undo")
    [key] = here.stored_keys()
    assert here.files() == {} and key.revoked_s is not None
    assert "is not connected" in here.refused(tool, "--undo")


@pytest.mark.parametrize("tool", TOOLS)
def test_undo_keeps_what_was_added_since(here: Here, tool: str) -> None:
    path = here.write(PLACES[tool], OTHERS[tool])
    here.connect(tool)
    text = path.read_text()
    added = {"claude": ('"model"', '"new": 1, "model"'), "opencode": ('"theme"', '"new": 1, "theme"'), "codex": ("# mine\n", "# mine\nnew = 1\n"), "gemini": ("# mine\n", "# mine\nnew=1\n"), "aider": ("# mine\n", "# mine\nnew: 1\n")}[tool]
    path.write_text(text.replace(*added))
    here.connect(tool, "--undo")
    expected = OTHERS[tool].replace(*added)
    if tool in PARSE:
        assert PARSE[tool](path.read_text()) == PARSE[tool](expected) and "mine" in path.read_text()
    else:
        assert path.read_text().replace("export ", "") == expected.replace("export ", "")


def test_undo_leaves_a_setting_that_was_changed_since(here: Here) -> None:
    path = here.write(PLACES["claude"], OTHERS["claude"])
    here.connect("claude")
    path.write_text(path.read_text().replace(f"{BASE}/anthropic", "https://newer.example"))
    assert "left as they are: env.ANTHROPIC_BASE_URL" in here.connect("claude", "--undo")
    assert PARSE["claude"](path.read_text())["env"] == {"ANTHROPIC_BASE_URL": "https://newer.example", "X": "1"}


def test_a_link_stays_a_link(here: Here) -> None:
    target = here.write("dotfiles/claude.json", OTHERS["claude"])
    (here.home / ".claude").mkdir()
    link = here.home / ".claude/settings.json"
    link.symlink_to(target)
    said = here.connect("claude")
    assert link.is_symlink() and f"{BASE}/anthropic" in target.read_text() and "keep it out of repositories" in said
    here.connect("claude", "--undo")
    assert link.is_symlink() and target.read_text() == OTHERS["claude"]


def test_a_link_to_nothing_is_refused(here: Here) -> None:
    (here.home / ".claude").mkdir()
    (here.home / ".claude/settings.json").symlink_to(here.home / "gone.json")
    assert "which does not exist" in here.refused("claude")
    assert here.stored_keys() == []


@pytest.mark.parametrize(
    ("tool", "text", "why"),
    [
        ("claude", '{\n "a": 1\n "b": 2}', "line 3 is not JSON"),
        ("claude", "[]", "is not JSON"),
        ("claude", '{"env": "x"}', "env is not a group of settings"),
        ("claude", '{"a": tru}', "line 1 is not JSON"),
        ("codex", "a = 1\nb = \n", "line 2 is not TOML"),
        ("codex", 'model_providers = {relay = {name = "a"}}\n', "is written in a form that is not changed"),
        ("aider", "a: 1\n b: [\n", "is not YAML"),
        ("aider", "- a\n", "it has no settings by name"),
        ("opencode", "\udcff", "it is not UTF-8"),
    ],
)
def test_a_file_that_is_not_understood_is_left_as_it_is(here: Here, tool: str, text: str, why: str) -> None:
    path = here.home / PLACES[tool]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    code, _, errors = here.run(tool)
    assert code == 1 and why in errors and "was left as it is" in errors
    assert path.read_bytes() == text.encode(errors="surrogateescape") and here.stored_keys() == []


def test_a_read_only_file_is_refused_before_a_key_is_made(here: Here) -> None:
    here.write(PLACES["claude"], "{}", 0o444)
    assert "is read-only" in here.refused("claude")
    assert here.stored_keys() == []


def test_a_folder_in_place_of_a_file_is_refused(here: Here) -> None:
    (here.home / ".claude/settings.json").mkdir(parents=True)
    assert "cannot be read: Is a directory" in here.refused("claude")


def test_variables_move_the_files(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, tool, name in (("CLAUDE_CONFIG_DIR", "claude", "settings.json"), ("CODEX_HOME", "codex", "config.toml")):
        monkeypatch.setenv(variable, str(here.home / "moved"))
        here.connect(tool)
        assert (here.home / "moved" / name).exists()
    monkeypatch.setenv("CODEX_HOME", str(here.home / "elsewhere"))
    assert "which is not the file that it reads now" in here.refused("codex")


def test_opencode_jsonc_is_used_where_it_exists(here: Here) -> None:
    path = here.write(".config/opencode/opencode.jsonc", OTHERS["opencode"])
    here.connect("opencode")
    assert f"{BASE}/openai/v1" in path.read_text() and not path.with_name("opencode.json").exists()


def test_lines_that_end_in_crlf_stay_so(here: Here) -> None:
    path = here.write(PLACES["codex"], "")
    path.write_bytes(b'model = "a"\r\n\r\n[x]\r\ny = 1\r\n')
    here.connect("codex")
    assert path.read_bytes().count(b"\n") == path.read_bytes().count(b"\r\n") > 6


# The key -------------------------------------------------------------------------------------


def test_a_given_key_is_taken_and_none_is_made(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, stdin, variable in ((["--key", CLIENT_KEY], "", ""), (["--key", "-"], CLIENT_KEY + "\n", ""), ([], "", CLIENT_KEY)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("RELAY_KEY", variable)
        said = here.connect("claude", *arguments)
        assert json.loads((here.home / PLACES["claude"]).read_text())["env"]["ANTHROPIC_AUTH_TOKEN"] == CLIENT_KEY
        assert CLIENT_KEY not in said and here.stored_keys() == []
        monkeypatch.setenv("RELAY_KEY", "")
        assert "nothing was changed" in here.connect("claude"), "the key is kept"
        here.connect("claude", "--undo")


def test_a_made_key_that_is_replaced_is_revoked(here: Here) -> None:
    here.connect("claude")
    assert "is revoked" in here.connect("claude", "--key", CLIENT_KEY)
    [key] = here.stored_keys()
    assert key.revoked_s is not None


def test_a_key_that_was_revoked_is_made_anew(here: Here) -> None:
    here.connect("claude")
    [key] = here.stored_keys()
    assert main(["keys", "revoke", key.id]) == 0
    here.connect("claude")
    assert sorted(each.revoked_s is None for each in here.stored_keys()) == [False, True]
    here.connect("claude", "--undo")
    assert all(each.revoked_s is not None for each in here.stored_keys()) and here.files() == {}


def test_the_client_may_have_another_name(here: Here) -> None:
    here.connect("claude", "--client", "alice")
    assert [key.client for key in here.stored_keys()] == ["alice"]


def test_without_a_database_open_access_needs_no_key(here: Here) -> None:
    here.configure(database=None)
    said = here.connect("claude")
    assert "there is no database: none was made" in said
    assert json.loads((here.home / PLACES["claude"]).read_text())["env"]["ANTHROPIC_AUTH_TOKEN"] == "the-relay-has-it"
    here.connect("claude", "--undo")
    assert here.files() == {}


def test_without_a_database_required_access_needs_a_given_key(here: Here) -> None:
    here.configure(database=None, access={"mode": "required"}, clients={"me": {"key": CLIENT_KEY}})
    assert "give one of `clients` by --key - or RELAY_KEY" in here.refused("claude")
    here.connect("claude", "--key", CLIENT_KEY)


def test_no_key_is_made_in_a_folder_without_a_relay(here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "no relay was run in this folder" in here.refused("claude", "--url", "https://ai.example.com")
    assert "no relay was run in this folder" in here.refused("claude")
    assert list((tmp_path / "empty").iterdir()) == []
    here.connect("claude", "--url", "https://ai.example.com/", "--key", CLIENT_KEY)
    assert "https://ai.example.com/api/" in (here.home / PLACES["claude"]).read_text()


def test_undo_in_another_folder_restores_the_file_and_says_that_the_key_is_valid(here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here.connect("claude")
    (tmp_path / "other").mkdir()
    write_config(tmp_path / "other", {"database": None, "providers": {}})
    monkeypatch.chdir(tmp_path / "other")
    code, _, errors = here.run("claude", "--undo")
    assert code == 1 and "the settings are restored, but the key" in errors and here.files() == {}
    monkeypatch.chdir(tmp_path)
    here.connect("claude", "--undo")
    assert [key.revoked_s is not None for key in here.stored_keys()] == [True]


def test_a_key_whose_database_is_gone_is_named_and_forgotten_at_the_second_try(here: Here) -> None:
    here.connect("claude")
    [key] = here.stored_keys()
    here.configure(database=None)
    assert here.run("claude", "--undo")[0] == 1
    assert f"`relay keys revoke {key.id}`" in here.connect("claude", "--undo")
    assert "is not connected" in here.refused("claude", "--undo")


def test_a_key_is_given_after_the_database_is_gone(here: Here) -> None:
    here.connect("claude")
    here.configure(database=None)
    assert "which is no longer used, is not revoked" in here.connect("claude", "--key", CLIENT_KEY)
    here.connect("claude", "--undo")
    assert here.files() == {}


def test_no_key_is_made_where_the_record_cannot_be_written(here: Here) -> None:
    here.write(".local", "a file")
    assert "cannot be used: Not a directory" in here.refused("claude")
    assert here.stored_keys() == []


@pytest.mark.parametrize("given", ["", "a b", "a\nb", "é"])
def test_a_key_that_is_no_key_is_refused(here: Here, given: str) -> None:
    assert "has characters that no key has" in here.refused("claude", "--key", given)


# The URL -------------------------------------------------------------------------------------


def test_the_public_url_wins_over_host_and_port(here: Here) -> None:
    here.configure(server={"host": "0.0.0.0", "port": 9000})
    assert "http://127.0.0.1:9000/api" in here.connect("claude", "--dry-run")
    here.configure(server={"public_url": "https://ai.example.com"})
    assert "https://ai.example.com/api" in here.connect("claude", "--dry-run")
    assert "http://10.0.0.1/api" in here.connect("claude", "--dry-run", "--url", "http://10.0.0.1")
    assert "should be an http:// or https:// URL" in here.refused("claude", "--url", "ai.example.com")


def test_what_the_relay_lacks_is_said(here: Here) -> None:
    assert "The relay has no provider anthropic: add it to gateway.yaml." in here.connect("claude")
    here.configure(providers={"anthropic": provider("http://127.0.0.1:1", "MY_ABSENT_KEY")})
    assert "put MY_ABSENT_KEY into its .env" in here.connect("claude")


# --dry-run and env ---------------------------------------------------------------------------


@pytest.mark.parametrize("tool", TOOLS)
def test_a_dry_run_shows_the_change_without_a_secret_and_changes_nothing(here: Here, tool: str) -> None:
    here.write(PLACES[tool], OTHERS[tool])
    before = here.files()
    code, out, errors = here.run(tool, "--dry-run", "--key", CLIENT_KEY)
    assert code == 0 and "+ " in out and "(hidden)" in out and BASE in out and "Nothing was changed." in out
    assert CLIENT_KEY not in out + errors and "old key" not in out
    _, out, _ = here.run(tool, "--dry-run")
    assert "A key of the client" in out and "would be made" in out
    assert here.files() == before and here.stored_keys() == [] and not (here.home / ".local").exists()


def test_a_dry_run_after_connecting_has_nothing_to_change(here: Here) -> None:
    here.connect("claude")
    assert "settings.json: nothing to change" in here.connect("claude", "--dry-run")


def test_env_prints_exports_alone_and_the_same_ones_again(here: Here) -> None:
    code, out, errors = here.run("env")
    assert code == 0 and out.splitlines()[0] == f"export OPENAI_BASE_URL={BASE}/openai/v1"
    names = [line.removeprefix("export ").partition("=")[0] for line in out.splitlines()]
    assert names == ["OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "GOOGLE_GEMINI_BASE_URL", "GEMINI_API_KEY"]
    assert out.count("=rk_") == 3 and "rk_" not in errors
    assert here.run("env")[1] == out
    assert "set -gx OPENAI_API_KEY rk_" in here.run("env", "--shell", "fish")[1]
    assert "rk_" not in here.run("env", "--dry-run")[1]
    [key] = here.stored_keys()
    assert key.client == "shell"
    here.connect("env", "--undo")
    assert [each.revoked_s is not None for each in here.stored_keys()] == [True]


def test_a_record_that_is_not_ours_is_refused(here: Here) -> None:
    here.write(".local/state/ai-gateway-relay/connected/claude.json", "{}")
    assert "cannot be used: it is not what the relay wrote" in here.refused("claude")
