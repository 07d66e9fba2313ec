"""Parse the command line, run one command, and turn its errors into text and exit codes.

Owns the table of commands and the exit codes. Each command is the module of its name beside this
one. It has `add_arguments(parser)`, for its options beside --config and --env-file, and
`run(options)`, which returns the exit code and raises OperatorError for a mistake that an operator
can correct. Only the module of the command that runs is imported.
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
from relay.core.text import escaped_lines

OK, INTERRUPTED = 0, 130

COMMANDS = {
    "serve": "run the relay",
    "check": "check gateway.yaml, or another file, and list the providers",
    "reload": "reload the configuration of the running relay, and print what changed",
    "explain": "print the upstream request of a call, without sending it",
    "doctor": "probe every configured provider, and say what failed and what to do",
    "connect": "make Claude Code, Codex or another agent call its provider through the relay",
    "keys": "make, list, show, revoke and rotate the keys of clients in the database",
    "budgets": "print the state of budgets, raise, reset and release them",
    "logs": "print the latest calls of the ledger",
    "usage": "print usage and cost of the calls in the ledger",
    "schema": "print the JSON Schema of gateway.yaml",
    "init": "write gateway.yaml, config/providers and .env.example here",
    "worker": None,
}
"""Name and help. A command without help is started by the supervisor only."""

_SERVING = ("serve", "worker")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 failed, 2 bad configuration or
    arguments, 130 interrupted. A reader that closes the output early, such as `head`, gives 0.
    """
    words = sys.argv[1:] if arguments is None else arguments
    options = build_parser(words[:1]).parse_args(words)
    try:
        code: int = _import_command(options.command).run(options)
        if options.command not in _SERVING:
            sys.stdout.flush()
        return code
    except OperatorError as error:
        print(escaped_lines(error.report), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        if options.command in _SERVING:
            raise
        # Python flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def build_parser(wanted: Collection[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser with every command, but only the options of the `wanted` ones: their modules are
    imported for that.
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
        "--env-file", default=".env", help="file with variables (default: .env, if it exists)"
    )
