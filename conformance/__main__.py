"""``python -m conformance``."""

import sys

from conformance.cli import main
from conformance.supervision import supervised


def entry() -> int:
    """Run the command line; a ``run`` in a process of its own, so that a crash of the stack still ends in a letter."""
    return supervised(main) if sys.argv[1:2] == ["run"] else main()


if __name__ == "__main__":
    sys.exit(entry())
