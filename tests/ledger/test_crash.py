"""The ledger after a kill -9: `scripts/bench/crash`, a few rounds of it."""

from __future__ import annotations

import asyncio
import sys

from tests.processes import ROOT


async def test_after_a_kill_every_row_is_there_once_and_the_file_is_sound() -> None:
    """With a margin that no busy machine needs; the script's own is 0.2 s, over twenty kills at 500 calls a second."""
    command = (sys.executable, "scripts/bench/crash", "--kills", "3", "--rate", "100", "--margin-s", "2")
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
