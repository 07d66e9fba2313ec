"""The exchange: its states, its failures, and what a shared call has in common with its leader."""

from __future__ import annotations

import asyncio
import itertools
from typing import get_args

import pytest

from relay.core.caching import CachePlan
from relay.core.errors import (
    ClientGone,
    ClientStalled,
    InternalError,
    RelayError,
    UnknownRoute,
    UpstreamTimeout,
)
from relay.core.exchange import CacheUse, Caller, Exchange, Request, State

STATES = get_args(State)


def make_exchange(**request: object) -> Exchange:
    return Exchange("7f3aaaaa-b", Request("rest", "POST", Caller("c"), 0.0, **request))  # type: ignore[arg-type]


@pytest.mark.parametrize(("before", "after"), [*itertools.product(STATES, STATES)])
def test_a_state_changes_only_to_a_later_one(before: State, after: State) -> None:
    exchange = make_exchange()
    exchange.state = before
    if STATES.index(after) > STATES.index(before):
        exchange.move_to(after)
        assert exchange.state == after
    else:
        with pytest.raises(RuntimeError, match=f"cannot become {after}"):
            exchange.move_to(after)
        assert exchange.state == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UpstreamTimeout("waiting", 1.0), UpstreamTimeout),
        (ConnectionResetError(), ClientGone),
        (asyncio.CancelledError(), ClientGone),
        (ValueError("a bug"), InternalError),
    ],
)
def test_an_error_is_mapped_to_a_failure_without_recording_it(error: BaseException, expected: type[RelayError]) -> None:
    exchange = make_exchange()
    assert isinstance(exchange.failure_of(error), expected)
    assert exchange.outcome.name is exchange.outcome.error is exchange.outcome.cause is None


@pytest.mark.parametrize(("failure", "name"), [(ClientGone(), "client_gone"), (ClientStalled(1.0), "client_gone"), (UnknownRoute("x"), "refused"), (InternalError(), "failed")])
def test_a_failure_is_recorded_with_its_cause(failure: RelayError, name: str) -> None:
    exchange, bug = make_exchange(), ValueError("a bug")
    exchange.fail(failure, bug)
    assert (exchange.outcome.name, exchange.outcome.error, exchange.outcome.cause) == (name, failure, bug)
    exchange.finish()
    assert exchange.outcome.name == name, "a call that failed stays failed"


def test_an_error_is_not_the_cause_of_itself() -> None:
    exchange, failure = make_exchange(), UpstreamTimeout("waiting", 1.0)
    exchange.fail(failure, failure)
    assert exchange.outcome.cause is None


@pytest.mark.parametrize(("state", "raised"), [("sending", UpstreamTimeout), ("committed", ConnectionResetError)])
def test_after_the_first_byte_a_failure_ends_the_connection(state: State, raised: type[BaseException]) -> None:
    exchange = make_exchange()
    exchange.state = state
    assert isinstance(exchange.end_with(UpstreamTimeout("waiting", 1.0)), raised)
    assert exchange.outcome.name == "failed"


async def test_a_task_that_was_cancelled_for_an_expiry_continues_with_its_error() -> None:
    exchange = make_exchange()

    async def call() -> RelayError | None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return exchange.take_expiry()
        return None

    exchange.task = asyncio.create_task(call())
    await asyncio.sleep(0)
    exchange.expire(expiry := UpstreamTimeout("waiting", 1.0))
    assert await exchange.task is expiry
    assert exchange.take_expiry() is None, "an expiry is taken once"


async def test_a_cancellation_for_another_reason_stays_a_cancellation() -> None:
    exchange = make_exchange()
    exchange.task = asyncio.current_task()
    assert isinstance(exchange.end_with(asyncio.CancelledError()), asyncio.CancelledError)
    assert exchange.outcome.name == "client_gone"


def test_a_shared_call_has_its_routing_and_its_usage_in_common_with_its_leader() -> None:
    leader = make_exchange(provider="openai", held_bytes=7)
    leader.cache, leader.at_end = CacheUse(CachePlan("openai", "k", 60, True, True)), (lambda: None,)
    call = leader.fork()
    assert call.routing is leader.routing and call.usage is leader.usage
    assert call.waiting is not leader.waiting and call.response is not leader.response and call.outcome is not leader.outcome
    assert (call.at_end, call.task, call.admission, call.state) == ((), None, None, "reading")
    assert leader.cache.leads and call.cache is not None and not call.cache.leads
    assert (leader.request.held_bytes, call.request.held_bytes, call.request.provider) == (0, 7, "openai")


@pytest.mark.parametrize(("reads", "is_hit", "status"), [(True, False, "MISS"), (False, False, "BYPASS"), (True, True, "HIT")])
def test_the_cache_status_follows_from_the_plan_and_the_hit(reads: bool, is_hit: bool, status: str) -> None:
    assert CacheUse(CachePlan("openai", "k", 60, reads, True), is_hit).status == status
