"""Make a database of 1,000 clients, each with a record and a key; one is the key of post.lua.

    make_keys.py DATABASE
"""

from __future__ import annotations

import asyncio
import sys
from hashlib import sha256

from relay.storage.access import AccessStore
from relay.storage.access_rows import NewKey
from relay.storage.database import Database, database_url

KEY = "sk-local-0123456789abcdef0123456789abcdef"
KEYS = 1000


async def main(setting: str) -> None:
    database = Database(database_url(setting))
    store = AccessStore(database)
    for number in range(KEYS):
        key = KEY if number == KEYS // 2 else f"key-{number}"
        record = '{"providers": ["up"]}'
        await store.create_key(f"client-{number}", record, NewKey(f"{number:012x}", sha256(key.encode()).digest()), "bench")
    await database.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
