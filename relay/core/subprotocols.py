"""Sort WebSocket subprotocols, of which browsers use some to carry a key (RFC 6455 1.9).

Owns the distinction between names and credentials, which names go to the provider, and which one
the relay selects in its response. It opens no sockets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from relay.core.access import is_relay_secret

SubprotocolUse = Literal["pass", "drop", "credential", "credential_next"]

# Forms that web pages send to any provider, in addition to the provider's own table.
_EVERYWHERE: Mapping[str, SubprotocolUse] = {
    "cf-aig-authorization.": "credential",
    "openai-insecure-api-key.": "credential",
    "xi-api-key.": "credential",
    "fal-api-key.": "credential",
    "bearer.": "credential",
}


@dataclass(frozen=True, slots=True)
class Offer:
    """The subprotocols that a client offered: all, the `public` names in order, those that are
    `passed` to the provider, and the credentials.
    """

    offered: tuple[str, ...] = field(default=(), repr=False)
    public: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()
    credentials: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """(prefix, secret) in order: `("xi-api-key.", "sk_…")`; the prefix of a pair is its first word
    and a space.
    """

    def echo(self, chosen_upstream: str | None) -> str | None:
        """Return the subprotocol to select in the relay's 101; None if the client offered none.

        It is the provider's choice if the client offered it, otherwise the first public name,
        otherwise the first credential: a browser fails a connection that selects none.
        """
        if not self.offered:
            return None
        if chosen_upstream is not None and chosen_upstream in self.offered:
            return chosen_upstream
        return self.public[0] if self.public else self.offered[0]


def split(header_values: Sequence[str]) -> tuple[str, ...]:
    """Return the items of one or more Sec-WebSocket-Protocol headers."""
    return tuple(
        item for value in header_values for raw in value.split(",") if (item := raw.strip())
    )


def sort(offered: tuple[str, ...], table: Mapping[str, SubprotocolUse]) -> Offer:
    """Sort the offered subprotocols by the provider's `table` of names and prefixes.

    A name that is not in the table is public, but not passed to the provider. `credential_next`
    marks a name whose *next* item is the secret (Deepgram's `token, KEY`).
    """
    public: list[str] = []
    passed: list[str] = []
    credentials: list[tuple[str, str]] = []
    items = iter(offered)
    for item in items:
        prefix, use = _use_of(item, table)
        if use == "credential":
            credentials.append((prefix, item[len(prefix) :]))
            continue
        public.append(item)
        if use == "pass":
            passed.append(item)
        elif use == "credential_next" and (secret := next(items, None)) is not None:
            credentials.append((item + " ", secret))
    return Offer(offered, tuple(public), tuple(passed), tuple(credentials))


def _use_of(item: str, table: Mapping[str, SubprotocolUse]) -> tuple[str, SubprotocolUse | None]:
    if is_relay_secret(item):
        return "", "credential"
    if (exact := table.get(item)) is not None:
        return item, exact
    lower = item.lower()
    for rules in (table, _EVERYWHERE):
        for prefix, use in rules.items():
            if prefix.endswith(".") and lower.startswith(prefix.lower()):
                return prefix, use
    return item, None
