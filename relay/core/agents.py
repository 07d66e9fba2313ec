"""Read what coding agents say about themselves: the session of a call, and its user.

Owns the headers of Claude Code and Codex that name a session, and the forms of `metadata.user_id`
in which Claude Code names user and session together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from relay.core.text import clean

_CLAUDE_SESSION = "x-claude-code-session-id"
_CLAUDE_AGENT, _CLAUDE_PARENT = "x-claude-code-agent-id", "x-claude-code-parent-agent-id"
_CODEX_SESSIONS = ("session-id", "session_id", "conversation_id")
"""The name that Codex sends today, and those of older versions."""
_CODEX_PARENT = "x-codex-parent-thread-id"

_MAX_USER_ID_CHARACTERS = 1024
_USER_AND_SESSION = re.compile(
    r"user_(?P<device>[0-9A-Za-z]+)_account_(?P<account>[0-9A-Za-z-]*)_session_[0-9A-Za-z-]*"
)


class AgentSession(NamedTuple):
    """The session of an agent in which a call is made."""

    id: str
    parent: str | None
    """The agent that started the sub-agent which makes the call: its id, or `id` for the session's
    main agent. None for a call of the main agent itself."""


def agent_session(header: Callable[[str], str | None]) -> AgentSession | None:
    """Return the session that the headers of a call name, cleaned; None if they name none."""
    if session := header(_CLAUDE_SESSION):
        parent = header(_CLAUDE_PARENT)
        if not parent and header(_CLAUDE_AGENT):
            parent = session  # an agent of the first level
    else:
        for name in _CODEX_SESSIONS:
            if session := header(name):
                break
        else:
            return None
        parent = header(_CODEX_PARENT)
    return AgentSession(clean(session), clean(parent) if parent else None)


class _UserId(msgspec.Struct):
    session_id: str
    device_id: str | None = None
    account_uuid: str | None = None


_decoder = msgspec.json.Decoder(_UserId)


def user_without_session(user_id: str) -> str | None:
    """Return the user of a `metadata.user_id`. Claude Code's has a session too, by which one person
    would be many users: of that the account counts, else the device. None if it has neither.
    """
    if user_id.startswith("{") and len(user_id) <= _MAX_USER_ID_CHARACTERS:
        try:
            found = _decoder.decode(user_id)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return user_id
        return found.account_uuid or found.device_id or None
    named = _USER_AND_SESSION.fullmatch(user_id)
    return user_id if named is None else named["account"] or named["device"]
