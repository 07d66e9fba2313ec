"""The output of the log: a reader that stops or exits loses lines, and the log counts them.

No call waits or fails because of its log line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from relay.log_output import MAX_WAITING_BYTES, DescriptorOutput, Losses
from tests.processes import ROOT, STARTED
from tests.relays import HANG_GUARD_S, LogStream, write_config
from tests.template import Command, popen

PIPE_BYTES = 64 * 1024
LONG = {"X-Request-Id": "r" * 3000, "cf-aig-event-id": "e" * 3000, "cf-aig-metadata": json.dumps({f"{n}{'n' * 900}": "v" * 900 for n in range(5)})}
"""Headers that make the log line of a call long."""


class Unread:
    """A relay whose standard output and error share a pipe that is read only on request."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.reader, writer = os.pipe()
        env = {k: v for k, v in os.environ.items() if not k.startswith(("CLOUDFLARE_", "RELAY_"))} | {"PYTHONPATH": str(ROOT)}
        self.process = popen(Command(arguments, folder, env), writer, writer)
        os.close(writer)
        self.text = b""

    async def until(self, pattern: bytes) -> re.Match[bytes]:
        """Read until the pattern matches."""
        async with asyncio.timeout(HANG_GUARD_S):
            while (found := re.search(pattern, self.text)) is None:
                if not await asyncio.to_thread(self._read):
                    raise AssertionError(self.text[-2000:].decode())
        return found

    async def rest(self) -> bytes:
        """Read to the end. Returns everything that was read."""
        async with asyncio.timeout(HANG_GUARD_S):
            while await asyncio.to_thread(self._read):
                pass
        return self.text

    def _read(self) -> bytes:
        data = os.read(self.reader, 1 << 20) if select.select([self.reader], [], [], HANG_GUARD_S)[0] else b""
        self.text += data
        return data

    async def ended(self) -> int:
        """Wait for the exit code."""
        return await asyncio.to_thread(self.process.wait, HANG_GUARD_S)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines of the log that were read so far."""
        LogStream.everything.append(self.text.decode())
        return [json.loads(line) for line in self.text.splitlines() if line.startswith(b"{") and line.endswith(b"}")]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(HANG_GUARD_S)
        with contextlib.suppress(OSError):
            os.close(self.reader)


@pytest.fixture
def unread(tmp_path: Path) -> Iterator[Any]:
    """Start an unread relay: `unread("serve", "--port", "0")`."""
    started: list[Unread] = []

    def begin(*arguments: str) -> Unread:
        started.append(Unread(tmp_path, *arguments))
        return started[-1]

    write_config(tmp_path, {"providers": {}})
    yield begin
    for each in started:
        each.close()


async def _ready(relay: Unread) -> str:
    url = (await relay.until(STARTED.encode())).group(1).decode()
    async with aiohttp.ClientSession() as session, asyncio.timeout(HANG_GUARD_S):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with session.get(f"{url}/readyz") as answer:
                    if answer.status == 200:
                        return url
            await asyncio.sleep(0.02)


async def _calls(url: str, count: int) -> None:
    """Make `count` calls with long log lines; each must get its response."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=HANG_GUARD_S)) as session:
        for _ in range(count):
            async with session.get(f"{url}/api/v1/ai-gateway/providers/nobody/x", headers=LONG) as answer:
                assert answer.status == 404


async def _lost(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/readyz") as answer:
        return int((await answer.json())["log_lines_lost"])


async def test_calls_continue_while_the_log_is_not_read_and_the_log_then_reports_the_lost_lines(unread: Any) -> None:
    relay = unread("serve", "--port", "0")
    url, calls = await _ready(relay), 0
    async with asyncio.timeout(HANG_GUARD_S * 2):
        while not await _lost(url):
            await _calls(url, 100)
            calls += 100
    await relay.until(rb"log.lines_lost")
    await _calls(url, 1)
    relay.process.send_signal(signal.SIGTERM)
    await relay.rest()
    assert await relay.ended() == 0
    notices = [line for line in relay.lines if line["event"] == "log.lines_lost"]
    written = [line for line in relay.lines if line["event"] == "exchange"]
    assert len(written) + sum(line["lines"] for line in notices) == calls + 1
    assert all(line["level"] == "warning" for line in notices)
    assert relay.lines[-1]["event"] == "drain.ended", "the last line is written"


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_sigterm_stops_a_relay_whose_log_is_not_read(unread: Any, workers: str) -> None:
    relay = unread("serve", "--port", "0", "--workers", workers)
    url = await _ready(relay)
    await _calls(url, 3 * PIPE_BYTES // 1000)
    relay.process.send_signal(signal.SIGTERM)
    assert await relay.ended() == 0


async def test_a_log_reader_that_exits_loses_lines_and_fails_no_call(unread: Any) -> None:
    relay = unread("serve", "--port", "0")
    url = await _ready(relay)
    os.close(relay.reader)
    await _calls(url, 3)
    async with asyncio.timeout(HANG_GUARD_S):
        while await _lost(url) < 3:
            await asyncio.sleep(0.02)
    relay.process.send_signal(signal.SIGTERM)
    assert await relay.ended() == 0


async def test_output_of_python_itself_to_standard_error_does_not_block_and_shows_no_secret(tmp_path: Path) -> None:
    script = """
import asyncio, logging, sys, warnings
from relay.core.redaction import Secrets
from relay import log
log.setup("info", "json")
secrets = Secrets(frozenset({"CANARY-secret-of-the-relay"}))
log.protect(secrets)
for n in range(200):
    logging.getLogger("some.library").error("%d CANARY-secret-of-the-relay %s", n, "x" * 2000)
    warnings.warn("careful", stacklevel=1)
    print("y" * 2000, file=sys.stderr)
print("went on", flush=True)
raise ValueError("the last line, CANARY-secret-of-the-relay")
"""
    (output, output_writer), (reader, writer) = os.pipe(), os.pipe()
    process = popen(Command(("-c", script), tmp_path, os.environ | {"PYTHONPATH": str(ROOT)}), output_writer, writer)
    os.close(output_writer)
    os.close(writer)
    with open(output, "rb") as said:
        assert await asyncio.wait_for(asyncio.to_thread(said.readline), HANG_GUARD_S) == b"went on\n"
    text = b""
    while data := await asyncio.to_thread(os.read, reader, 1 << 20):
        text += data
    os.close(reader)
    assert process.wait(HANG_GUARD_S) == 1
    assert b"199 [redacted] xx" in text and b"UserWarning: careful" in text
    assert text.endswith(b"ValueError: the last line, [redacted]\n") and b"CANARY" not in text


def test_a_non_blocking_descriptor_loses_no_line() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    losses = Losses()
    output = DescriptorOutput(writer, losses, lambda lost: b"lost %d\n" % lost)
    line = b"x" * 999 + b"\n"
    for _ in range(1000):
        output.write(line, 1)
    text = b""
    while len(text) < 1000 * len(line):
        text += os.read(reader, 1 << 20)
    output.flush(HANG_GUARD_S)
    assert text == line * 1000 and losses.lines == 0
    os.close(reader)
    os.close(writer)


def test_the_notice_of_lost_lines_is_written_where_they_are_missing() -> None:
    reader, writer = os.pipe()
    losses = Losses()
    output = DescriptorOutput(writer, losses, lambda lost: b"lost %d\n" % lost)
    large = b"x" * (MAX_WAITING_BYTES // 2 - 1) + b"\n"
    for data in (large, large, b"too much\n", b"too much\n"):
        output.write(data, 1)
    text = b""
    while not text.endswith(b"lost 2\n"):
        text += os.read(reader, 1 << 20)
    assert text == large + large + b"lost 2\n" and losses.lines == 2
    output.write(b"more\n", 1)
    assert os.read(reader, 100) == b"more\n"
    os.close(reader)
    os.close(writer)


def test_a_forked_process_writes_its_lines() -> None:
    reader, writer = os.pipe()
    output = DescriptorOutput(writer, Losses(), lambda lost: b"")
    output.write(b"parent\n", 1)
    output.flush(HANG_GUARD_S)
    assert threading.active_count() > 1
    child = os.fork()
    if not child:
        output.write(b"child\n", 1)
        output.flush(HANG_GUARD_S)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reader, 100) == b"parent\nchild\n"
    os.close(reader)
    os.close(writer)


def test_a_host_that_configured_no_log_is_not_blocked_by_its_standard_output(tmp_path: Path) -> None:
    write_config(tmp_path, {"providers": {}})
    script = """
import asyncio, sys
from relay.client import AIGateway
from relay.core.redaction import Redactor

async def main():
    async with AIGateway.from_config("gateway.yaml") as gateway:
        for _ in range(300):
            try:
                await gateway.request(provider="nobody", endpoint="x", method="GET", headers={"X-Request-Id": "r" * 1000})
            except Exception as error:
                assert getattr(error, "code", "") == "unknown_provider", error
    print("went on", file=sys.stderr)

asyncio.run(main())
"""
    reader, writer = os.pipe()
    with (tmp_path / "errors").open("wb") as errors:
        process = popen(Command(("-c", script), tmp_path, os.environ | {"PYTHONPATH": str(ROOT)}), writer, errors.fileno())
    os.close(writer)
    code, complaints = process.wait(HANG_GUARD_S), (tmp_path / "errors").read_bytes()
    os.close(reader)
    assert complaints.endswith(b"went on\n") and code == 0, complaints
