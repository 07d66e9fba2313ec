"""`relay init`: write the packaged gateway.yaml, config/providers and .env.example to a folder."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from relay.registry.packaged import packaged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("folder", nargs="?", default=".", help="target folder (default: this one)")


def run(options: argparse.Namespace) -> int:
    """Write the files that do not exist yet; return 0."""
    source, target = packaged(), Path(options.folder)
    files = [Path("gateway.yaml"), Path(".env.example")]
    files += [
        file.relative_to(source) for file in sorted((source / "config/providers").glob("*.yaml"))
    ]
    for file in files:
        if (target / file).exists():
            print(f"kept   {file} (it exists already)")
            continue
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
        print(f"wrote  {file}")
    print("Next: copy .env.example to .env, fill in your keys, and run `relay serve`.")
    return 0
