"""What ties a call to a key, and the order of a pool's keys for a session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import pytest

from relay.core.affinity import KnownKeys, affinity_of, digest_of, key_id, made_response, rank
from relay.core.peek import peek_body
from tests.processes import ROOT

KEYS = [key_id(f"sk-{number}") for number in range(5)]
SESSIONS = [digest_of("web", "session", str(number)) for number in range(4000)]


def owners(keys: Sequence[bytes], weights: Sequence[float] = ()) -> list[bytes]:
    """The key of each session."""
    return [keys[rank(session, keys, weights)[0]] for session in SESSIONS]


def test_sessions_are_distributed_evenly() -> None:
    counts = Counter(owners(KEYS))
    assert all(700 < counts[key] < 900 for key in KEYS), counts


def test_a_key_that_is_removed_moves_only_its_own_sessions() -> None:
    before, after = owners(KEYS), owners(KEYS[1:])
    assert {old for old, new in zip(before, after, strict=True) if old != new} == {KEYS[0]}
    assert len(set(after)) == 4, "they are divided among all the others"


def test_a_removed_key_leaves_its_sessions_to_the_next_key_of_their_order() -> None:
    for session in SESSIONS[:100]:
        first, second, *_ = rank(session, KEYS, ())
        left = [key for at, key in enumerate(KEYS) if at != first]
        assert left[rank(session, left, ())[0]] == KEYS[second]


def test_weights_divide_the_sessions_in_proportion() -> None:
    counts = Counter(owners(KEYS[:3], (1, 1, 2)))
    assert 1850 < counts[KEYS[2]] < 2150 and 900 < counts[KEYS[0]] < 1100, counts


def test_equal_weights_are_no_weights() -> None:
    assert owners(KEYS[:3], (2, 2, 2)) == owners(KEYS[:3])


def test_a_changed_weight_moves_sessions_to_that_key_alone() -> None:
    before, after = owners(KEYS[:3], (1, 1, 1)), owners(KEYS[:3], (1, 1, 2))
    assert {new for old, new in zip(before, after, strict=True) if old != new} == {KEYS[2]}


def test_the_order_of_the_pool_does_not_matter() -> None:
    assert owners(KEYS) == owners(KEYS[::-1])


PROGRAM = """
from relay.core.affinity import digest_of, key_id, rank
keys = [key_id(f"sk-{number}") for number in range(5)]
print([rank(digest_of("web", "session", str(number)), keys, ())[0] for number in range(50)])
"""


def test_the_key_of_a_session_is_the_same_in_every_process() -> None:
    run = [sys.executable, "-c", PROGRAM]
    seen = {subprocess.run(run, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True, cwd=ROOT).stdout for seed in ("1", "2")}
    assert seen == {f"{[rank(session, KEYS, ())[0] for session in SESSIONS[:50]]}\n"}


def test_clients_with_the_same_session_id_are_different_sessions() -> None:
    mine, yours = (affinity_of(client, {"session-id": "1"}.get, "responses") for client in ("a", "b"))
    assert mine.session != yours.session


def test_no_client_can_be_named_so_that_its_sessions_are_those_of_another() -> None:
    assert digest_of("a", "session", "b c") != digest_of("a b", "session", "c")


CACHE_KEY, PREVIOUS = b'{"model": "m", "prompt_cache_key": "chat-1"}', b'{"previous_response_id": "resp_1"}'
SESSION = digest_of("web", "session", "chat-1")


@pytest.mark.parametrize("header", ["x-claude-code-session-id", "session-id", "session_id", "conversation_id"])
def test_the_session_of_an_agents_header_goes_before_that_of_the_body(header: str) -> None:
    found = affinity_of("web", {header: "chat-1"}.get, "responses", prompt_cache_key="another")
    assert found.session == SESSION


def test_without_a_header_the_prompt_cache_key_is_the_session() -> None:
    seen = peek_body(CACHE_KEY, "application/json")
    assert affinity_of("web", {}.get, "responses", seen.prompt_cache_key).session == SESSION


def test_a_call_names_the_response_that_it_continues() -> None:
    seen = peek_body(PREVIOUS, "application/json")
    found = affinity_of("web", {}.get, "responses", None, seen.previous_response_id)
    assert found == ("web", b"", digest_of("web", "response", "resp_1"), False)


@pytest.mark.parametrize("endpoint", ["v1/responses/resp_1", "responses/resp_1/input_items", "responses/resp_1/cancel"])
def test_a_path_names_the_response_that_it_reads(endpoint: str) -> None:
    assert affinity_of("web", {}.get, endpoint) == ("web", b"", digest_of("web", "response", "resp_1"), True)


@pytest.mark.parametrize("endpoint", ["v1/responses", "responses/compact", "chat/completions", "x/responses/../resp_1"])
def test_other_paths_name_no_response(endpoint: str) -> None:
    assert affinity_of("web", {}.get, endpoint) == ("web", b"", b"", False)


@pytest.mark.parametrize("given", ["5", "null", "[]", '"' + "x" * 511 + '"', '"\\ud800"', '"a'])
def test_ids_of_another_type_or_too_long_are_ignored(given: str) -> None:
    seen = peek_body(b'{"model": "m", "prompt_cache_key": %s}' % given.encode(), "application/json")
    assert seen.prompt_cache_key is None


@pytest.mark.parametrize(
    "start",
    [
        b'{"id":"resp_1","object":"response"}',
        b'{\n  "id": "resp_1",\n  "object"',
        b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_1","object":',
    ],
)
def test_the_id_of_a_new_response_is_read_from_its_beginning(start: bytes) -> None:
    assert made_response(start) == "resp_1"


@pytest.mark.parametrize("start", [b"", b'{"id":"chatcmpl-1"}', b'{"text":"\\"id\\":\\"resp_1\\""}', b'{"previous_response_id":"resp_1"}', b'{"id":"resp_1'])
def test_no_other_text_is_read_as_the_id_of_a_response(start: bytes) -> None:
    assert made_response(start) is None


def test_the_memory_forgets_the_least_recently_used_first() -> None:
    known = KnownKeys(max_entries=2)
    known.remember(b"a", KEYS[0])
    known.remember(b"b", KEYS[1])
    assert known.find(b"a") == KEYS[0]
    known.remember(b"c", KEYS[2])
    assert (known.find(b"a"), known.find(b"b"), known.find(b"c"), len(known)) == (KEYS[0], None, KEYS[2], 2)
