"""`relay check`: check the configuration, and list the providers with what each is missing."""

from __future__ import annotations

import argparse

from relay.cli.sources import load_config, print_warnings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no option of its own."""


def run(options: argparse.Namespace) -> int:
    """Print the providers; 0. Raises ConfigError."""
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
