"""Run a real PostgreSQL on loopback, one for each test process."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import asyncpg

from relay.storage.database import HEAD, try_out
from relay.storage.tables import metadata
from tests.processes import free_port
from tests.relays import HANG_GUARD_S
from tests.tools import need

T = TypeVar("T")


class PostgresServer:
    """One PostgreSQL server. It refuses to run as root, so root starts it as user `postgres`."""

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        self._bin = found[-1].parent if found else Path(shutil.which("postgres") or "/nowhere/postgres").parent
        self._folder = Path(tempfile.mkdtemp(prefix="relay-postgres-"))
        self.port = free_port()
        self._run_as = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._connections = _Connections()
        self._count = 0
        self._migrated: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def _command(self, name: str, *arguments: str) -> Sequence[str]:
        return [str(self._bin / name), *arguments]

    def make(self) -> None:
        """Create the files of the cluster, once."""
        command = self._command("initdb", "-D", str(self._folder / "data"), "-U", "relay", "-A", "trust", "--no-sync")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self._folder, **self._run_as)

    def start(self) -> None:
        """Start the server. Returns when its port accepts connections."""
        command = self._command(
            "postgres", "-D", str(self._folder / "data"), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1",
            "-c", f"unix_socket_directories={self._folder}", "-c", "fsync=off",
        )  # fmt: skip
        null = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=null, stderr=null, cwd=self._folder, **self._run_as)
        deadline = time.monotonic() + HANG_GUARD_S
        while True:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert time.monotonic() < deadline and self._process.poll() is None, "PostgreSQL did not start"
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill the server, as a crash would."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def remove(self) -> None:
        """Stop the server and delete its files."""
        self._connections.close()
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def migrated_database(self) -> str:
        """The URL of a database with empty tables.

        The database of the previous test is emptied and used again if it has the current schema:
        a new database takes 300 files to write, and later to delete.
        """
        if self._migrated is None or not await self._connections.use(self._migrated, _empty_tables):
            self._migrated = await self.database()
            await try_out(self._migrated)
        return self._migrated

    async def database(self) -> str:
        """Create a database. Returns its URL."""
        self._count += 1
        name = f"test{self._count}"
        server = f"postgresql+asyncpg://relay@127.0.0.1:{self.port}"
        await self._connections.use(f"{server}/postgres", lambda connection: connection.execute(f"CREATE DATABASE {name}"))
        return f"{server}/{name}"


class _Connections:
    """Connections that stay open while the loops of tests come and go, in a thread of its own.

    A new connection reads the catalog again, so emptying the tables through one takes ten times as
    long.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._open: dict[str, Any] = {}

    async def use(self, url: str, query: Callable[[Any], Awaitable[T]]) -> T:
        """Await `query` with the connection to a database."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._use(url, query), self._loop))

    async def _use(self, url: str, query: Callable[[Any], Awaitable[T]]) -> T:
        connection = self._open.get(url)
        if connection is None or connection.is_closed():
            connection = self._open[url] = await _connect(url.replace("+asyncpg", ""))
        return await query(connection)

    def close(self) -> None:
        """Close all connections, and end the thread."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(HANG_GUARD_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        for connection in self._open.values():
            connection.terminate()
        await asyncio.sleep(0)


async def _connect(url: str) -> Any:
    """Connect, and retry while the server does not accept connections yet."""
    async with asyncio.timeout(HANG_GUARD_S):
        while True:
            try:
                return await asyncpg.connect(url)
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.05)


_MANY_BYTES = 512 * 1024


async def _empty(connection: Any) -> None:
    """Empty all tables. TRUNCATE makes new files of each, which takes 30 ms for all of them."""
    tables = await connection.fetch("SELECT relname, pg_relation_size(oid) AS size FROM pg_class WHERE relname = ANY($1)", list(metadata.tables))
    await connection.execute(";".join(f"TRUNCATE {name}" if size > _MANY_BYTES else f"DELETE FROM {name}" for name, size in tables))
    sequences = await connection.fetch("SELECT sequencename FROM pg_sequences")
    await connection.execute(";".join(f"SELECT setval('{name}', 1, false)" for (name,) in sequences))


async def _empty_tables(connection: Any) -> bool:
    """Close all other connections to a database and empty its tables.

    Returns False, and leaves the tables alone, if the schema is not the current one.
    """
    if await connection.fetchval("SELECT version_num FROM alembic_version") != HEAD:
        return False
    await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
    await _empty(connection)
    return True


class Network:
    """A TCP connection to a server that a test can cut, or let hang without an answer.

    A context manager: its end closes all connections.
    """

    def __init__(self, port: int) -> None:
        self.port, self._server_port = free_port(), port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.passes = asyncio.Event()
        """While it is not set, nothing arrives on the other side."""
        self.passes.set()
        self.hangs_after: int | None = None
        """How many more chunks pass, of both directions, before nothing does."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.cut()

    def url(self, url: str) -> str:
        """The URL of a database, through here."""
        return url.replace(f":{self._server_port}/", f":{self.port}/")

    async def connect(self) -> None:
        """Accept connections from now on."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """Close all connections, and accept no more."""
        self.recover()
        if self._server is not None:
            self._server.close()
        self.reset()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self) -> None:
        """Close all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    def recover(self) -> None:
        """Let everything pass again."""
        self.hangs_after = None
        self.passes.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        self._writers |= {writer, server_writer}
        for source, sink in ((reader, server_writer), (server_reader, writer)):
            task = asyncio.create_task(self._copy(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                if self.hangs_after is not None:
                    self.hangs_after -= 1
                    if self.hangs_after < 0:
                        self.passes.clear()
                await self.passes.wait()
                sink.write(data)
        except OSError:
            pass
        finally:
            sink.close()
            self._writers.discard(sink)


def running() -> PostgresServer:
    """Create and start a server. Skips the test if PostgreSQL is not installed."""
    need("pg_ctlcluster")
    server = PostgresServer()
    server.make()
    server.start()
    return server
