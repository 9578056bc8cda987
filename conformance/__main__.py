"""``python -m conformance``."""

import os
import sys

from conformance.cli import main
from conformance.supervision import supervised


def entry() -> int:
    """Run the command line; a ``run`` in a process of its own, so that a crash of the stack still ends in a letter."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell (>&-) or by a daemon: nobody reads
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 # until the process ends
    return supervised(main) if sys.argv[1:2] == ["run"] else main()


if __name__ == "__main__":
    sys.exit(entry())
