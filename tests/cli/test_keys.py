"""`relay keys`: make, list, show, revoke and rotate keys in the database, while no relay runs."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from relay.cli.keys import KeysFailed, carry_out
from relay.cli.main import build_parser, main
from relay.registry.load import Config, Sources, load
from relay.storage.access import AccessStore
from relay.storage.access_rows import KeyRow
from relay.storage.database import Database, database_url, try_out
from tests.relays import CLIENT_KEY, provider, write_config

MADE = re.compile(r"rk_[A-Za-z0-9_-]{32}\Z")
FILED = {"filed": {"key": CLIENT_KEY, "providers": ["openai"]}}


@pytest.fixture
async def migrated(tmp_path: Path, migrated_sqlite: Path) -> str:
    """The path of a SQLite file with empty tables."""
    if not migrated_sqlite.exists():
        await try_out(str(migrated_sqlite))
    return str(shutil.copy(migrated_sqlite, tmp_path / "migrated.db"))


def configure(folder: Path, setting: str | None, **more: Any) -> Config:
    write_config(folder, {"database": setting, "providers": {"openai": provider("http://127.0.0.1:1")}} | more)
    return load(Sources(folder / "gateway.yaml", folder / ".env"))


async def keys(config: Config, *arguments: str) -> list[str]:
    """Run `relay keys ARGUMENTS`. Returns the lines of standard output."""
    lines: list[str] = []
    await carry_out(config, build_parser(["keys"]).parse_args(["keys", *arguments]), lines.append)
    return lines


async def create(config: Config, *arguments: str) -> str:
    [secret] = await keys(config, "create", *arguments)
    return secret


async def listed(config: Config, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in await keys(config, "list", "--json", *arguments)]


async def shown(config: Config, target: str) -> Any:
    [line] = await keys(config, "show", target, "--json")
    return json.loads(line)


async def stored(setting: str) -> list[KeyRow]:
    database = Database(database_url(setting))
    try:
        return list(await AccessStore(database).keys())
    finally:
        await database.close()


async def test_a_made_key_is_the_only_text_on_standard_output_and_only_its_hash_is_stored(
    database_setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = await create(configure(tmp_path, database_setting), "web")
    assert MADE.match(secret)
    said = capsys.readouterr().err
    [row] = await stored(database_setting)
    assert row.sha256 == sha256(secret.encode()).digest() and row.client == "web" and row.created_by.startswith("cli:")
    assert f"key {row.id} of the client 'web'" in said and secret not in said


async def test_the_options_of_a_key_are_the_record_of_its_client(migrated: str, tmp_path: Path) -> None:
    config = configure(tmp_path, migrated)
    await create(
        config, "web", "--providers", "openai", "--models", "gpt-*,o3", "--models", "o4", "--endpoints", "chat", "--origins", "https://a.example",
        "--addresses", "10.0.0.0/8, 127.0.0.1", "--limit", "requests=10,window_s=60,models=a,models=b", "--metadata", "team=growth", "--expires", "2999-01-01",
    )  # fmt: skip
    found = await shown(config, "web")
    assert {name: found["client"][name] for name in ("name", "source", "record")} == {
        "name": "web", "source": "database",
        "record": {
            "providers": ["openai"], "models": ["gpt-*", "o3", "o4"], "endpoints": ["chat"], "origins": ["https://a.example"], "addresses": ["10.0.0.0/8", "127.0.0.1"],
            "limits": [{"requests": 10, "models": ["a", "b"]}], "metadata": {"team": "growth"},
        },
    }  # fmt: skip
    assert found["keys"][0]["expires_at"] == "2999-01-01T00:00:00Z"


async def test_a_second_key_of_a_client_shares_its_record(migrated: str, tmp_path: Path) -> None:
    config = configure(tmp_path, migrated)
    await create(config, "web", "--models", "o3")
    await create(config, "web")
    await create(config, "web", "--models", "o3")
    assert len(await listed(config, "--client", "web")) == 3
    with pytest.raises(KeysFailed, match="exists with another record; make its key without one"):
        await create(config, "web", "--models", "*")
    assert (await shown(config, "web"))["client"]["record"] == {"models": ["o3"]}


async def test_a_revoked_client_comes_back_with_the_rights_that_it_had(migrated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(tmp_path, migrated)
    await create(config, "web", "--models", "o3")
    await keys(config, "revoke", "web")
    await create(config, "web")
    assert (await shown(config, "web"))["client"]["record"] == {"models": ["o3"]}
    assert "its record is again the one it had" in capsys.readouterr().err


async def test_a_client_of_the_file_takes_no_record(migrated: str, tmp_path: Path) -> None:
    config = configure(tmp_path, migrated, clients=FILED)
    with pytest.raises(KeysFailed, match=r"the client 'filed' is in gateway\.yaml, and is changed there alone"):
        await create(config, "filed", "--models", "o3", "--metadata", "a=b")
    await create(config, "filed", "--expires", "30d")
    found = await shown(config, "filed")
    assert found["client"] == {"name": "filed", "source": "gateway.yaml", "record": {"providers": ["openai"]}}
    assert [(key["source"], key["state"]) for key in found["keys"]] == [("gateway.yaml", "valid"), ("database", "valid")]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(("create", "a", "--providers", "opnai"), "there is no such provider; did you mean 'openai'"), (("create", "a", "--endpoints", "chta"), "endpoints.0: is not a kind of endpoint; did you mean 'chat'"),
     (("create", "a", "--limit", "request=5"), "limits.0.request: unknown key; did you mean 'requests'"), (("create", "a", "--limit", "window_s=5"), "exactly one of"),
     (("create", "a", "--limit", "requests=1_0,window_s=60"), "limits.0.requests: should be a whole number"), (("create", "a", "--limit", "requests=٣,window_s=60"), "limits.0.requests: should be a whole number"),
     (("create", "a", "--addresses", "here"), "addresses.0: should be an address"), (("create", "a", "--origins", "a.example"), "origins.0: should be an origin"),
     (("create", "a", "--expires", "2020-01-01"), "expires: 2020-01-01 is in the past"), (("create", "a", "--expires", "soon"), "expires: 'soon' is not a time"),
     (("create", "a b"), "name: 'a b' should be a name of"), (("create", "10.0.0.1"), "not an address"), (("create", "0123456789ab"), "the form of a key's id"),
     (("rotate", "nobody"), "there is no client 'nobody'"), (("rotate", "filed", "--grace", "soon"), "grace: 'soon' is not a time"), (("rotate", "filed", "--expires", "0s"), "in the past"),
     (("rotate", "filed", "--grace", "60w"), "grace_s is not from 0 to"), (("create", "\udcff"), "should be a name of"), (("create", "a", "--models", "\udcff"), "the record is"), (("show", "\udcff"), "there is no key"),
     (("revoke", "nobody"), "there is no key and no client 'nobody'"), (("revoke", "0123456789ab"), "there is no key and no client '0123456789ab'"), (("show", "a b\n"), "there is no key"),
     (("revoke", "filed/1"), "is in gateway.yaml: remove it there"), (("revoke", "rk_secret"), "write - and the key on standard input"), (("show", "rk_secret"), "write - and the key on")],
)  # fmt: skip
async def test_a_mistake_is_refused_with_its_reason_and_stores_nothing(tmp_path: Path, migrated: str, arguments: tuple[str, ...], problem: str) -> None:
    config = configure(tmp_path, migrated, clients=FILED)
    with pytest.raises(KeysFailed, match=re.escape(problem)) as refused:
        await keys(config, *arguments)
    assert "rk_secret" not in str(refused.value)
    assert await stored(migrated) == []


@pytest.mark.parametrize("option", [("--metadata", "team"), ("--metadata", "=x"), ("--limit", "requests")])
def test_a_malformed_option_is_refused(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "create", "web", *option])
    assert "should be NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("setting", [None, "/proc/nowhere/relay.db", "postgresql://nobody@127.0.0.1:1/none"])
async def test_without_a_database_the_error_says_what_to_do(tmp_path: Path, setting: str | None) -> None:
    problem = "`database` is not set in gateway.yaml" if setting is None else "the database cannot be used"
    with pytest.raises(KeysFailed, match=problem):
        await keys(configure(tmp_path, setting), "create", "web")


async def test_the_first_key_warns_while_access_is_open(tmp_path: Path, migrated: str, capsys: pytest.CaptureFixture[str]) -> None:
    for config, warns in (
        (configure(tmp_path, migrated, access={"mode": "required"}), False), (configure(tmp_path, str(tmp_path / "other.db")), True), (configure(tmp_path, str(tmp_path / "other.db")), False)
    ):  # fmt: skip
        secret = await create(config, "web")
        captured = capsys.readouterr()
        assert ("warning: access.mode is open, so calls without a key are still allowed" in captured.err) is warns
        assert captured.out == "" and MADE.match(secret)


async def test_list_names_the_keys_of_file_and_database_with_their_state(migrated: str, tmp_path: Path) -> None:
    config = configure(tmp_path, migrated, clients=FILED | {"old": {"key": CLIENT_KEY + "2", "expires": "2020-01-01"}})
    for name in ("web", "app", "gone"):
        await create(config, name)
    await keys(config, "revoke", (await shown(config, "app"))["keys"][0]["id"])
    await create(config, "old")
    without_old = configure(tmp_path, migrated, clients=FILED)
    states = {(key["client"], key["source"]): key["state"] for key in await listed(config)}
    assert states == {
        ("filed", "gateway.yaml"): "valid", ("old", "gateway.yaml"): "expired", ("old", "database"): "valid",
        ("web", "database"): "valid", ("app", "database"): "revoked", ("gone", "database"): "valid",
    }  # fmt: skip
    assert [key["state"] for key in await listed(without_old, "--client", "old")] == ["no client"]
    table = await keys(config, "list")
    assert table[0].split() == ["id", "client", "state", "expires", "made", "by"] and len(table) == 7


async def test_list_prints_every_page(tmp_path: Path, migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.cli.keys.PAGE_ROWS", 2)
    original = AccessStore.keys
    monkeypatch.setattr(AccessStore, "keys", lambda self, client=None, after="", limit=2: original(self, client, after, limit))
    config = configure(tmp_path, migrated)
    for name in ("b", "a", "b", "c", "a"):
        await create(config, name)
    assert [key["client"] for key in await listed(config)] == ["a", "a", "b", "b", "c"]
    assert len(await listed(config, "--client", "b")) == 2


async def test_a_client_is_revoked_with_all_its_keys_and_a_key_alone(database_setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(tmp_path, database_setting, clients=FILED)
    for name in ("web", "web", "web", "app", "filed"):
        await create(config, name)
    one = (await listed(config, "--client", "web"))[0]["id"]
    capsys.readouterr()
    for arguments, said in (
        (("revoke", one), f"key {one} of the client 'web' revoked\n"), (("revoke", one), f"key {one} of the client 'web' was revoked before\n"), (("revoke", "web"), "client 'web': 2 keys revoked\n"),
        (("revoke", "filed"), "client 'filed': 1 key revoked\nfiled/1 in gateway.yaml stay valid: remove them there, and reload\n"),
    ):  # fmt: skip
        assert await keys(config, *arguments) == [] and capsys.readouterr().err == said
    assert {row.client for row in await stored(database_setting) if row.revoked_s is None} == {"app"}


async def test_keys_are_revoked_by_their_client_though_it_has_left_gateway_yaml(migrated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await create(configure(tmp_path, migrated, clients=FILED), "filed")
    config = configure(tmp_path, migrated)
    capsys.readouterr()
    await keys(config, "revoke", "filed")
    assert capsys.readouterr().err == "client 'filed': 1 key revoked\n"
    with pytest.raises(KeysFailed, match="there is no key and no client 'filed'"):
        await keys(config, "revoke", "filed")


async def test_a_leaked_key_is_found_and_revoked_by_itself_on_standard_input(tmp_path: Path, migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(tmp_path, migrated, clients=FILED)
    secret = await create(config, "web")
    await create(config, "web")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{secret}\n"))
    await keys(config, "revoke", "-")
    assert [row.sha256 for row in await stored(migrated) if row.revoked_s is not None] == [sha256(secret.encode()).digest()]
    for text, found in ((secret, "web"), (CLIENT_KEY, "filed")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        shown_keys = (await shown(config, "-"))["keys"]
        assert [key["client"] for key in shown_keys] == [found]
    monkeypatch.setattr(sys, "stdin", io.StringIO("rk_something"))
    with pytest.raises(KeysFailed, match="not a key of any client"):
        await keys(config, "show", "-")


async def test_rotation_makes_a_new_key_and_lets_the_older_ones_expire(database_setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(tmp_path, database_setting, clients=FILED)
    old = await create(config, "filed")
    await create(config, "other")
    capsys.readouterr()
    [new] = await keys(config, "rotate", "filed", "--grace", "0", "--expires", "2999-01-01")
    assert MADE.match(new) and "filed/1 in gateway.yaml stay valid" in capsys.readouterr().err
    rows = {row.sha256: row for row in await stored(database_setting)}
    states = {key["id"]: key["state"] for key in await listed(config)}
    assert states[rows[sha256(old.encode()).digest()].id] == "expired" and states[rows[sha256(new.encode()).digest()].id] == "valid"
    [newer] = await keys(config, "rotate", "filed")
    assert newer != new and list(states.values()).count("expired") == 1


def test_the_command_line_prints_the_key_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configure(tmp_path, "data/relay.db")
    assert main(["keys", "create", "web"]) == 0
    assert MADE.match(capsys.readouterr().out.removesuffix("\n"))
    assert main(["keys", "revoke", "nobody"]) == 1
    assert capsys.readouterr().err == "relay: there is no key and no client 'nobody'\n"
