"""A reload: what it applies, what it reports as needing a restart, and which files it refuses."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web
from cryptography.hazmat.primitives import serialization

from relay.app import standalone
from relay.cli.main import main
from relay.gateway import GATEWAY, Gateway
from relay.registry.changes import changed_names
from relay.registry.files import Files
from relay.registry.load import ConfigError, Sources, load
from relay.registry.restart import needing_restart, taken_over
from tests.conftest import StartRelay
from tests.processes import ROOT
from tests.relays import HANG_GUARD_S, KEYS, Relay, canary, configured, provider, write_config
from tests.upstream.raw import RawUpstream, ok

ONE = {"providers": {"one": provider("https://one.example.com")}}


async def _reload(relay: Relay) -> tuple[int, Any]:
    status, _, body = await relay.call("POST", f"{relay.url}/api/v1/ai-gateway/providers/reload")
    return status, json.loads(body)


async def _refusal(relay: Relay) -> list[str]:
    """Reload, check that it is refused and changes nothing, and return the problems."""
    before = relay.gateway.config
    status, answer = await _reload(relay)
    assert status == 422 and answer["error"]["code"] == "config_invalid"
    assert relay.gateway.config is before
    problems = (await relay.events("reload.refused"))[0]["problems"]
    assert answer["error"]["message"].splitlines()[1:] == problems
    return problems


# Files that are half-written ----------------------------------------------------------------------

GONE = "; its previous content stays in force (a restart accepts the file as it is)"
UNFINISHED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda text: b"", f"gateway.yaml:1:1: is empty{GONE}"),
    "comments alone": (lambda text: b"# soon\n\n", f"gateway.yaml:1:1: is empty{GONE}"),
    "truncated within a line": (lambda text: text[: text.index(b".example.com")], "the last line has no line end, as it had before: is the file half-written?"),
    "truncated before the providers": (lambda text: text[: text.index(b"providers:")], "gateway.yaml:1:1: has no providers any more: is the file half-written? To remove them, write `providers: {}`"),
    "truncated after providers:": (lambda text: text[: text.index(b"  one:")], "gateway.yaml:1:1: has no providers"),
    "an empty mapping": (lambda text: b"{}\n", "gateway.yaml:1:1: has no providers"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), UNFINISHED.values(), ids=UNFINISHED)
async def test_a_file_that_is_empty_or_half_written_is_refused(start: StartRelay, change: Callable[[bytes], bytes], words: str) -> None:
    relay = await start(ONE)
    config = relay.folder / "gateway.yaml"
    whole = config.read_bytes()
    config.write_bytes(change(whole))
    assert any(words in problem for problem in await _refusal(relay))
    config.write_bytes(whole)
    assert (await _reload(relay))[0] == 200


def test_a_truncated_file_is_refused_unless_it_ends_with_a_whole_line(tmp_path: Path) -> None:
    """A file truncated after a line, with providers, looks like one that is complete."""
    config, sources = configured(tmp_path, ONE)
    whole = sources.config.read_bytes()
    for at in range(0, len(whole), 5):
        sources.config.write_bytes(whole[:at])
        try:
            load(sources, before=config)
        except ConfigError:
            continue
        assert whole[:at].endswith(b"\n") and whole[:at].count(b"one:") == 1


async def test_an_included_file_that_is_half_written_is_refused(start: StartRelay) -> None:
    relay = await start(ONE)
    more = relay.folder / "more.yaml"
    more.write_text("providers:\n  two: {base_url: https://two}\n")
    config = relay.folder / "gateway.yaml"
    config.write_text("include: [more.yaml]\n" + config.read_text())
    assert (await _reload(relay))[1]["providers"] == ["one", "two"]
    more.write_text("")
    assert await _refusal(relay) == [f"more.yaml:1:1: is empty{GONE}"]
    more.unlink()
    assert await _refusal(relay) == ["gateway.yaml:1:11: include.0: no file matches 'more.yaml'"]


async def test_providers_are_removed_if_the_file_says_so(start: StartRelay) -> None:
    relay = await start(ONE)
    (relay.folder / "gateway.yaml").write_text("providers: {}\ndemo: {enabled: false}\ndatabase: null\n")
    assert await _reload(relay) == (200, {"reloaded": True, "providers": [], "changed": ["retries.max_attempts", "providers.one (removed)"], "needs_restart": []})


async def test_an_empty_file_is_accepted_if_it_was_empty_before(start: StartRelay) -> None:
    relay = await start({})
    config = relay.folder / "gateway.yaml"
    config.write_text(config.read_text().rstrip("\n"))
    assert (await _reload(relay))[0] == 422
    config.write_text("")
    loaded = load(Sources(config, None))
    assert load(Sources(config, None), before=loaded).registry.providers == {}


@pytest.mark.parametrize("change", ["gone", "empty", "cut", "folder", "not UTF-8"])
async def test_a_reload_with_a_broken_env_file_is_refused_and_keeps_the_old_variables(start: StartRelay, raw: RawUpstream, change: str) -> None:
    raw.plays(ok(b"x"))
    relay = await start(one=provider(raw.url))
    env = relay.folder / ".env"
    whole = env.read_bytes()
    env.unlink()
    if change == "folder":
        env.mkdir()
    elif change != "gone":
        env.write_bytes({"empty": b"\n# none\n", "cut": whole[:-5], "not UTF-8": b"A=\xff\n"}[change])
    [problem] = await _refusal(relay)
    assert problem.startswith(".env:")
    words = {"gone": f".env:1:1: is missing{GONE}", "empty": f".env:1:1: is empty{GONE}", "folder": "cannot be read: Is a directory", "not UTF-8": "it is not UTF-8 text"}
    assert words.get(change, "the last line has no line end, as it had before") in problem
    await relay.call("GET", relay.path("one", "x"))
    assert raw.arrived[0].header("authorization") == [f"Bearer {KEYS['OPENAI_API_KEY']}"]


@pytest.mark.parametrize("change", ["missing", "empty"])
async def test_a_reload_with_a_lost_secret_file_is_refused_and_keeps_the_old_secret(start: StartRelay, tmp_path: Path, change: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text(canary("file"))
    entry = {"base_url": "https://x", "auth": {"header": "k", "value": f"${{file:{secret}}}"}}
    relay = await start(one=entry)
    if change == "missing":
        secret.unlink()
    else:
        secret.write_text("\n")
    assert await _refusal(relay) == [f"secret:1:1: is {change}{GONE}"]
    secret.write_text(canary("file2"))  # without an end of line, as many tools write secrets
    assert (await _reload(relay))[0] == 200
    assert relay.gateway.registry.providers["one"].rest.pool[0].provider.value == canary("file2")


# What a reload applies

CHANGED: dict[str, dict[str, Any]] = {
    "server": {"host": "127.0.0.2", "port": 9, "workers": 3, "keepalive_timeout_s": 9},
    "tls": {"host": "127.0.0.2", "port": 9},
    "redis": {"url": "redis://other", "timeout_s": 9},
    "metrics": {"enabled": False, "max_models": 9, "max_clients": 9},
    "tracing": {"endpoint": "http://other", "headers": {"a": "b"}, "service_name": "other"},
    "log": {"level": "error", "format": "json"},
    "demo": {"enabled": True},
    "cache": {"store": "redis"},
}
RESTARTED = [f"{section}.{key}" for section, keys in CHANGED.items() for key in keys] + ["database"]


def test_every_setting_that_needs_a_restart_is_reported_and_keeps_its_value(tmp_path: Path) -> None:
    started, _ = configured(tmp_path, ONE)
    loaded, _ = configured(tmp_path, ONE | CHANGED | {"database": "other.db", "upstream": {"idle_timeout_s": 9}})
    assert needing_restart(started.settings, loaded.settings) == RESTARTED
    config = taken_over(started, loaded)
    assert needing_restart(started.settings, config.settings) == []
    assert config.settings.upstream.idle_timeout_s == 9 and config.registry is loaded.registry


async def test_a_reload_never_applies_half_of_a_setting(start: StartRelay) -> None:
    """For example a store that is not open, or a database that only a new worker would open."""
    relay = await start(ONE)
    write_config(relay.folder, ONE | {"redis": {"url": "redis://127.0.0.1:9"}, "cache": {"store": "redis", "ttl_s": 9}, "database": "other.db"})
    assert (await _reload(relay))[1]["needs_restart"] == ["redis.url", "cache.store", "database"]
    settings = relay.gateway.settings
    assert (settings.redis.url, settings.cache.store, settings.database, settings.cache.ttl_s) == (None, "memory", None, 9)
    assert (await relay.events("reload.done"))[0]["needs_restart"] == ["redis.url", "cache.store", "database"]
    write_config(relay.folder, ONE)
    assert (await _reload(relay))[1]["needs_restart"] == [], "a setting as at the start needs no restart"


async def test_a_reload_moves_the_cache_to_a_redis_that_is_in_use(tmp_path: Path) -> None:
    redis = {"redis": {"url": "redis://127.0.0.1:9"}}
    config, sources = configured(tmp_path, ONE | redis)
    gateway: Gateway = standalone(config, sources)[GATEWAY]
    assert not gateway.cache.is_shared
    other, _ = configured(tmp_path, ONE | redis | {"cache": {"store": "redis"}})
    assert needing_restart(config.settings, other.settings) == []
    gateway.replace(other)
    assert gateway.cache.is_shared
    gateway.replace(config)
    assert not gateway.cache.is_shared


def _issue(authority: trustme.CA, folder: Path, name: str) -> dict[str, str]:
    issued = authority.issue_cert(name)
    issued.private_key_pem.write_to_path(folder / f"{name}-key.pem")
    issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return {"certificate": f"{name}.pem", "key": f"{name}-key.pem"}


def test_another_certificate_needs_no_restart_and_removing_it_does(tmp_path: Path) -> None:
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    one, other = (_issue(authority, tmp_path, name) for name in ("a.example.com", "b.example.com"))
    first, _ = configured(tmp_path, {"tls": one})
    second, _ = configured(tmp_path, {"tls": other})
    none, _ = configured(tmp_path, {})
    assert needing_restart(first.settings, second.settings) == []
    assert taken_over(first, second).certificate == second.certificate != first.certificate
    assert needing_restart(first.settings, none.settings) == ["tls.certificate", "tls.key"]
    assert taken_over(first, none).certificate == first.certificate
    assert taken_over(none, first).certificate is None


def test_the_certificate_that_was_checked_is_served(tmp_path: Path) -> None:
    """The files may have changed since the check."""
    _issue(trustme.CA(key_type=trustme.KeyType.ECDSA), tmp_path, "a.example.com")
    config, _ = configured(tmp_path, {"tls": {"certificate": "a.example.com.pem", "key": "a.example.com-key.pem"}})
    (tmp_path / "a.example.com-key.pem").write_text("not a key")
    assert config.certificate is not None
    config.certificate.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    assert "PRIVATE KEY" not in repr(config)


def test_a_key_with_a_passphrase_is_refused_without_a_prompt(tmp_path: Path) -> None:
    _issue(trustme.CA(key_type=trustme.KeyType.ECDSA), tmp_path, "a.example.com")
    path = tmp_path / "a.example.com-key.pem"
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")))
    with pytest.raises(ConfigError, match=r"gateway\.yaml:\d+:\d+: tls\.certificate: is no valid certificate with tls\.key"):
        configured(tmp_path, {"tls": {"certificate": "a.example.com.pem", "key": "a.example.com-key.pem"}})


async def test_a_reload_logs_warnings(start: StartRelay) -> None:
    relay = await start(ONE)
    (relay.folder / ".env").chmod(0o600)
    write_config(relay.folder, {"providers": {"one": provider("https://x", headers={"a": "$NAME"})}})
    assert (await _reload(relay))[0] == 200
    [warning] = await relay.events("config.warning")
    assert warning["place"].startswith("gateway.yaml:") and warning["message"].startswith("providers.one.headers.a: `$` without braces")


# The same bytes for every process -----------------------------------------------------------------


def test_another_process_loads_the_same_configuration_after_the_files_are_gone(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.yaml").write_text("providers: {a: {base_url: https://a, auth: {header: k, value: '${file:secret} ${OPENAI_API_KEY}'}}}\n")
    (tmp_path / "secret").write_text(canary("file"))
    _issue(trustme.CA(key_type=trustme.KeyType.ECDSA), tmp_path, "a.example.com")
    tls = {"certificate": "a.example.com.pem", "key": "a.example.com-key.pem"}
    config, sources = configured(tmp_path, ONE | {"include": ["more/*.yaml"], "tls": tls})
    for file in [*tmp_path.rglob("*")]:
        if file.is_file():
            file.unlink()
    again = load(sources, Files(config.read.files))
    assert (again.settings, again.registry, again.certificate) == (config.settings, config.registry, config.certificate)
    assert again.read == config.read and "CANARY" not in repr(config.read)


def test_files_that_are_too_large_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.registry.files.MAX_TOTAL_BYTES", 200)
    with pytest.raises(ConfigError, match="together are larger than 4 MiB"):
        configured(tmp_path, ONE | {"providers": {f"p{number}": provider("https://x") for number in range(9)}})


# relay reload -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_config(tmp_path, ONE)
    (tmp_path / ".env").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def _run_reload(relay: Relay, *arguments: str) -> int:
    return await asyncio.to_thread(main, ["reload", "--config", str(relay.folder / "gateway.yaml"), "--env-file", str(relay.folder / ".env"), *arguments])


async def test_the_command_prints_the_result_of_a_reload(start: StartRelay, capsys: pytest.CaptureFixture[str]) -> None:
    relay = await start(ONE)
    write_config(relay.folder, ONE | {"server": {"port": relay.port}, "log": {"level": "debug"}})
    assert await _run_reload(relay) == 0
    assert capsys.readouterr().out.splitlines() == ["reloaded: 1 providers", "changed: nothing", "needs a restart: server.port, log.level"]
    assert await _run_reload(relay, "--url", relay.url) == 0


async def test_the_command_and_the_log_name_what_changed(start: StartRelay, capsys: pytest.CaptureFixture[str]) -> None:
    relay = await start(ONE | {"providers": {"gone": provider("https://gone.example.com"), **ONE["providers"]}})
    changed = {"providers": {"one": provider("https://other.example.com"), "two": provider("https://two.example.com")}}
    write_config(relay.folder, changed | {"limits": [{"requests": 9}], "server": {"drain_timeout_s": 9, "workers": 1}})
    assert await _run_reload(relay, "--url", relay.url) == 0
    names = ["server.drain_timeout_s", "limits", "providers.gone (removed)", "providers.one", "providers.two (added)"]
    assert capsys.readouterr().out.splitlines() == ["reloaded: 2 providers", f"changed: {', '.join(names)}"]
    assert (await relay.events("reload.done"))[0]["changed"] == names


async def test_a_changed_key_is_reported_by_the_name_of_its_provider(start: StartRelay) -> None:
    relay = await start(ONE)
    assert (await _reload(relay))[1]["changed"] == []
    (relay.folder / ".env").write_text(f"OPENAI_API_KEY={canary('next')}\n")
    assert (await _reload(relay))[1]["changed"] == ["providers.one"]


def test_the_shipped_providers_are_equal_when_they_are_loaded_again(tmp_path: Path) -> None:
    sources = Sources(ROOT / "gateway.yaml", None)
    assert changed_names(load(sources), load(sources)) == []


async def test_the_command_with_a_url_reads_no_file(start: StartRelay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await start(ONE)
    (tmp_path / "gateway.yaml").write_text("nonsense: 1\n")
    monkeypatch.chdir(tmp_path)
    assert await asyncio.to_thread(main, ["reload", "--url", relay.url]) == 0


ADMIN = canary("reload-admin")


async def test_the_command_sends_the_admin_token_of_its_configuration(start: StartRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    document = ONE | {"access": {"admin_token": "${RELAY_ADMIN_TOKEN:-}"}}
    monkeypatch.setenv("RELAY_ADMIN_TOKEN", ADMIN)
    relay = await start(document)
    write_config(relay.folder, document | {"server": {"port": relay.port}})
    assert await _run_reload(relay) == 0
    assert await _run_reload(relay, "--url", relay.url) == 0
    monkeypatch.delenv("RELAY_ADMIN_TOKEN")
    assert await _run_reload(relay) == 1


async def test_with_a_url_the_command_takes_the_token_of_the_env_file(start: StartRelay, capsys: pytest.CaptureFixture[str]) -> None:
    relay = await start(ONE | {"access": {"admin_token": ADMIN}})
    assert await _run_reload(relay, "--url", relay.url) == 1
    assert "RELAY_ADMIN_TOKEN" in capsys.readouterr().err
    (relay.folder / ".env").write_text(f"RELAY_ADMIN_TOKEN={ADMIN}\nOPENAI_API_KEY={canary('openai')}\n")
    assert await _run_reload(relay, "--url", relay.url) == 0


async def test_the_command_recognises_a_server_that_is_not_a_relay(raw: RawUpstream, capsys: pytest.CaptureFixture[str]) -> None:
    raw.plays(ok(b"welcome"))
    raw.plays(ok(b"[]"))
    for _ in range(2):
        assert await asyncio.to_thread(main, ["reload", "--url", raw.url]) == 1
        assert "is not a relay; name the relay with --url" in capsys.readouterr().err


async def test_the_command_prints_no_character_that_a_terminal_obeys(raw: RawUpstream, capsys: pytest.CaptureFixture[str]) -> None:
    raw.plays(ok(json.dumps({"changed": ["\x1b[2J"]}).encode()))
    raw.plays(ok(json.dumps({"error": {"message": "1:1: no\n2:1: \x9b2J"}}).encode(), status="422 No"))
    assert await asyncio.to_thread(main, ["reload", "--url", raw.url]) == 0
    assert await asyncio.to_thread(main, ["reload", "--url", raw.url]) == 1
    printed = capsys.readouterr()
    assert "changed: \\x1b[2J\n" in printed.out
    assert printed.err == "relay: 1:1: no\n2:1: \\x9b2J\n"


async def test_the_command_tells_an_untrusted_certificate_from_another_server(aiohttp_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    server = await aiohttp_server(web.Application(), ssl=context)
    assert await asyncio.to_thread(main, ["reload", "--url", str(server.make_url(""))]) == 1
    assert "certificate verify failed" in capsys.readouterr().err


async def test_the_command_fails_if_the_reload_fails(start: StartRelay, capsys: pytest.CaptureFixture[str]) -> None:
    relay = await start(ONE)
    (relay.folder / "gateway.yaml").write_text("demo: {enabled: false}\n")
    assert await _run_reload(relay, "--url", relay.url) == 2
    assert "gateway.yaml:1:1: has no providers" in capsys.readouterr().err


def test_the_command_reports_why_no_relay_was_reached(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reload", "--url", "http://127.0.0.1:9"]) == 1
    err = capsys.readouterr().err
    assert "no relay answers on 127.0.0.1:9 (Connection refused)" in err and "write --url and the URL" in err
    assert main(["reload", "--url", "nowhere"]) == 1
    assert "--url should be an http:// or https:// URL" in capsys.readouterr().err
    (folder / "gateway.yaml").write_text("server:\n\tport: 1")
    assert main(["reload"]) == 2
    assert capsys.readouterr().err.splitlines()[:3] == [
        "gateway.yaml:2:1: the line is indented with a tab; YAML allows only spaces", "     port: 1", "    ^",
    ]  # fmt: skip


def test_check_prints_warnings_and_succeeds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / ".env").chmod(0o644)
    assert main(["check"]) == 0
    assert capsys.readouterr().err == "warning: .env:1:1: other users may read this file (mode 0644): chmod 600 .env\n"


async def test_a_key_is_rotated_by_two_reloads_and_no_call_fails(start: StartRelay, raw: RawUpstream) -> None:
    """The steps of docs/operations.md: add the new key to the pool, then remove the old one."""
    raw.plays(ok(b"{}"))
    relay = await start(openai=provider(raw.url))

    async def keys_in_use(variables: list[str]) -> set[str]:
        pool = {"header": "Authorization", "value": [f"Bearer ${{{name}}}" for name in variables]}
        write_config(relay.folder, {"providers": {"openai": provider(raw.url, auth=pool)}})
        assert (await _reload(relay))[0] == 200
        raw.arrived.clear()
        for _ in range(4):
            assert (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[0] == 200
        return {name for name, value in KEYS.items() for each in raw.arrived if value.encode() in each.head}

    assert await keys_in_use(["OPENAI_API_KEY", "GROQ_API_KEY"]) == {"OPENAI_API_KEY", "GROQ_API_KEY"}
    assert await keys_in_use(["GROQ_API_KEY"]) == {"GROQ_API_KEY"}


# Running calls ----------------------------------------------------------------------------------


async def test_a_running_call_keeps_the_route_it_began_with(start: StartRelay, raw: RawUpstream) -> None:
    """Also for its retry, when the provider of this name is elsewhere by then."""
    other, busy = await RawUpstream.start(), asyncio.Event()
    raw.plays(busy, ok(b"busy", "Retry-After: 0", status="503 Busy"))
    raw.plays(ok(b"of the old route"))
    other.plays(ok(b"of the new route"))
    relay = await start({"retries": {"max_attempts": 2, "delay_s": 0.01}}, one=provider(raw.url))
    running = asyncio.create_task(relay.call("POST", relay.path("one", "x"), data=b"{}"))
    try:
        async with asyncio.timeout(HANG_GUARD_S):
            while not raw.arrived:
                await asyncio.sleep(0.001)
        config = relay.folder / "gateway.yaml"
        config.write_text(config.read_text().replace(raw.url, other.url))
        assert (await _reload(relay))[0] == 200
    finally:
        busy.set()
    assert (await running)[2] == b"of the old route"
    assert (await relay.call("POST", relay.path("one", "x"), data=b"{}"))[2] == b"of the new route"
    await other.stop()


def test_a_registry_cannot_be_changed(tmp_path: Path) -> None:
    registry = configured(tmp_path, ONE)[0].registry
    with pytest.raises(FrozenInstanceError):
        registry.providers = {}  # type: ignore[misc]
