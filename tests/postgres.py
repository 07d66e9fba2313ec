"""A real PostgreSQL on loopback, of the tests' own: one for the whole run, a database for each test."""

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

import asyncpg

from relay.storage.database import try_out
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
        """A database with nothing but the tables: its URL."""
        if self._migrated is None:
            made = await self.database()
            await try_out(made)
            self._migrated = made.rpartition("/")[2]
        return await self.database(self._migrated)

    async def database(self, like: str = "template1") -> str:
        """A new database: its URL."""
        self._count += 1
        name = f"test{self._count}"
        async with asyncio.timeout(HANG_GUARD_S):
            while True:
                try:
                    connection = await asyncpg.connect(f"postgresql://relay@127.0.0.1:{self.port}/postgres")
                    break
                except (OSError, asyncpg.PostgresError):
                    await asyncio.sleep(0.05)
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {like}")
        await connection.close()
        return f"postgresql+asyncpg://relay@127.0.0.1:{self.port}/{name}"


def running() -> PostgresServer:
    """A server, made and started; skips, loudly, where there is none to run."""
    need("pg_ctlcluster")
    server = PostgresServer()
    server.make()
    server.start()
    return server
