"""The headers that carry a credential: whatever a client puts there is removed from every request.

Owns the names. What a client's credential is used for is credentials.py's.
"""

from __future__ import annotations

import re

CREDENTIAL_HEADERS = (
    "x-relay-key", "cf-aig-authorization", "authorization", "x-api-key", "api-key", "xi-api-key",
    "x-goog-api-key",
)  # fmt: skip
"""Wherever an SDK puts a key, in the order in which a client's own is looked for. Removed from
every request; the provider's own is put in afterwards.
"""

# What names a key, a token or a session of anybody's: the relay's, the provider's, or that of some
# other service, which a client sends everywhere.
_OF_KEYS = frozenset({"authentication", "token", "x-bf-vk", "x-auth", "jwt"})
_OF_KEYS_PART = re.compile(
    r"(?:^|-)(?:"
    r"(?:[a-z0-9]+-?)?api-?keys?|(?:access|auth|private|secret|subscription|functions|signing)-?key"
    r"|(?:api|access|auth|bearer|csrf|id|identity|oidc|private|refresh|secret|security|session|xsrf"
    r"|subscription)-?token"
    r"|authorization|cookies?2?|credentials?|pass(?:wd|word|phrase)|secret"
    r")(?:-|$)"
)
RELAY_PREFIX = "x-relay-"


def names_a_key(name: str) -> bool:
    """True for a header that carries a credential of anybody's, by its normal name."""
    return (
        name in CREDENTIAL_HEADERS
        or name in _OF_KEYS
        or name.startswith(RELAY_PREFIX)
        or _OF_KEYS_PART.search(name) is not None
    )
