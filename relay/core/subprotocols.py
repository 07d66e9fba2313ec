"""WebSocket subprotocols as browsers use them: some name a protocol, some carry a key (RFC 6455
1.9).

Owns: telling the two apart, what goes to the provider, and which one is echoed. Knows nothing of
sockets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

SubprotocolUse = Literal["pass", "drop", "credential", "credential_next"]

# Forms that users' pages send to any provider, whatever its own table says.
_EVERYWHERE: Mapping[str, SubprotocolUse] = {
    "cf-aig-authorization.": "credential",
    "openai-insecure-api-key.": "credential",
    "xi-api-key.": "credential",
    "fal-api-key.": "credential",
    "bearer.": "credential",
}


@dataclass(frozen=True, slots=True)
class Offer:
    """What a client offered, sorted into `public` names, in order, and the secrets among them."""

    offered: tuple[str, ...] = field(default=(), repr=False)
    public: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()
    credentials: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """(prefix, secret) in order: `("xi-api-key.", "sk_…")`; the prefix of a pair is its first word
    and a space.
    """

    def echo(self, chosen_upstream: str | None) -> str | None:
        """The subprotocol to select in our 101 answer, or None if the client offered none.

        The one the provider chose if the client offered it, else the first offered that is no
        secret, else, because a browser drops a connection that selects none, the first secret.
        """
        if not self.offered:
            return None
        if chosen_upstream is not None and chosen_upstream in self.offered:
            return chosen_upstream
        return self.public[0] if self.public else self.offered[0]


def split(header_values: Sequence[str]) -> tuple[str, ...]:
    """The items of one or more Sec-WebSocket-Protocol headers."""
    return tuple(
        item for value in header_values for raw in value.split(",") if (item := raw.strip())
    )


def sort(offered: tuple[str, ...], table: Mapping[str, SubprotocolUse]) -> Offer:
    """Sort what a client offered by the provider's `table` of names and `prefix.`es.

    Names that the table does not know are public but stay here: a provider hears only what it is
    known to take. `credential_next` marks a word whose *next* item is the secret (Deepgram's
    `token, KEY`).
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
    if (exact := table.get(item)) is not None:
        return item, exact
    lower = item.lower()
    for rules in (table, _EVERYWHERE):
        for prefix, use in rules.items():
            if prefix.endswith(".") and lower.startswith(prefix.lower()):
                return prefix, use
    return item, None
