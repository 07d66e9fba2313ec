"""Keys that were never made, in every place of a key; and the keys of one client used by another.

A wrong key is refused before any query, whatever it contains, and no log and no row shows it.
"""

from __future__ import annotations

import base64
import contextlib
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.gate import keys as keys_module
from relay.storage.access import AccessStore
from relay.storage.access_rows import NewKey
from relay.storage.database import Database, database_url, try_out
from tests.conftest import StartRelay, Vendors
from tests.relays import Relay, canary
from tests.test_security import send_one
from tests.upstream.raw import RawUpstream, ok

KEYS = {"a": "rk_" + canary("tenant-a"), "b": "rk_" + canary("tenant-b")}
STORED = "rk_" + canary("stored-tenant")
MARK = "CANARYhostile"
SECRETS = {
    "a quote": f"rk_{MARK}' OR '1'='1", "a statement": f'rk_{MARK}"; DROP TABLE client_keys; --', "a pattern": f"rk_{MARK}%_*?[a-z]", "10 KiB": f"rk_{MARK}" + "x" * 10_240,
    "Unicode": f"rk_{MARK}é😀", "no Unicode": f"rk_{MARK}\udcff\udcfe", "a template": f"rk_{MARK}${{OPENAI_API_KEY}}{{0}}%s", "the prefix alone": "rk_", "a near miss": STORED[:-1],
    "one more character": STORED + "x", "another case": "rk_" + STORED[3:].swapcase(),
}  # fmt: skip
HEADERS = ("x-relay-key", "cf-aig-authorization", "Authorization", "x-api-key", "api-key", "xi-api-key", "x-goog-api-key", "X-Own")
Request = tuple[list[tuple[str, str]], str]


def places(secret: str) -> Iterator[tuple[str, Request]]:
    """Every place of a key: the name of the place, the headers and the query."""
    for name in HEADERS:
        yield name, ([(name, secret)], "")
    for scheme in ("Bearer", "bEaReR", "Token", "Key"):
        yield scheme, ([("Authorization", f"{scheme} {secret}")], "")
    yield "Basic without base64", ([("Authorization", f"Basic {secret}")], "")
    for shape in ("x:{}", "{}:", "{}:x"):
        basic = base64.b64encode(shape.format(secret).encode("utf-8", "surrogateescape")).decode()
        yield f"Basic {shape}", ([("Authorization", f"Basic {basic}")], "")
    escaped = quote(secret, errors="surrogateescape")
    for name in ("token", "key", "anything", "tok%65n"):
        yield f"?{name}", ([], f"?{name}={escaped}")
    yield "escaped letters", ([], "?token=" + "".join(f"%{byte:02x}" for byte in secret.encode("utf-8", "surrogateescape")[:2000]))
    yield "the second header", ([("x-api-key", "sk-some-credential"), ("x-api-key", secret)], "")
    yield "the second parameter", ([], f"?token=sk-some-credential&token={escaped}")
    yield "all headers", ([(name, secret) for name in HEADERS if len(secret) < 1000], f"?token={escaped}")


def message(headers: list[tuple[str, str]], query: str, path: str = "mine/chat/completions") -> bytes:
    lines = [f"POST /api/v1/ai-gateway/providers/{path}{query} HTTP/1.1", "Host: localhost", "Content-Length: 2", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n{}"


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Every statement that any engine executes, but for the rows of the ledger."""
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.split()[0] not in ("BEGIN", "INSERT"):
            found.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    yield found
    sa.event.remove(sa.Engine, "before_cursor_execute", note)


@pytest.fixture
async def file(tmp_path: Path, migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database with one key, which a relay polls only at its start."""
    if not migrated_sqlite.exists():
        await try_out(str(migrated_sqlite))
    file = Path(shutil.copy(migrated_sqlite, tmp_path / "keys.db"))
    database = Database(database_url(str(file)))
    await AccessStore(database).create_key("stored", "{}", NewKey("0123456789ab", sha256(STORED.encode()).digest()), "test")
    await database.close()
    monkeypatch.setattr("relay.access_updates.POLL_S", 1e6)
    # tests/gate/test_management.py tests that wrong keys are refused early after ten of them.
    monkeypatch.setattr("relay.gate.wrong_tries.MAX_TRIES", 10**6)
    return file


async def _start(start: StartRelay, raw: RawUpstream, file: Path, mode: str = "required") -> Relay:
    raw.plays(ok())
    entry = {"base_url": raw.url, "auth": {"header": "X-Own", "value": "${OPENAI_API_KEY}"}, "query_credentials": ["token"]}
    return await start({"access": {"mode": mode}, "database": str(file), "ledger": {"bodies": "on"}}, mine=entry)


def contents(file: Path) -> str:
    """Everything in a database, as text."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        return "\n".join(connection.iterdump())


async def assert_nothing_was_sent_or_written(relay: Relay, raw: RawUpstream, file: Path) -> None:
    """No call has arrived at the provider, and no hostile key is in the database or the log."""
    assert not raw.arrived
    await relay.idle()
    text = contents(file) + "".join(relay.logged.lines)
    assert MARK not in text and STORED[3:-1] not in text
    assert "client_keys" in text  # the table is still there


@pytest.mark.parametrize("mode", ["required", "open"])
@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
async def test_a_key_that_was_never_made_is_refused_everywhere_without_a_query(
    start: StartRelay, raw: RawUpstream, file: Path, statements: list[str], secret: str, mode: str
) -> None:
    relay = await _start(start, raw, file, mode)
    statements.clear()
    for place, (headers, query) in places(secret):
        answer = (await send_one(relay, message(headers, query))).decode()
        assert answer.startswith("HTTP/1.1 401 "), (place, answer[:200])
        assert MARK not in answer and secret[:40] not in answer, place
    assert statements == []
    await assert_nothing_was_sent_or_written(relay, raw, file)


@pytest.mark.parametrize("header", ["Authorization: Bearer rk_{}\0x", "Authorization: Bearer rk_{}\x01", "x-api-key: rk_{}\x7f"])
async def test_a_key_with_a_control_character_is_refused_and_not_shown(start: StartRelay, raw: RawUpstream, file: Path, statements: list[str], header: str) -> None:
    relay = await _start(start, raw, file)
    statements.clear()
    name, _, value = header.format(MARK).partition(": ")
    answer = await send_one(relay, message([(name, value)], ""))
    assert answer.split()[1] in (b"400", b"401") and MARK.encode() not in answer
    assert statements == [] and MARK not in "".join(relay.logged.lines)


async def test_a_key_of_20_kib_is_refused_and_not_shown(start: StartRelay, raw: RawUpstream, file: Path, statements: list[str]) -> None:
    relay = await _start(start, raw, file)
    statements.clear()
    for headers, query in (([("Authorization", f"Bearer rk_{MARK}" + "x" * 20_480)], ""), ([], f"?token=rk_{MARK}" + "x" * 20_480)):
        answer = await send_one(relay, message(headers, query))
        assert answer.split()[1] in (b"400", b"401", b"414", b"431") and MARK.encode() not in answer
    assert statements == [] and MARK not in "".join(relay.logged.lines)


async def test_a_near_miss_is_as_much_work_as_any_other_key(start: StartRelay, raw: RawUpstream, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await _start(start, raw, file)
    hashes = [0]

    def count(data: bytes) -> Any:
        hashes[0] += 1
        return sha256(data)

    monkeypatch.setattr(keys_module, "sha256", count)
    work = set()
    for secret in (STORED[:-1], STORED[:-1] + "x", "x" + STORED[1:], "rk_" + "q" * (len(STORED) - 3), "another-credential"):
        hashes[0] = 0
        assert (await send_one(relay, message([("Authorization", f"Bearer {secret}")], ""))).startswith(b"HTTP/1.1 401")
        work.add(hashes[0])
    assert work == {1}


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("other", [f"Bearer {STORED}x", STORED[:-1], f"Token {STORED} x", _basic("x", STORED[:-1])])
async def test_a_header_sent_beside_a_key_is_no_key_afterwards(start: StartRelay, raw: RawUpstream, file: Path, other: str) -> None:
    relay = await _start(start, raw, file)
    for _ in range(2):
        assert (await send_one(relay, message([("Authorization", other), ("x-api-key", STORED)], ""))).startswith(b"HTTP/1.1 200")
        assert (await send_one(relay, message([("Authorization", other)], ""))).startswith(b"HTTP/1.1 401")
        assert (await send_one(relay, message([("Authorization", f"Bearer {STORED}")], ""))).startswith(b"HTTP/1.1 200")


PREFIXES = ("openai-insecure-api-key.", "cf-aig-authorization.", "xi-api-key.", "bearer.", "Bearer.", "")
_BYTES = st.binary(max_size=40).filter(lambda text: not {*b"\r\n\0"} & {*text})


def handshake(offered: list[bytes]) -> bytes:
    lines = [b"GET /api/v1/ai-gateway/ws/mine/socket HTTP/1.1", b"Host: localhost", b"Connection: Upgrade", b"Upgrade: websocket"]
    lines += [b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *(b"Sec-WebSocket-Protocol: " + each for each in offered)]
    return b"\r\n".join(lines) + b"\r\n\r\n"


async def _refused(relay: Relay, offered: list[bytes], secret: bytes) -> None:
    answer = await send_one(relay, handshake(offered))
    assert answer.split()[1] in (b"400", b"401"), (offered, answer[:200])
    assert len(secret) < 8 or secret not in answer, offered


@pytest.mark.parametrize("mode", ["required", "open"])
@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
async def test_a_key_that_was_never_made_is_refused_as_a_subprotocol_without_a_query(
    start: StartRelay, raw: RawUpstream, file: Path, statements: list[str], secret: str, mode: str
) -> None:
    relay = await _start(start, raw, file, mode)
    statements.clear()
    sent = secret.encode("utf-8", "surrogateescape")
    for prefix in PREFIXES:
        token = prefix.encode() + sent
        for offered in ([token], [b"realtime, " + token], [b"realtime", token], [token + b", openai-beta.realtime-v1"]):
            await _refused(relay, offered, sent)
    assert statements == []
    await assert_nothing_was_sent_or_written(relay, raw, file)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.tuples(st.sampled_from(PREFIXES), _BYTES), min_size=1, max_size=4), min_size=1, max_size=3))
async def test_no_offer_of_subprotocols_gets_past_the_key(required: Relay, lists: list[list[tuple[str, bytes]]]) -> None:
    offered = [b",".join(prefix.encode() + text for prefix, text in offers) for offers in lists]
    await _refused(required, offered, b"")


@pytest.fixture
async def required(start: StartRelay, raw: RawUpstream, file: Path) -> AsyncIterator[Relay]:
    relay = await _start(start, raw, file)
    yield relay
    assert not raw.arrived


# --- cross-tenant


def _access(mode: str, *, anonymous: bool) -> dict[str, Any]:
    return {"mode": mode} | ({"anonymous": "public"} if anonymous else {})


FORMS = ("rest", "probe", "socket", "socket route", "reason", "proxy", "get")


async def _answer(relay: Relay, form: str, name: str, headers: dict[str, str]) -> tuple[int, str]:
    """Call `name` in one of the forms of a call. Returns the status and the code of the error."""
    if form == "rest":
        status, answer, _ = await relay.call("POST", relay.path(name, "v1/chat/completions"), json={"model": "m"}, headers=headers)
    elif form == "get":
        status, answer, _ = await relay.call("GET", relay.path(name, "v1/models"), headers=headers)
    elif form == "probe":
        status, answer, _ = await relay.call("HEAD", relay.path(name, "/").removesuffix("/"), headers=headers)
    elif form == "proxy":
        target = {"x-fal-target-url": "https://queue.fal.run/fal-ai/flux"}
        status, answer, _ = await relay.call("POST", relay.path(name, "proxy"), json={}, headers=headers | target)
    elif form == "reason":
        status, answer, _ = await relay.call("GET", relay.ws(name).replace("ws:", "http:"), headers=headers)
    else:
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": base64.b64encode(b"x" * 16).decode()}
        url = relay.ws(name) if form == "socket route" else relay.path(name, "v1/realtime")
        async with relay.client.get(url, headers=headers | upgrade) as answered:
            status, answer = answered.status, answered.headers
    return status, answer.get("x-relay-error", "")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("mode", "anonymous"), [("required", False), ("required", True), ("open", False), ("open", True)], ids=["required", "required and anonymous", "open", "open and anonymous"])
async def test_a_key_reaches_the_providers_of_its_own_client_only(start: StartRelay, vendors: Vendors, form: str, mode: str, anonymous: bool) -> None:
    """Client a may call openai and fal, client b elevenlabs, and calls without a key cartesia."""
    clients = {"a": {"key": KEYS["a"], "providers": ["openai", "fal"]}, "b": {"key": KEYS["b"], "providers": ["elevenlabs"]}, "public": {"providers": ["cartesia"]}}
    relay = await start({"access": _access(mode, anonymous=anonymous), "clients": clients, "providers": vendors.entries()})
    own = {"proxy": "fal"}.get(form, "openai")
    for caller, secret in (("a", KEYS["a"]), ("b", KEYS["b"]), ("none", ""), ("unknown", "rk_" + canary("of-no-tenant")), ("own", "sk-credential-of-the-user")):
        for headers in ([{"x-relay-key": secret}, {"Authorization": f"Bearer {secret}"}] if secret else [{}]):
            status, error = await _answer(relay, form, own, headers)
            if caller == "b":
                assert (status, error) == (403, "provider_not_allowed"), headers
            elif caller == "unknown":
                assert (status, error) == (401, "client_key_invalid")
            elif caller in ("none", "own") and anonymous and not (caller == "own" and mode == "required"):
                assert (status, error) == (403, "provider_not_allowed"), headers
            elif caller in ("none", "own") and mode == "required":
                assert (status, error) == (401, "client_key_missing" if caller == "none" else "client_key_invalid")
            else:  # allowed: whatever the provider or the relay answers, access does not refuse it
                assert error not in ("provider_not_allowed", "client_key_invalid", "client_key_missing", "endpoint_not_allowed"), (caller, status, error)
    await relay.idle()
    reached = str([seen.headers for name in vendors.servers for seen in vendors.seen(name)])
    assert "rk_" not in reached and "sk-credential" not in reached


async def test_an_expired_and_a_revoked_key_reach_nothing_in_any_form(start: StartRelay, vendors: Vendors, file: Path) -> None:
    clients = {"old": {"key": KEYS["a"], "expires": "2020-01-01"}}
    relay = await start({"access": {"mode": "required"}, "clients": clients, "database": str(file), "providers": vendors.entries()})
    database = Database(database_url(str(file)))
    await AccessStore(database).revoke_key("0123456789ab", "test")
    await database.close()
    await relay.gateway.refresh_access()
    for form in FORMS:
        name = {"proxy": "fal"}.get(form, "openai")
        assert await _answer(relay, form, name, {"x-relay-key": KEYS["a"]}) == (401, "client_key_expired"), form
        assert await _answer(relay, form, name, {"x-relay-key": STORED}) == (401, "client_key_invalid"), form
    assert not any(vendors.seen(name) for name in vendors.servers)
