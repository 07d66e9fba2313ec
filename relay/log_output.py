"""Write log lines to a descriptor that may block, or to a stream in memory.

Owns the guarantee that a line never blocks the event loop. A write blocks where the reader of a
pipe has stopped or a terminal is paused. So one thread writes to the descriptor, and lines wait for
it in a queue that is bounded in bytes; lines beyond the bound are dropped and counted.

The descriptor is not made non-blocking: that flag belongs to the open file, which the relay shares
with its shell, its supervisor and its workers.
"""

from __future__ import annotations

import io
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TextIO

MAX_WAITING_BYTES = 4 * 1024 * 1024
"""The bound of the queue for a slow or stopped reader."""
_WRITE_BYTES = 256 * 1024
"""Lines are joined to writes of about this size: after each the thread waits for Python's GIL."""
_RETRY_MS = 1000
_MAX_TEXT_CHARS = 64 * 1024


class Losses:
    """Counts the lines that were never written, since the start."""

    def __init__(self) -> None:
        self.lines = 0
        self._lock = threading.Lock()

    def add(self, lines: int) -> None:
        """Count lost lines. Any thread may call this."""
        with self._lock:
            self.lines += lines


class StreamOutput:
    """Writes at once to a stream without a descriptor, which cannot block."""

    def __init__(self, stream: TextIO, losses: Losses) -> None:
        self._stream, self._losses = stream, losses

    def write(self, data: bytes, lines: int) -> None:
        """Write `data`, which has `lines` whole lines. Never raises."""
        try:
            buffer = getattr(self._stream, "buffer", None)
            if buffer is not None:
                buffer.write(data)
            else:
                self._stream.write(data.decode())
            self._stream.flush()
        except (OSError, ValueError):  # a closed stream must not end a call; counted
            self._losses.add(lines)

    def flush(self, timeout_s: float) -> None:
        """Do nothing: no line waits."""


class _Batch(NamedTuple):
    data: bytes
    lines: int
    reported_lost: int = 0
    """How many lost lines this batch reports."""


class DescriptorOutput:
    """Writes to a descriptor from a thread of its own.

    `notice` renders the line that reports lost lines; it is written as soon as the descriptor takes
    lines again.
    """

    def __init__(self, descriptor: int, losses: Losses, notice: Callable[[int], bytes]) -> None:
        self._descriptor, self._losses, self._notice = descriptor, losses, notice
        self._reset()
        # A forked process lacks the thread, and its copy of the lock may stay locked for ever.
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._batches: deque[_Batch] = deque()
        self._waiting_bytes = 0
        self._unreported = 0
        self._thread: threading.Thread | None = None

    def write(self, data: bytes, lines: int) -> None:
        """Queue `data`, which has `lines` whole lines. Never raises."""
        with self._changed:
            if self._waiting_bytes + len(data) > MAX_WAITING_BYTES:
                self._lose(lines)
                return
            self._report_lost()
            self._add(_Batch(data, lines))
            if self._thread is None:
                # A daemon: a descriptor that blocks for ever must not keep the process alive.
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> None:
        """Wait until the queue is written, at most `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting_bytes, timeout_s)

    def _add(self, batch: _Batch) -> None:
        self._batches.append(batch)
        self._waiting_bytes += len(batch.data)

    def _lose(self, lines: int) -> None:
        self._unreported += lines
        self._losses.add(lines)

    def _report_lost(self) -> None:
        """Queue the notice where the lost lines would be."""
        if self._unreported:
            reported_lost, self._unreported = self._unreported, 0
            self._add(_Batch(self._notice(reported_lost), 0, reported_lost))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._batches)
                taken = self._take()
            written = self._write_all(b"".join([batch.data for batch in taken]))
            with self._changed:
                self._waiting_bytes -= sum([len(batch.data) for batch in taken])
                if not written:
                    self._lose(sum([batch.lines for batch in taken]))
                    # A lost notice is not a lost line, but its number must be reported again.
                    self._unreported += sum([batch.reported_lost for batch in taken])
                elif not self._batches:
                    self._report_lost()
                self._changed.notify_all()

    def _take(self) -> list[_Batch]:
        taken, taken_bytes = [], 0
        while self._batches and taken_bytes < _WRITE_BYTES:
            batch = self._batches.popleft()
            taken.append(batch)
            taken_bytes += len(batch.data)
        return taken

    def _write_all(self, data: bytes) -> bool:
        """False if the descriptor fails: a full disk, a pipe without a reader."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process made the open file non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll(_RETRY_MS)
            except OSError:
                return False
        return True


Output = StreamOutput | DescriptorOutput


def output_of(stream: TextIO, losses: Losses, notice: Callable[[int], bytes]) -> Output:
    """An output that writes to the same place as `stream`, whose buffer is flushed first."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return StreamOutput(stream, losses)
    stream.flush()
    return DescriptorOutput(descriptor, losses, notice)


class TextOutput(io.TextIOBase):
    """`sys.stderr` of a serving relay: text of Python itself, of loggers and of `print` goes to an
    Output, so that it never blocks either. `redact` removes secrets from the text.
    """

    encoding = "utf-8"

    def __init__(self, output: Output, stream: TextIO, redact: Callable[[str], str]) -> None:
        self._output, self._stream, self._redact = output, stream, redact
        self._partial_line = ""
        """A line without its end: log lines must not be written into the middle of it."""

    def write(self, text: str) -> int:
        """Queue the whole lines of `text`."""
        whole, end, self._partial_line = (self._partial_line + text).rpartition("\n")
        self._forward(whole + end)
        if len(self._partial_line) > _MAX_TEXT_CHARS:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Queue a line without its end too."""
        partial_line, self._partial_line = self._partial_line, ""
        self._forward(partial_line)

    def _forward(self, text: str) -> None:
        if text:
            data = self._redact(text[:_MAX_TEXT_CHARS]).encode("utf-8", "backslashreplace")
            self._output.write(data, data.count(b"\n"))

    def fileno(self) -> int:
        """The descriptor of the stream that this one replaces."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """True if the stream that this one replaces is a terminal."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """True."""
        return True
