"""Change an answer on its way down: URLs of a provider's own hosts come back as the relay's, the
event that tells the usage which the relay asked for is removed, and an error that quotes a key of
the relay's comes without it.

Owns: which answers are read for that, and how far. The text work is that of core/rewriting.py,
core/injection.py and core/redaction.py. Any other answer passes none of this.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from aiohttp import ClientResponse
from multidict import CIMultiDict

from relay.calls.attempt import SSE, RestAttempt, is_stream
from relay.core.exchange import Exchange
from relay.core.injection import UsageEventRemover, without_usage_event
from relay.core.meters.unpack import coding_of
from relay.core.provider import Keys
from relay.core.redaction import Redactor, redactor_of
from relay.core.rewriting import CHANGED_WITH_BODY, EventChanger, Rewriter

_TEXTS = ("application/json", SSE)
_UNTRUE_OF_CHANGED = {"content-length", *(name.lower() for name in CHANGED_WITH_BODY)}
REWRITE_BYTES = 1024 * 1024
"""A JSON answer, or an SSE event, larger than this passes as it is."""


@dataclass(frozen=True, slots=True)
class Transform:
    """What changes one response on its way down. Made by `plan_transform`."""

    rewriter: Rewriter | None
    """Makes the URLs in the body's fields the relay's."""
    redactor: Redactor | None
    """Takes keys out of an error."""
    removes_usage: bool
    """The event with the usage, for which its client did not ask, is removed."""
    is_events: bool
    is_coded: bool

    @property
    def bytes_first(self) -> int:
        """How much is read before the head goes down: all JSON that is rewritten, if it is not too
        large.
        """
        return 0 if self.rewriter is None or self.is_events else REWRITE_BYTES + 1

    @property
    def leaves_out_stream(self) -> bool:
        """True for an error that may quote a key, is compressed, and is not here as a whole."""
        return self.redactor is not None and self.is_coded

    def true_headers(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Without those that events which are changed as they come make untrue."""
        if self.removes_usage or (self.rewriter is not None and self.is_events):
            return [pair for pair in pairs if pair[0].lower() not in _UNTRUE_OF_CHANGED]
        return pairs

    def change_whole(self, body: bytes, headers: CIMultiDict[str]) -> bytes:
        """A whole body as it goes down; `headers` are made true to it."""
        if self.removes_usage:
            body = without_usage_event(body)
        if self.rewriter is not None and len(body) <= REWRITE_BYTES:
            ours = self.rewriter.body(body)
            if ours != body:
                body = ours
                _changed(headers, body)
        return body if self.redactor is None else _redact_whole(body, headers, self.redactor)

    def stream(self, read: Callable[[], Awaitable[bytes]], exchange: Exchange) -> Changing | None:
        """What changes a stream; None where its chunks pass as they come."""
        made: Changing | None = None
        if self.removes_usage:
            made = _UsageRemoved(read, exchange)
        elif self.redactor is not None:
            made = _Redacted(read, self.redactor)
        if self.rewriter is None or not self.is_events:
            return made
        return _Rewritten(read, made, self.rewriter.body)


def plan_transform(upstream: ClientResponse, attempt: RestAttempt) -> Transform | None:
    """Work out what is changed in a response; None where its body passes as it came, as that of
    most does.
    """
    rewriter, redactor = attempt.rewriter, None
    if upstream.status >= 400:
        redactor = redactor_of(attempt.exchange.routing.keys)
    elif rewriter is None and not attempt.asks_usage:
        return None
    if rewriter is not None and not _is_rewritten(upstream, rewriter):
        rewriter = None
    is_coded = coding_of(upstream.headers.get("Content-Encoding")) != ""
    removes_usage = attempt.asks_usage and not is_coded and is_stream(upstream)
    if rewriter is None and redactor is None and not removes_usage:
        return None
    is_events = upstream.content_type == SSE
    return Transform(rewriter, redactor, removes_usage, is_events, is_coded)


def _is_rewritten(upstream: ClientResponse, rewriter: Rewriter) -> bool:
    """True for a response whose listed fields hold URLs that must be the relay's."""
    if rewriter.fields is None or "Content-Encoding" in upstream.headers:
        return False
    return upstream.content_type in _TEXTS and upstream.status != 206


def redacted_pairs(pairs: list[tuple[str, str]], keys: Keys) -> list[tuple[str, str]]:
    """Headers without the relay's credentials: a Location, say, repeats one of the query."""
    redactor = redactor_of(keys)
    if redactor is None:
        return pairs
    return [(name, redactor.redact_text(value)) for name, value in pairs]


def redacted_text(text: str, keys: Keys) -> str:
    """A reason phrase, or the reason of a close frame, without the relay's credentials."""
    redactor = redactor_of(keys)
    return text if redactor is None else redactor.redact_text(text)


def redact_whole(body: bytes, headers: CIMultiDict[str], keys: Keys) -> bytes:
    """An error's whole body without the relay's credentials; `headers` are made true to it."""
    redactor = redactor_of(keys)
    return body if redactor is None else _redact_whole(body, headers, redactor)


def _redact_whole(body: bytes, headers: CIMultiDict[str], redactor: Redactor) -> bytes:
    if not body:
        return body
    ours, coded = redactor.redact_coded(body, headers.get("Content-Encoding", ""))
    if ours != body:
        _changed(headers, ours)
        if not coded:
            headers.popall("Content-Encoding", None)
    return ours


def leave_out(headers: CIMultiDict[str]) -> bytes:
    """An empty body; `headers` are made true to it."""
    headers.popall("Content-Encoding", None)
    _changed(headers, b"")
    return b""


def _changed(headers: CIMultiDict[str], body: bytes) -> None:
    headers["Content-Length"] = str(len(body))
    for name in CHANGED_WITH_BODY:
        headers.popall(name, None)


class Changing(Protocol):
    """A stream that is changed on its way."""

    __slots__ = ()

    def begin(self, begun: bytes) -> bytes:
        """What goes down of what an attempt has read already."""

    async def next(self) -> bytes:
        """The next chunk that goes down; empty at the end."""

    def rest(self, left: bytes) -> bytes:
        """What goes down when reading has failed: what is held, and what was `left` unread."""

    def close(self) -> None:
        """Nothing more is read."""
        return


class _UsageRemoved(Changing):
    """A stream without the event that tells the usage for which its client did not ask. The meter
    sees it as it came, each chunk once it has gone down.
    """

    __slots__ = ("_look", "_passes", "_past", "_read", "_remover", "_show", "_unseen")

    def __init__(self, read: Callable[[], Awaitable[bytes]], exchange: Exchange) -> None:
        self._read, self._remover = read, UsageEventRemover()
        self._passes = self._remover.passes
        observer = exchange.response.meter_observer
        self._look = self._show = observer.see if observer is not None else _overlook
        self._past = observer.see_past if observer is not None else _overlook
        exchange.response.meter_observer = None
        self._unseen = b""

    def begin(self, begun: bytes) -> bytes:
        """See Changing."""
        self._unseen, self._show = begun, self._look
        return self._remover.feed(begun)

    async def next(self) -> bytes:
        """See Changing."""
        if self._unseen:
            self._show(self._unseen)
        self._unseen = b""
        while chunk := await self._read():
            if self._passes(chunk):
                self._unseen, self._show = chunk, self._past
                return chunk
            if passed := self._remover.feed(chunk):
                self._unseen, self._show = chunk, self._look
                return passed
            self._look(chunk)
        return self._remover.rest()

    def rest(self, left: bytes) -> bytes:
        """See Changing."""
        self._unseen, self._show = self._unseen + left, self._look
        return self._remover.feed(left) + self._remover.rest()

    def close(self) -> None:
        """See Changing."""
        if self._unseen:
            self._look(self._unseen)
        self._unseen = b""


def _overlook(_chunk: bytes) -> None:
    pass


class _Redacted(Changing):
    """An error's body, in which each byte of a key is an asterisk: its length stays. As much is
    held as may be the beginning of a key.
    """

    __slots__ = ("_held", "_held_back_bytes", "_mask", "_read")

    def __init__(self, read: Callable[[], Awaitable[bytes]], redactor: Redactor) -> None:
        self._read, self._mask = read, redactor.mask
        self._held_back_bytes = max(0, redactor.longest - 1)
        self._held = b""

    def begin(self, begun: bytes) -> bytes:
        """See Changing."""
        self._held = self._mask(begun)
        return self._pass()

    async def next(self) -> bytes:
        """See Changing."""
        while True:
            if passed := self._pass():
                return passed
            if not (chunk := await self._read()):
                return self.rest(b"")
            self._held = self._mask(self._held + chunk)

    def _pass(self) -> bytes:
        end = len(self._held) - self._held_back_bytes
        if end <= 0:
            return b""
        passed, self._held = self._held[:end], self._held[end:]
        return passed

    def rest(self, left: bytes) -> bytes:
        """See Changing."""
        rest, self._held = self._mask(self._held + left), b""
        return rest


class _Rewritten(Changing):
    """SSE of whole events, changed. An event of more than REWRITE_BYTES is not."""

    __slots__ = ("_changer", "_inner", "_read")

    def __init__(
        self,
        read: Callable[[], Awaitable[bytes]],
        inner: Changing | None,
        change: Callable[[bytes], bytes],
    ) -> None:
        self._read = read if inner is None else inner.next
        self._inner, self._changer = inner, EventChanger(change, REWRITE_BYTES)

    def begin(self, begun: bytes) -> bytes:
        """See Changing."""
        return self._changer.feed(begun if self._inner is None else self._inner.begin(begun))

    async def next(self) -> bytes:
        """The next whole events; at the end what is left; empty after it."""
        while chunk := await self._read():
            if changed := self._changer.feed(chunk):
                return changed
        return self._changer.rest()

    def rest(self, left: bytes) -> bytes:
        """See Changing."""
        left = left if self._inner is None else self._inner.rest(left)
        return self._changer.feed(left) + self._changer.rest()

    def close(self) -> None:
        """See Changing."""
        if self._inner is not None:
            self._inner.close()
