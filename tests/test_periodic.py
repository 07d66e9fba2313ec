"""The periodic jobs: what they check, how often, and that they block nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import WSMsgType

from relay import periodic
from relay.sessions.session import Session
from tests.conftest import StartRelay
from tests.relays import Relay, configured, provider
from tests.upstream.vendors import echo, vendor


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def checked(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """Collect the session of each check, in order."""
    seen: list[Session] = []
    original = periodic.overdue_ending

    def record_check(session: Session, *rest: Any) -> Any:
        seen.append(session)
        return original(session, *rest)

    monkeypatch.setattr(periodic, "overdue_ending", record_check)
    return seen


@pytest.fixture
async def sockets(aiohttp_server: Any, start: StartRelay) -> AsyncIterator[Any]:
    """Open sessions: `await sockets(count, websocket={…}, **rules)`.

    Returns (relay, clock, the sockets of the clients). `rules` are `websocket` settings of the
    provider entry.
    """
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    stack = AsyncExitStack()

    async def begin(count: int, websocket: dict[str, Any] | None = None, **more: Any) -> tuple[Relay, Clock, list[Any]]:
        entry = provider(str(server.make_url("")), websocket={"default_path": "echo"} | more)
        relay = await start({"websocket": websocket or {}}, openai=entry)
        clock = relay.gateway.clock = Clock()
        opened = [await stack.enter_async_context(relay.client.ws_connect(relay.ws("openai"), autoping=False)) for _ in range(count)]
        for socket in opened:
            await socket.send_str("there?")
            assert (await socket.receive(20)).data == "there?"
        await periodic.sweep(relay.gateway)
        return relay, clock, opened

    yield begin
    await stack.aclose()


async def test_an_idle_session_is_checked_only_when_a_limit_may_have_passed(sockets: Any, checked: list[Session]) -> None:
    relay, clock, _ = await sockets(3)
    checked.clear()
    for _ in range(38):
        clock.now += 0.5
        await periodic.sweep(relay.gateway)
    assert checked == [], "nothing is due before the send timeout"
    clock.now += 1.1
    await periodic.sweep(relay.gateway)
    assert len(checked) == 3


async def test_an_open_session_is_not_among_the_calls_that_every_sweep_checks(sockets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    relay, _, _ = await sockets(2)
    assert not relay.gateway.calls and len(relay.gateway.running) == 2
    assert relay.gateway.gauges()["relay_requests_in_flight",] == 2


async def test_readyz_and_metrics_agree_on_requests_in_flight_shed_and_dropped(sockets: Any) -> None:
    relay, _, _ = await sockets(2)
    relay.gateway.requests_shed, relay.gateway.background.dropped = 3, 4
    _, _, ready = await relay.call("GET", f"{relay.url}/readyz")
    _, _, metrics = await relay.call("GET", f"{relay.url}/metrics")
    readiness = json.loads(ready)
    assert (readiness["in_flight"], readiness["requests_shed"], readiness["background_dropped"]) == (2, 3, 4)
    for line in (b"relay_requests_in_flight 2.0", b"relay_requests_shed_total 3.0", b"relay_background_dropped_total 4.0"):
        assert line in metrics.splitlines(), line


@pytest.mark.parametrize(("limit", "code"), [("idle_timeout_s", 4408), ("max_session_s", 4409)])
async def test_a_session_is_closed_once_its_time_limit_has_passed(sockets: Any, limit: str, code: int) -> None:
    relay, clock, [socket] = await sockets(1, **{limit: 7.0})
    clock.now += 6.9
    await periodic.sweep(relay.gateway)
    assert not next(iter(relay.gateway.sessions)).ended.done()
    clock.now += 0.2
    await periodic.sweep(relay.gateway)
    assert (await socket.receive(20)).data == code


async def test_a_message_restarts_the_idle_timeout(sockets: Any) -> None:
    relay, clock, [socket] = await sockets(1, idle_timeout_s=7.0)
    clock.now += 6.0
    await socket.send_str("still")
    assert (await socket.receive(20)).data == "still"
    clock.now += 6.0
    await periodic.sweep(relay.gateway)
    assert not next(iter(relay.gateway.sessions)).ended.done()
    clock.now += 1.1
    await periodic.sweep(relay.gateway)
    assert (await socket.receive(20)).data == 4408


async def test_a_session_is_closed_when_a_message_exceeds_the_send_timeout(sockets: Any) -> None:
    relay, clock, [socket] = await sockets(1, {"send_timeout_s": 8.0})
    [session] = relay.gateway.sessions
    clock.now += 5.0
    session.downstream.sending_since_s = clock.now  # as a pump sets it
    clock.now += 7.9
    await periodic.sweep(relay.gateway)
    assert not session.ended.done()
    clock.now += 0.2
    await periodic.sweep(relay.gateway)
    assert session.ended.result().code == 1013
    assert (await socket.receive(20)).type is WSMsgType.CLOSE


async def test_a_client_that_sends_too_fast_after_a_quiet_time_is_closed_at_the_next_sweep(sockets: Any) -> None:
    relay, clock, [socket] = await sockets(1, {"max_messages_per_s": 5})
    for _ in range(10):
        clock.now += 0.5
        await periodic.sweep(relay.gateway)
    for _ in range(20):
        await socket.send_str("x")
        await socket.receive(20)
    clock.now += 1.0
    await periodic.sweep(relay.gateway)
    assert (await socket.receive(20)).data == 1008


async def test_a_reload_changes_the_limits_of_open_sessions(sockets: Any) -> None:
    relay, clock, [socket] = await sockets(1, {"ping_after_s": 1000, "send_timeout_s": 1000})
    document = {"websocket": {"ping_after_s": 3, "send_timeout_s": 1000}, "providers": {"openai": provider("http://127.0.0.1:1")}}
    clock.now += 10.0
    relay.gateway.replace(configured(relay.folder, document)[0])
    await periodic.sweep(relay.gateway)
    assert (await socket.receive(20)).type is WSMsgType.PING


async def test_a_ping_does_not_wait_for_a_peer_that_reads_nothing(sockets: Any) -> None:
    relay, clock, opened = await sockets(3, {"ping_after_s": 5, "send_timeout_s": 1000})
    for session in relay.gateway.sessions:
        # The write buffer is full, and no message waits for it.
        writer = session.downstream.socket._writer
        writer.protocol.pause_writing()
        writer._output_size = writer._limit + 1
    clock.now += 6.0
    sweeping = periodic.sweep(relay.gateway)
    with pytest.raises(StopIteration):
        sweeping.send(None)  # finishes in one step: nothing is awaited
    for session in relay.gateway.sessions:
        session.downstream.socket._writer.protocol.resume_writing()
    for socket in opened:
        assert (await socket.receive(20)).type is WSMsgType.PING


async def test_many_sessions_that_are_due_at_once_do_not_block_the_loop(sockets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    relay, clock, _ = await sockets(3)
    monkeypatch.setattr(periodic, "_SESSIONS_AT_ONCE", 2)
    clock.now += 100.0
    others = 0

    async def other() -> None:
        nonlocal others
        others += 1

    task = asyncio.create_task(other())
    await periodic.sweep(relay.gateway)
    assert others == 1, "another task ran during the sweep"
    await task
