"""`relay check`: check a configuration, and list its providers with the variables each lacks."""

from __future__ import annotations

import argparse

from relay.cli.sources import load_config, print_warnings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument of the command, which names the same file as --config."""
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="the gateway.yaml to check (default: --config); its includes are relative to it",
    )


def run(options: argparse.Namespace) -> int:
    """Print the providers; 0. Raises ConfigError."""
    if options.file is not None:
        options.config = options.file
    config = load_config(options)
    print_warnings(config)
    width = max(map(len, config.registry.providers), default=0)
    for name, provider in sorted(config.registry.providers.items()):
        sockets = f", WebSockets {provider.websocket.via}" if provider.websocket_rules else ""
        state = (
            f"not configured: set {', '.join(provider.missing)}" if provider.missing else "ready"
        )
        print(f"{name:<{width}}  {state:<40}  REST {provider.rest.via}{sockets}")
    print(f"{config.path}: no problems, {len(config.registry.providers)} providers.")
    return 0
