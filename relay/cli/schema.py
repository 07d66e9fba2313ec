"""`relay schema`: print the JSON Schema of gateway.yaml, for editors."""

from __future__ import annotations

import argparse
import json

from relay.registry.schema import GatewayFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options."""


def run(_options: argparse.Namespace) -> int:
    """Print the schema; return 0."""
    print(json.dumps(GatewayFile.model_json_schema(), indent=2))
    return 0
