"""`relay serve`: run the relay in this process, or in several workers under a supervisor.

Owns the options of the command, which win over gateway.yaml, the order of the start, and how the
start is announced. Serving itself is in server/.

A supervisor serves no call. It does not import the modules that do, nor, without a database, those
of the database: this saves 40 % of its start and 25 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvloop

from relay import log
from relay.cli.banner import Started
from relay.cli.options import whole
from relay.cli.sources import sources_of
from relay.demo.provider import Demo
from relay.internals import check_private_parts, require_c_parser
from relay.ledger.metrics_multiprocess import remove_dead_folders
from relay.registry.files import Files
from relay.registry.load import Config, Sources, load
from relay.server.listen import (
    CannotListen,
    Listeners,
    listen,
    raise_file_limit,
    require_loopback,
)
from relay.server.supervisor import Supervisor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--host", help="address to listen on, instead of server.host")
    port, workers = whole(0, 65535), whole(1, 64)
    parser.add_argument("--port", type=port, help="port to listen on, instead of server.port")
    parser.add_argument("--workers", type=workers, help="processes, instead of server.workers")
    parser.add_argument(
        "--open",
        action="store_true",
        help="allow an address beyond loopback, although calls need no key",
    )
    parser.add_argument("--tls-port", type=port, help="port for TLS, instead of tls.port")
    parser.add_argument(
        "--tls-self-signed",
        action="store_true",
        help="serve TLS too, with a certificate generated for this machine",
    )


def run(options: argparse.Namespace) -> int:
    """Serve until a signal ends the process; 0. Raises OperatorError if the relay cannot start."""
    check_private_parts()
    require_c_parser()
    sources = replace(sources_of(options), overrides=_overrides(options))
    sources = _with_certificate(sources, options)
    config = load(sources)
    settings = config.settings
    log.setup(settings.log.level, settings.log.format)
    config.log_warnings()
    raise_file_limit()
    is_allowed_anywhere = options.open or settings.access.mode == "required"
    listeners = listen(config, _allow_any if is_allowed_anywhere else require_loopback)
    demo = Demo.bind() if settings.demo.enabled else None
    if demo is not None:
        sources = replace(sources, demo_url=demo.url)
        config = load(sources, Files(config.read.files))
    uvloop.run(_run(config, sources, listeners, demo))
    return 0


def _announce(started: Started) -> None:
    """Say that the relay serves: to a person by the banner, else by an event of the log."""
    if sys.stdout.isatty() and sys.stderr.isatty() and not log.is_json():
        print(started.banner, file=sys.stderr, flush=True)
    else:
        log.event("relay.started", **started.fields)


def _allow_any(_host: str) -> None:
    """Allow every address: with --open, or where every call needs a key."""


def _with_certificate(sources: Sources, options: argparse.Namespace) -> Sources:
    """`sources` with the certificate in data/tls, generated if needed, for --tls-self-signed."""
    if not options.tls_self_signed:
        return sources
    # Imported where it is used: its import takes a tenth of a second.
    from relay.server.tls import self_signed

    hosts = load(sources).settings.server.hosts
    now = datetime.datetime.now(datetime.UTC)
    try:
        files = self_signed(Path("data/tls"), [host for host in hosts if host != "*"], now)
    except OSError as error:
        raise CannotListen(f"cannot write {error.filename}: {error.strerror}") from error
    return replace(sources, certificate=files)


def _overrides(options: argparse.Namespace) -> tuple[tuple[str, str, object], ...]:
    """Settings of the command line, which win over the file at the start and at each reload."""
    server = [("server", key, getattr(options, key)) for key in ("host", "port", "workers")]
    overrides = [*server, ("tls", "port", options.tls_port)]
    return tuple(override for override in overrides if override[2] is not None)


async def _run(config: Config, sources: Sources, listeners: Listeners, demo: Demo | None) -> None:
    remove_dead_folders()
    is_supervised = config.settings.server.workers > 1
    announce = partial(_announce, Started.at(config, listeners))
    if is_supervised and config.settings.database:
        from relay.storage.database import try_out

        # Refused once here, not again and again by each worker.
        await try_out(config.settings.database)
    async with demo.running() if demo is not None else contextlib.nullcontext():
        if is_supervised:
            await Supervisor(config, sources, listeners, announce).run()
        else:
            from relay.server.worker import serve

            await serve(config, sources, listeners, announce)
