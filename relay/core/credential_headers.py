"""The request headers that carry a credential, which the relay removes from every request.

Owns the names of these headers. How a client's credential is used is decided in credentials.py.
"""

from __future__ import annotations

import re

CREDENTIAL_HEADERS = (
    "x-relay-key", "cf-aig-authorization", "authorization", "x-api-key", "api-key", "xi-api-key",
    "x-goog-api-key",
)  # fmt: skip
"""Headers in which SDKs send a key, in the order in which a client's key is looked for. They are
removed from every request before the credential of the provider is added.
"""

# Names of headers with a key, a token or a session: the relay's, the provider's, or that of another
# service, which some clients send to every host.
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
    """True for a header that carries a credential. `name` is normalized (headers.normal)."""
    return (
        name in CREDENTIAL_HEADERS
        or name in _OF_KEYS
        or name.startswith(RELAY_PREFIX)
        or _OF_KEYS_PART.search(name) is not None
    )
