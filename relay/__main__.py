"""`python -m relay` and the command `relay`: the command line, with signals in order before
anything is imported.
"""

import sys

from relay import signals


def main() -> int:
    """Run the command line; its exit code."""
    if sys.argv[1:2] in (["serve"], ["worker"]):
        signals.before_start()
    from relay.cli import main as run  # an import that takes a second

    return run()


if __name__ == "__main__":
    sys.exit(main())
