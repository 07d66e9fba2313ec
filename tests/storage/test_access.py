"""Clients and their keys in the database: every change is durable, audited, and seen by all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from relay.storage import access as module
from relay.storage import readers
from relay.storage.access import AccessStore
from relay.storage.access_rows import (
    MAX_DETAILS_BYTES,
    MAX_JSON_BYTES,
    Changes,
    ClientRow,
    KeyRow,
    NewKey,
)
from relay.storage.database import (
    Database,
    DatabaseNewer,
    DatabaseUnavailable,
    RowsRefused,
    database_url,
)
from relay.storage.readers import AT_ONCE, MAX_WAITING
from relay.storage.tables import client_keys
from relay.storage.tickets import TicketStore
from tests.processes import run
from tests.relays import HANG_GUARD_S
from tests.storage import access_process
from tests.storage.test_tickets import TICKET, ticket
from tests.surfaces.test_slow_questions import FOREVER, asked_by

NOW_S = 1_000.9
RECORD = '{"providers":["openai"],"models":["gpt-5*"]}'


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database: Database, clock: Clock) -> AccessStore:
    return AccessStore(database, clock)


def key(number: int, expires_s: int | None = None) -> NewKey:
    return NewKey(f"{number:012x}", sha256(f"{number}".encode()).digest(), expires_s)


async def changed(store: AccessStore, since: int = 0) -> tuple[int, Sequence[ClientRow], Sequence[KeyRow]]:
    """All pages of `changes` as one."""
    pages = [page async for page in store.changes(since)]
    assert [page.version for page in pages[:-1]] == [since] * (len(pages) - 1), "only the last page has the new version"
    return pages[-1].version, [row for page in pages for row in page.clients], [row for page in pages for row in page.keys]


async def actions(store: AccessStore) -> list[tuple[str, str]]:
    """The audit, oldest first."""
    return [(row.action, row.target) for row in reversed(await store.audit_rows())]


async def test_every_change_raises_the_version_by_one(store: AccessStore) -> None:
    versions = [await store.version()]
    for change in (
        store.put_client("web", RECORD, "admin"), store.create_key("web", None, key(1), "admin"), store.create_key("app", RECORD, key(2), "admin"),
        store.rotate("web", key(3), 2_000, "admin"), store.revoke_key(key(1).id, "admin"), store.revoke_client("app", "admin"),
    ):  # fmt: skip
        await change
        versions.append(await store.version())
    assert versions == [0, 1, 2, 3, 4, 5, 6]


async def test_a_change_is_seen_once(store: AccessStore) -> None:
    made = await store.create_key("web", RECORD, key(1, 5_000), "admin")
    assert made == KeyRow(key(1).id, "web", key(1).sha256, 1_000, "admin", 5_000, None, 1)
    assert await changed(store) == (1, [ClientRow("web", RECORD, 1_000, "admin", None, 1)], [made])
    assert await changed(store, since=1) == (1, [], [])
    later = await store.create_key("web", None, key(2), "admin")
    assert await changed(store, since=1) == (2, [], [later])


async def test_a_key_of_a_client_of_gateway_yaml_needs_no_row_of_the_client(store: AccessStore) -> None:
    made = await store.create_key("web", None, key(1), "admin")
    assert await changed(store) == (1, [], [made])
    assert await store.client("web") is None


async def test_a_record_replaces_the_one_before(store: AccessStore, clock: Clock) -> None:
    await store.put_client("web", RECORD, "admin")
    clock.now_s = 2_000
    replaced = await store.create_key("web", '{"providers":[]}', key(1), "another")
    assert await store.client("web") == ClientRow("web", '{"providers":[]}', 1_000, "admin", None, replaced.version)
    assert await actions(store) == [("client.put", "web"), ("client.put", "web"), ("key.create", key(1).id)]


async def test_a_revoked_key_is_among_the_changes(store: AccessStore, clock: Clock) -> None:
    await store.create_key("web", None, key(1), "admin")
    clock.now_s = 2_000
    revoked = await store.revoke_key(key(1).id, "admin")
    assert revoked is not None and revoked.revoked_s == 2_000
    assert await changed(store, since=1) == (2, [], [revoked])
    assert await store.key(key(1).id) == revoked


async def test_revoking_a_key_again_changes_nothing(store: AccessStore, clock: Clock) -> None:
    await store.create_key("web", None, key(1), "admin")
    revoked = await store.revoke_key(key(1).id, "admin")
    clock.now_s = 3_000
    assert await store.revoke_key(key(1).id, "another") == revoked
    assert await store.version() == 2
    assert await actions(store) == [("key.create", key(1).id), ("key.revoke", key(1).id)]


async def test_revoking_an_unknown_key_changes_nothing(store: AccessStore) -> None:
    assert await store.revoke_key(key(1).id, "admin") is None
    assert await store.revoke_client("web", "admin") is None
    assert (await store.version(), await actions(store)) == (0, [])


async def test_two_who_revoke_one_key_at_once_raise_one_version(store: AccessStore, other_database: Database) -> None:
    await store.create_key("web", None, key(1), "admin")
    both = await asyncio.gather(store.revoke_key(key(1).id, "admin"), AccessStore(other_database).revoke_key(key(1).id, "admin"))
    assert both[0] == both[1] and await store.version() == 2


async def test_a_revoked_client_is_deleted_and_all_its_keys_are_revoked(store: AccessStore) -> None:
    await store.create_key("web", RECORD, key(1), "admin")
    await store.create_key("web", None, key(2), "admin")
    await store.revoke_key(key(1).id, "admin")
    other = await store.create_key("web2", RECORD, key(3), "admin")
    assert await store.revoke_client("web", "admin") == 1
    version, changed_clients, changed_keys = await changed(store, since=4)
    assert version == 5
    assert [(row.name, row.deleted_s) for row in changed_clients] == [("web", 1_000)]
    assert [(row.id, row.revoked_s) for row in changed_keys] == [(key(2).id, 1_000)]
    assert await store.key(key(3).id) == other
    assert (await store.revoke_client("web", "admin"), await store.version()) == (None, 5)


async def test_a_client_that_exists_again_has_no_valid_key(store: AccessStore) -> None:
    await store.create_key("web", RECORD, key(1), "admin")
    await store.revoke_client("web", "admin")
    again = await store.put_client("web", RECORD, "admin")
    assert again.deleted_s is None and await store.client("web") == again
    revoked = await store.key(key(1).id)
    assert revoked is not None and revoked.revoked_s == 1_000


async def test_a_rotation_lets_the_older_keys_of_the_client_expire(store: AccessStore) -> None:
    for number, (client, expires_s) in enumerate([("web", None), ("web", 9_000), ("web", 1_500), ("other", None), ("web", None)]):
        await store.create_key(client, None, key(number, expires_s), "admin")
    await store.revoke_key(key(4).id, "admin")
    before = await store.version()
    new = await store.rotate("web", key(5), 2_000, "admin")
    version, _, rows = await changed(store, since=before)
    assert version == new.version == before + 1
    assert {row.id: row.expires_s for row in rows} == {key(0).id: 2_000, key(1).id: 2_000, key(5).id: None}
    assert (await actions(store))[-1] == ("key.rotate", key(5).id)


async def test_a_rotation_to_a_key_that_exists_changes_nothing(store: AccessStore) -> None:
    made = await store.create_key("web", None, key(1), "admin")
    with pytest.raises(RowsRefused):
        await store.rotate("web", NewKey(key(2).id, key(1).sha256), 2_000, "admin")
    assert await changed(store) == (1, [], [made])
    assert await actions(store) == [("key.create", key(1).id)]


async def test_a_change_that_fails_raises_no_version(store: AccessStore) -> None:
    async def fail(change: Any) -> None:
        await change.put_client("web", RECORD)
        raise KeyError

    with pytest.raises(KeyError):
        await store._change("admin", fail)
    assert (await changed(store), await actions(store)) == ((0, [], []), [])


async def test_versions_are_committed_in_their_order(store: AccessStore, other_database: Database) -> None:
    """While a change is open, a later one waits, and no reader sees either of them."""
    second_store = AccessStore(other_database)
    await second_store.put_client("before", RECORD, "admin")
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def put(change: Any) -> int:
        row = await change.put_client("first", RECORD)
        begun.set()
        await go_on.wait()
        return int(row.version)

    first = asyncio.create_task(store._change("admin", put))
    async with asyncio.timeout(HANG_GUARD_S):
        await begun.wait()
    second = asyncio.create_task(second_store.put_client("second", RECORD, "admin"))
    try:
        for _ in range(5):
            version, changed_clients, _ = await changed(second_store)
            assert (version, [row.name for row in changed_clients]) == (1, ["before"])
        assert not second.done()
    finally:
        go_on.set()
    assert (await first, (await second).version) == (2, 3)
    assert [row.version for row in (await changed(store))[1]] == [1, 2, 3]


async def test_a_change_whose_caller_is_cancelled_is_finished(store: AccessStore, other_database: Database) -> None:
    """The error of a cancelled caller must not keep a lock: here it is kept until the end."""
    other_store, errors = AccessStore(other_database), []
    for number in range(12):
        creation = asyncio.create_task(other_store.create_key("web", None, key(number), "admin"))
        for _ in range(number + 1):
            await asyncio.sleep(0)
        creation.cancel()
        errors += await asyncio.gather(creation, return_exceptions=True)
    async with asyncio.timeout(HANG_GUARD_S):
        while await store.version() < 12:
            await asyncio.sleep(0.001)
    assert [type(error) for error in errors] == [asyncio.CancelledError] * 12
    assert (await store.version(), len(await store.keys())) == (12, 12)


async def test_who_sees_a_version_has_all_changes_up_to_it(store: AccessStore, database_setting: str, tmp_path: Path) -> None:
    """Two processes create keys, each of which has its own version, while a third one polls."""
    processes = [await run(tmp_path, "create_keys", database_setting, name, module=access_process.__name__) for name in "ab"]
    last = access_process.KEYS * len(processes)
    seen, loaded = 0, list[int]()
    async with asyncio.timeout(HANG_GUARD_S):
        while seen < last:
            if (await store.version()) > seen:
                seen, _, rows = await changed(store, since=(since := seen))
                loaded += [row.version for row in rows if row.version <= seen]
                assert sorted(set(loaded)) == list(range(1, seen + 1)), since
    made = [list(map(int, (await process.until(r"versions (.+)")).group(1).split())) for process in processes]
    assert sorted(made[0] + made[1]) == list(range(1, last + 1))
    assert [sorted(versions) == versions for versions in made] == [True, True]
    for process in processes:
        assert await process.ended() == 0


async def insert_keys(database: Database, count: int) -> None:
    """Store keys that were all changed by a few changes."""
    rows = [{"id": f"{n:012x}", "client": f"c{n % 7}", "sha256": sha256(f"{n}".encode()).digest(), "created_s": 1, "created_by": "a", "version": 1 + n // 900} for n in range(count)]
    async with database.writing() as connection:
        await connection.execute(sa.insert(client_keys), rows)


async def test_changes_are_loaded_in_pages(database: Database, store: AccessStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_ROWS", 100)
    await insert_keys(database, 950)
    pages = [page async for page in store.changes(0)]
    assert [len(page.keys) for page in pages if page.keys] == [100] * 9 + [50]
    ids = [row.id for page in pages for row in page.keys]
    assert sorted(ids) == ids == [f"{n:012x}" for n in range(950)], "each key is loaded once, in the order of versions and ids"


async def test_a_row_that_changes_while_pages_are_loaded_is_not_missed(database: Database, store: AccessStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_ROWS", 2)
    for number in range(6):
        await store.create_key("web", None, key(number), "admin")
    loaded: dict[str, int | None] = {}
    last = Changes(0)
    async for page in store.changes(0):
        if not loaded:
            await store.revoke_key(key(5).id, "admin")  # its row moves behind the pages to come
        loaded |= {row.id: row.revoked_s for row in page.keys}
        last = page
    assert loaded.keys() == {key(number).id for number in range(6)}
    assert loaded[key(5).id] == 1_000 and last.version == 6
    assert [row.id for row in (await changed(store, since=last.version))[2]] == [key(5).id]


async def test_reports_do_not_hold_up_the_poll(database: Database, store: AccessStore) -> None:
    await store.create_key("web", None, key(1), "admin")
    async with asked_by(database, AT_ONCE + MAX_WAITING), asyncio.timeout(HANG_GUARD_S):
        assert await store.version() == 1
        assert len((await changed(store))[2]) == 1
        await store.revoke_key(key(1).id, "admin")
        assert await store.version() == 2


async def test_a_poll_that_hangs_is_ended_as_unavailable(database: Database, store: AccessStore, monkeypatch: pytest.MonkeyPatch) -> None:
    await database.prepare()
    monkeypatch.setattr(readers, "READ_S", 0.05)
    with pytest.raises(DatabaseUnavailable):
        await database.watch(lambda connection: connection.execute(sa.text(FOREVER[database.is_sqlite])))
    monkeypatch.setattr(readers, "READ_S", HANG_GUARD_S)
    assert await store.version() == 0


async def synchronous(connection: Any) -> int:
    return int((await connection.exec_driver_sql("PRAGMA synchronous")).scalar_one())


on_sqlite = pytest.mark.parametrize("database_setting", ["sqlite"], indirect=True)


@on_sqlite
async def test_sqlite_waits_for_the_disk_for_changes_of_access_only(database: Database) -> None:
    assert await database.change_durably(synchronous) == 2, "FULL"
    assert await database.change(synchronous) == 1, "NORMAL"


@on_sqlite
async def test_every_change_and_redemption_is_durable(database: Database, store: AccessStore) -> None:
    ticket_store, durable = TicketStore(database), list[str]()
    sa.event.listen(database._durable_engine.sync_engine, "commit", lambda _: durable.append(name))
    await ticket_store.issue(ticket())
    changes = {
        "put_client": store.put_client("web", RECORD, "admin"), "create_key": store.create_key("web", None, key(1), "admin"),
        "rotate": store.rotate("web", key(2), 2_000, "admin"), "revoke_key": store.revoke_key(key(1).id, "admin"), "revoke_client": store.revoke_client("web", "admin"),
        "audit": store.audit("admin", "session.end", "1", {}), "redeem": ticket_store.redeem(TICKET, NOW_S, "e"),
    }  # fmt: skip
    for name, change in changes.items():
        assert await change is not None or name == "audit"
    assert durable == list(changes)


@on_sqlite
@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "web\n", "\u00e4", "a\0"])
async def test_a_name_that_no_client_can_have_is_refused(store: AccessStore, name: str) -> None:
    for change in (store.put_client(name, RECORD, "admin"), store.create_key(name, None, key(1), "admin"), store.rotate(name, key(1), 1, "admin")):
        with pytest.raises(RowsRefused):
            await change
    assert await changed(store) == (0, [], [])


@on_sqlite
@pytest.mark.parametrize("record", ["", "[]", "null", "{", '{"a":1}x', '{"a":"%s"}' % ("x" * MAX_JSON_BYTES), '{"a":"\ud800"}', "[" * 10_000])
async def test_a_record_that_is_no_object_or_too_long_is_refused(store: AccessStore, record: str) -> None:
    for change in (store.put_client("web", record, "admin"), store.create_key("web", record, key(1), "admin")):
        with pytest.raises(RowsRefused):
            await change
    assert await changed(store) == (0, [], [])


@on_sqlite
@pytest.mark.parametrize("refused", [NewKey("0" * 11, bytes(32)), NewKey("A" * 12, bytes(32)), NewKey("0" * 12 + "\n", bytes(32)), NewKey("0" * 12, b"rk_secret"), NewKey("0" * 12, bytes(32), -1), NewKey("0" * 12, bytes(32), 2**63)])
async def test_a_key_that_no_relay_makes_is_refused(store: AccessStore, refused: NewKey) -> None:
    for change in (store.create_key("web", RECORD, refused, "admin"), store.rotate("web", refused, 1, "admin")):
        with pytest.raises(RowsRefused):
            await change
    assert (await changed(store), await actions(store)) == ((0, [], []), [])


async def test_the_audit_says_who_changed_what_newest_first(store: AccessStore) -> None:
    await store.create_key("web", RECORD, key(1), "127.0.0.1")
    await store.audit("admin", "session.end", "exchange-1", {"reason": "leak"})
    rows = await store.audit_rows()
    assert [(row.at_s, row.actor, row.action, row.target, json.loads(row.details)) for row in rows] == [
        (1_000, "admin", "session.end", "exchange-1", {"reason": "leak"}), (1_000, "127.0.0.1", "key.create", key(1).id, {"client": "web"}),
        (1_000, "127.0.0.1", "client.put", "web", {"record": json.loads(RECORD)}),
    ]  # fmt: skip
    assert await store.version() == 1, "an audit row alone is no change of access"
    assert [await store.audit_rows(before=rows[0].seq, limit=1), await store.audit_rows(before=rows[2].seq)] == [[rows[1]], []]


async def test_strings_of_the_audit_are_bounded(store: AccessStore) -> None:
    await store.audit("a" * 1000, "b" * 1000, "c\0" * 1000, {})
    (row,) = await store.audit_rows()
    assert [len(text) for text in (row.actor, row.action, row.target)] == [256] * 3 and "\0" not in row.target
    with pytest.raises(RowsRefused):
        await store.audit("admin", "x", "y", {"z": "x" * MAX_DETAILS_BYTES})
    made = await store.create_key("web", None, key(1), "a" * 1000)
    assert len(made.created_by) == 256


async def test_keys_are_listed_in_pages_by_client(store: AccessStore) -> None:
    for number, client in enumerate(("b", "a", "b", "a", "c")):
        await store.create_key(client, None, key(number), "admin")
    everything = await store.keys()
    assert [(row.client, int(row.id, 16)) for row in everything] == [("a", 1), ("a", 3), ("b", 0), ("b", 2), ("c", 4)]
    pages, after = [], ""
    while page := await store.keys(after=after, limit=2):
        pages.append([int(row.id, 16) for row in page])
        after = page[-1].id
    assert pages == [[1, 3], [0, 2], [4]]
    assert [int(row.id, 16) for row in await store.keys("b")] == [0, 2]
    assert [int(row.id, 16) for row in await store.keys("b", after=key(0).id)] == [2]
    assert await store.keys(after="unknown") == []


async def test_clients_are_listed_in_pages_without_deleted_ones(store: AccessStore) -> None:
    for name in ("d", "a", "c", "b"):
        await store.put_client(name, RECORD, "admin")
    await store.revoke_client("b", "admin")
    assert [row.name for row in await store.clients(limit=2)] == ["a", "c"]
    assert [row.name for row in await store.clients(after="c", limit=2)] == ["d"]
    deleted = await store.client("b")
    assert deleted is not None and deleted.deleted_s == 1_000


async def test_an_older_relay_refuses_a_newer_database(database: Database, store: AccessStore) -> None:
    async with database.writing() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    database._prepared = False
    for attempt in (store.version(), changed(store), store.create_key("web", None, key(1), "admin"), store.revoke_key(key(1).id, "admin"), store.keys()):
        with pytest.raises(DatabaseNewer):
            await attempt


async def test_a_database_that_cannot_be_opened_is_unavailable(tmp_path: Path) -> None:
    database = Database(database_url(str(tmp_path)))
    store = AccessStore(database)
    for attempt in (store.version(), changed(store), store.create_key("web", None, key(1), "admin"), store.keys()):
        with pytest.raises(DatabaseUnavailable):
            await attempt
    await database.close()
