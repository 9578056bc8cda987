"""Whose fault an exception is: the stack's, the adapter's or the suite's, told by the frames of its traceback."""

import inspect
import linecache
import sys
import sysconfig
from pathlib import Path
from types import TracebackType

from conformance.loading import POLICY_METHODS
from conformance.subject import Subject

STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
# An adapter that asks a recipe or a checkpoint for what is not there fails inside these files.
ON_BEHALF = {str(Path(__file__).parent / name) for name in ("recipe.py", "recording/trace.py")}


def raised_by_adapter(error: BaseException, subject: Subject) -> bool:
    """Return True if the innermost frame is the adapter's, or the suite's on its behalf: not a fault of the stack.

    Frames of the standard library below it (a file that was not found, a module that was not there) do not count.
    """
    trail = [path for path, _ in frames(error)]
    while trail and is_standard_library(trail[-1]):
        trail.pop()
    return bool(trail) and trail[-1] in adapter_files(subject) | ON_BEHALF


def line_in_adapter(error: BaseException | None, subject: Subject) -> str:
    """Return the innermost line of the adapter that an exception passed through, as ``file:line: code``."""
    files = adapter_files(subject)
    for path, line in reversed(frames(error)):
        if path in files:
            return f"{Path(path).name}:{line}: {linecache.getline(path, line).strip()}"
    return ""


def adapter_files(subject: Subject) -> set[str]:
    """Return the files that the adapter's code lies in: of its classes, their bases, its policy, loose functions."""
    files = set()
    for thing in (subject, subject.policy):
        for kind in type(thing).__mro__:
            files.add(getattr(sys.modules.get(kind.__module__), "__file__", None))
        for name in ("train", "load", *POLICY_METHODS):
            function = inspect.unwrap(getattr(thing, name, None))  # type: ignore[arg-type] # None has no __wrapped__
            files.add(getattr(getattr(function, "__code__", None), "co_filename", None))
    return {file for file in files if file is not None and not file.endswith(("typing.py", "types.py"))}


def frames(error: BaseException | None) -> list[tuple[str, int]]:
    """Return file and line of each frame of an exception's traceback, outermost first."""
    found, step = [], error.__traceback__ if error is not None else None
    while isinstance(step, TracebackType):
        found.append((step.tb_frame.f_code.co_filename, step.tb_lineno))
        step = step.tb_next
    return found


def is_standard_library(path: str) -> bool:
    """Return True if a source file came with Python itself."""
    return path.startswith("<frozen ") or (path.startswith(STANDARD_LIBRARY) and "site-packages" not in path)
