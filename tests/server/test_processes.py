"""Processes at their edges: signals at any moment, sockets and orphans that must not be left, calls that a drain cuts."""

from __future__ import annotations

import asyncio
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
from tests.processes import STARTED, Served, free_port, passing_socket, run
from tests.relays import HANG_GUARD_S, Relay, provider, write_config
from tests.server.conftest import Serve
from tests.template import Start, executed, forked
from tests.upstream.raw import LAST_CHUNK, SILENCE, SSE_HEAD, RawUpstream, chunk, head, ok
from tests.upstream.vendors import echo, vendor

EVENT = b"data: 1\n\n"


@pytest.fixture
async def started(tmp_path: Path) -> AsyncIterator[Serve]:
    """`await started({...}, "--flag")` does not wait until it listens; whatever becomes of it, nothing is left."""
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
    """Those that run; a zombie that nobody has reaped does not."""
    return [pid for pid in pids if _state(pid) not in ("", "Z")]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _catches_hang_ups(pid: int) -> bool:
    return bool(int(Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16) & 1)


async def _ready(relay: Served, count: int) -> dict[int, int]:
    """Worker number to process id, once `count` have said that they are ready."""
    lines = await _until(lambda: (found := [line for line in relay.lines if "worker.ready" in line])[count - 1 :] and found)
    return {event["worker"]: event["pid"] for event in map(json.loads, lines)}


def _port(relay: Served) -> int:
    return int(relay.url.rpartition(":")[2])


def _connect(port: int) -> int:
    """The errno of a connect, 0 if it was taken or queued."""
    with socket.socket() as sock:
        sock.settimeout(2)
        return sock.connect_ex(("127.0.0.1", port))


# Signals at any moment --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "numbers"),
    [
        ("its workers are not there", (signal.SIGTERM,)),
        ("its workers are not there", (signal.SIGTERM, signal.SIGINT)),
        ("they start", (signal.SIGINT,)),
        ("they start", (signal.SIGTERM, signal.SIGINT)),
        ("one is ready", (signal.SIGTERM,)),
        ("one is ready", (signal.SIGINT, signal.SIGINT)),
    ],
    ids=str,
)
async def test_a_signal_at_any_moment_ends_all_and_leaves_no_orphan(started: Serve, moment: str, numbers: tuple[int, ...]) -> None:
    relay = await started({"providers": {}}, "--port", str(port := free_port()), "--workers", "2", by=executed if moment == "they start" else forked)
    await _until(lambda: _connect(port) == 0)
    workers: list[int] = []
    if moment != "its workers are not there":
        workers = await _until(lambda: (found := _children(relay.pid))[1:] and found)
    if moment == "one is ready":
        await relay.until("worker.ready")
    for number in numbers:
        relay.send(number)
    code = await relay.ended()
    assert code == 0 or (moment == "its workers are not there" and code in [-number for number in numbers])
    assert _alive(workers) == []
    assert not any("Traceback" in line or "worker.died" in line for line in relay.lines), relay.lines


async def test_an_interrupt_before_anything_is_imported_prints_nothing(started: Serve) -> None:
    relay = await started({"providers": {}}, "--port", "0", "--workers", "2", by=executed)
    # Its first statement catches SIGHUP: then the imports begin.
    await _until(lambda: _catches_hang_ups(relay.pid))
    relay.send(signal.SIGINT)
    assert await relay.ended() == -signal.SIGINT
    assert relay.lines == []


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.soak), "2"])
async def test_a_hang_up_during_the_start_is_a_reload_once_it_runs(started: Serve, workers: str) -> None:
    relay = await started({"providers": {"up": provider("http://127.0.0.1:9")}}, "--port", "0", "--workers", workers, by=executed)
    await _until(lambda: _catches_hang_ups(relay.pid))
    relay.send(signal.SIGHUP)
    await relay.until(STARTED)
    relay.send(signal.SIGHUP)
    await relay.until("reload.done" if workers == "1" else "reload.complete")
    await relay.stop()
    assert relay.process.returncode == 0


async def test_a_worker_that_is_hung_up_on_while_it_starts_goes_on(served: Serve, raw: RawUpstream) -> None:
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", "2", by=executed)
    first = await _ready(relay, 2)
    os.kill(first[0], signal.SIGKILL)
    await relay.until("worker.died")
    [successor] = await _until(lambda: set(_children(relay.pid)) - set(first.values()))
    await _until(lambda: b"\0worker\0" in Path(f"/proc/{successor}/cmdline").read_bytes())
    await _until(lambda: _catches_hang_ups(successor))
    os.kill(successor, signal.SIGHUP)
    assert (await _ready(relay, 3))[0] == successor


async def test_workers_end_when_their_supervisor_is_killed_while_they_start(started: Serve) -> None:
    relay = await started({"providers": {}}, "--port", "0", "--workers", "2", by=executed)
    workers = await _until(lambda: (found := _children(relay.pid))[1:] and found)
    relay.send(signal.SIGKILL)
    await relay.ended()
    await _until(lambda: not _alive(workers))


async def test_a_worker_lets_its_calls_end_when_its_supervisor_is_killed_during_a_drain(served: Serve, raw: RawUpstream) -> None:
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


async def test_the_supervisor_waits_for_a_worker_that_was_draining_already(served: Serve, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, chunk(EVENT), LAST_CHUNK)
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", "2")
    workers = await _ready(relay, 2)
    async with aiohttp.ClientSession() as session:
        stream = await session.get(relay.path("up", "x"))
        for pid in workers.values():  # one of them has the stream
            os.kill(pid, signal.SIGTERM)
        await _ready(relay, 4)
        relay.send(signal.SIGTERM)
        await _until(lambda: sum("drain.started" in line for line in relay.lines) == 4)
        gate.set()
        assert await stream.read() == EVENT * 2
    assert await relay.ended() == 0
    assert _alive(list(workers.values())) == []


# Sockets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.soak), "2"])
async def test_while_it_drains_a_socket_of_its_own_refuses_and_a_kept_connection_is_served(served: Serve, raw: RawUpstream, workers: str) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, LAST_CHUNK)
    raw.plays(ok(b"served"))
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", workers)
    if workers != "1":
        await _ready(relay, int(workers))
    async with aiohttp.ClientSession() as session:
        stream = await session.get(relay.path("up", "x"))
        kept, writer = await asyncio.open_connection("127.0.0.1", _port(relay))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await kept.readuntil(b"}")
        relay.send(signal.SIGTERM)
        await _until(lambda: sum("drain.started" in line for line in relay.lines) == int(workers))
        assert _connect(_port(relay)) == errno.ECONNREFUSED
        writer.write(b"GET /api/v1/ai-gateway/providers/up/y HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await asyncio.wait_for(kept.read(), HANG_GUARD_S)
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"served") and b"connection: close" in answer.lower()
        writer.close()
        gate.set()
        assert await stream.read() == EVENT
    assert await relay.ended() == 0


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.soak), "2"])
async def test_while_it_drains_a_socket_that_was_handed_over_goes_on_queueing(started: Serve, raw: RawUpstream, workers: str) -> None:
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
        assert _connect(_port(relay)) == 0, "and after its end"


@pytest.mark.parametrize("room", [0, 3], ids=["no socket", "no process"])
async def test_a_worker_that_cannot_be_started_for_want_of_files_is_tried_again(served: Serve, raw: RawUpstream, room: int) -> None:
    raw.plays(ok())
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", "2", by=executed)
    first = await _ready(relay, 2)
    soft, hard = resource.prlimit(relay.pid, resource.RLIMIT_NOFILE)
    os.kill(first[0], signal.SIGSTOP)  # holds its place until the limit is there
    used = {int(name) for name in os.listdir(f"/proc/{relay.pid}/fd")}
    resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (_limit(used, room), hard))
    os.kill(first[0], signal.SIGKILL)
    failed = json.loads((await relay.until("worker.not_started")).string)
    assert failed["cause"] == "Too many open files" and failed["retry_in_s"] > 0
    await _until(lambda: sum("worker.not_started" in line for line in relay.lines) > 3)
    await _until(lambda: len(os.listdir(f"/proc/{relay.pid}/fd")) < len(used))  # no socket is left
    resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert (await _ready(relay, 3))[0] != first[0]
    relay.send(signal.SIGTERM)
    assert await relay.ended() == 0


def _limit(used: set[int], room: int) -> int:
    """The limit under which so many descriptors are free: those of the dead worker's channel too."""
    free, limit = 0, 0
    while free < room or limit <= 3:
        free += limit not in used
        limit += 1
    return limit


# Calls that a drain cuts ------------------------------------------------------------------------------


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream, aiohttp_server: Any) -> Relay:
    """A relay that gives its calls no time when it drains."""
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    providers = {"up": provider(raw.url), "sock": provider(str(server.make_url("")), websocket={"default_path": "echo"})}
    return await start({"server": {"drain_timeout_s": 0.001}, "providers": providers})


async def _drained(relay: Relay) -> dict[str, Any]:
    """Drain it as a signal does; the record of the one call that ran."""
    await drain(relay.gateway, asyncio.Event())
    assert not relay.gateway.running, "a drain ends when its calls are written down"
    [record] = await relay.events()
    return record


async def _read_raw(port: int, during: Callable[[], Awaitable[object]]) -> bytes:
    """All bytes of an answer on the wire; `during` is awaited once the first event is here."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /api/v1/ai-gateway/providers/up/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
    got = await reader.readuntil(EVENT)
    await during()
    async with asyncio.timeout(HANG_GUARD_S):
        got += await reader.read()
    writer.close()
    return got


@pytest.mark.parametrize(("sent", "told"), [(EVENT, True), (EVENT + b"data: {", False)], ids=["between events", "within one"])
async def test_an_event_stream_that_a_drain_cuts_gets_a_last_event_only_between_events(relay: Relay, raw: RawUpstream, sent: bytes, told: bool) -> None:
    raw.plays(SSE_HEAD, chunk(sent), SILENCE)
    records: list[dict[str, Any]] = []

    async def cut() -> None:
        records.append(await _drained(relay))

    got = await _read_raw(relay.port, cut)
    assert (b'"code":"draining"' in got.rpartition(b"data: ")[2]) is told and (b"draining" in got) is told
    assert not got.endswith(LAST_CHUNK)
    assert [(record["outcome"], record["error"], record["status"]) for record in records] == [("failed", "draining", 200)]


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", "Content-Length: 100"])
async def test_another_stream_that_a_drain_cuts_is_visibly_cut(relay: Relay, raw: RawUpstream, framing: str) -> None:
    part = b"x" * 10
    raw.plays(head("Content-Type: audio/mpeg", framing), chunk(part) if "chunked" in framing else part, SILENCE)
    answer = await relay.client.get(relay.path("up", "x"))
    record = await _drained(relay)
    with pytest.raises(aiohttp.ClientPayloadError):
        await answer.read()
    assert (record["outcome"], record["error"]) == ("failed", "draining")


async def test_a_call_that_waits_for_its_answer_is_told_that_the_relay_restarts_and_is_not_tried_again(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SILENCE)
    fallback = [{"provider": "other", "model": "n"}]
    up = provider(raw.url, retries={"max_attempts": 3}, fallback=fallback, idempotency_header="Idempotency-Key")
    relay = await start({"server": {"drain_timeout_s": 0.001}, "providers": {"up": up, "other": provider(raw.url)}})
    asked = asyncio.create_task(relay.call("POST", relay.path("up", "chat/completions"), json={"model": "m"}))
    await _until(lambda: raw.arrived)
    record = await _drained(relay)
    status, headers, body = await asked
    assert (status, headers["x-relay-error"], headers["retry-after"], headers["Connection"]) == (503, "draining", "1", "close")
    assert json.loads(body)["error"]["code"] == "draining"
    assert (record["outcome"], record["error"], record["status"]) == ("failed", "draining", 503)
    assert len(raw.arrived) == 1


async def test_an_upload_that_goes_on_is_told_that_the_relay_restarts(relay: Relay, raw: RawUpstream) -> None:
    raw.plays(ok())
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"POST /api/v1/ai-gateway/providers/up/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
    await _until(lambda: relay.gateway.running)
    record = await _drained(relay)
    answer = await asyncio.wait_for(reader.read(), HANG_GUARD_S)
    assert answer.startswith(b"HTTP/1.1 503") and b"x-relay-error: draining" in answer.lower()
    assert record["error"] == "draining"
    writer.close()


async def test_clients_that_share_a_call_are_all_told(start: StartRelay, raw: RawUpstream) -> None:
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


async def test_a_session_is_told_1012_and_its_row_says_draining(relay: Relay) -> None:
    ws = await relay.client.ws_connect(relay.ws("sock"), autoclose=False)
    draining = asyncio.create_task(_drained(relay))
    message = await ws.receive(HANG_GUARD_S)
    assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)
    await ws.close()
    record = await draining
    assert (record["outcome"], record["error"], record["close_code"]) == ("failed", "draining", 1012)


async def test_a_call_whose_client_left_before_stays_so(start: StartRelay, raw: RawUpstream) -> None:
    """Its answer is read on, to learn what it used, until the drain ends that too."""
    raw.plays(SSE_HEAD, chunk(EVENT), SILENCE)
    up = provider(raw.url, on_disconnect="drain", drain_s=600)
    relay = await start({"server": {"drain_timeout_s": 0.001}, "providers": {"up": up}})
    answer = await relay.client.get(relay.path("up", "x"))
    assert await answer.content.readany() == EVENT
    answer.close()
    await _until(lambda: all(exchange.outcome.error is not None for exchange in relay.gateway.running))
    assert (await _drained(relay))["outcome"] == "client_gone"


def test_a_second_cancellation_does_not_change_what_a_call_failed_with() -> None:
    """As aiohttp's own shutdown sends one, to a call that is still telling its client."""
    exchange = Exchange("x", Request("rest", "GET", Caller(""), 0.0))
    exchange.waiting.expired = Draining()
    exchange.fail(exchange.failure_of(asyncio.CancelledError()), asyncio.CancelledError())
    exchange.waiting.expired = None  # as `take_expiry` leaves it
    exchange.fail(exchange.failure_of(asyncio.CancelledError()), asyncio.CancelledError())
    assert exchange.outcome.error is not None and (exchange.outcome.error.code, exchange.outcome.name) == ("draining", "failed")


async def test_a_drain_that_cuts_leaves_its_rows_in_the_database(served: Serve, raw: RawUpstream) -> None:
    """Several workers, a second signal: the last event, the exit code, and the row."""
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


async def test_a_stream_cut_while_its_client_reads_nothing_gets_no_event_within_another(start: StartRelay) -> None:
    """The provider sends the beginning of an event and, once that has gone down, its end; until a beginning finds no room."""
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
    """Whether it stays true: the system's buffers may take some more."""
    for _ in range(20):
        if not condition():
            return False
        await asyncio.sleep(0.01)
    return True


# Reload -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.soak), "2"])
async def test_a_reload_names_what_needs_a_restart_and_the_command_line_still_wins(served: Serve, raw: RawUpstream, workers: str) -> None:
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


async def test_a_worker_that_starts_during_a_reload_reads_the_new_configuration(served: Serve, raw: RawUpstream) -> None:
    raw.plays(ok(b"fine"))
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", "2", by=executed)
    first = await _ready(relay, 2)
    os.kill(first[0], signal.SIGKILL)
    await relay.until("worker.died")
    await _until(lambda: set(_children(relay.pid)) - set(first.values()))
    write_config(relay.folder, {"providers": {"moved": provider(raw.url)}})
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        async with session.post(f"{relay.url}/api/v1/ai-gateway/providers/reload") as answer:
            assert answer.status == 200, await answer.text()
        assert len(await _ready(relay, 3)) == 2, "the answer came when all had it"
        for _ in range(30):
            async with session.get(relay.path("moved", "x")) as answer:
                assert answer.status == 200


async def test_a_reload_that_a_worker_does_not_answer_is_no_success(served: Serve, raw: RawUpstream) -> None:
    relay = await served({"providers": {"up": provider(raw.url)}}, "--workers", "2")
    stopped = (await _ready(relay, 2))[1]
    os.kill(stopped, signal.SIGSTOP)  # from now on the other one accepts
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(HANG_GUARD_S * 2):
            async with session.post(f"{relay.url}/api/v1/ai-gateway/providers/reload") as answer:
                assert answer.status == 503 and answer.headers["x-relay-error"] == "workers_incomplete"
                assert "worker 1: no answer within" in (await answer.json())["error"]["message"]
    finally:
        os.kill(stopped, signal.SIGCONT)
