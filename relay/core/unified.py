"""Define the unified surface, `/v1/…`: its endpoints, and where each provider has them.

Owns which endpoints there are, in which wire format each of them is, and the path of an endpoint at
a provider. registry/unified_routes.py chooses the provider by the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

SocketKind = Literal["realtime", "responses", "live"]

_OPENAI = (
    "chat/completions", "completions", "responses", "responses/*", "embeddings", "images/*",
    "audio/*", "moderations",
)  # fmt: skip
_ANTHROPIC = ("messages", "messages/count_tokens")
ENDPOINTS = (*_OPENAI, *_ANTHROPIC)
"""The REST endpoints with a model, as patterns."""
SOCKETS: Mapping[str, SocketKind] = {
    "realtime": "realtime", "responses": "responses", "live/sessions": "live",
}  # fmt: skip
_SPOKEN: Mapping[str, Mapping[str, str]] = {
    "openai": dict.fromkeys(_OPENAI, ""),
    "anthropic": {"messages": "", "messages/*": "", "chat/completions": ""},
    "google": {
        "chat/completions": "openai/chat/completions",
        "embeddings": "openai/embeddings",
        "images/generations": "openai/images/generations",
    },
    "cohere": {
        "chat/completions": "compatibility/v1/chat/completions",
        "embeddings": "compatibility/v1/embeddings",
    },
}
"""The endpoints of providers by their wire format: pattern to path, empty for the same path."""


class Member(NamedTuple):
    """A target of an alias: a model of a provider."""

    provider: str
    model: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Alias:
    """A name of `models`, which stands for its targets."""

    members: tuple[Member, ...]
    by_weight: bool = False
    """True: one is chosen at random by weight; False: the others follow when the first fails."""


@dataclass(frozen=True, slots=True)
class Unified:
    """The sections `models` and `unified` of gateway.yaml."""

    aliases: Mapping[str, Alias] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    """The providers in which an unprefixed model is looked for; empty: all, in their order."""
    sockets: Mapping[str, str] = field(default_factory=dict)
    """Kind of socket to the provider that answers it if no model is named."""


def is_endpoint(endpoint: str) -> bool:
    """True for a REST endpoint of the unified surface that has a model or an object."""
    return any(fnmatchcase(endpoint, pattern) for pattern in ENDPOINTS)


def error_format(endpoint: str) -> str:
    """Return the wire format of the SDKs that call `endpoint`, for the relay's own errors."""
    return "anthropic" if endpoint in _ANTHROPIC else "openai"


def names_object(endpoint: str) -> bool:
    """True if the path names an object instead of the body a model: `responses/{id}`."""
    head, _, rest = endpoint.partition("/")
    return head == "responses" and rest not in ("", "compact", "input_tokens")


def spoken(format_: str, own: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return the endpoints of a provider: its own, else those of its wire format."""
    return _SPOKEN.get(format_, {}) if own is None else own


def path_at(speaks: Mapping[str, str], endpoint: str) -> str | None:
    """Return the path of an endpoint at a provider; None if the provider does not have it."""
    for pattern, path in speaks.items():
        if fnmatchcase(endpoint, pattern):
            return path or endpoint
    return None


def paths_instead(speaks: Mapping[str, str]) -> Sequence[str]:
    """Return the endpoints of a provider that take a conversation, for a refusal."""
    wanted = ("chat/completions", "responses", "messages")
    return [f"/v1/{each}" for each in wanted if path_at(speaks, each) is not None]
