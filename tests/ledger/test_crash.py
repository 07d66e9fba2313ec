"""The ledger after a kill -9: a few rounds of `scripts/bench/crash`."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from pathlib import Path

import pytest

from relay.storage.database import try_out
from tests.processes import ROOT, run
from tests.relays import write_config

pytestmark = pytest.mark.programs


async def test_after_a_kill_every_row_exists_once_and_the_file_is_intact() -> None:
    """The limits are generous, for a busy machine.

    By default the script kills twenty times at 500 calls a second, with 0.2 s and 5 s.
    """
    command = (sys.executable, "scripts/bench/crash", "--kills", "2", "--rate", "50", "--margin-s", "4", "--start-s", "30")
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_the_relay_does_not_start_with_the_database_of_a_newer_relay(tmp_path: Path, workers: str) -> None:
    await try_out(str(tmp_path / "relay.db"))
    with sqlite3.connect(tmp_path / "relay.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    write_config(tmp_path, {"database": "relay.db", "providers": {}})
    relay = await run(tmp_path, "serve", "--port", "0", "--workers", workers)
    assert await relay.ended() == 1
    assert any("newer relay" in line for line in relay.lines)
