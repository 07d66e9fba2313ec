"""Where log lines go: a descriptor that may block, or a stream in memory.

Owns: that writing a line never blocks the event loop. A pipe whose reader stopped, or a terminal
that was paused, blocks whoever writes to it. One thread writes to the descriptor; lines wait for
it up to a bound in bytes. Lines beyond the bound are dropped and counted.

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
"""What waits for a reader that is slow or stopped."""
_WRITE_BYTES = 256 * 1024
"""Joined into one write: each write has to wait for Python's lock afterwards."""
_RETRY_MS = 1000
_MAX_TEXT_CHARS = 64 * 1024


class Losses:
    """Lines that were never written, counted since the start."""

    def __init__(self) -> None:
        self.lines = 0
        self._lock = threading.Lock()

    def add(self, lines: int) -> None:
        """Count some more. Any thread may call this."""
        with self._lock:
            self.lines += lines


class StreamOutput:
    """Writes at once to a stream that cannot block: one without a descriptor."""

    def __init__(self, stream: TextIO, losses: Losses) -> None:
        self._stream, self._losses = stream, losses

    def write(self, data: bytes, lines: int) -> None:
        """Write `data`, which is so many whole lines. Never raises."""
        try:
            buffer = getattr(self._stream, "buffer", None)
            if buffer is not None:
                buffer.write(data)
            else:
                self._stream.write(data.decode())
            self._stream.flush()
        except (OSError, ValueError):  # a full disk or a closed stream must not end a call; counted
            self._losses.add(lines)

    def flush(self, timeout_s: float) -> None:
        """Nothing waits."""


class _Batch(NamedTuple):
    data: bytes
    lines: int
    reported_lost: int = 0
    """Lost lines that this batch reports."""


class DescriptorOutput:
    """Writes to a descriptor from a thread of its own. `notice` makes the line that tells how many
    lines were lost; it is written as soon as lines can be written again.
    """

    def __init__(self, descriptor: int, losses: Losses, notice: Callable[[int], bytes]) -> None:
        self._descriptor, self._losses, self._notice = descriptor, losses, notice
        self._reset()
        # A forked process has no copy of the thread, and the lock may be held in it for ever.
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._batches: deque[_Batch] = deque()
        self._waiting_bytes = 0
        self._unreported = 0
        self._thread: threading.Thread | None = None

    def write(self, data: bytes, lines: int) -> None:
        """Write `data`, which is so many whole lines, soon. Never raises."""
        with self._changed:
            if self._waiting_bytes + len(data) > MAX_WAITING_BYTES:
                self._lose(lines)
                return
            self._report_lost()
            self._add(_Batch(data, lines))
            if self._thread is None:
                # A daemon: a descriptor that blocks for ever must not keep the process.
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> None:
        """Wait for so long at most until all is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting_bytes, timeout_s)

    def _add(self, batch: _Batch) -> None:
        self._batches.append(batch)
        self._waiting_bytes += len(batch.data)

    def _lose(self, lines: int) -> None:
        self._unreported += lines
        self._losses.add(lines)

    def _report_lost(self) -> None:
        """Put the notice in the place of the lines that are missing."""
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
                    # The notice itself is no lost line, but what it reported must be reported
                    # again.
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
        """False if the descriptor takes nothing: a full disk, a pipe without a reader."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another process made the open file non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll(_RETRY_MS)
            except OSError:
                return False
        return True


Output = StreamOutput | DescriptorOutput


def output_of(stream: TextIO, losses: Losses, notice: Callable[[int], bytes]) -> Output:
    """An output that writes where `stream` does. What `stream` still holds is written first."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return StreamOutput(stream, losses)
    stream.flush()
    return DescriptorOutput(descriptor, losses, notice)


class TextOutput(io.TextIOBase):
    """`sys.stderr` in a relay that serves: what Python itself, a library's logger or `print` write
    there goes to an Output too, and so never blocks. `redact` takes secrets out of each line.
    """

    encoding = "utf-8"

    def __init__(self, output: Output, stream: TextIO, redact: Callable[[str], str]) -> None:
        self._output, self._stream, self._redact = output, stream, redact
        self._partial_line = ""
        """The beginning of a line: a line of the log must not land in its middle."""

    def write(self, text: str) -> int:
        """Take some text."""
        whole, end, self._partial_line = (self._partial_line + text).rpartition("\n")
        self._forward(whole + end)
        if len(self._partial_line) > _MAX_TEXT_CHARS:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Pass on the beginning of a line too."""
        partial_line, self._partial_line = self._partial_line, ""
        self._forward(partial_line)

    def _forward(self, text: str) -> None:
        if text:
            data = self._redact(text[:_MAX_TEXT_CHARS]).encode("utf-8", "backslashreplace")
            self._output.write(data, data.count(b"\n"))

    def fileno(self) -> int:
        """Of the stream that this one stands for."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Of the stream that this one stands for."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """Always."""
        return True
