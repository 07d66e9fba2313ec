"""`relay worker`: run one of several workers; only the supervisor starts it.

Owns the worker's command line and its start from the files that the supervisor sends. A worker
reads no configuration file itself: after a refused reload the files on disk may be invalid, and all
workers must have the same ones.
"""

from __future__ import annotations

import argparse
import json
import socket
from functools import partial
from pathlib import Path

import uvloop

from relay import log
from relay.registry.certificates import CertificateFiles
from relay.registry.files import Files
from relay.registry.load import Sources, load
from relay.server.control import Control, Ready
from relay.server.listen import Listeners, raise_file_limit
from relay.server.worker import Supervision, serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that server/supervisor.py passes."""
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--demo-url", default="")
    parser.add_argument("--tls-fd", type=int)
    parser.add_argument("--admin-fd", type=int)
    parser.add_argument("--tls-certificate")
    parser.add_argument("--tls-key")
    parser.add_argument("--overrides", type=json.loads, default=[])


def run(options: argparse.Namespace) -> int:
    """Serve until the supervisor ends; 0."""
    raise_file_limit()
    descriptors = (options.listen_fd, options.tls_fd, options.admin_fd)
    plain, tls, admin = (None if fd is None else socket.socket(fileno=fd) for fd in descriptors)
    assert plain is not None
    listeners = Listeners(plain, tls, admin)
    uvloop.run(_run(_sources(options), listeners, options.control_fd))
    return 0


def _sources(options: argparse.Namespace) -> Sources:
    """The names of the files, whose contents come from the supervisor."""
    certificate = None
    if options.tls_certificate:
        certificate = CertificateFiles(Path(options.tls_certificate), Path(options.tls_key))
    overrides = tuple((section, key, value) for section, key, value in options.overrides)
    env_file = Path(options.env_file)
    return Sources(Path(options.config), env_file, options.demo_url, certificate, overrides)


async def _run(sources: Sources, listeners: Listeners, control_fd: int) -> None:
    control = await Control.open(control_fd)
    begin = await control.begin()
    if begin is None:
        return  # the supervisor has ended
    config = load(sources, Files(begin.files))
    log.setup(config.settings.log.level, config.settings.log.format)
    ready = partial(control.report, Ready())
    await serve(config, sources, listeners, ready, Supervision(control, begin.reloaded))
