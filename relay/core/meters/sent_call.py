"""The request of a call, as the readers of its response need it.

Owns SentCall, and what its method and endpoint say about usage in the response.
"""

from __future__ import annotations

import msgspec

from relay.core.exchange import Exchange
from relay.core.formats import Counting, counting_of, makes_objects
from relay.core.peek import generates
from relay.core.usage import BYTES_PER_TOKEN


class SentCall(msgspec.Struct, frozen=True):
    """The request of a call."""

    kind: str
    """`chat`, `speech`, … (core/peek.py)."""
    body: bytes = b""
    """The billable fields of the body: text for speech, `n` of images, beginning of audio."""
    input_tokens: int = 0
    """Estimated input tokens."""
    method: str = "POST"
    endpoint: str = ""
    length: int = 0
    """Size of the body in bytes."""

    @classmethod
    def of(cls, exchange: Exchange) -> SentCall:
        """Return the request of an exchange."""
        assert exchange.routing.route is not None
        return cls(
            exchange.request.kind,
            exchange.request.billable_input,
            exchange.request.body_bytes // BYTES_PER_TOKEN
            if exchange.request.input_estimate is None
            else exchange.request.input_estimate,
            exchange.request.method,
            exchange.routing.route.endpoint,
            exchange.request.body_bytes,
        )  # fmt: skip

    @property
    def counting(self) -> Counting:
        """Whose usage the response reports."""
        return counting_of(self.method, self.endpoint)

    @property
    def generates(self) -> bool:
        """True if the response is a generated result: an error in it is an error of this call."""
        return generates(self.method, self.endpoint)

    @property
    def makes_objects(self) -> bool:
        """True if the object in the response can be read again later, by its id."""
        return self.method != "POST" or makes_objects(self.endpoint)

    @property
    def named_id(self) -> str:
        """The id at the end of a GET's path; empty for other methods."""
        parts = self.endpoint.rstrip("/").removesuffix("/results").rsplit("/", 1)
        return parts[-1] if self.method == "GET" else ""
