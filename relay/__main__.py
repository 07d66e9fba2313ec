"""`python -m relay` and the command `relay`: the command line, with signals in order before
anything is imported.
"""

import gc
import sys

from relay.server import signals


def main() -> int:
    """Run the command line; its exit code."""
    if sys.argv[1:2] in (["serve"], ["worker"]):
        signals.before_start()
    gc.disable()  # what an import makes stays: to search it for cycles takes a sixth of its time
    from relay.cli.main import main as run  # an import that takes a second

    gc.enable()
    return run()


if __name__ == "__main__":
    sys.exit(main())
