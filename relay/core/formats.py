"""Which wire format a path speaks, and whether what it answers is new usage.

Owns: the names of the formats, the paths that every vendor spells alike, and which answers only
repeat what was used before. The order decides: a provider's own `formats:`, the table here, the
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
"""Whose usage an answer reports: this call's; a stored object's, counted once it is final; none."""


class PathFormat(NamedTuple):
    """Endpoints that match `pattern` (`*` is anything) speak `format`."""

    pattern: str
    format: str


_BUILT_IN = (
    PathFormat("*threads/*", ""),  # their messages and runs are the provider's own
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
    """The wire format of an endpoint."""
    path = endpoint.rstrip("/")
    for rule in (*own, *_BUILT_IN):
        if fnmatch.fnmatchcase(path, rule.pattern):
            return rule.format or default
    return default


_OBJECTS = (
    r"(?:responses|interactions|batches|batch/jobs|videos|transcripts?|async/chat/completions"
    r"|chat/deferred-completion|requests|operations|fine_tuning/jobs|threads/[^/]+/runs|evals/[^/]+/runs)"
)
"""Where vendors keep what a call made, to be read by its id."""
_STORED = re.compile(rf"(?:^|/){_OBJECTS}/[^/]+(?<!/compact)(?<!/input_tokens)(?:/results)?$")
"""Reads of one object that a call before began."""
_MAKES = re.compile(
    rf"(?:^|/)(?:{_OBJECTS}|speech-to-text|threads/runs|videos(?:/[^/]+){{1,2}}"
    r"|threads/[^/]+/runs/[^/]+(?:/submit_tool_outputs)?)$"
)
"""POSTs that make such an object, or go on with it, and may tell its usage at once."""
_FREE = re.compile(
    r"(?:^|[/:])(?:count_tokens|input_tokens|countTokens|tokenize|detokenize|cancel|moderations"
    r"|client_secrets|search)$"
    r"|chat/completions/[^/]+$"
    r"|(?:^|/)threads(?:/(?!runs$)[^/]+)?(?:/messages(?:/[^/]+)?)?$"
    r"|(?:^|/)(?:files|uploads|vector_stores|cachedContents|voices)(?:/|$)"
)
"""POSTs that use nothing, though their answers may look as if they did."""


_MAX_PATHS = 1024


@lru_cache(_MAX_PATHS)
def counting_of(method: str, endpoint: str) -> Counting:
    """Whether the answer of a call tells usage that is not counted yet."""
    path = endpoint.rstrip("/")
    if method == "POST":
        return "nothing" if _FREE.search(path) else "new"
    return "stored" if method == "GET" and _STORED.search(path) else "nothing"


@lru_cache(_MAX_PATHS)
def makes_objects(endpoint: str) -> bool:
    """True if what a POST here answers can be read again later, by an id."""
    return _MAKES.search(endpoint.rstrip("/")) is not None


@lru_cache(_MAX_PATHS)
def continues_object(endpoint: str) -> bool:
    """True if a POST here goes on with an object that another call made, or only changes it."""
    return re.search(r"(?:^|/)threads/[^/]+/runs/", endpoint) is not None
