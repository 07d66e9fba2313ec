"""100,000 client keys: what they cost in memory, in statements and in turns of the event loop.

No test here measures time: a lookup is one hash and two dictionaries, however many keys there are.
"""

from __future__ import annotations

import asyncio
import shutil
import tracemalloc
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from relay.access_updates import AccessUpdates
from relay.core.access import StoredKey
from relay.gate import keys as keys_module
from relay.gate.keys import ClientKeys
from relay.storage.access import AccessStore
from relay.storage.access_rows import PAGE_ROWS
from relay.storage.database import Database, database_url, try_out
from relay.storage.tables import access_state, client_keys, clients
from tests.conftest import StartRelay

MAX_BYTES_A_KEY = 550
"""60 MiB for 100,000 keys, each with a client of its own, are 629 bytes a key; the rest is for the
pages that are read."""


def record(number: int) -> str:
    return f'{{"providers": ["openai"], "metadata": {{"team": "team-{number}"}}}}'


def put(keys: ClientKeys, first: int, count: int, records: int) -> None:
    """Add keys, each with a client of its own, whose record is one of `records`."""
    for number in range(first, first + count):
        keys.put_client(f"client-{number:06d}", record(number % records))
        keys.put_key(sha256(b"rk_%d" % number).digest(), StoredKey(f"{number:012x}", f"client-{number:06d}", None))


@pytest.mark.parametrize("records", [20, 10_000], ids=["some records", "a record each"])
def test_a_key_with_its_client_takes_few_bytes(records: int) -> None:
    keys, count = ClientKeys(lambda: 0.0), 10_000
    put(keys, 0, 10, records)
    tracemalloc.start()
    try:
        put(keys, 10, count, records)
        assert tracemalloc.get_traced_memory()[0] / count < MAX_BYTES_A_KEY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("secret", ["rk_7", "rk_8", "rk_x", "rk_" + "x" * 10_000], ids=["known", "near miss", "random", "long"])
@pytest.mark.parametrize("count", [10, 3000])
def test_a_lookup_is_one_hash_and_one_search_however_many_keys_there_are(monkeypatch: pytest.MonkeyPatch, secret: str, count: int) -> None:
    """So a near miss takes as long as any other text: nothing is compared with a key."""
    keys = ClientKeys(lambda: 0.0)
    put(keys, 0, count, 20)
    keys.remove_key(sha256(b"rk_8").digest())
    work: list[str] = []

    class Counted(dict[bytes, Any]):
        def get(self, key: bytes, default: Any = None) -> Any:
            work.append("search")
            return super().get(key, default)

    keys._stored = Counted(keys._stored)
    monkeypatch.setattr(keys_module, "sha256", lambda data: work.append("hash") or sha256(data))
    assert (keys.find(secret) is not None) is (secret == "rk_7")
    assert work == ["hash", "search"]


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Every statement that any engine executes."""
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        found.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    yield found
    sa.event.remove(sa.Engine, "before_cursor_execute", note)


async def test_loading_reads_pages_and_leaves_the_loop_to_others(start: StartRelay, tmp_path: Path, migrated_sqlite: Path, statements: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.access_updates.POLL_S", 1e6)
    if not migrated_sqlite.exists():
        await try_out(str(migrated_sqlite))
    file, count = str(shutil.copy(migrated_sqlite, tmp_path / "many.db")), 2500
    relay = await start({"database": file, "providers": {}})
    database = Database(database_url(file))
    row = {"created_s": 1, "created_by": "test", "version": 1}
    async with database.writing() as connection:
        await connection.execute(sa.insert(clients), [row | {"name": f"c{number}", "record": record(number % 20)} for number in range(count)])
        await connection.execute(sa.insert(client_keys), [row | {"id": f"{number:012x}", "client": f"c{number}", "sha256": sha256(b"%d" % number).digest()} for number in range(count)])
        await connection.execute(sa.update(access_state).values(version=1))
    turns = [0]

    async def take_turns() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    updates = AccessUpdates(relay.gateway, AccessStore(database), lambda: 0.0)
    statements.clear()
    other = asyncio.create_task(take_turns())
    await updates.load()
    other.cancel()
    assert len(relay.gateway.keys) == count and turns[0] >= 2 * count / 100
    pages = -(-count // PAGE_ROWS)
    read = [statement for statement in statements if "FROM client" in statement]
    assert len(read) == 2 * pages
    statements.clear()
    await updates.load()
    assert [statement for statement in statements if "access_state" in statement] == statements and len(statements) == 1
    await database.close()
