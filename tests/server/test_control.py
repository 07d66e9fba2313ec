"""The channel between a supervisor and its workers, and orders to workers that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from relay import log
from relay.registry.files import MAX_TOTAL_BYTES, Snapshot
from relay.server import control
from relay.server.control import Answer, Begin, Channel, Command, Control, Reply
from relay.server.listen import Listeners, bind
from relay.server.supervisor import Supervisor
from tests.relays import HANG_GUARD_S, LogStream, configured, write_config


@pytest.fixture
def logged() -> LogStream:
    stream = LogStream()
    log.setup("debug", "json", stream)  # type: ignore[arg-type]
    return stream


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Control, Channel]]:
    """The two ends of a channel: the one of a worker and the one of the supervisor."""
    ours, theirs = socket.socketpair()
    supervisor, worker = await Channel.open(ours), await Channel.open(theirs)
    yield Control(worker), supervisor
    supervisor.close()
    worker.close()


async def _echo(argument: dict[str, Any]) -> Answer:
    return Answer(count=argument["count"])


async def _broken(_argument: dict[str, Any]) -> Answer:
    raise KeyError("an unexpected error")


async def _stuck(_argument: dict[str, Any]) -> Answer:
    await asyncio.Event().wait()
    raise AssertionError


ORDERS = {"echo": _echo, "broken": _broken, "stuck": _stuck}


async def _answers(channel: Channel, count: int) -> dict[int, Answer]:
    found: dict[int, Answer] = {}
    async with asyncio.timeout(HANG_GUARD_S):
        async for message in channel.messages():
            assert isinstance(message, Reply)
            found[message.id] = message.answer
            if len(found) == count:
                break
    return found


async def _listening(worker: Control) -> asyncio.Task[None]:
    return asyncio.create_task(worker.listen(ORDERS))


async def test_a_failed_order_is_answered_and_the_next_is_executed(pair: tuple[Control, Channel], logged: LogStream) -> None:
    worker, supervisor = pair
    listening = await _listening(worker)
    supervisor.post(Command(1, "broken"))
    supervisor.post(Command(2, "nonsense"))
    supervisor.post(Command(3, "echo", {"wrong": "argument"}))
    supervisor.post(Command(4, "echo", {"count": 7}))
    answers = await _answers(supervisor, 4)
    assert answers[4] == Answer(count=7) and not listening.done()
    assert answers[2].problems == ["unknown order 'nonsense'"]
    assert "broken failed (KeyError)" in answers[1].problems[0] and "echo failed" in answers[3].problems[0]
    assert sum("control.order_failed" in line for line in logged.lines) == 2
    supervisor.close()
    await asyncio.wait_for(listening, HANG_GUARD_S)


async def test_a_slow_order_delays_no_other_and_times_out(pair: tuple[Control, Channel], logged: LogStream, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, supervisor = pair
    listening = await _listening(worker)
    supervisor.post(Command(1, "stuck"))
    supervisor.post(Command(2, "echo", {"count": 1}))
    assert await _answers(supervisor, 1) == {2: Answer(count=1)}
    monkeypatch.setattr(control, "ANSWER_TIMEOUT_S", 0.05)
    supervisor.post(Command(3, "stuck"))
    [problem] = (await _answers(supervisor, 1))[3].problems
    assert "took longer" in problem and not listening.done()
    supervisor.close()
    await asyncio.wait_for(listening, HANG_GUARD_S)


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"null", b"[]", b'{"say":"command"}', b'{"say":"command","id":"x","order":1}', b'{"say":"dance"}', b"\xff\xfe", b'{"say":"ready"}', b"x" * 300_000],
    ids=["empty", "cut", "null", "array", "incomplete", "wrong types", "unknown", "not UTF-8", "not for a worker", "too long"],
)
async def test_a_line_that_is_no_message_is_logged_and_skipped(pair: tuple[Control, Channel], logged: LogStream, line: bytes) -> None:
    worker, supervisor = pair
    listening = await _listening(worker)
    supervisor._writer.write(line + b"\n")
    supervisor.post(Command(9, "echo", {"count": 3}))
    assert await _answers(supervisor, 1) == {9: Answer(count=3)}
    assert any("control.malformed_message" in entry or "control.unexpected_message" in entry for entry in logged.lines)
    supervisor.close()
    await asyncio.wait_for(listening, HANG_GUARD_S)


async def test_an_answer_with_many_problems_is_truncated(pair: tuple[Control, Channel], logged: LogStream) -> None:
    worker, supervisor = pair

    async def long(_argument: dict[str, Any]) -> Answer:
        return Answer([f"{number} " + "é" * 10_000 for number in range(1000)])

    listening = asyncio.create_task(worker.listen({"long": long}))
    supervisor.post(Command(1, "long"))
    problems = (await _answers(supervisor, 1))[1].problems
    assert problems[0].startswith("0 é") and problems[-1] == "and 900 more"
    supervisor.close()
    await asyncio.wait_for(listening, HANG_GUARD_S)


async def test_a_process_that_stopped_reading_is_detected_and_blocks_nothing(pair: tuple[Control, Channel]) -> None:
    _, supervisor = pair
    with pytest.raises(ConnectionError):
        for number in range(1000):
            supervisor.post(Command(number, "echo", {"text": "x" * 100_000}))


# A supervisor with stand-in workers: `python -m relay` finds this package in the working folder --

WORKER = '''
import json, os, signal, socket, sys, time

number = [argument for argument in sys.argv if argument.startswith("--control-fd=")][0].partition("=")[2]
channel = socket.socket(fileno=int(number)).makefile("rw", buffering=1)
behaviours = json.loads(open("behaviours.json").read())
for number_of_worker in range(1000):
    try:
        os.symlink(str(os.getpid()), f"started/{number_of_worker}")  # fails if another worker has this number
        break
    except FileExistsError:
        continue
behaviour = behaviours[min(number_of_worker, len(behaviours) - 1)]

def send(**message):
    channel.write(json.dumps(message) + "\\n")

if behaviour == "dies":
    sys.exit(3)
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "malformed":
    for line in ("", "{", "null", json.dumps({"say": "reply", "id": 1}), json.dumps({"say": "begin", "files": {}}), "y" * 300000):
        channel.write(line + "\\n")
    send(say="reply", id=12345, answer={})
    send(say="command", id=1, order="dance", arguments={})
    send(say="command", id=2, order="purge", arguments={})
open(f"behaves.{os.getpid()}", "w").close()
if behaviour not in ("starting", "deaf"):
    send(say="ready")
for line in channel:
    message = json.loads(line)
    if message["say"] == "begin":
        open(f"began.{os.getpid()}.tmp", "w").write(line)
        os.rename(f"began.{os.getpid()}.tmp", f"began.{os.getpid()}.json")
        continue
    if message.get("order") == "reload":
        open(f"reloaded.{os.getpid()}.json", "w").write(json.dumps(message["arguments"]))
    open("orders.txt", "a").write(f"{message.get('order', message['say'])}\\n")
    if message["say"] == "reply":
        open(f"done{message['id']}.json", "w").write(json.dumps(message["answer"]))
    elif behaviour in ("starting", "deaf") or behaviour == "silent" and message["order"] != "cut":
        pass
    elif behaviour == "dies on reload" and message["order"] == "reload":
        sys.exit(4)
    elif behaviour == "refuses" and message["order"] == "reload":
        send(say="reply", id=message["id"], answer={"problems": ["gateway.yaml:1:1: I do not like it"]})
    elif message["order"] in ("drain", "cut"):
        send(say="leaving")
        sys.exit(0)
    else:
        send(say="reply", id=message["id"], answer={"count": 1})
'''


@dataclass
class Supervised:
    """A supervisor in this process, and what its workers have left in the folder."""

    supervisor: Supervisor
    folder: Path
    logged: LogStream
    task: asyncio.Task[None]
    listener: socket.socket
    seen: set[int] = field(default_factory=set)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for line in self.logged.lines for event in [json.loads(line)] if event["event"] == name]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(HANG_GUARD_S):
            while not condition():
                await asyncio.sleep(0.01)

    @property
    def started(self) -> list[int]:
        """The process ids of all workers that were started."""
        return [int(os.readlink(link)) for link in (self.folder / "started").iterdir()]

    @property
    def alive(self) -> list[int]:
        return [pid for pid in self.started if Path(f"/proc/{pid}").exists()]


Supervise = Callable[..., Awaitable[Supervised]]


@pytest.fixture
async def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: LogStream) -> AsyncIterator[Supervise]:
    """Start a supervisor: in `await supervise("good", "refuses")` the first worker is good.

    All later workers behave as the last argument says, so here they refuse.
    """
    (tmp_path / "relay").mkdir()
    (tmp_path / "started").mkdir()
    (tmp_path / "relay/__init__.py").touch()
    (tmp_path / "relay/__main__.py").write_text(textwrap.dedent(WORKER))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("relay.server.supervisor.ANSWER_TIMEOUT_S", 2.0)
    running: list[Supervised] = []

    async def begin(*behaviours: str, **document: Any) -> Supervised:
        (tmp_path / "behaviours.json").write_text(json.dumps(behaviours))
        config, sources = configured(tmp_path, {"server": {"workers": 2, "drain_timeout_s": 0.5}} | document)
        listener = bind("127.0.0.1", 0)
        supervisor = Supervisor(config, sources, Listeners(listener), lambda: None)
        running.append(Supervised(supervisor, tmp_path, logged, asyncio.create_task(supervisor.run()), listener))
        return running[-1]

    yield begin
    for one in running:
        while not one.task.done():  # the first call drains, the second cancels calls
            one.supervisor.stop()
            await asyncio.wait({one.task}, timeout=0.2)
        one.listener.close()
        assert one.alive == [], "no worker is left"


async def test_malformed_messages_of_a_worker_are_skipped_and_the_others_are_answered(supervise: Supervise) -> None:
    run = await supervise("malformed")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    await run.until(lambda: (run.folder / "done2.json").exists())
    assert "does not know the order 'dance'" in (run.folder / "done1.json").read_text()
    assert json.loads((run.folder / "done2.json").read_text())["count"] >= 1
    assert run.events("control.malformed_message") and run.events("control.unexpected_message")


@pytest.mark.parametrize("behaviour", ["starting", "good", "silent", "deaf"])
async def test_every_worker_ends_in_bounded_time(supervise: Supervise, monkeypatch: pytest.MonkeyPatch, behaviour: str) -> None:
    monkeypatch.setattr("relay.server.supervisor._EXIT_GRACE_S", 0.3)
    run = await supervise(behaviour)
    await run.until(lambda: len(list(run.folder.glob("behaves.*"))) == 2)
    if behaviour not in ("starting", "deaf"):
        await run.until(lambda: len(run.events("worker.ready")) == 2)
    run.supervisor.stop()
    await asyncio.wait_for(run.task, HANG_GUARD_S)
    assert run.alive == []
    assert len(run.events("worker.killed")) == (2 if behaviour in ("silent", "deaf") else 0)


async def test_a_second_signal_stops_workers_that_still_drain(supervise: Supervise) -> None:
    run = await supervise("silent", server={"workers": 2, "drain_timeout_s": 3600})
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    run.supervisor.stop()
    await run.until(lambda: (run.folder / "orders.txt").exists() and (run.folder / "orders.txt").read_text() == "drain\n" * 2)
    run.supervisor.stop()
    await asyncio.wait_for(run.task, HANG_GUARD_S)


async def test_a_worker_that_dies_at_its_start_is_restarted_with_increasing_back_off(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.server.supervisor._BACKOFF_S", (0.01, 0.02, 0.03))
    run = await supervise("dies")

    def pauses_of_the_first() -> list[float]:
        return [event["restart_in_s"] for event in run.events("worker.died") if event["worker"] == 0]

    await run.until(lambda: len(pauses_of_the_first()) >= 4)
    pauses = pauses_of_the_first()
    assert pauses[:4] == [0.01, 0.02, 0.03, 0.03] and run.events("worker.died")[0]["exit_code"] == 3


async def test_a_worker_that_served_long_enough_is_restarted_at_once(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.server.supervisor._BACKOFF_S", (0.01, 0.02, 3600))
    monkeypatch.setattr("relay.server.supervisor._STABLE_S", 0.0)
    run = await supervise("good", server={"workers": 1, "drain_timeout_s": 0.5})
    for count in range(1, 5):
        await run.until(lambda count=count: len(run.events("worker.ready")) == count)
        os.kill(run.events("worker.ready")[-1]["pid"], signal.SIGKILL)
        await run.until(lambda count=count: len(run.events("worker.died")) == count)
    assert [event["restart_in_s"] for event in run.events("worker.died")] == [0.01] * 4


async def test_a_reload_names_the_worker_that_refused_it(supervise: Supervise) -> None:
    run = await supervise("good", "refuses")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    answer = await run.supervisor.order("reload", {})
    [missing] = answer.missing
    assert missing.endswith(": gateway.yaml:1:1: I do not like it") and missing.startswith("worker ") and answer.problems == []
    assert run.events("reload.incomplete")[0]["missing"] == [missing]


async def test_a_reload_names_the_worker_that_did_not_answer(supervise: Supervise) -> None:
    run = await supervise("good", "silent")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    [missing] = (await run.supervisor.order("reload", {})).missing
    assert "no answer within" in missing
    [missing] = (await run.supervisor.order("purge", {})).missing
    assert "no answer within" in missing


async def test_a_reload_names_a_starting_worker_which_still_gets_the_order(supervise: Supervise) -> None:
    run = await supervise("good", "starting")
    await run.until(lambda: len(run.started) == 2 and run.events("worker.ready"))
    [missing] = (await run.supervisor.order("reload", {})).missing
    assert "still starting" in missing
    assert (run.folder / "orders.txt").read_text() == "reload\n" * 2


async def test_a_reload_waits_for_the_successor_of_a_worker_that_dies_during_it(supervise: Supervise) -> None:
    run = await supervise("dies on reload", "good")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    assert (await run.supervisor.order("reload", {})).missing == []
    log.flush()
    assert len(run.events("worker.ready")) == 3


async def test_a_reload_names_the_worker_that_does_not_run(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.server.supervisor._BACKOFF_S", (3600,))
    run = await supervise("good", "dies")
    await run.until(lambda: run.events("worker.died") and run.events("worker.ready"))
    [missing] = (await run.supervisor.order("reload", {})).missing
    assert f"worker {run.events('worker.died')[0]['worker']}: died" in missing


@pytest.mark.parametrize("more", [{"server": {"workers": 2}}, {"server": {"workers": 1}}, {"server": {"workers": 2}, "redis": {"url": "redis://127.0.0.1:1"}}])
async def test_a_reload_is_refused_if_a_start_would_be_refused(more: dict[str, Any], supervise: Supervise) -> None:
    """Two workers without Redis keep running until a restart, whatever the new file sets."""
    run = await supervise("good")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    write_config(run.folder, {"limits": [{"requests": 5, "name": "few"}]} | more)
    answer = await run.supervisor.order("reload", {})
    assert "few is counted in each process" in answer.problems[0] and answer.missing == []
    assert not (run.folder / "orders.txt").exists(), "no worker got the order"


async def test_a_reload_names_the_settings_that_need_a_restart(supervise: Supervise) -> None:
    run = await supervise("good")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    configured(run.folder, {"server": {"workers": 3, "drain_timeout_s": 1}, "log": {"level": "debug"}})
    answer = await run.supervisor.order("reload", {})
    assert answer.restart == ["server.workers", "log.level"] and answer.missing == []


# The files that workers load their configuration from ---------------------------------------------


async def _begin_of(run: Supervised, pid: int) -> Begin:
    file = run.folder / f"began.{pid}.json"
    await run.until(file.exists)
    return msgspec.json.decode(file.read_bytes(), type=Begin)


def _file(sent: Snapshot, folder: Path) -> bytes:
    return sent.files[str(folder / "gateway.yaml")]


async def test_every_worker_loads_the_bytes_that_the_supervisor_read(supervise: Supervise) -> None:
    run = await supervise("good")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    config = run.folder / "gateway.yaml"
    first = config.read_bytes()
    for pid in run.started:
        begin = await _begin_of(run, pid)
        assert _file(begin.files, run.folder) == first and begin.reloaded is None
    config.write_bytes(first + b"# changed\n")
    assert (await run.supervisor.order("reload", {})).problems == []
    for pid in run.started:
        argument = json.loads((run.folder / f"reloaded.{pid}.json").read_text())
        assert _file(msgspec.convert(argument, Snapshot), run.folder) == first + b"# changed\n"


async def test_a_restarted_worker_gets_the_configuration_in_force_and_not_the_invalid_file(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.server.supervisor._BACKOFF_S", (0.01,))
    run = await supervise("good", server={"workers": 1, "drain_timeout_s": 0.5})
    await run.until(lambda: len(run.events("worker.ready")) == 1)
    config = run.folder / "gateway.yaml"
    first = config.read_bytes()
    for text, reloaded in ((b"sever: {}\n", None), (first + b"# new\n", first + b"# new\n"), (b"", first + b"# new\n")):
        config.write_bytes(text)
        answer = await run.supervisor.order("reload", {})
        assert bool(answer.problems) == (not text.startswith(first))
        before = len(run.events("worker.ready"))
        os.kill(run.events("worker.ready")[-1]["pid"], signal.SIGKILL)
        await run.until(lambda before=before: len(run.events("worker.ready")) == before + 1)
        begin = await _begin_of(run, run.events("worker.ready")[-1]["pid"])
        assert _file(begin.files, run.folder) == first, "it starts with the files of the first one"
        assert (begin.reloaded and _file(begin.reloaded, run.folder)) == reloaded


async def test_a_configuration_of_the_maximum_size_reaches_a_worker() -> None:
    ours, theirs = socket.socketpair()
    supervisor, worker = await Channel.open(ours), await Control.open(theirs.detach())
    snapshot = Snapshot({"gateway.yaml": os.urandom(MAX_TOTAL_BYTES)})
    files = msgspec.to_builtins(snapshot)
    supervisor.post(Begin(snapshot, snapshot))
    supervisor.post(Command(1, "reload", files))  # while the worker still starts
    begin = await asyncio.wait_for(worker.begin(), HANG_GUARD_S)
    assert begin is not None and begin.reloaded == snapshot
    order = await asyncio.wait_for(worker._channel.first(), HANG_GUARD_S)
    assert isinstance(order, Command) and order.arguments == files
    supervisor.close()
    assert await asyncio.wait_for(worker.begin(), HANG_GUARD_S) is None, "the supervisor has closed the channel"
    worker._channel.close()


LIMITED: dict[str, dict[str, Any]] = {"of all": {"limits": [{"requests": 5}]}, "of a client": {"clients": {"web": {"limits": [{"requests": 5}]}}}}


@pytest.mark.parametrize("whose", LIMITED)
async def test_a_reload_is_refused_if_the_running_workers_would_multiply_a_limit(tmp_path: Path, whose: str) -> None:
    """The file says one worker now, but two run until the restart."""
    config, sources = configured(tmp_path, {"server": {"workers": 2}})
    listener = bind("127.0.0.1", 0)
    try:
        supervisor = Supervisor(config, sources, Listeners(listener), lambda: None)
        write_config(tmp_path, {"server": {"workers": 1}} | LIMITED[whose])
        [problem] = (await supervisor.order("reload", {})).problems
    finally:
        listener.close()
    assert "several workers would allow a multiple" in problem
