"""The channel between a supervisor and its workers, and orders to workers that do not do as they should."""

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
    """A worker's end, and the supervisor's."""
    ours, theirs = socket.socketpair()
    supervisor, worker = await Channel.open(ours), await Channel.open(theirs)
    yield Control(worker), supervisor
    supervisor.close()
    worker.close()


async def _echo(given: dict[str, Any]) -> Answer:
    return Answer(count=given["count"])


async def _broken(_given: dict[str, Any]) -> Answer:
    raise KeyError("what nobody thought of")


async def _stuck(_given: dict[str, Any]) -> Answer:
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


async def test_an_order_that_fails_is_answered_and_the_next_is_done(pair: tuple[Control, Channel], logged: LogStream) -> None:
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


async def test_a_slow_order_holds_up_no_other_and_is_given_up(pair: tuple[Control, Channel], logged: LogStream, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_an_answer_of_many_problems_is_cut_to_fit(pair: tuple[Control, Channel], logged: LogStream) -> None:
    worker, supervisor = pair

    async def long(_given: dict[str, Any]) -> Answer:
        return Answer([f"{number} " + "é" * 10_000 for number in range(1000)])

    listening = asyncio.create_task(worker.listen({"long": long}))
    supervisor.post(Command(1, "long"))
    problems = (await _answers(supervisor, 1))[1].problems
    assert problems[0].startswith("0 é") and problems[-1] == "and 900 more"
    supervisor.close()
    await asyncio.wait_for(listening, HANG_GUARD_S)


async def test_a_process_that_stopped_reading_is_noticed_and_holds_nobody_up(pair: tuple[Control, Channel]) -> None:
    _, supervisor = pair
    with pytest.raises(ConnectionError):
        for number in range(1000):
            supervisor.post(Command(number, "echo", {"text": "x" * 100_000}))


# A supervisor with stand-in workers: `python -m relay` finds this package in the working folder -------

WORKER = '''
import json, os, signal, socket, sys, time

number = [given for given in sys.argv if given.startswith("--control-fd=")][0].partition("=")[2]
channel = socket.socket(fileno=int(number)).makefile("rw", buffering=1)
behaviours = json.loads(open("behaviours.json").read())
for mine in range(1000):
    try:
        os.symlink(str(os.getpid()), f"started/{mine}")  # the first to take a number has it
        break
    except FileExistsError:
        continue
behaviour = behaviours[min(mine, len(behaviours) - 1)]

def say(**message):
    channel.write(json.dumps(message) + "\\n")

if behaviour == "dies":
    sys.exit(3)
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "babbles":
    for line in ("", "{", "null", json.dumps({"say": "reply", "id": 1}), json.dumps({"say": "begin", "files": {}}), "y" * 300000):
        channel.write(line + "\\n")
    say(say="reply", id=12345, answer={})
    say(say="command", id=1, order="dance", arguments={})
    say(say="command", id=2, order="purge", arguments={})
open(f"behaves.{os.getpid()}", "w").close()
if behaviour not in ("starting", "deaf"):
    say(say="ready")
for line in channel:
    said = json.loads(line)
    if said["say"] == "begin":
        open(f"began.{os.getpid()}.tmp", "w").write(line)
        os.rename(f"began.{os.getpid()}.tmp", f"began.{os.getpid()}.json")
        continue
    if said.get("order") == "reload":
        open(f"reloaded.{os.getpid()}.json", "w").write(json.dumps(said["arguments"]))
    open("orders.txt", "a").write(f"{said.get('order', said['say'])}\\n")
    if said["say"] == "reply":
        open(f"done{said['id']}.json", "w").write(json.dumps(said["answer"]))
    elif behaviour in ("starting", "deaf") or behaviour == "silent" and said["order"] != "cut":
        pass
    elif behaviour == "dies when told" and said["order"] == "reload":
        sys.exit(4)
    elif behaviour == "refuses" and said["order"] == "reload":
        say(say="reply", id=said["id"], answer={"problems": ["gateway.yaml:1:1: I do not like it"]})
    elif said["order"] in ("drain", "cut"):
        say(say="leaving")
        sys.exit(0)
    else:
        say(say="reply", id=said["id"], answer={"count": 1})
'''


@dataclass
class Supervised:
    """A supervisor in this process, and what is known of its workers."""

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
        """The process ids of the workers that ran."""
        return [int(os.readlink(link)) for link in (self.folder / "started").iterdir()]

    @property
    def alive(self) -> list[int]:
        return [pid for pid in self.started if Path(f"/proc/{pid}").exists()]


Supervise = Callable[..., Awaitable[Supervised]]


@pytest.fixture
async def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: LogStream) -> AsyncIterator[Supervise]:
    """`await supervise("good", "refuses")`: the first worker to start is good, all others refuse."""
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
        while not one.task.done():  # the first call drains, the second cuts
            one.supervisor.stop()
            await asyncio.wait({one.task}, timeout=0.2)
        one.listener.close()
        assert one.alive == [], "no orphan"


async def test_a_worker_that_babbles_is_listened_to_and_answered(supervise: Supervise) -> None:
    run = await supervise("babbles")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    await run.until(lambda: (run.folder / "done2.json").exists())
    assert "does not know the order 'dance'" in (run.folder / "done1.json").read_text()
    assert json.loads((run.folder / "done2.json").read_text())["count"] >= 1
    assert run.events("control.malformed_message") and run.events("control.unexpected_message")


@pytest.mark.parametrize("behaviour", ["starting", "good", "silent", "deaf"])
async def test_every_worker_ends_in_bounded_time_whatever_it_does(supervise: Supervise, monkeypatch: pytest.MonkeyPatch, behaviour: str) -> None:
    monkeypatch.setattr("relay.server.supervisor._EXIT_GRACE_S", 0.3)
    run = await supervise(behaviour)
    await run.until(lambda: len(list(run.folder.glob("behaves.*"))) == 2)
    if behaviour not in ("starting", "deaf"):
        await run.until(lambda: len(run.events("worker.ready")) == 2)
    run.supervisor.stop()
    await asyncio.wait_for(run.task, HANG_GUARD_S)
    assert run.alive == []
    assert len(run.events("worker.killed")) == (2 if behaviour in ("silent", "deaf") else 0)


async def test_a_second_signal_cuts_what_the_first_lets_go_on(supervise: Supervise) -> None:
    run = await supervise("silent", server={"workers": 2, "drain_timeout_s": 3600})
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    run.supervisor.stop()
    await run.until(lambda: (run.folder / "orders.txt").exists() and (run.folder / "orders.txt").read_text() == "drain\n" * 2)
    run.supervisor.stop()
    await asyncio.wait_for(run.task, HANG_GUARD_S)


async def test_a_worker_that_dies_at_its_start_is_started_again_ever_more_slowly(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.server.supervisor._BACKOFF_S", (0.01, 0.02, 0.03))
    run = await supervise("dies")

    def pauses_of_the_first() -> list[float]:
        return [event["restart_in_s"] for event in run.events("worker.died") if event["worker"] == 0]

    await run.until(lambda: len(pauses_of_the_first()) >= 4)
    pauses = pauses_of_the_first()
    assert pauses[:4] == [0.01, 0.02, 0.03, 0.03] and run.events("worker.died")[0]["exit_code"] == 3


async def test_a_worker_that_served_long_enough_is_started_again_at_once(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_a_reload_names_the_worker_that_is_starting_and_it_gets_the_order_all_the_same(supervise: Supervise) -> None:
    run = await supervise("good", "starting")
    await run.until(lambda: len(run.started) == 2 and run.events("worker.ready"))
    [missing] = (await run.supervisor.order("reload", {})).missing
    assert "still starting" in missing
    assert (run.folder / "orders.txt").read_text() == "reload\n" * 2


async def test_a_reload_waits_for_the_successor_of_a_worker_that_dies_in_it(supervise: Supervise) -> None:
    run = await supervise("dies when told", "good")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    assert (await run.supervisor.order("reload", {})).missing == []
    log.flush()
    assert len(run.events("worker.ready")) == 3


async def test_a_reload_names_the_worker_that_is_not_there(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.server.supervisor._BACKOFF_S", (3600,))
    run = await supervise("good", "dies")
    await run.until(lambda: run.events("worker.died") and run.events("worker.ready"))
    [missing] = (await run.supervisor.order("reload", {})).missing
    assert f"worker {run.events('worker.died')[0]['worker']}: died" in missing


@pytest.mark.parametrize("more", [{"server": {"workers": 2}}, {"server": {"workers": 1}}, {"server": {"workers": 2}, "redis": {"url": "redis://127.0.0.1:1"}}])
async def test_a_reload_is_refused_where_a_start_would_be(more: dict[str, Any], supervise: Supervise) -> None:
    """Two workers without Redis run until a restart, whatever the file says now."""
    run = await supervise("good")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    write_config(run.folder, {"limits": [{"requests": 5, "name": "few"}]} | more)
    answer = await run.supervisor.order("reload", {})
    assert "few is counted in each process" in answer.problems[0] and answer.missing == []
    assert not (run.folder / "orders.txt").exists(), "no worker was told"


async def test_a_reload_names_the_settings_that_need_a_restart(supervise: Supervise) -> None:
    run = await supervise("good")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    configured(run.folder, {"server": {"workers": 3, "drain_timeout_s": 1}, "log": {"level": "debug"}})
    answer = await run.supervisor.order("reload", {})
    assert answer.restart == ["server.workers", "log.level"] and answer.missing == []


# What workers make their configuration of -------------------------------------------------------------


async def _begun(run: Supervised, pid: int) -> Begin:
    file = run.folder / f"began.{pid}.json"
    await run.until(file.exists)
    return msgspec.json.decode(file.read_bytes(), type=Begin)


def _file(sent: Snapshot, folder: Path) -> bytes:
    return sent.files[str(folder / "gateway.yaml")]


async def test_every_worker_takes_the_bytes_that_the_supervisor_read(supervise: Supervise) -> None:
    run = await supervise("good")
    await run.until(lambda: len(run.events("worker.ready")) == 2)
    config = run.folder / "gateway.yaml"
    first = config.read_bytes()
    for pid in run.started:
        begin = await _begun(run, pid)
        assert _file(begin.files, run.folder) == first and begin.reloaded is None
    config.write_bytes(first + b"# changed\n")
    assert (await run.supervisor.order("reload", {})).problems == []
    for pid in run.started:
        given = json.loads((run.folder / f"reloaded.{pid}.json").read_text())
        assert _file(msgspec.convert(given, Snapshot), run.folder) == first + b"# changed\n"


async def test_a_worker_that_is_started_again_gets_what_is_in_force_and_not_the_bad_file(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
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
        begin = await _begun(run, run.events("worker.ready")[-1]["pid"])
        assert _file(begin.files, run.folder) == first, "it starts as the first one did"
        assert (begin.reloaded and _file(begin.reloaded, run.folder)) == reloaded


async def test_a_configuration_as_large_as_one_may_be_reaches_a_worker() -> None:
    ours, theirs = socket.socketpair()
    supervisor, worker = await Channel.open(ours), await Control.open(theirs.detach())
    snapshot = Snapshot({"gateway.yaml": os.urandom(MAX_TOTAL_BYTES)})
    files = msgspec.to_builtins(snapshot)
    supervisor.post(Begin(snapshot, snapshot))
    supervisor.post(Command(1, "reload", files))  # while it still starts
    begin = await asyncio.wait_for(worker.begin(), HANG_GUARD_S)
    assert begin is not None and begin.reloaded == snapshot
    order = await asyncio.wait_for(worker._channel.first(), HANG_GUARD_S)
    assert isinstance(order, Command) and order.arguments == files
    supervisor.close()
    assert await asyncio.wait_for(worker.begin(), HANG_GUARD_S) is None, "the supervisor is gone"
    worker._channel.close()
