"""The command line: serve, check, reload, explain, doctor, logs, usage, schema, init.

It reads arguments, calls, prints.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

import relay
from relay import log
from relay.cli import reload as reloading
from relay.cli import report, worker
from relay.cli.banner import banner
from relay.cli.doctor import examine
from relay.cli.explain import explain
from relay.core.errors import RelayError
from relay.demo.provider import Demo
from relay.ledger.metrics_folder import remove_dead_folders
from relay.ledger.traces import TracingUnavailable
from relay.registry.files import Files
from relay.registry.load import (
    Config,
    ConfigError,
    Sources,
    find_config,
    json_schema,
    load,
    packaged,
)
from relay.registry.problems import Problem
from relay.server.listen import CannotListen, Listeners, listen, raise_file_limit
from relay.server.supervisor import Supervisor
from relay.server.worker import assert_fast_parser, serve
from relay.storage.database import BadDatabaseUrl, DatabaseNewer, try_out

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

OK, FAILED, BAD_CONFIG, INTERRUPTED = 0, 1, 2, 130
_CANNOT = (
    CannotListen,
    BadDatabaseUrl,
    DatabaseNewer,
    TracingUnavailable,
    report.NoAnswer,
    reloading.NoReload,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed, 2 bad configuration or arguments, 130
    interrupted. A reader of the output that leaves early has what it wanted: that is 0.
    """
    options = _parser().parse_args(arguments)
    try:
        code = int(options.run(options))
        if options.run not in _SERVING:
            sys.stdout.flush()
        return code
    except ConfigError as error:
        for problem in error.problems:
            print(problem.in_full, file=sys.stderr)
        print(f"{len(error.problems)} problem(s); nothing was started.", file=sys.stderr)
        return BAD_CONFIG
    except _CANNOT as error:
        print(f"relay: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        if options.run in _SERVING:
            raise
        # The reader, such as `head`, has enough. Python flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="relay", description="A self-hosted AI gateway relay.")
    parser.add_argument("--version", action="version", version=f"relay {relay.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _serving(_command(commands, "serve", "run the relay", _serve))
    _command(commands, "check", "check gateway.yaml and list the providers", _check)
    reloading.add_arguments(
        _command(commands, "reload", "have the running relay read its files again", _reload)
    )
    explaining = _command(
        commands, "explain", "print what a call would become, without making it", _explain
    )
    explaining.add_argument("method", help="GET, POST, … or WS")
    explaining.add_argument(
        "path", help="path of the relay, such as /api/v1/ai-gateway/providers/openai/models"
    )
    doctor = _command(
        commands, "doctor", "try every configured provider, and say what is wrong", _doctor
    )
    doctor.add_argument("providers", nargs="*", help="only these")
    report.add_arguments(
        _command(commands, "logs", "print the latest calls of the ledger", _logs),
        _command(commands, "usage", "print what was used, and what it cost", _usage),
    )
    _command(commands, "schema", "print the JSON Schema of gateway.yaml", _schema)
    writing = _command(
        commands, "init", "write gateway.yaml, config/providers and .env.example here", _init
    )
    writing.add_argument("folder", nargs="?", default=".", help="where to (default: here)")
    worker.add_arguments(_command(commands, "worker", argparse.SUPPRESS, worker.run))
    return parser


def _serving(serving: argparse.ArgumentParser) -> None:
    serving.add_argument("--host", help="address to listen on, instead of server.host")
    serving.add_argument("--port", type=int, help="port to listen on, instead of server.port")
    serving.add_argument("--workers", type=int, help="processes, instead of server.workers")
    serving.add_argument(
        "--open", action="store_true", help="listen beyond loopback although calls need no key"
    )
    serving.add_argument("--tls-port", type=int, help="port for TLS, instead of tls.port")
    serving.add_argument(
        "--tls-self-signed",
        action="store_true",
        help="serve TLS too, with a certificate made for this machine",
    )


def _command(commands: _Commands, name: str, text: str, run: object) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser
    if text is argparse.SUPPRESS:
        parser = commands.add_parser(name)
    else:
        parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument(
        "--config", help="gateway.yaml to use (default: ./gateway.yaml, else the packaged one)"
    )
    parser.add_argument(
        "--env-file", default=".env", help="file with variables (default: .env, if there is one)"
    )
    parser.set_defaults(run=run)
    return parser


def _sources(options: argparse.Namespace) -> Sources:
    config = find_config(options.config)
    if options.env_file != ".env" and not Path(options.env_file).exists():
        raise ConfigError([Problem(options.env_file, 1, 1, (), "there is no such file")])
    return Sources(config, Path(options.env_file))


def _with_certificate(sources: Sources, options: argparse.Namespace) -> Sources:
    """With --tls-self-signed: the certificate in data/tls, made if need be."""
    if not options.tls_self_signed:
        return sources
    # Imported only where it is used: its certificates take a tenth of a second.
    from relay.server.tls import self_signed

    hosts = load(sources).settings.server.hosts
    now = datetime.datetime.now(datetime.UTC)
    try:
        made = self_signed(Path("data/tls"), [host for host in hosts if host != "*"], now)
    except OSError as error:
        raise CannotListen(f"cannot write {error.filename}: {error.strerror}") from error
    return replace(sources, certificate=made)


def _serve(options: argparse.Namespace) -> int:
    assert_fast_parser()
    sources = replace(_sources(options), overrides=_overrides(options))
    sources = _with_certificate(sources, options)
    config = load(sources)
    settings = config.settings
    log.setup(settings.log.level, settings.log.format)
    config.log_warnings()
    raise_file_limit()
    listeners = listen(config, allow_beyond_loopback=options.open)
    demo = Demo.bind() if settings.demo.enabled else None
    if demo is not None:
        sources = replace(sources, demo_url=demo.url)
        config = load(sources, Files(config.read.files))
    print(banner(config, listeners.plain, listeners.tls), file=sys.stderr, flush=True)
    uvloop.run(_run(config, sources, listeners, demo))
    return OK


_OVERRIDES = (
    ("server", "host", "host"),
    ("server", "port", "port"),
    ("server", "workers", "workers"),
    ("tls", "port", "tls_port"),
)


def _overrides(options: argparse.Namespace) -> tuple[tuple[str, str, object], ...]:
    """What the command line says instead of the file, at the start and at each reload."""
    given = ((section, key, getattr(options, option)) for section, key, option in _OVERRIDES)
    return tuple(override for override in given if override[2] is not None)


async def _run(config: Config, sources: Sources, listeners: Listeners, demo: Demo | None) -> None:
    remove_dead_folders()
    if config.settings.server.workers > 1:
        if config.settings.database:
            # Refused once and for all, not by each worker again and again.
            await try_out(config.settings.database)
        await Supervisor(config, sources, listeners, demo).run()
        return
    async with contextlib.AsyncExitStack() as stack:
        if demo is not None:
            await stack.enter_async_context(contextlib.asynccontextmanager(demo.running)())
        await serve(config, sources, listeners)


def _reload(options: argparse.Namespace) -> int:
    config = load(_sources(options))
    _print_warnings(config)
    reloading.reload(config, options.url, print)
    return OK


def _print_warnings(config: Config) -> None:
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _check(options: argparse.Namespace) -> int:
    config = load(_sources(options))
    _print_warnings(config)
    width = max(map(len, config.registry.providers), default=0)
    for name, provider in sorted(config.registry.providers.items()):
        sockets = f", WebSockets {provider.websocket.via}" if provider.websocket_rules else ""
        state = (
            f"not configured: set {', '.join(provider.missing)}" if provider.missing else "ready"
        )
        print(f"{name:<{width}}  {state:<40}  REST {provider.rest.via}{sockets}")
    print(f"{config.path}: no problems, {len(config.registry.providers)} providers.")
    return OK


def _explain(options: argparse.Namespace) -> int:
    config = load(_sources(options))
    try:
        print(explain(config, options.method.upper(), options.path))
    except RelayError as error:
        print(f"refused with {error.status} {error}", file=sys.stderr)
        return FAILED
    return OK


def _doctor(options: argparse.Namespace) -> int:
    sources = _sources(options)
    log.setup("error", "json")
    healthy = uvloop.run(examine(sources, options.providers, print))
    return OK if healthy else FAILED


def _logs(options: argparse.Namespace) -> int:
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(report.logs(load(_sources(options)), options, print))
    return OK


def _usage(options: argparse.Namespace) -> int:
    uvloop.run(report.spent(load(_sources(options)), options, print))
    return OK


def _schema(options: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=2))
    return OK


def _init(options: argparse.Namespace) -> int:
    """Write the packaged files out; what is there already stays."""
    source, target = packaged(), Path(options.folder)
    files = [Path("gateway.yaml"), Path(".env.example")]
    files += [
        file.relative_to(source) for file in sorted((source / "config/providers").glob("*.yaml"))
    ]
    for file in files:
        if (target / file).exists():
            print(f"kept   {file} (it is there already)")
            continue
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
        print(f"wrote  {file}")
    print("Next: copy .env.example to .env, put your keys in, and run `relay serve`.")
    return OK


_SERVING = (_serve, worker.run)
