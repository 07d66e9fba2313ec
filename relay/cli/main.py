"""The command line: which commands there are, and what their errors become.

Owns the table of commands, the exit codes and what is printed for an error. Each command is the
module of its name beside this one, with `add_arguments(parser)`, for its options beside --config
and --env-file, and `run(options)`, which returns the exit code and raises OperatorError for what an
operator can put right. Only the module of the command that runs is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Collection, Sequence
from types import ModuleType

import relay
from relay.core.errors import OperatorError

OK, INTERRUPTED = 0, 130

COMMANDS = {
    "serve": "run the relay",
    "check": "check gateway.yaml and list the providers",
    "reload": "have the running relay read its files again",
    "explain": "print what a call would become, without making it",
    "doctor": "try every configured provider, and say what is wrong",
    "logs": "print the latest calls of the ledger",
    "usage": "print what was used, and what it cost",
    "schema": "print the JSON Schema of gateway.yaml",
    "init": "write gateway.yaml, config/providers and .env.example here",
    "worker": None,
}
"""Name and help. Without help: started by the supervisor, not by people."""

_SERVING = ("serve", "worker")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed, 2 bad configuration or arguments, 130
    interrupted. A reader of the output that leaves early has what it wanted: that is 0.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options = build_parser(given[:1]).parse_args(given)
    try:
        code: int = _import_command(options.command).run(options)
        if options.command not in _SERVING:
            sys.stdout.flush()
        return code
    except OperatorError as error:
        print(error.report, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        if options.command in _SERVING:
            raise
        # The reader, such as `head`, has enough. Python flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def build_parser(wanted: Collection[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser. It names every command, and has the options of the `wanted` ones alone: to know
    them takes the import of their modules.
    """
    parser = argparse.ArgumentParser(prog="relay", description="A self-hosted AI gateway relay.")
    parser.add_argument("--version", action="version", version=f"relay {relay.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for name, text in COMMANDS.items():
        if text is None:
            command = commands.add_parser(name)
        else:
            command = commands.add_parser(name, help=text, description=text)
        if name in wanted:
            _add_file_arguments(command)
            _import_command(name).add_arguments(command)
    return parser


def _import_command(name: str) -> ModuleType:
    return importlib.import_module(f"relay.cli.{name}")


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", help="gateway.yaml to use (default: ./gateway.yaml, else the packaged one)"
    )
    parser.add_argument(
        "--env-file", default=".env", help="file with variables (default: .env, if there is one)"
    )
