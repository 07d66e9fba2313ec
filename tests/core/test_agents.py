"""What coding agents say about themselves: their session, the agent above, and their user."""

from __future__ import annotations

import json

import pytest

from relay.core.agents import agent_session, user_without_session
from relay.core.peek import peek_body
from relay.core.text import clean

SESSION, AGENT, PARENT = "5f2c9f5a-session", "agent-2", "agent-1"
CLAUDE = {"x-claude-code-session-id": SESSION}
HEADERS: dict[str, tuple[dict[str, str], tuple[str, str | None] | None]] = {
    "Claude Code": (CLAUDE, (SESSION, None)),
    "a sub-agent of Claude Code": (CLAUDE | {"x-claude-code-agent-id": AGENT}, (SESSION, SESSION)),
    "a sub-agent of a sub-agent": (CLAUDE | {"x-claude-code-agent-id": AGENT, "x-claude-code-parent-agent-id": PARENT}, (SESSION, PARENT)),
    "Codex": ({"session-id": SESSION, "thread-id": SESSION}, (SESSION, None)),
    "a sub-agent of Codex": ({"session-id": SESSION, "thread-id": AGENT, "x-codex-parent-thread-id": SESSION}, (SESSION, SESSION)),
    "Codex of 2025": ({"session_id": SESSION, "conversation_id": SESSION}, (SESSION, None)),
    "the first Codex": ({"conversation_id": SESSION}, (SESSION, None)),
    "a sub-agent of Codex of 2025": ({"session_id": AGENT, "x-codex-parent-thread-id": PARENT}, (AGENT, PARENT)),
    "no agent": ({"user-agent": "curl/8"}, None),
    "empty headers": ({"x-claude-code-session-id": "", "session-id": ""}, None),
    "a parent without a session": ({"x-codex-parent-thread-id": PARENT, "x-claude-code-agent-id": AGENT}, None),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_the_session_and_the_parent_are_read_from_the_agents_headers(what: str) -> None:
    headers, expected = HEADERS[what]
    assert agent_session(headers.get) == expected


def test_session_and_parent_are_cleaned_and_bounded() -> None:
    found = agent_session({"session-id": "s\x1b" * 5000, "x-codex-parent-thread-id": "p" * 5000}.get)
    assert found == (clean("s\x1b" * 5000), clean("p" * 5000))


DEVICE, ACCOUNT = "0a" * 32, "7d52a1ce-4c1e-4a51-9a51-0e5f0c1d2e3f"
USER_IDS: dict[str, tuple[str, str | None]] = {
    "JSON": (json.dumps({"device_id": DEVICE, "account_uuid": ACCOUNT, "session_id": SESSION}), ACCOUNT),
    "JSON without an account": (json.dumps({"device_id": DEVICE, "account_uuid": "", "session_id": SESSION}), DEVICE),
    "JSON with null": (json.dumps({"device_id": DEVICE, "account_uuid": None, "session_id": SESSION}), DEVICE),
    "JSON of a sub-agent": (json.dumps({"device_id": DEVICE, "account_uuid": ACCOUNT, "session_id": SESSION, "parent_session_id": "x"}), ACCOUNT),
    "JSON with a session alone": (json.dumps({"session_id": SESSION}), None),
    "text": (f"user_{DEVICE}_account_{ACCOUNT}_session_{SESSION}", ACCOUNT),
    "text without an account": (f"user_{DEVICE}_account__session_{SESSION}", DEVICE),
    "another text": ("ann_account_session", "ann_account_session"),
    "another JSON": ('{"name": "ann"}', '{"name": "ann"}'),
    "JSON of other types": ('{"session_id": 5, "device_id": []}', '{"session_id": 5, "device_id": []}'),
    "JSON that breaks off": ('{"session_id": "', '{"session_id": "'),
    "deep JSON": ('{"a":' * 150 + "1" + "}" * 150, '{"a":' * 150 + "1" + "}" * 150),
}  # fmt: skip


@pytest.mark.parametrize("what", USER_IDS)
def test_the_user_of_claude_code_is_the_account_or_the_device_without_the_session(what: str) -> None:
    user_id, expected = USER_IDS[what]
    assert user_without_session(user_id) == expected
    body = json.dumps({"model": "m", "metadata": {"user_id": user_id}}).encode()
    assert peek_body(body, "application/json").user == expected


def test_a_long_user_id_is_not_parsed() -> None:
    long = json.dumps({"session_id": "s" * 5000, "account_uuid": ACCOUNT})
    assert user_without_session(long) == long


def test_only_metadata_names_a_user_with_a_session() -> None:
    text = f"user_{DEVICE}_account_{ACCOUNT}_session_{SESSION}"
    assert peek_body(json.dumps({"user": text}).encode(), "application/json").user == text
