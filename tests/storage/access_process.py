"""A process of its own that changes access, for tests of several processes and of their death.

`python -m tests.storage.access_process WHAT DATABASE NAME` prints one line as its result.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from hashlib import sha256

from relay.storage.access import AccessStore
from relay.storage.access_rows import NewKey
from relay.storage.database import Database, database_url
from relay.storage.tickets import TicketStore

REDEMPTIONS = 50
KEYS = 6
NOW_S = 1_000
TICKET = sha256(b"ticket").digest()


async def redeem(database: Database, name: str) -> str:
    """Redeem one ticket many times at once. Returns how many of them got it."""
    store = TicketStore(database)
    found = await asyncio.gather(*(store.redeem(TICKET, NOW_S, f"{name}-{number}") for number in range(REDEMPTIONS)))
    return f"redeemed {sum(ticket is not None for ticket in found)}"


async def redeem_and_die(database: Database, name: str) -> str:
    """Redeem the ticket, and be killed before the next statement of Python."""
    if await TicketStore(database).redeem(TICKET, NOW_S, name) is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return "not redeemed"


async def create_keys(database: Database, name: str) -> str:
    """Create keys, one after another. Returns their versions."""
    store, versions = AccessStore(database), []
    for number in range(KEYS):
        digest = sha256(f"{name}{number}".encode()).digest()
        versions.append((await store.create_key(name, None, NewKey(digest.hex()[:12], digest), name)).version)
    return f"versions {' '.join(map(str, versions))}"


async def main(what: str, setting: str, name: str) -> None:
    database = Database(database_url(setting))
    await database.prepare()
    print("started", file=sys.stderr, flush=True)
    print(await globals()[what](database, name), file=sys.stderr, flush=True)
    await database.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
