"""A real PostgreSQL on loopback, of the tests' own: one for each test process."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg

from relay.storage.database import HEAD, try_out
from relay.storage.tables import metadata
from tests.processes import free_port
from tests.relays import HANG_GUARD_S
from tests.tools import need


class PostgresServer:
    """One server process. It refuses to run as root: then it runs as the user `postgres`."""

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        self._bin = found[-1].parent if found else Path(shutil.which("postgres") or "/nowhere/postgres").parent
        self._folder = Path(tempfile.mkdtemp(prefix="relay-postgres-"))
        self.port = free_port()
        self._as = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._count = 0
        self._migrated: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def _command(self, name: str, *arguments: str) -> Sequence[str]:
        return [str(self._bin / name), *arguments]

    def make(self) -> None:
        """Once: the files of a cluster."""
        command = self._command("initdb", "-D", str(self._folder / "data"), "-U", "relay", "-A", "trust", "--no-sync")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self._folder, **self._as)

    def start(self) -> None:
        """Returns when it answers."""
        command = self._command(
            "postgres", "-D", str(self._folder / "data"), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1",
            "-c", f"unix_socket_directories={self._folder}", "-c", "fsync=off",
        )  # fmt: skip
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=quiet, stderr=quiet, cwd=self._folder, **self._as)
        deadline = time.monotonic() + HANG_GUARD_S
        while True:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert time.monotonic() < deadline and self._process.poll() is None, "PostgreSQL did not start"
            time.sleep(0.05)

    def stop(self) -> None:
        """At once, as a crash would."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def remove(self) -> None:
        """Stop it, and leave nothing."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def migrated_database(self) -> str:
        """A database with nothing but empty tables: its URL. It is the one of the test before, where that left it usable:
        a new database is 300 files to write, and later to remove."""
        if self._migrated is None or not await _emptied(self._migrated):
            self._migrated = await self.database()
            await try_out(self._migrated)
        return self._migrated

    async def database(self) -> str:
        """A new database: its URL."""
        self._count += 1
        name = f"test{self._count}"
        connection = await _connected(f"postgresql://relay@127.0.0.1:{self.port}/postgres")
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()
        return f"postgresql+asyncpg://relay@127.0.0.1:{self.port}/{name}"


async def _connected(url: str) -> Any:
    """A connection, once the server takes one: it may just have started."""
    async with asyncio.timeout(HANG_GUARD_S):
        while True:
            try:
                return await asyncpg.connect(url)
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.05)


async def _emptied(url: str) -> bool:
    """Whether it has the tables of this relay, which are empty now, and no other connection."""
    tables = ", ".join(metadata.tables)
    connection = await _connected(url.replace("+asyncpg", ""))
    try:
        if await connection.fetchval("SELECT version_num FROM alembic_version") != HEAD:
            return False
        await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
        await connection.execute(f"TRUNCATE {tables} RESTART IDENTITY")
        return True
    finally:
        await connection.close()


def running() -> PostgresServer:
    """A server, made and started; skips, loudly, where there is none to run."""
    need("pg_ctlcluster")
    server = PostgresServer()
    server.make()
    server.start()
    return server
