"""Ctrl-C while a command is still being imported: one sentence, instead of a traceback through imports."""

import sys
from types import TracebackType

SCRIPT = "gpt-reference"


def is_command() -> bool:
    """Return whether this process was started as ``python -m reference`` or by its script."""
    if not sys.argv:
        return False
    if sys.argv[0] == "-m":  # until Python has found the module, whose name stands where its path will
        module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
        return module.partition(".")[0] == __name__.partition(".")[0]
    return sys.argv[0].replace("\\", "/").rpartition("/")[2].startswith(SCRIPT)


def tell(kind: type[BaseException], error: BaseException, trail: TracebackType | None) -> None:
    """Say that Ctrl-C ended the command, and end the process as shells expect; show other errors as ever."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trail)
        return
    import os

    print("Stopped at once.", file=sys.stderr, flush=True)
    os._exit(130)


if is_command():
    sys.excepthook = tell
