"""Whose fault an exception is: the stack's, the adapter's or the suite's, told by the frames of its traceback."""

import inspect
import linecache
import opcode
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from conformance.loading import POLICY_METHODS
from conformance.subject import Subject

STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
# An adapter that asks a recipe or a checkpoint for what is not there fails inside these files.
ON_BEHALF = {str(Path(__file__).parent / name) for name in ("recipe.py", "recording/trace.py")}


MISTAKES = (LookupError, AttributeError, NameError, ImportError, AssertionError, NotImplementedError, RecursionError)
"""Errors by which a program fails, rather than refuses."""


def raised_by_adapter(error: BaseException, subject: Subject) -> bool:
    """Return True if an exception is a mistake in the adapter, or of the suite on its behalf: not the stack's word.

    It is if its innermost frame lies in the adapter's file, unless it reads like a refusal: a loop may live in the same
    file as its adapter, and a loop that raises ValueError at a NaN, or hands a misspelt keyword to a class, refuses.
    Frames of the standard library below it (a file that was not found, a module that was not there) do not count.
    """
    trail = list(steps(error))
    while trail and is_standard_library(trail[-1].tb_frame.f_code.co_filename):
        trail.pop()
    if not trail:
        return False
    path = trail[-1].tb_frame.f_code.co_filename
    if path in ON_BEHALF:
        return True
    return path in adapter_files(subject) and not refuses(error, trail[-1])


def refuses(error: BaseException, step: TracebackType) -> bool:
    """Return True if an exception was raised on purpose or is about a keyword, unless programs fail by its kind."""
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return True
    if isinstance(error, MISTAKES) or step.tb_next is not None:
        return False
    return step.tb_frame.f_code.co_code[step.tb_lasti] == opcode.opmap["RAISE_VARARGS"]


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
    return [(step.tb_frame.f_code.co_filename, step.tb_lineno) for step in steps(error)]


def steps(error: BaseException | None) -> Iterator[TracebackType]:
    """Yield the entries of an exception's traceback, outermost first."""
    step = error.__traceback__ if error is not None else None
    while step is not None:
        yield step
        step = step.tb_next


def is_standard_library(path: str) -> bool:
    """Return True if a source file came with Python itself."""
    return path.startswith("<frozen ") or (path.startswith(STANDARD_LIBRARY) and "site-packages" not in path)
