"""Decide who may manage the relay: read its ledger and state, change clients and keys, reload.

Owns the tokens of management (`access.admin_token`, `access.read_token`) and their roles. Without a
token only local callers may (gate/access.py). A token is taken from `Authorization: Bearer` alone:
a query ends up in logs and histories. Tokens are compared as digests, all of them, in constant
time. A client's key never opens management, and a token of management is never a client's key.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Literal, NamedTuple

from multidict import CIMultiDictProxy

from relay.core.access import is_relay_secret
from relay.core.credentials import presented
from relay.core.errors import (
    ManagementDenied,
    ManagementForbidden,
    ManagementNotLocal,
    OriginNotAllowed,
    RelayError,
)
from relay.core.exchange import Caller
from relay.gate.access import OpenAccess, is_own_page, require_local
from relay.gate.keys import ClientKeys, digest_of

Role = Literal["admin", "read", "local"]
READS = frozenset({"GET", "HEAD"})
"""The methods that the role `read` may use. Every other one needs `admin`."""

_NOTHING_SENT = (
    "Management needs a token: send `Authorization: Bearer` with the relay's RELAY_ADMIN_TOKEN, or"
    " to read with its RELAY_READ_TOKEN."
)
_UNKNOWN = "This is not a token of this relay's management."
_CLIENT_KEY = (
    "A client's key does not open management, which takes the relay's RELAY_ADMIN_TOKEN or"
    " RELAY_READ_TOKEN."
)
_ONLY_READS = "RELAY_READ_TOKEN only reads; changes need RELAY_ADMIN_TOKEN."


class Manager(NamedTuple):
    """Who manages the relay, for the audit."""

    role: Role
    """`local` without a token: a caller on this machine, who may do everything."""
    address: str

    def __str__(self) -> str:
        return f"{self.role} {self.address}"


class Question(NamedTuple):
    """What decides about a request for management."""

    method: str
    headers: CIMultiDictProxy[str]
    query: str
    caller: Caller
    """By its address alone."""


class Management:
    """The tokens of a configuration, and what they allow."""

    __slots__ = ("_keys", "_roles")

    def __init__(self, tokens: Mapping[Role, str], keys: ClientKeys) -> None:
        """`tokens` by role; an empty one is none."""
        self._keys = keys
        self._roles = tuple((digest_of(token), role) for role, token in tokens.items() if token)

    @property
    def digests(self) -> frozenset[bytes]:
        """The SHA-256 of the tokens."""
        return frozenset(digest for digest, _ in self._roles)

    @property
    def has_tokens(self) -> bool:
        """True if there is a token."""
        return bool(self._roles)

    def require(self, question: Question) -> Manager:
        """Return who manages. Raises ManagementDenied, ManagementForbidden, TooManyAttempts,
        ManagementNotLocal, OriginNotAllowed or CrossSiteRequest.

        With an admin token everybody needs a token. With a read token alone, or none, local callers
        need none.
        """
        headers, method, caller = question.headers, question.method, question.caller
        token = _bearer(headers)
        role = self._role_of(token)
        if role is not None:
            if not is_own_page(headers):
                raise OriginNotAllowed(headers["Origin"])
            if role == "read" and method not in READS:
                raise ManagementForbidden(_ONLY_READS)
            return Manager(role, caller.address)
        if self._sends_client_key(question):
            raise ManagementForbidden(_CLIENT_KEY)
        roles = {role for _, role in self._roles}
        if roles and token:
            raise self._keys.wrong_tries.refusal(caller.address, ManagementDenied(_UNKNOWN))
        if "admin" in roles:
            raise ManagementDenied(_NOTHING_SENT)
        try:
            require_local(caller.peer, headers)
        except ManagementNotLocal as error:
            if roles and method in READS:
                raise ManagementDenied(_NOTHING_SENT) from error
            raise
        return Manager("local", caller.address)

    def require_metrics(self, question: Question, access: OpenAccess) -> None:
        """Raise the error for a request that may not read metrics, which hold no contents of calls:
        those may who may read management; local callers; and while access is open and there is no
        token, whoever may call.
        """
        if not access.is_required and not self.has_tokens:
            access.check(question.headers)
        elif not self.is_local(question):
            self.require(question)

    def may_read_metrics(self, question: Question, access: OpenAccess) -> bool:
        """True for a request that may read metrics. Counts no wrong token."""
        if not access.is_required and not self.has_tokens:
            return True
        return self._role_of(_bearer(question.headers)) is not None or self.is_local(question)

    def is_local(self, question: Question) -> bool:
        """True for a local caller who sends neither a token, which is to be checked, nor a client's
        key.
        """
        if _bearer(question.headers) or self._sends_client_key(question):
            return False
        try:
            require_local(question.caller.peer, question.headers)
        except RelayError:
            return False
        return True

    def _role_of(self, token: str) -> Role | None:
        """Return the role of a token; None for a wrong one."""
        found: Role | None = None
        if token:
            digest = digest_of(token)
            for known, role in self._roles:
                if hmac.compare_digest(digest, known):
                    found = role
        return found

    def _sends_client_key(self, question: Question) -> bool:
        """True if the request brings a client's key or ticket, in any place where these are."""
        sent = presented(question.headers, question.query, (), (), ())
        return any(is_relay_secret(each) or self._keys.find(each) is not None for each in sent)


def _bearer(headers: CIMultiDictProxy[str]) -> str:
    """Return the token of the one Authorization header; empty without one."""
    lines = headers.getall("Authorization", ())
    if len(lines) != 1:
        return ""
    scheme, _, token = lines[0].strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
