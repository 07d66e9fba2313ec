"""Clients and keys of the database: every process follows them, and ends what is not allowed any
more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from relay.access_updates import CHECK_S, AccessUpdates
from relay.app import reload
from relay.gate.keys import MAX_AGE_S, ClientKeys
from relay.registry.clients import rights_of
from relay.registry.load import Sources
from relay.server.control import Answer, Channel, Command, Control, Reply
from relay.server.supervisor import Supervisor
from relay.server.worker import Stop, _orders, _pass_to_all
from relay.storage.access import AccessStore
from relay.storage.access_rows import NewKey
from relay.storage.database import Database, database_url, try_out
from tests.conftest import StartRelay
from tests.postgres import Network, PostgresServer
from tests.processes import Served, serve
from tests.relays import CLIENT_KEY, HANG_GUARD_S, Relay, canary, provider, write_config
from tests.upstream.raw import SILENCE, SSE_HEAD, RawUpstream, chunk, ok

KEY, OTHER = "rk_" + canary("stored"), "rk_" + canary("another-stored")
UNKNOWN = "rk_" + canary("unknown")


def new_key(secret: str = KEY, id: str = "0123456789ab", expires_s: int | None = None) -> NewKey:
    return NewKey(id, sha256(secret.encode()).digest(), expires_s)


NEW = new_key()
STREAM = (SSE_HEAD, chunk(b"data: 1\n\n"), SILENCE)


@pytest.fixture
async def file(tmp_path: Path, migrated_sqlite: Path) -> Path:
    """A SQLite file with empty tables."""
    if not migrated_sqlite.exists():
        await try_out(str(migrated_sqlite))
    return Path(shutil.copy(migrated_sqlite, tmp_path / "access.db"))


@contextlib.asynccontextmanager
async def opened(setting: str | Path) -> AsyncIterator[AccessStore]:
    """Open a database as `relay keys` does, beside the relay that uses it."""
    database = Database(database_url(str(setting)))
    try:
        yield AccessStore(database)
    finally:
        await database.close()


def document(setting: str | Path | None, raw: RawUpstream, **more: Any) -> dict[str, Any]:
    clients = {"filed": {"key": CLIENT_KEY}}
    return {"access": {"mode": "required"}, "clients": clients, "database": str(setting) if setting else None, "providers": {"mine": provider(raw.url)}} | more


async def call(relay: Relay, secret: str) -> tuple[int, str]:
    """Call with a key. Returns the status and the code of the relay's error."""
    status, answer, _ = await relay.call("POST", relay.path("mine", "chat/completions"), json={}, headers={"Authorization": f"Bearer {secret}"})
    return status, answer.get("x-relay-error", "")


async def begin_stream(relay: Relay, raw: RawUpstream, secret: str) -> aiohttp.ClientResponse:
    raw.scripts[:] = [STREAM]
    stream = await relay.client.post(relay.path("mine", "chat/completions"), json={"model": "m", "stream": True}, headers={"Authorization": f"Bearer {secret}"})
    assert await stream.content.readany() == b"data: 1\n\n"
    return stream


async def is_cut(stream: aiohttp.ClientResponse) -> bool:
    """Wait for the end of a stream. True if it was cut."""
    try:
        await asyncio.wait_for(stream.content.read(), HANG_GUARD_S)
    except aiohttp.ClientError:
        return True
    return False


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(HANG_GUARD_S):
        while not await condition():
            await asyncio.sleep(0.02)


def set_clock(relay: Relay, clock: Callable[[], float]) -> None:
    relay.gateway.clock = relay.gateway.keys._clock = clock


# --- revoking


async def test_a_stored_key_calls_until_it_is_revoked_and_then_its_call_and_session_end(start: StartRelay, raw: RawUpstream, vendors: Any, file: Path) -> None:
    raw.plays(ok())
    relay = await start(document(file, raw, providers=vendors.entries() | {"mine": provider(raw.url)}))
    assert await call(relay, KEY) == (401, "client_key_invalid")
    async with opened(file) as store:
        await store.create_key("web", '{"providers": ["mine", "openai"]}', NEW, "test")
        await relay.gateway.refresh_access()
        assert await call(relay, KEY) == (200, "")
        headers = {"Authorization": f"Bearer {KEY}"}
        assert (await relay.call("POST", relay.path("anthropic", "v1/messages"), json={}, headers=headers))[1]["x-relay-error"] == "provider_not_allowed"
        stream = await begin_stream(relay, raw, KEY)
        async with relay.client.ws_connect(relay.ws("openai"), headers=headers) as session:
            await session.receive()
            await store.revoke_key(NEW.id, "test")
            await relay.gateway.refresh_access()
            closed = await session.receive()
            while closed.type is aiohttp.WSMsgType.TEXT:
                closed = await session.receive()
            assert (closed.data, closed.extra) == (4401, "The client key was revoked.")
    assert await is_cut(stream)
    assert await call(relay, KEY) == (401, "client_key_invalid")
    await relay.idle()
    ended = [event for event in await relay.events(count=6) if event.get("error") == "access_revoked"]
    assert {event["transport"] for event in ended} == {"rest", "websocket"} and {event["client"] for event in ended} == {"web"}


async def test_a_process_polls_for_changes_by_itself(start: StartRelay, raw: RawUpstream, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.access_updates.POLL_S", 0.02)
    raw.plays(ok())
    relay = await start(document(file, raw))
    async with opened(file) as store:
        await store.create_key("web", "{}", NEW, "test")
        await until(lambda: is_answer(relay, KEY, 200))
        stream = await begin_stream(relay, raw, KEY)
        await store.revoke_client("web", "test")
        assert await is_cut(stream)


async def is_answer(relay: Relay, secret: str, status: int) -> bool:
    return (await call(relay, secret))[0] == status


async def test_a_revoked_key_ends_no_call_of_another_key(start: StartRelay, raw: RawUpstream, file: Path) -> None:
    relay = await start(document(file, raw))
    async with opened(file) as store:
        await store.create_key("web", "{}", NEW, "test")
        await store.create_key("web", None, new_key(OTHER, "00000000000b"), "test")
        await relay.gateway.refresh_access()
        streams = [await begin_stream(relay, raw, secret) for secret in (KEY, OTHER, CLIENT_KEY)]
        await store.revoke_key(NEW.id, "test")
        await relay.gateway.refresh_access()
    assert await is_cut(streams[0])
    assert {exchange.request.caller.key_id for exchange in relay.gateway.calls} == {"00000000000b", "filed/1"}


async def test_a_shared_call_goes_on_for_the_others_when_the_key_of_its_first_client_is_revoked(start: StartRelay, raw: RawUpstream, file: Path) -> None:
    relay = await start(document(file, raw, cache={"coalesce": True, "scope": "shared"}))
    async with opened(file) as store:
        await store.create_key("web", "{}", NEW, "test")
        await relay.gateway.refresh_access()
        first = await begin_stream(relay, raw, KEY)
        second = await relay.client.post(relay.path("mine", "chat/completions"), json={"model": "m", "stream": True}, headers={"Authorization": f"Bearer {CLIENT_KEY}"})
        assert await second.content.readany() == b"data: 1\n\n" and len(raw.arrived) == 1
        await store.revoke_key(NEW.id, "test")
        await relay.gateway.refresh_access()
    assert await is_cut(first)
    assert {exchange.request.caller.key_id for exchange in relay.gateway.calls if not exchange.is_shared} == {"filed/1"}
    assert [exchange.waiting.expired for exchange in relay.gateway.calls] == [None, None]


async def test_a_reload_that_removes_a_key_ends_its_calls(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.access_updates.POLL_S", 0.02)
    whole = document(None, raw, clients={"filed": {"key": CLIENT_KEY}, "moved": {"key": KEY}, "stays": {"key": OTHER}})
    relay = await start(whole)
    streams = [await begin_stream(relay, raw, secret) for secret in (CLIENT_KEY, KEY, OTHER)]
    sources = write_config(relay.folder, whole | {"clients": {"stays": {"key": OTHER}, "heir": {"key": KEY}}})
    await reload(relay.gateway, sources)
    assert await is_cut(streams[0]) and await is_cut(streams[1])
    assert [exchange.request.caller.client for exchange in relay.gateway.calls] == ["stays"]
    streams[2].close()


async def test_a_key_that_expires_ends_its_running_calls(start: StartRelay, raw: RawUpstream, vendors: Any) -> None:
    clients = {"web": {"key": CLIENT_KEY, "expires": "2999-01-01"}, "other": {"key": OTHER, "expires": "2999-01-03"}}
    relay = await start(document(None, raw, clients=clients, providers=vendors.entries() | {"mine": provider(raw.url)}))
    stream, other = await begin_stream(relay, raw, CLIENT_KEY), await begin_stream(relay, raw, OTHER)
    async with relay.client.ws_connect(relay.ws("openai"), headers={"x-relay-key": CLIENT_KEY}) as session:
        await session.receive()
        await AccessUpdates(relay.gateway, None, lambda: 32472144000.0 + 1).end_invalid()  # 2999-01-01
        closed = await session.receive()
        while closed.type is aiohttp.WSMsgType.TEXT:
            closed = await session.receive()
        assert (closed.data, closed.extra) == (4401, "The client key has expired.")
    assert await is_cut(stream) and not other.closed
    assert [exchange.request.caller.client for exchange in relay.gateway.calls] == ["other"]


async def test_a_rotated_key_goes_on_until_the_end_of_its_grace(start: StartRelay, raw: RawUpstream, file: Path) -> None:
    raw.plays(ok())
    relay = await start(document(file, raw))
    async with opened(file) as store:
        await store.create_key("web", "{}", NEW, "test")
        await store.rotate("web", new_key(OTHER, "00000000000b"), 32472144000, "test")
        await relay.gateway.refresh_access()
        assert await call(relay, KEY) == await call(relay, OTHER) == (200, "")
        await store.rotate("web", new_key(UNKNOWN, "00000000000c"), 1, "test")
        await relay.gateway.refresh_access()
        assert await call(relay, KEY) == await call(relay, OTHER) == (401, "client_key_expired")


async def test_running_calls_are_checked_when_a_key_has_changed_and_now_and_then(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.access_updates.POLL_S", 1e6)
    relay, now = await start(document(None, raw)), [1000.0]
    stream = await begin_stream(relay, raw, CLIENT_KEY)
    updates, checks = AccessUpdates(relay.gateway, None, lambda: 0.0), [0]

    def is_valid(*_: Any) -> bool:
        checks[0] += 1
        return True

    monkeypatch.setattr(ClientKeys, "is_valid", is_valid)
    set_clock(relay, lambda: now[0])
    counts = []
    for step_s, changes in ((0.0, 0), (CHECK_S / 2, 0), (0.0, 1), (CHECK_S, 0), (0.0, 0)):
        now[0] += step_s
        relay.gateway.keys.changes += changes
        await updates.end_invalid()
        counts.append(checks[0])
    assert counts == [1, 1, 2, 3, 3]
    stream.close()


# --- the database is unavailable


def break_(file: Path, *, back: bool = False) -> None:
    """Rename the table that every poll reads, so that the database refuses the poll."""
    names = ("renamed", "access_state") if back else ("access_state", "renamed")
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute(f"ALTER TABLE {names[0]} RENAME TO {names[1]}")


async def readyz(relay: Relay) -> str:
    return str(json.loads((await relay.call("GET", f"{relay.url}/readyz"))[2])["access"])


async def test_after_five_seconds_without_the_database_stored_keys_are_refused_and_those_of_the_file_are_not(start: StartRelay, raw: RawUpstream, file: Path) -> None:
    raw.plays(ok())
    async with opened(file) as store:
        await store.create_key("web", "{}", NEW, "test")
    relay = await start(document(file, raw))
    now = [relay.gateway.clock()]
    set_clock(relay, lambda: now[0])
    await relay.gateway.refresh_access()
    break_(file)
    now[0] += MAX_AGE_S
    for _ in range(2):
        await relay.gateway.refresh_access()
    assert await call(relay, KEY) == (200, "") and await readyz(relay) == "ok"
    now[0] += 0.01
    for secret in (KEY, UNKNOWN):
        assert await call(relay, secret) == (503, "store_unavailable")
    _, answer, body = await relay.call("POST", relay.path("mine", "chat/completions"), json={}, headers={"x-relay-key": KEY})
    assert answer["retry-after"] == "1" and "database of client keys is unavailable" in body.decode()
    assert await call(relay, CLIENT_KEY) == (200, "") and await call(relay, "sk-foreign-credential") == (401, "client_key_invalid")
    assert await readyz(relay) == "unavailable" and relay.gateway.gauges()["relay_store_up", "access"] == 0
    break_(file, back=True)
    await relay.gateway.refresh_access()
    assert await call(relay, KEY) == (200, "") and await readyz(relay) == "ok" and relay.gateway.gauges()["relay_store_up", "access"] == 1
    await relay.events("access.database_recovered")
    logged = [json.loads(line)["event"] for line in relay.logged.lines if "access.database" in line]
    assert logged == ["access.database_unavailable", "access.database_recovered"]


async def test_what_a_poll_finds_out_is_as_old_as_its_begin(start: StartRelay, raw: RawUpstream, file: Path) -> None:
    relay = await start(document(file, raw))
    now = [relay.gateway.clock()]

    class Slow(AccessStore):
        async def version(self) -> int:
            found = await super().version()
            now[0] += MAX_AGE_S + 1  # so long does its answer take
            return found

    async with opened(file) as store:
        set_clock(relay, lambda: now[0])
        await AccessUpdates(relay.gateway, Slow(store._database), lambda: 0.0).load()
    assert not relay.gateway.keys.is_fresh


async def test_everything_is_loaded_again_after_the_database_was_unavailable(start: StartRelay, raw: RawUpstream, file: Path) -> None:
    """The database may be a replica then, in which the last changes have other versions."""
    raw.plays(ok())
    async with opened(file) as store:
        await store.create_key("web", "{}", NEW, "test")
    relay = await start(document(file, raw))
    break_(file)
    await relay.gateway.refresh_access()
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("UPDATE client_keys SET revoked_s = 1")
    break_(file, back=True)
    await relay.gateway.refresh_access()
    assert await call(relay, KEY) == (401, "client_key_invalid")


async def test_a_restored_backup_is_loaded_anew_while_keys_in_both_stay_valid(start: StartRelay, raw: RawUpstream, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(ok())
    relay = await start(document(file, raw))
    async with opened(file) as store:
        await store.create_key("web", "{}", NEW, "test")
        await store.create_key("app", "{}", new_key(OTHER, "00000000000b"), "test")
        with contextlib.closing(sqlite3.connect(file)) as live, contextlib.closing(sqlite3.connect(file.with_name("backup.db"))) as backup:
            live.backup(backup)
        await store.revoke_key("00000000000b", "test")
        await store.create_key("new", "{}", new_key(UNKNOWN, "00000000000c"), "test")
        await store.create_key("web", None, new_key(UNKNOWN + "2", "00000000000d"), "test")
        await relay.gateway.refresh_access()
    assert [await call(relay, secret) for secret in (KEY, OTHER, UNKNOWN)] == [(200, ""), (401, "client_key_invalid"), (200, "")]
    stream = await begin_stream(relay, raw, KEY)
    cut = await begin_stream(relay, raw, UNKNOWN)
    with contextlib.closing(sqlite3.connect(file)) as live, contextlib.closing(sqlite3.connect(file.with_name("backup.db"))) as backup:
        backup.backup(live)
    missing = []
    put_client = ClientKeys.put_client

    def put_client_and_look(self: ClientKeys, *arguments: Any) -> None:
        put_client(self, *arguments)
        missing.append(self.find(KEY) is None)

    monkeypatch.setattr(ClientKeys, "put_client", put_client_and_look)
    await relay.gateway.refresh_access()
    assert len(missing) == 2 and not any(missing)
    raw.scripts[:] = [(ok(),)]
    assert [await call(relay, secret) for secret in (KEY, OTHER, UNKNOWN, UNKNOWN + "2")] == [(200, ""), (200, ""), *[(401, "client_key_invalid")] * 2]
    assert relay.gateway.keys.stored_clients() == {"web", "app"}
    assert await is_cut(cut) and not stream.closed and len(relay.gateway.calls) == 1


async def test_a_database_that_is_unavailable_at_the_start_or_hangs_is_followed_when_it_answers(
    start: StartRelay, raw: RawUpstream, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.plays(ok())
    monkeypatch.setattr("relay.access_updates.POLL_S", 0.05)
    monkeypatch.setattr("relay.storage.readers._LIMIT_S", 1)
    monkeypatch.setattr("relay.storage.readers._COMMAND_S", 1)
    url = await postgres.migrated_database()
    async with Network(postgres.port) as network, opened(url) as store:
        await store.create_key("web", "{}", NEW, "test")
        relay = await start(document(network.url(url), raw))
        assert await call(relay, KEY) == (503, "store_unavailable") and await call(relay, CLIENT_KEY) == (200, "")
        assert await readyz(relay) == "unavailable"
        await network.connect()
        await until(lambda: is_answer(relay, KEY, 200))
        network.passes.clear()  # no answer, and no end of the connection
        await relay.events("access.database_unavailable", 2)
        network.recover()
        await relay.events("access.database_recovered", 2)
        assert await call(relay, KEY) == (200, "")


async def test_a_hanging_database_does_not_delay_the_end_of_calls(start: StartRelay, raw: RawUpstream, file: Path) -> None:
    whole = document(file, raw)
    relay = await start(whole)
    stream = await begin_stream(relay, raw, CLIENT_KEY)

    class Hanging(AccessStore):
        async def version(self) -> int:
            await asyncio.Event().wait()
            raise AssertionError

    updates = AccessUpdates(relay.gateway, Hanging(None), lambda: 0.0)  # type: ignore[arg-type]
    hanging = asyncio.create_task(updates.load())
    await reload(relay.gateway, write_config(relay.folder, whole | {"clients": {}}))
    await asyncio.wait_for(updates.end_invalid(), HANG_GUARD_S)
    assert await is_cut(stream)
    hanging.cancel()


async def test_a_failure_that_lasts_is_logged_once_and_ends_no_poll(start: StartRelay, raw: RawUpstream, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.access_updates.POLL_S", 0.01)
    relay = await start(document(file, raw))
    polls = [0]
    version = AccessStore.version

    async def fail(_self: AccessStore) -> int:
        polls[0] += 1
        raise KeyError("unexpected")

    monkeypatch.setattr(AccessStore, "version", fail)
    await relay.events("access.update_failed")
    failed_polls = polls[0]
    await until(lambda: asyncio.sleep(0, polls[0] > failed_polls + 3))
    monkeypatch.setattr(AccessStore, "version", version)
    now = [relay.gateway.clock() + MAX_AGE_S + 1]
    set_clock(relay, lambda: now[0])
    await until(lambda: asyncio.sleep(0, relay.gateway.keys.is_fresh))
    assert len([line for line in relay.logged.lines if "access.update_failed" in line]) == 1


async def test_a_client_whose_record_cannot_be_read_may_call_nothing(start: StartRelay, raw: RawUpstream, file: Path) -> None:
    relay = await start(document(file, raw))
    async with opened(file) as store:
        await store.create_key("web", '{"nonsense": 1}', NEW, "test")
    await relay.gateway.refresh_access()
    assert await call(relay, KEY) == (403, "provider_not_allowed")
    [event] = await relay.events("access.bad_record")
    assert event["client"] == "web" and "nonsense: unknown key" in event["cause"]


# --- several processes


async def revoke_in_two(running: list[Served], setting: str | Path) -> None:
    """Create a key, open streams with it in all processes, revoke it, and see all of it end."""
    headers = {"x-relay-key": KEY, "Connection": "close"}
    async with opened(setting) as store, aiohttp.ClientSession() as client:
        await store.create_key("web", "{}", NEW, "test")

        async def statuses() -> set[int]:
            found = set()
            for relay in running:
                for _ in range(8):
                    async with client.post(relay.path("mine", "chat/completions"), json={}, headers=headers) as answer:
                        found.add(answer.status)
            return found

        async def are_all(*expected: int) -> bool:
            return await statuses() <= set(expected)

        await until(lambda: are_all(200))
        sessions = [await client.ws_connect(relay.path("demo", "realtime").replace("http", "ws", 1) + "?model=demo-realtime", headers={"x-relay-key": KEY}) for relay in running for _ in range(6)]
        await store.revoke_key(NEW.id, "test")
        await until(lambda: are_all(401, 429))  # after ten wrong keys a process answers 429
        for session in sessions:
            async with asyncio.timeout(HANG_GUARD_S):
                async for _ in session:
                    pass
            assert session.close_code == 4401


async def test_a_revoked_key_is_refused_by_both_workers_on_one_sqlite_file(tmp_path: Path, raw: RawUpstream, file: Path) -> None:
    raw.plays(ok())
    relay = await serve(tmp_path, document(file, raw, demo={"enabled": True}), "--workers", "2")
    await revoke_in_two([relay], file)
    await relay.stop()


async def test_a_revoked_key_is_refused_by_two_relays_on_one_postgresql(tmp_path: Path, raw: RawUpstream, postgres: PostgresServer) -> None:
    raw.plays(ok())
    url = await postgres.migrated_database()
    relays = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        relays.append(await serve(tmp_path / name, document(url, raw, demo={"enabled": True}), "--workers", "2"))
    await revoke_in_two(relays, url)
    for relay in relays:
        await relay.stop()


async def test_a_change_through_one_worker_makes_all_workers_load_it_at_once(start: StartRelay, raw: RawUpstream, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor's part is played by this test: it passes the order on to the worker."""
    monkeypatch.setattr("relay.access_updates.POLL_S", 1e6)
    raw.plays(ok())
    relay = await start(document(file, raw))
    ours, theirs = socket.socketpair()
    supervisor, worker = await Channel.open(ours), Control(await Channel.open(theirs))
    orders = _orders(relay.gateway, Stop(asyncio.Event(), asyncio.Event()))
    _pass_to_all(relay.gateway, worker)
    listening = asyncio.create_task(worker.listen(orders))
    async with opened(file) as store:
        await store.create_key("web", "{}", NEW, "test")
    changing = asyncio.create_task(relay.gateway.refresh_access())
    ordered = await supervisor.first()
    assert isinstance(ordered, Command) and ordered.order == "refresh_access"
    supervisor.post(Command(1, ordered.order, ordered.arguments))
    assert await supervisor.first() == Reply(1, Answer())
    supervisor.post(Reply(ordered.id, Answer()))
    await changing
    assert await call(relay, KEY) == (200, "")
    monkeypatch.setattr("relay.server.worker._REFRESH_S", 0.01)
    await relay.gateway.refresh_access()  # no answer: it does not wait for long
    supervisor.close()
    await asyncio.wait_for(listening, HANG_GUARD_S)
    worker._channel.close()


async def test_the_supervisor_passes_the_order_on_to_its_workers(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(document(None, raw))
    supervisor = Supervisor(relay.gateway.config, Sources(relay.folder / "gateway.yaml", None), None, lambda: None)  # type: ignore[arg-type]
    assert await supervisor.order("refresh_access", {}) == Answer()


# --- many keys


def test_equal_records_are_one_object_for_as_long_as_a_client_has_them() -> None:
    text = '{"metadata": {"team": "%s"}}'
    clients = [rights_of(text % (number % 3)) for number in range(9)]
    assert len({id(rights) for rights in clients}) == 3


def test_the_origins_of_many_clients_are_put_together_when_a_page_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("relay.gate.keys.Origins", lambda known: made.append(len(known)) or Origins(known))
    from relay.gate.access import Origins

    keys = ClientKeys(lambda: 0.0)
    for number in range(100):
        keys.put_client(f"c{number}", json.dumps({"origins": [f"https://{number}.example", f"https://*.{number}.test"]}))
    assert made == [0] and keys.origins.listed
    assert [keys.origins.allow(origin) for origin in ("https://7.example", "https://a.b.99.test", "https://99.test", "https://a.100.test", "http://a.9.test")] == [True, True, False, False, False]
    assert made == [0, 200]
