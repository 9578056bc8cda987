"""Stacks that no package index has: an environment variable says where their checkout is."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from conformance.errors import UsageError


def checkout(variable: str, repository: str, script: str) -> Path:
    """Return the folder that an environment variable names.

    Args:
        variable: the name of the environment variable.
        repository: where users get the stack, for the message.
        script: a file that every checkout has, relative to its root.

    Raises:
        UsageError: if the variable is not set, or names no such checkout.
    """
    given = os.environ.get(variable)
    get = f"clone {repository} and set {variable} to the path of the checkout"
    if not given:
        raise UsageError(f"the environment variable {variable} is not set: {get}.")
    if not Path(given, script).is_file():
        raise UsageError(f"{variable} is {given!r}, which has no file {script}: {get}.")
    return Path(given).resolve()


def commit(root: Path) -> str:
    """Return the short id of the commit that is checked out, or "unknown" if git does not say."""
    command = ["git", "-C", str(root), "rev-parse", "--short=9", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextmanager
def own_modules(root: Path, *packages: str) -> Iterator[None]:
    """Import packages of a checkout inside the block, and forget them after it: some read the environment only once.

    The garbage collector is put back as well: a script may have frozen and stopped it.
    """
    enabled = gc.isenabled()
    with patch.object(sys, "path", [str(root), *sys.path]):
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
                del sys.modules[name]
            gc.unfreeze()
            if enabled:
                gc.enable()
