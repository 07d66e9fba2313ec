"""Tickets are used once, whatever the number of processes, and never after their expiry."""

from __future__ import annotations

import asyncio
import signal
from hashlib import sha256
from pathlib import Path

import pytest
import sqlalchemy as sa

from relay.storage import tickets as module
from relay.storage.access import AccessStore
from relay.storage.access_rows import MAX_JSON_BYTES, NewKey, TicketRow
from relay.storage.database import Database, DatabaseNewer, RowsRefused
from relay.storage.tables import tickets
from relay.storage.tickets import KEPT_S, TicketStore
from tests.processes import run
from tests.storage import access_process
from tests.storage.access_process import NOW_S, REDEMPTIONS, TICKET

EXPIRES_S = NOW_S + 60
KEY = "0123456789ab"


def ticket(digest: bytes = TICKET, key_id: str = KEY, expires_s: int = EXPIRES_S, terms: str = '{"provider":"openai"}') -> TicketRow:
    return TicketRow(digest, "web", key_id, terms, expires_s)


@pytest.fixture
def store(database: Database) -> TicketStore:
    return TicketStore(database)


async def test_a_ticket_is_redeemed_once(store: TicketStore) -> None:
    await store.issue(ticket())
    redeemed = await store.redeem(TICKET, NOW_S + 0.9, "exchange-1")
    assert redeemed == TicketRow(TICKET, "web", KEY, '{"provider":"openai"}', EXPIRES_S, NOW_S, "exchange-1")
    assert await store.redeem(TICKET, NOW_S, "exchange-2") is None
    assert await store.ticket(TICKET) == redeemed


async def test_an_unknown_ticket_is_not_redeemed(store: TicketStore) -> None:
    await store.issue(ticket())
    assert await store.redeem(sha256(b"another").digest(), NOW_S, "e") is None
    assert await store.ticket(sha256(b"another").digest()) is None
    assert await store.redeem(TICKET, NOW_S, "e") is not None


@pytest.mark.parametrize(("now_s", "is_valid"), [(EXPIRES_S - 0.001, True), (EXPIRES_S, False), (EXPIRES_S + 0.001, False)])
async def test_a_ticket_ends_with_the_second_of_its_expiry(store: TicketStore, now_s: float, is_valid: bool) -> None:
    await store.issue(ticket())
    assert (await store.redeem(TICKET, now_s, "e") is not None) is is_valid


async def test_of_100_redemptions_by_two_processes_one_gets_the_ticket(database: Database, store: TicketStore, database_setting: str, tmp_path: Path) -> None:
    await store.issue(ticket())
    async with database.writing() as connection:
        # Both processes wait for this transaction, so that all their redemptions are pending.
        await connection.execute(sa.update(tickets).values(refusal=None))
        processes = [await run(tmp_path, "redeem", database_setting, name, module=access_process.__name__) for name in "ab"]
        for process in processes:
            await process.until("started")
    counts = [int((await process.until(r"redeemed (\d+)")).group(1)) for process in processes]
    assert [await process.ended() for process in processes] == [0, 0]
    assert sorted(counts) == [0, 1] and REDEMPTIONS * len(processes) == 100


async def test_a_ticket_stays_used_when_its_process_is_killed(store: TicketStore, database_setting: str, tmp_path: Path) -> None:
    await store.issue(ticket())
    process = await run(tmp_path, "redeem_and_die", database_setting, "exchange-1", module=access_process.__name__)
    assert await process.ended() == -signal.SIGKILL
    assert await store.redeem(TICKET, NOW_S, "exchange-2") is None
    used = await store.ticket(TICKET)
    assert used is not None and (used.used_s, used.exchange_id) == (NOW_S, "exchange-1")


async def test_a_cancelled_redemption_gives_no_second_use(store: TicketStore) -> None:
    """Whether the ticket is used then depends on the moment; the connection is free in any case."""
    for steps in range(12):
        digest = sha256(bytes([steps])).digest()
        await store.issue(ticket(digest))
        redemption = asyncio.create_task(store.redeem(digest, NOW_S, "e"))
        for _ in range(steps):
            await asyncio.sleep(0)
        redemption.cancel()
        (first,) = await asyncio.gather(redemption, return_exceptions=True)
        found = [first, await store.redeem(digest, NOW_S, "e"), await store.redeem(digest, NOW_S, "e")]
        assert sum(isinstance(each, TicketRow) for each in found) <= 1


async def test_the_ticket_of_a_revoked_key_is_not_redeemed(database: Database, store: TicketStore) -> None:
    access = AccessStore(database)
    await access.create_key("web", None, NewKey(KEY, TICKET), "admin")
    await access.create_key("web", None, NewKey("f" * 12, bytes(32)), "admin")
    await store.issue(ticket())
    await store.issue(ticket(bytes(32), "f" * 12))
    await access.revoke_key(KEY, "admin")
    assert await store.redeem(TICKET, NOW_S, "e") is None
    assert await store.redeem(bytes(32), NOW_S, "e") is not None, "the other key is valid"


async def test_the_ticket_of_an_expired_key_is_not_redeemed(database: Database, store: TicketStore) -> None:
    await AccessStore(database).create_key("web", None, NewKey(KEY, TICKET, expires_s=NOW_S + 1), "admin")
    await store.issue(ticket())
    assert await store.redeem(TICKET, NOW_S + 1, "e") is None
    assert await store.redeem(TICKET, NOW_S, "e") is not None


async def test_the_ticket_of_a_key_in_gateway_yaml_is_redeemed(store: TicketStore) -> None:
    await store.issue(ticket(key_id="web/1"))
    assert await store.redeem(TICKET, NOW_S, "e") is not None


async def test_the_reason_of_a_refusal_is_kept_for_a_used_ticket(store: TicketStore) -> None:
    await store.issue(ticket())
    await store.note_refusal(TICKET, '{"code":"too_early"}')
    unused = await store.ticket(TICKET)
    assert unused is not None and unused.refusal is None
    await store.redeem(TICKET, NOW_S, "e")
    await store.note_refusal(TICKET, '{"code":"rate_limited"}')
    used = await store.ticket(TICKET)
    assert used is not None and used.refusal == '{"code":"rate_limited"}'


async def test_tickets_are_deleted_an_hour_after_their_expiry(store: TicketStore) -> None:
    await store.issue(ticket())
    assert await store.delete_expired(EXPIRES_S + KEPT_S - 0.001) == 0
    assert await store.ticket(TICKET) is not None
    assert await store.delete_expired(EXPIRES_S + KEPT_S) == 1
    assert await store.ticket(TICKET) is None


async def test_one_deletion_is_bounded(store: TicketStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DELETED_AT_ONCE", 2)
    for number in range(5):
        await store.issue(ticket(sha256(bytes([number])).digest()))
    assert [await store.delete_expired(EXPIRES_S + KEPT_S) for _ in range(4)] == [2, 2, 1, 0]


async def test_all_processes_have_one_secret_for_tickets(database: Database, other_database: Database) -> None:
    secrets = await asyncio.gather(TicketStore(database).ticket_secret(), TicketStore(other_database).ticket_secret())
    await AccessStore(other_database).put_client("web", "{}", "admin")
    secrets.append(await TicketStore(other_database).ticket_secret())
    assert len(set(secrets)) == 1 and len(secrets[0]) == 32


@pytest.mark.parametrize(
    "refused",
    [
        ticket(digest=b"rt_secret"), ticket(terms="[]"), ticket(terms="{"), ticket(terms='{"a":"%s"}' % ("x" * MAX_JSON_BYTES)), ticket(terms='{"a":"\ud800"}'),
        ticket(expires_s=-1), ticket(expires_s=2**63), TicketRow(TICKET, "a b", KEY, "{}", EXPIRES_S),
    ],
    ids=["digest", "list", "broken", "long", "surrogate", "negative", "far", "name"],
)  # fmt: skip
async def test_a_ticket_that_no_relay_makes_is_refused(store: TicketStore, refused: TicketRow) -> None:
    with pytest.raises(RowsRefused):
        await store.issue(refused)


async def test_a_ticket_is_issued_once(store: TicketStore) -> None:
    await store.issue(ticket())
    await store.redeem(TICKET, NOW_S, "e")
    with pytest.raises(RowsRefused):
        await store.issue(ticket())
    assert await store.redeem(TICKET, NOW_S, "e") is None


@pytest.mark.parametrize("database_setting", ["postgresql"], indirect=True)
async def test_a_restart_of_postgresql_costs_no_ticket(database: Database, store: TicketStore) -> None:
    await store.issue(ticket())
    await store.redeem(bytes(32), NOW_S, "e")  # connects
    async with database.writing() as connection:
        await connection.execute(sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"))
    assert await store.redeem(TICKET, NOW_S, "e") is not None


async def test_an_older_relay_refuses_a_newer_database(database: Database, store: TicketStore) -> None:
    async with database.writing() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    database._prepared = False
    for attempt in (store.ticket_secret(), store.issue(ticket()), store.redeem(TICKET, NOW_S, "e"), store.ticket(TICKET), store.delete_expired(NOW_S)):
        with pytest.raises(DatabaseNewer):
            await attempt
