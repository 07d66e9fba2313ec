"""Change a response before it is sent downstream: replace a provider's URLs with the relay's,
remove a usage event that only the relay asked for, and redact the relay's keys in errors.

Owns which responses are changed, and how much of a response is read for that. core/rewriting.py,
core/injection.py and core/redaction.py change the text. Other responses run none of this code.
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
_INVALID_AFTER_CHANGE = {"content-length", *(name.lower() for name in CHANGED_WITH_BODY)}
REWRITE_BYTES = 1024 * 1024
"""A JSON response, or an SSE event, larger than this is not changed."""


@dataclass(frozen=True, slots=True)
class Transform:
    """The changes to one response. Made by `plan_transform`."""

    rewriter: Rewriter | None
    """Replaces URLs in fields of the body with the relay's."""
    redactor: Redactor | None
    """Removes keys from an error."""
    removes_usage: bool
    """True to remove the usage event, for which the client did not ask."""
    is_events: bool
    is_coded: bool

    @property
    def bytes_first(self) -> int:
        """How many bytes are read before the head is sent: a JSON body that is rewritten is read
        whole, if it is not too large.
        """
        return 0 if self.rewriter is None or self.is_events else REWRITE_BYTES + 1

    @property
    def leaves_out_stream(self) -> bool:
        """True if the body is dropped unless it was received whole: an error that may quote a key
        and is compressed.
        """
        return self.redactor is not None and self.is_coded

    def true_headers(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return `pairs` without the headers that are wrong for a stream whose events change."""
        if self.removes_usage or (self.rewriter is not None and self.is_events):
            return [pair for pair in pairs if pair[0].lower() not in _INVALID_AFTER_CHANGE]
        return pairs

    def change_whole(self, body: bytes, headers: CIMultiDict[str]) -> bytes:
        """Return a whole body, changed; `headers` are corrected for the new body."""
        if self.removes_usage:
            body = without_usage_event(body)
        if self.rewriter is not None and len(body) <= REWRITE_BYTES:
            rewritten = self.rewriter.body(body)
            if rewritten != body:
                body = rewritten
                _correct_headers(headers, body)
        return body if self.redactor is None else _redact_whole(body, headers, self.redactor)

    def stream(self, read: Callable[[], Awaitable[bytes]], exchange: Exchange) -> Changing | None:
        """Make the stream of changed chunks; None if the chunks are not changed."""
        made: Changing | None = None
        if self.removes_usage:
            made = _UsageRemoved(read, exchange)
        elif self.redactor is not None:
            made = _Redacted(read, self.redactor)
        if self.rewriter is None or not self.is_events:
            return made
        return _Rewritten(read, made, self.rewriter.body)


def plan_transform(upstream: ClientResponse, attempt: RestAttempt) -> Transform | None:
    """Decide which changes a response gets; None if its body is not changed, as for most."""
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
    """True if URLs in the body of this response are to be replaced with the relay's."""
    if rewriter.fields is None or "Content-Encoding" in upstream.headers:
        return False
    return upstream.content_type in _TEXTS and upstream.status != 206


def redacted_pairs(pairs: list[tuple[str, str]], keys: Keys) -> list[tuple[str, str]]:
    """Redact the relay's credentials in headers: a Location may repeat one from the query."""
    redactor = redactor_of(keys)
    if redactor is None:
        return pairs
    return [(name, redactor.redact_text(value)) for name, value in pairs]


def redacted_text(text: str, keys: Keys) -> str:
    """Redact the relay's credentials in a reason phrase, or in the reason of a close frame."""
    redactor = redactor_of(keys)
    return text if redactor is None else redactor.redact_text(text)


def redact_whole(body: bytes, headers: CIMultiDict[str], keys: Keys) -> bytes:
    """Redact the relay's credentials in an error's whole body; `headers` are corrected for the new
    body.
    """
    redactor = redactor_of(keys)
    return body if redactor is None else _redact_whole(body, headers, redactor)


def _redact_whole(body: bytes, headers: CIMultiDict[str], redactor: Redactor) -> bytes:
    if not body:
        return body
    redacted, is_coded = redactor.redact_coded(body, headers.get("Content-Encoding", ""))
    if redacted != body:
        _correct_headers(headers, redacted)
        if not is_coded:
            headers.popall("Content-Encoding", None)
    return redacted


def leave_out(headers: CIMultiDict[str]) -> bytes:
    """Return an empty body, and correct `headers` for it."""
    headers.popall("Content-Encoding", None)
    _correct_headers(headers, b"")
    return b""


def _correct_headers(headers: CIMultiDict[str], body: bytes) -> None:
    headers["Content-Length"] = str(len(body))
    for name in CHANGED_WITH_BODY:
        headers.popall(name, None)


class Changing(Protocol):
    """A stream whose chunks are changed before they are sent downstream."""

    __slots__ = ()

    def begin(self, start: bytes) -> bytes:
        """Return what is sent of `start`, the bytes that an attempt has read already."""

    async def next(self) -> bytes:
        """Return the next changed chunk; empty at the end."""

    def rest(self, left: bytes) -> bytes:
        """Return what is sent after a read has failed: the bytes held back, and `left`, the bytes
        that were received and not read.
        """

    def close(self) -> None:
        """End the stream: nothing more is read."""
        return


class _UsageRemoved(Changing):
    """A stream without the usage event, for which its client did not ask. The meter sees each chunk
    as the provider sent it, after the chunk was sent downstream.
    """

    __slots__ = ("_meter", "_meter_next", "_meter_past", "_passes", "_read", "_remover", "_unseen")

    def __init__(self, read: Callable[[], Awaitable[bytes]], exchange: Exchange) -> None:
        self._read, self._remover = read, UsageEventRemover()
        self._passes = self._remover.passes
        observer = exchange.response.meter_observer
        self._meter = self._meter_next = observer.see if observer is not None else _ignore
        self._meter_past = observer.see_past if observer is not None else _ignore
        exchange.response.meter_observer = None
        self._unseen = b""

    def begin(self, start: bytes) -> bytes:
        """See Changing."""
        self._unseen, self._meter_next = start, self._meter
        return self._remover.feed(start)

    async def next(self) -> bytes:
        """See Changing."""
        if self._unseen:
            self._meter_next(self._unseen)
        self._unseen = b""
        while chunk := await self._read():
            if self._passes(chunk):
                self._unseen, self._meter_next = chunk, self._meter_past
                return chunk
            if passed := self._remover.feed(chunk):
                self._unseen, self._meter_next = chunk, self._meter
                return passed
            self._meter(chunk)
        return self._remover.rest()

    def rest(self, left: bytes) -> bytes:
        """See Changing."""
        self._unseen, self._meter_next = self._unseen + left, self._meter
        return self._remover.feed(left) + self._remover.rest()

    def close(self) -> None:
        """See Changing."""
        if self._unseen:
            self._meter(self._unseen)
        self._unseen = b""


def _ignore(_chunk: bytes) -> None:
    pass


class _Redacted(Changing):
    """An error's body in which asterisks replace the bytes of a key: its length stays. Bytes
    that may be the beginning of a key are held back.
    """

    __slots__ = ("_held", "_held_back_bytes", "_mask", "_read")

    def __init__(self, read: Callable[[], Awaitable[bytes]], redactor: Redactor) -> None:
        self._read, self._mask = read, redactor.mask
        self._held_back_bytes = max(0, redactor.longest - 1)
        self._held = b""

    def begin(self, start: bytes) -> bytes:
        """See Changing."""
        self._held = self._mask(start)
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
    """SSE whose events are changed, each as a whole; one of more than REWRITE_BYTES is not."""

    __slots__ = ("_changer", "_inner", "_read")

    def __init__(
        self,
        read: Callable[[], Awaitable[bytes]],
        inner: Changing | None,
        change: Callable[[bytes], bytes],
    ) -> None:
        self._read = read if inner is None else inner.next
        self._inner, self._changer = inner, EventChanger(change, REWRITE_BYTES)

    def begin(self, start: bytes) -> bytes:
        """See Changing."""
        return self._changer.feed(start if self._inner is None else self._inner.begin(start))

    async def next(self) -> bytes:
        """Return the next whole events, at the end the rest, then nothing."""
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
