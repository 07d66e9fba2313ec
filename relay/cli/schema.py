"""`relay schema`: the JSON Schema of gateway.yaml, for editors."""

from __future__ import annotations

import argparse
import json

from relay.registry.schema import GatewayFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no option of its own."""


def run(_options: argparse.Namespace) -> int:
    """Print the schema; 0."""
    print(json.dumps(GatewayFile.model_json_schema(), indent=2))
    return 0
