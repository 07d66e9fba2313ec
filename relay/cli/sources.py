"""Find and load the configuration files of a command: --config and --env-file.

Owns the choice of the files. Reading and checking them is in registry/load.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from relay.registry.load import Config, ConfigError, Sources, load
from relay.registry.packaged import find_config
from relay.registry.problems import Problem

DEFAULT_ENV_FILE = ".env"


def sources_of(options: argparse.Namespace) -> Sources:
    """The files that the options name. Raises ConfigError for an --env-file that is not there."""
    env_file = Path(options.env_file)
    if options.env_file != DEFAULT_ENV_FILE:
        try:
            env_file.stat()
        except FileNotFoundError:
            raise _env_file_problem(options, "there is no such file") from None
        except OSError as error:
            raise _env_file_problem(options, f"cannot be read: {error.strerror}") from error
    return Sources(find_config(options.config), env_file)


def _env_file_problem(options: argparse.Namespace, message: str) -> ConfigError:
    return ConfigError([Problem(options.env_file, 1, 1, (), message)])


def load_config(options: argparse.Namespace) -> Config:
    """Read and check the configuration. Raises ConfigError."""
    return load(sources_of(options))


def print_warnings(config: Config) -> None:
    """Print the warnings of the configuration to stderr."""
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr)
