"""What a call sent, as far as readers of its answer look at it."""

from __future__ import annotations

import msgspec

from relay.core.exchange import Exchange
from relay.core.formats import Counting, counting_of, makes_objects
from relay.core.peek import generates
from relay.core.usage import BYTES_PER_TOKEN


class SentCall(msgspec.Struct, frozen=True):
    """See the module."""

    kind: str
    """`chat`, `speech`, … (core/peek.py)."""
    body: bytes = b""
    """The request's, where it tells what is paid for: text made speech, images asked for."""
    input_tokens: int = 0
    """As estimated from the request."""
    method: str = "POST"
    endpoint: str = ""

    @classmethod
    def of(cls, exchange: Exchange) -> SentCall:
        """What an exchange sent."""
        assert exchange.routing.route is not None
        return cls(
            exchange.request.kind,
            exchange.request.billable_input,
            exchange.request.body_bytes // BYTES_PER_TOKEN
            if exchange.request.input_estimate is None
            else exchange.request.input_estimate,
            exchange.request.method,
            exchange.routing.route.endpoint,
        )  # fmt: skip

    @property
    def counting(self) -> Counting:
        """Whether its answer tells new usage."""
        return counting_of(self.method, self.endpoint)

    @property
    def generates(self) -> bool:
        """True if its answer is what was asked for: an error in it is an error of this call."""
        return generates(self.method, self.endpoint)

    @property
    def makes_objects(self) -> bool:
        """True if what its answer tells can be read again later, by an id."""
        return self.method != "POST" or makes_objects(self.endpoint)

    @property
    def named_id(self) -> str:
        """The id at the end of the path, of a read."""
        parts = self.endpoint.rstrip("/").removesuffix("/results").rsplit("/", 1)
        return parts[-1] if self.method == "GET" else ""
