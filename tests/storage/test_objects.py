"""The objects of clients: both databases, and the memory in front of them."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest

from relay.core.errors import ObjectNotFound
from relay.gate.made_objects import MadeObjects
from relay.storage.database import Database, DatabaseUnavailable
from relay.storage.objects import MadeObject, ObjectStore


class Later:
    """Keeps the queued work until a test runs it."""

    def __init__(self) -> None:
        self.work: list[Coroutine[Any, Any, None]] = []

    def __call__(self, work: Coroutine[Any, Any, None]) -> bool:
        self.work.append(work)
        return True

    async def run(self) -> None:
        work, self.work = self.work, []
        for each in work:
            await each


@pytest.fixture
def later() -> Later:
    return Later()


def objects(database: Database | None, later: Later) -> MadeObjects:
    return MadeObjects(ObjectStore(database) if database is not None else None, later, lambda: 1_000.0)


async def test_another_process_finds_what_one_has_written(database: Database, later: Later) -> None:
    one, other = objects(database, later), objects(database, later)
    for number in range(300):
        one.note("web", f"resp_{number}", "openai")
    assert await one.provider_of("web", "resp_0") == "openai"
    assert len(later.work) == 1, "one transaction for all"
    await later.run()
    assert await other.provider_of("web", "resp_299") == "openai"


async def test_an_object_exists_for_the_client_that_made_it_alone(database: Database, later: Later) -> None:
    made = objects(database, later)
    made.note("web", "resp_1", "openai")
    await later.run()
    with pytest.raises(ObjectNotFound):
        await made.provider_of("app", "resp_1")


async def test_a_second_maker_of_an_id_takes_nothing_over(database: Database) -> None:
    store = ObjectStore(database)
    await store.add([MadeObject("web", "resp_1", "openai")], 1.0)
    await store.add([MadeObject("web", "resp_1", "grok"), MadeObject("app", "resp_1", "grok")], 2.0)
    assert await store.provider_of("web", "resp_1") == "openai"
    assert await store.provider_of("app", "resp_1") == "grok"


async def test_what_could_not_be_written_is_written_with_the_next(database: Database, later: Later, monkeypatch: pytest.MonkeyPatch) -> None:
    made, add = objects(database, later), ObjectStore.add

    async def fail(*_: Any) -> None:
        raise DatabaseUnavailable("OperationalError")

    monkeypatch.setattr(ObjectStore, "add", fail)
    made.note("web", "resp_1", "openai")
    await later.run()
    monkeypatch.setattr(ObjectStore, "add", add)
    made.note("web", "resp_2", "openai")
    await later.run()
    assert await objects(database, later).provider_of("web", "resp_1") == "openai"


async def test_objects_are_written_after_a_full_queue_has_dropped_a_write(database: Database, later: Later) -> None:
    is_full = [True]

    def drop_or_queue(work: Coroutine[Any, Any, None]) -> bool:
        if is_full[0]:
            work.close()
            return False
        return later(work)

    made = MadeObjects(ObjectStore(database), drop_or_queue, lambda: 1_000.0)
    made.note("web", "resp_1", "openai")
    is_full[0] = False
    made.note("web", "resp_2", "openai")
    await later.run()
    assert await objects(database, later).provider_of("web", "resp_1") == "openai"


async def test_an_outage_of_the_database_is_logged_once(database: Database, later: Later, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr("relay.gate.made_objects.log.warn", lambda event, **_: logged.append(event))

    async def fail(*_: Any) -> None:
        raise DatabaseUnavailable("OperationalError")

    monkeypatch.setattr(ObjectStore, "add", fail)
    made = objects(database, later)
    for number in range(3):
        made.note("web", f"resp_{number}", "openai")
        await later.run()
    assert logged == ["objects.not_written"]


async def test_without_a_database_the_memory_of_the_process_answers(later: Later) -> None:
    made = objects(None, later)
    made.note("web", "resp_1", "openai")
    assert await made.provider_of("web", "resp_1") == "openai" and not later.work
    with pytest.raises(ObjectNotFound):
        await made.provider_of("web", "resp_2")
