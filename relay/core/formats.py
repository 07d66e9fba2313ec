"""The wire format of a path, and whether its response reports new usage.

Owns the names of the formats, the paths that all vendors spell alike, and the decision which
responses only repeat earlier usage. Precedence: a provider's `formats:`, the table here, the
provider's `format:`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

Format = Literal[
    "openai", "anthropic", "google", "cohere", "elevenlabs", "cartesia", "fal", "deepgram",
    "assemblyai",
]  # fmt: skip

Counting = Literal["new", "stored", "nothing"]
"""Whose usage a response reports: that of this call; that of a stored object, which is counted once
it is final; or none."""


class PathFormat(NamedTuple):
    """Endpoints that match `pattern` (`*` matches anything) have the wire format `format`."""

    pattern: str
    format: str


_BUILT_IN = (
    PathFormat("*threads/*", ""),  # their messages and runs have the provider's own format
    PathFormat("*chat/completions", "openai"),
    PathFormat("*chat/completions/*", "openai"),
    PathFormat("*/completions", "openai"),
    PathFormat("completions", "openai"),
    PathFormat("*embeddings", "openai"),
    PathFormat("*responses", "openai"),
    PathFormat("*responses/*", "openai"),
    PathFormat("*images/generations", "openai"),
    PathFormat("*images/edits", "openai"),
    PathFormat("*images/variations", "openai"),
    PathFormat("*audio/speech", "openai"),
    PathFormat("*audio/transcriptions", "openai"),
    PathFormat("*audio/translations", "openai"),
    PathFormat("*:generateContent", "google"),
    PathFormat("*:streamGenerateContent", "google"),
    PathFormat("*:embedContent", "google"),
    PathFormat("*:batchEmbedContents", "google"),
    PathFormat("*:countTokens", "google"),
    PathFormat("messages", "anthropic"),
    PathFormat("*/messages", "anthropic"),
    PathFormat("*messages/count_tokens", "anthropic"),
    PathFormat("*messages/batches*", "anthropic"),
)


def format_of(endpoint: str, default: str, own: Sequence[PathFormat]) -> str:
    """Return the wire format of an endpoint."""
    path = endpoint.rstrip("/")
    for rule in (*own, *_BUILT_IN):
        if fnmatch.fnmatchcase(path, rule.pattern):
            return rule.format or default
    return default


_OBJECTS = (
    r"(?:responses|interactions|batches|batch/jobs|videos|transcripts?|async/chat/completions"
    r"|chat/deferred-completion|requests|operations|fine_tuning/jobs|threads/[^/]+/runs|evals/[^/]+/runs)"
)
"""Collections in which vendors store the results of calls, to be read by their ids."""
_STORED = re.compile(rf"(?:^|/){_OBJECTS}/[^/]+(?<!/compact)(?<!/input_tokens)(?:/results)?$")
"""GETs of one object that an earlier call created."""
_MAKES = re.compile(
    rf"(?:^|/)(?:{_OBJECTS}|speech-to-text|threads/runs|videos(?:/[^/]+){{1,2}}"
    r"|threads/[^/]+/runs/[^/]+(?:/submit_tool_outputs)?)$"
)
"""POSTs that create such an object, or continue it, and may report its usage at once."""
_FREE = re.compile(
    r"(?:^|[/:])(?:count_tokens|input_tokens|countTokens|tokenize|detokenize|cancel|moderations"
    r"|client_secrets|search)$"
    r"|chat/completions/[^/]+$"
    r"|(?:^|/)threads(?:/(?!runs$)[^/]+)?(?:/messages(?:/[^/]+)?)?$"
    r"|(?:^|/)(?:files|uploads|vector_stores|cachedContents|voices)(?:/|$)"
)
"""POSTs without usage, although their responses may have usage fields."""


_MAX_PATHS = 1024


@lru_cache(_MAX_PATHS)
def counting_of(method: str, endpoint: str) -> Counting:
    """Return whose usage the response to a call reports."""
    path = endpoint.rstrip("/")
    if method == "POST":
        return "nothing" if _FREE.search(path) else "new"
    return "stored" if method == "GET" and _STORED.search(path) else "nothing"


@lru_cache(_MAX_PATHS)
def makes_objects(endpoint: str) -> bool:
    """True if the result of a POST here can be read again later, by its id."""
    return _MAKES.search(endpoint.rstrip("/")) is not None


@lru_cache(_MAX_PATHS)
def continues_object(endpoint: str) -> bool:
    """True if a POST here continues or changes an object that another call created."""
    return re.search(r"(?:^|/)threads/[^/]+/runs/", endpoint) is not None
