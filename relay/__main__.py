"""Start the command line, for `python -m relay` and the command `relay`.

Sets up the signals of a serving process before anything else is imported (server/signals.py).
"""

import gc
import sys

from relay.server import signals


def main() -> int:
    """Run the command line and return its exit code."""
    if sys.argv[1:2] in (["serve"], ["worker"]):
        signals.before_start()
    gc.disable()  # imported objects are never freed; collections take a sixth of the import
    from relay.cli.main import main as run  # here, since signals come first

    gc.enable()
    return run()


if __name__ == "__main__":
    sys.exit(main())
