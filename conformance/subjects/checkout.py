"""Stacks that no package index has: an environment variable says where their checkout is."""

import os
import subprocess
from pathlib import Path

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
