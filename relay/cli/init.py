"""`relay init`: write the packaged gateway.yaml, config/providers and .env.example to a folder."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from relay.registry.packaged import packaged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("folder", nargs="?", default=".", help="where to (default: here)")


def run(options: argparse.Namespace) -> int:
    """Write the files that are not there yet; 0."""
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
    return 0
