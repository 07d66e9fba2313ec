"""Start, drain and end of processes: signals, sockets, orphans, and calls that a drain cancels."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import resource
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType

from relay.core.errors import Draining
from relay.core.exchange import Caller, Exchange, Request
from relay.server.worker import drain
from tests.conftest import StartRelay
from tests.processes import STARTED, Served, free_port, run
from tests.relays import HANG_GUARD_S, Relay, provider, write_config
from tests.server.conftest import Serve
from tests.template import (
    Start,
    executed,
    executing_successors,
    executing_workers,
    forked,
    passing_socket,
)
from tests.upstream.raw import LAST_CHUNK, SILENCE, SSE_HEAD, RawUpstream, chunk, head, ok
from tests.upstream.vendors import echo, vendor

EVENT = b"data: 1\n\n"


@pytest.fixture
async def started(tmp_path: Path) -> AsyncIterator[Serve]:
    """Start a relay without waiting until it listens: `await started({...}, "--flag")`.

    It is killed at the end of the test if it still runs.
    """
    running: list[Served] = []

    async def begin(document: dict[str, Any], *arguments: str, by: Start = forked) -> Served:
        write_config(tmp_path, document)
        running.append(await run(tmp_path, "serve", *arguments, start=by))
        return running[-1]

    yield begin
    for one in running:
        if one.process.returncode is None:
            one.process.kill()
        await one.ended()



async def _until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(HANG_GUARD_S):
        while not (found := condition()):
            await asyncio.sleep(0.005)
        return found


def _children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _alive(pids: list[int]) -> list[int]:
    """The running ones; a zombie does not run."""
    return [pid for pid in pids if _state(pid) not in ("", "Z")]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _catches_sighup(pid: int) -> bool:
    return bool(int(Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16) & 1)


async def _ready(relay: Served, count: int) -> dict[int, int]:
    """Wait for `count` `worker.ready` events. Returns the process ids by worker number."""
    lines = await _until(lambda: (found := [line for line in relay.lines if "worker.ready" in line])[count - 1 :] and found)
    return {event["worker"]: event["pid"] for event in map(json.loads, lines)}


def _port(relay: Served) -> int:
    return int(relay.url.rpartition(":")[2])


def _connect(port: int) -> int:
    """The errno of a connect; 0 if it was accepted or queued."""
    with socket.socket() as sock:
        sock.settimeout(2)
        return sock.connect_ex(("127.0.0.1", port))


# Signals at any moment ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "numbers"),
    [
        ("before the workers", (signal.SIGTERM,)),
        ("before the workers", (signal.SIGTERM, signal.SIGINT)),
        ("workers start", (signal.SIGINT,)),
        ("workers start", (signal.SIGTERM, signal.SIGINT)),
        ("one worker is ready", (signal.SIGTERM,)),
        ("one worker is ready", (signal.SIGINT, signal.SIGINT)),
    ],
    ids=str,
)
async def test_a_signal_at_any_moment_ends_all_processes(started: Serve, moment: str, numbers: tuple[int, ...]) -> None:
    relay = await started({"providers": {}}, "--port", str(port := free_port()), "--workers", "2", by=executing_workers if moment == "workers start" else forked)
    await _until(lambda: _connect(port) == 0)
    workers: list[int] = []
    if moment != "before the workers":
        workers = await _until(lambda: (found := _children(relay.pid))[1:] and found)
    if moment == "one worker is ready":
        await relay.until("worker.ready")
    for number in numbers:
        relay.send(number)
    code = await relay.ended()
    assert code == 0 or (moment == "before the workers" and code in [-number for number in numbers])
    assert _alive(workers) == []
    assert not any("Traceback" in line or "worker.died" in line for line in relay.lines), relay.lines


async def test_an_interrupt_before_the_imports_prints_nothing(started: Serve) -> None:
    relay = await started({"providers": {}}, "--port", "0", "--workers", "2", by=executed)
    # The first statement of the relay catches SIGHUP; the imports follow.
    await _until(lambda: _catches_sighup(relay.pid))
    relay.send(signal.SIGINT)
    assert await relay.ended() == -signal.SIGINT
    assert relay.lines == []


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.soak), "2"])
async def test_sighup_during_the_start_is_ignored_and_later_reloads(started: Serve, workers: str) -> None:
    relay = await started({"providers": {"up": provider("http://127.0.0.1:9")}}, "--port", "0", "--workers", workers, by=executed)
    await _until(lambda: _catches_sighup(relay.pid))
    relay.send(signal.SIGHUP)
    await relay.until(STARTED)
    relay.send(signal.SIGHUP)
    await relay.until("reload.done" if workers == "1" else "reload.complete")
    await relay.stop()
    assert relay.process.returncode == 0


async def test_sighup_does_not_end_a_starting_worker(served: Serve, raw: RawUpstream) -> None:
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", "2", by=executing_successors)
    first = await _ready(relay, 2)
    os.kill(first[0], signal.SIGKILL)
    await relay.until("worker.died")
    [successor] = await _until(lambda: set(_children(relay.pid)) - set(first.values()))
    await _until(lambda: b"\0worker\0" in Path(f"/proc/{successor}/cmdline").read_bytes())
    await _until(lambda: _catches_sighup(successor))
    os.kill(successor, signal.SIGHUP)
    assert (await _ready(relay, 3))[0] == successor


async def test_starting_workers_end_when_their_supervisor_is_killed(started: Serve) -> None:
    relay = await started({"providers": {}}, "--port", "0", "--workers", "2", by=executing_workers)
    workers = await _until(lambda: (found := _children(relay.pid))[1:] and found)
    relay.send(signal.SIGKILL)
    await relay.ended()
    await _until(lambda: not _alive(workers))


async def test_a_worker_finishes_its_calls_when_its_supervisor_is_killed_during_a_drain(served: Serve, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, chunk(EVENT), LAST_CHUNK)
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", "2")
    workers = list((await _ready(relay, 2)).values())
    async with aiohttp.ClientSession() as session:
        stream = await session.get(relay.path("up", "x"))
        relay.send(signal.SIGTERM)
        await relay.until("drain.started")
        relay.send(signal.SIGKILL)
        await relay.process.wait()
        gate.set()
        assert await stream.read() == EVENT * 2
    await _until(lambda: not _alive(workers))


async def test_the_supervisor_waits_for_workers_that_already_drain(served: Serve, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, chunk(EVENT), LAST_CHUNK)
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", "2")
    workers = await _ready(relay, 2)
    async with aiohttp.ClientSession() as session:
        stream = await session.get(relay.path("up", "x"))
        for pid in workers.values():  # one of them serves the stream
            os.kill(pid, signal.SIGTERM)
        await _ready(relay, 4)
        relay.send(signal.SIGTERM)
        await _until(lambda: sum("drain.started" in line for line in relay.lines) == 4)
        gate.set()
        assert await stream.read() == EVENT * 2
    assert await relay.ended() == 0
    assert _alive(list(workers.values())) == []


# Sockets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.soak), "2"])
async def test_during_a_drain_the_relays_own_socket_refuses_and_keep_alive_connections_are_served(served: Serve, raw: RawUpstream, workers: str) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, LAST_CHUNK)
    raw.plays(ok(b"served"))
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", workers)
    if workers != "1":
        await _ready(relay, int(workers))
    async with aiohttp.ClientSession() as session:
        stream = await session.get(relay.path("up", "x"))
        # Several, since a worker without calls may end before it is asked: some are at the other.
        kept = [await asyncio.open_connection("127.0.0.1", _port(relay)) for _ in range(8)]
        for reader, writer in kept:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"}")
        relay.send(signal.SIGTERM)
        await _until(lambda: sum("drain.started" in line for line in relay.lines) == int(workers))
        assert _connect(_port(relay)) == errno.ECONNREFUSED
        answers = []
        for reader, writer in kept:
            with contextlib.suppress(ConnectionError):
                writer.write(b"GET /api/v1/ai-gateway/providers/up/y HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answers.append(await asyncio.wait_for(reader.read(), HANG_GUARD_S))
        served_answers = [answer for answer in answers if answer]
        assert served_answers
        for answer in served_answers:
            assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"served") and b"connection: close" in answer.lower()
        for _, writer in kept:
            writer.close()
        gate.set()
        assert await stream.read() == EVENT
    assert await relay.ended() == 0


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.soak), "2"])
async def test_during_a_drain_a_passed_socket_keeps_queueing_connections(started: Serve, raw: RawUpstream, workers: str) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, LAST_CHUNK)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen(16)
        relay = await started({"providers": {"up": provider(raw.url)}}, "--workers", workers, by=passing_socket(held))
        relay.url = f"http://127.0.0.1:{held.getsockname()[1]}"
        if workers != "1":
            await _ready(relay, int(workers))
        async with aiohttp.ClientSession() as session:
            stream = await session.get(relay.path("up", "x"))
            relay.send(signal.SIGTERM)
            await _until(lambda: sum("drain.started" in line for line in relay.lines) == int(workers))
            assert _connect(_port(relay)) == 0
            gate.set()
            assert await stream.read() == EVENT
        assert await relay.ended() == 0
        assert _connect(_port(relay)) == 0, "it queues also after the end of the relay"


@pytest.mark.parametrize("room", [0, 3], ids=["no socket", "no process"])
async def test_a_worker_that_cannot_start_without_file_descriptors_is_retried(served: Serve, raw: RawUpstream, room: int) -> None:
    raw.plays(ok())
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", "2", by=executing_successors)
    first = await _ready(relay, 2)
    soft, hard = resource.prlimit(relay.pid, resource.RLIMIT_NOFILE)
    os.kill(first[0], signal.SIGSTOP)  # it keeps its descriptors until the limit is set
    used = {int(name) for name in os.listdir(f"/proc/{relay.pid}/fd")}
    resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (_limit(used, room), hard))
    os.kill(first[0], signal.SIGKILL)
    failed = json.loads((await relay.until("worker.not_started")).string)
    assert failed["cause"] == "Too many open files" and failed["retry_in_s"] > 0
    await _until(lambda: sum("worker.not_started" in line for line in relay.lines) > 3)
    await _until(lambda: len(os.listdir(f"/proc/{relay.pid}/fd")) < len(used))  # no socket leaks
    resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert (await _ready(relay, 3))[0] != first[0]
    relay.send(signal.SIGTERM)
    assert await relay.ended() == 0


def _limit(used: set[int], room: int) -> int:
    """The limit that leaves `room` descriptors free, with those of the dead worker's channel."""
    free, limit = 0, 0
    while free < room or limit <= 3:
        free += limit not in used
        limit += 1
    return limit


# Calls that a drain cancels -----------------------------------------------------------------------


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream, aiohttp_server: Any) -> Relay:
    """A relay that cancels its calls at once when it drains."""
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    providers = {"up": provider(raw.url), "sock": provider(str(server.make_url("")), websocket={"default_path": "echo"})}
    return await start({"server": {"drain_timeout_s": 0.001}, "providers": providers})


async def _drained(relay: Relay) -> dict[str, Any]:
    """Drain a relay as a signal does. Returns the record of the one call that ran."""
    await drain(relay.gateway, asyncio.Event())
    assert not relay.gateway.running, "a drain ends once its calls are recorded"
    [record] = await relay.events()
    return record


async def _read_raw(port: int, during: Callable[[], Awaitable[object]]) -> bytes:
    """Read all bytes of a response, and await `during` after the first event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /api/v1/ai-gateway/providers/up/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
    got = await reader.readuntil(EVENT)
    await during()
    async with asyncio.timeout(HANG_GUARD_S):
        got += await reader.read()
    writer.close()
    return got


@pytest.mark.parametrize(("sent", "has_event"), [(EVENT, True), (EVENT + b"data: {", False)], ids=["between events", "within one"])
async def test_an_event_stream_that_a_drain_cancels_gets_an_error_event_only_between_events(relay: Relay, raw: RawUpstream, sent: bytes, has_event: bool) -> None:
    raw.plays(SSE_HEAD, chunk(sent), SILENCE)
    records: list[dict[str, Any]] = []

    async def cut() -> None:
        records.append(await _drained(relay))

    got = await _read_raw(relay.port, cut)
    assert (b'"code":"draining"' in got.rpartition(b"data: ")[2]) is has_event and (b"draining" in got) is has_event
    assert not got.endswith(LAST_CHUNK)
    assert [(record["outcome"], record["error"], record["status"]) for record in records] == [("failed", "draining", 200)]


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", "Content-Length: 100"])
async def test_a_byte_stream_that_a_drain_cancels_is_visibly_truncated(relay: Relay, raw: RawUpstream, framing: str) -> None:
    part = b"x" * 10
    raw.plays(head("Content-Type: audio/mpeg", framing), chunk(part) if "chunked" in framing else part, SILENCE)
    answer = await relay.client.get(relay.path("up", "x"))
    record = await _drained(relay)
    with pytest.raises(aiohttp.ClientPayloadError):
        await answer.read()
    assert (record["outcome"], record["error"]) == ("failed", "draining")


async def test_a_waiting_call_gets_a_draining_error_and_is_not_retried(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SILENCE)
    fallback = [{"provider": "other", "model": "n"}]
    up = provider(raw.url, retries={"max_attempts": 3}, fallback=fallback, idempotency_header="Idempotency-Key")
    relay = await start({"server": {"drain_timeout_s": 0.001}, "providers": {"up": up, "other": provider(raw.url)}})
    call = asyncio.create_task(relay.call("POST", relay.path("up", "chat/completions"), json={"model": "m"}))
    await _until(lambda: raw.arrived)
    record = await _drained(relay)
    status, headers, body = await call
    assert (status, headers["x-relay-error"], headers["retry-after"], headers["Connection"]) == (503, "draining", "1", "close")
    assert json.loads(body)["error"]["code"] == "draining"
    assert (record["outcome"], record["error"], record["status"]) == ("failed", "draining", 503)
    assert len(raw.arrived) == 1


async def test_a_running_upload_gets_a_draining_error(relay: Relay, raw: RawUpstream) -> None:
    raw.plays(ok())
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"POST /api/v1/ai-gateway/providers/up/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
    await _until(lambda: relay.gateway.running)
    record = await _drained(relay)
    answer = await asyncio.wait_for(reader.read(), HANG_GUARD_S)
    assert answer.startswith(b"HTTP/1.1 503") and b"x-relay-error: draining" in answer.lower()
    assert record["error"] == "draining"
    writer.close()


async def test_all_clients_of_a_coalesced_call_get_a_draining_error(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(EVENT), SILENCE)
    relay = await start({"server": {"drain_timeout_s": 0.001}, "cache": {"ttl_s": 60, "coalesce": True}, "providers": {"up": provider(raw.url)}})
    both = asyncio.Barrier(2)

    async def cut() -> None:
        if await both.wait() == 0:
            await drain(relay.gateway, asyncio.Event())

    for got in await asyncio.gather(*(_read_raw(relay.port, cut) for _ in range(2))):
        assert b'"code":"draining"' in got and not got.endswith(LAST_CHUNK)
    assert len(raw.arrived) == 1
    records = await relay.events(count=2)
    assert [(record["outcome"], record["error"]) for record in records] == [("failed", "draining")] * 2


async def test_a_session_is_closed_with_1012_and_recorded_as_draining(relay: Relay) -> None:
    ws = await relay.client.ws_connect(relay.ws("sock"), autoclose=False)
    draining = asyncio.create_task(_drained(relay))
    message = await ws.receive(HANG_GUARD_S)
    assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)
    await ws.close()
    record = await draining
    assert (record["outcome"], record["error"], record["close_code"]) == ("failed", "draining", 1012)


async def test_a_call_whose_client_disconnected_before_a_drain_stays_client_gone(start: StartRelay, raw: RawUpstream) -> None:
    """The relay reads the rest of the response for its usage, until the drain stops that."""
    raw.plays(SSE_HEAD, chunk(EVENT), SILENCE)
    up = provider(raw.url, on_disconnect="drain", drain_s=600)
    relay = await start({"server": {"drain_timeout_s": 0.001}, "providers": {"up": up}})
    answer = await relay.client.get(relay.path("up", "x"))
    assert await answer.content.readany() == EVENT
    answer.close()
    await _until(lambda: all(exchange.outcome.error is not None for exchange in relay.gateway.running))
    assert (await _drained(relay))["outcome"] == "client_gone"


def test_a_second_cancellation_does_not_change_the_error_of_a_call() -> None:
    """The shutdown of aiohttp cancels again while a call still sends its error to the client."""
    exchange = Exchange("x", Request("rest", "GET", Caller(""), 0.0))
    exchange.waiting.expired = Draining()
    exchange.fail(exchange.failure_of(asyncio.CancelledError()), asyncio.CancelledError())
    exchange.waiting.expired = None  # as `take_expiry` does
    exchange.fail(exchange.failure_of(asyncio.CancelledError()), asyncio.CancelledError())
    assert exchange.outcome.error is not None and (exchange.outcome.error.code, exchange.outcome.name) == ("draining", "failed")


async def test_calls_that_a_drain_cancels_have_rows_in_the_database(served: Serve, raw: RawUpstream) -> None:
    """With two workers and a second signal: check the last event, the exit code and the row."""
    raw.plays(SSE_HEAD, chunk(EVENT), SILENCE)
    relay = await served({"server": {"drain_timeout_s": 3600}, "database": "relay.db", "providers": {"up": provider(raw.url)}}, "--workers", "2")
    await _ready(relay, 2)

    async def twice() -> None:
        relay.send(signal.SIGTERM)
        await relay.until("drain.started")
        relay.send(signal.SIGTERM)

    assert b'"code":"draining"' in await _read_raw(_port(relay), twice)
    assert await relay.ended() == 0
    with sqlite3.connect(relay.folder / "relay.db") as connection:
        [(record,)] = connection.execute("SELECT record FROM exchanges").fetchall()
    assert (json.loads(record)["outcome"], json.loads(record)["error"]) == ("failed", "draining")


async def test_a_cancelled_stream_with_a_stalled_client_gets_no_event_within_another(start: StartRelay) -> None:
    """The provider sends each event in two parts, until the client buffers no further part."""
    stuck, part = asyncio.Event(), b"data: " + b"x" * 16_000

    async def provide(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SSE_HEAD)
        [exchange] = relay.gateway.running
        sent = 0
        while not stuck.is_set():
            for piece in (part, b"\n\n"):
                writer.write(chunk(piece))
                sent += len(piece)
                await _until(lambda sent=sent: exchange.response.body_bytes == sent)
                if await _holds(lambda: exchange.waiting.for_ == "client"):
                    stuck.set()
                    break
        await reader.read()
        writer.close()

    server = await asyncio.start_server(provide, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    relay = await start({"server": {"drain_timeout_s": 0.001}, "providers": {"up": provider(f"http://127.0.0.1:{port}")}})
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port, limit=1024)
    writer.write(b"GET /api/v1/ai-gateway/providers/up/x HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await asyncio.wait_for(stuck.wait(), HANG_GUARD_S)
    [exchange] = relay.gateway.running
    cutting = asyncio.create_task(drain(relay.gateway, asyncio.Event()))
    await _until(lambda: exchange.outcome.error is not None)
    failure = exchange.outcome.error
    got = b""
    async with asyncio.timeout(HANG_GUARD_S):
        while data := await reader.read(1 << 20):
            got += data
    await cutting
    writer.close()
    server.close()
    assert failure is not None and failure.code == "draining"
    assert b"draining" not in got and got.endswith(b"x\r\n")


async def _holds(condition: Callable[[], bool]) -> bool:
    """Whether a condition stays true: the buffers of the system may accept some more data."""
    for _ in range(20):
        if not condition():
            return False
        await asyncio.sleep(0.01)
    return True


# Reload -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.soak), "2"])
async def test_a_reload_lists_settings_that_need_a_restart_and_keeps_command_line_values(served: Serve, raw: RawUpstream, workers: str) -> None:
    document: dict[str, Any] = {"server": {"port": 1, "workers": 1}, "providers": {"up": provider(raw.url)}}
    relay = await served(document, "--workers", workers)
    if workers != "1":
        await _ready(relay, int(workers))
    async with aiohttp.ClientSession() as session:
        url = f"{relay.url}/api/v1/ai-gateway/providers/reload"
        async with session.post(url) as answer:
            assert (await answer.json())["needs_restart"] == []
        write_config(relay.folder, document | {"server": {"port": 2, "keepalive_timeout_s": 9, "drain_timeout_s": 9}, "metrics": {"enabled": False}})
        async with session.post(url) as answer:
            result = await answer.json()
    assert (result["changed"], result["needs_restart"]) == (["server.drain_timeout_s"], ["server.keepalive_timeout_s", "metrics.enabled"])
    await relay.until(r'"needs_restart":\["server.keepalive_timeout_s","metrics.enabled"\].*reload.done')


async def test_a_worker_that_starts_during_a_reload_gets_the_new_configuration(served: Serve, raw: RawUpstream) -> None:
    raw.plays(ok(b"fine"))
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", "2", by=executing_successors)
    first = await _ready(relay, 2)
    os.kill(first[0], signal.SIGKILL)
    await relay.until("worker.died")
    await _until(lambda: set(_children(relay.pid)) - set(first.values()))
    write_config(relay.folder, {"providers": {"moved": provider(raw.url)}})
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        async with session.post(f"{relay.url}/api/v1/ai-gateway/providers/reload") as answer:
            assert answer.status == 200, await answer.text()
        assert len(await _ready(relay, 3)) == 2, "the response came after all workers were ready"
        for _ in range(30):
            async with session.get(relay.path("moved", "x")) as answer:
                assert answer.status == 200


async def test_a_reload_without_the_answer_of_a_worker_fails(served: Serve, raw: RawUpstream) -> None:
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", "2")
    stopped = (await _ready(relay, 2))[1]
    os.kill(stopped, signal.SIGSTOP)  # only the other worker accepts from now on
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(HANG_GUARD_S * 2):
            async with session.post(f"{relay.url}/api/v1/ai-gateway/providers/reload") as answer:
                assert answer.status == 503 and answer.headers["x-relay-error"] == "workers_incomplete"
                assert "worker 1: no answer within" in (await answer.json())["error"]["message"]
    finally:
        os.kill(stopped, signal.SIGCONT)
