"""Guess the provider of a request with a wrong base URL, which matches no route of the relay.

Owns the guess, by path and headers. `UnknownRoute` reports the right base URL to the client.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from relay.core.formats import format_of
from relay.core.provider import Provider

_MAX_SEGMENTS = 6


class BaseUrlGuess(NamedTuple):
    """The provider that a client probably means, and the wire format of its SDK, for the error."""

    provider: str
    """Empty: unknown."""
    format: str


class _Signature(NamedTuple):
    """How to recognize the requests of one provider's SDK."""

    provider: str
    format: str
    header: str
    """A header that only this SDK sends; empty: there is none."""
    path: re.Pattern[str]


# The first match is used.
_SIGNATURES = (
    _Signature(
        "google-ai-studio", "google", "x-goog-api-key",
        re.compile(r"(?:^|/)v1(?:beta|alpha)/|/models/[^/]+:[A-Za-z]+$|google\.ai\.generative"),
    ),
    _Signature(
        "anthropic", "anthropic", "anthropic-version",
        re.compile(r"(?:^|/)messages(?:/count_tokens|/batches.*)?$|(?:^|/)api/hello$"),
    ),
    _Signature(
        "elevenlabs", "elevenlabs", "xi-api-key",
        re.compile(r"(?:^|/)(?:text-to-speech|speech-to-text|text-to-dialogue|convai)(?:/|$)"),
    ),
    _Signature("cartesia", "cartesia", "cartesia-version", re.compile(r"(?:^|/)(?:tts|stt)/")),
    _Signature("deepgram", "deepgram", "", re.compile(r"(?:^|/)v[12]/(?:listen|speak)$")),
    _Signature("cohere", "cohere", "", re.compile(r"(?:^|/)v2/(?:chat|embed|rerank)$")),
    _Signature(
        "openai", "openai", "",
        re.compile(
            r"(?:^|/)(?:chat/completions|completions|responses|embeddings|moderations|models|files"
            r"|realtime|images/[a-z]+|audio/[a-z]+)(?:/|$)"
        ),
    ),
)  # fmt: skip


def guess_provider(
    path: str, headers: Mapping[str, str], providers: Mapping[str, Provider]
) -> BaseUrlGuess:
    """Guess the provider of a request to `path`: the one that a segment of the path names,
    otherwise the one whose SDK sends such requests, if gateway.yaml has it.
    """
    segments = [segment for segment in path.split("/") if segment]
    signature = next(
        (each for each in _SIGNATURES if each.header and each.header in headers), None
    ) or next((each for each in _SIGNATURES if each.path.search(path)), None)
    is_version = segments and segments[0] in ("v1beta", "v1alpha")  # v1beta/openai is Google's
    at = next((at for at, each in enumerate(segments[:_MAX_SEGMENTS]) if each in providers), None)
    if at is not None and not is_version:
        provider = providers[segments[at]]
        endpoint = provider.endpoint("/".join(segments[at + 1 :]))
        return BaseUrlGuess(segments[at], format_of(endpoint, provider.format, provider.formats))
    if signature is None:
        return BaseUrlGuess("", "openai")
    found = signature.provider if signature.provider in providers else ""
    return BaseUrlGuess(found, format_of(path, signature.format, ()))
