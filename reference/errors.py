"""Every error that a user can mend, under one base class; the message of each is one sentence.

A message says what is wrong, what was expected and what to do. The command line prints it without a traceback and ends
with the error's exit code.
"""

import shlex


class ExplainedError(Exception):
    """Base class of the errors below, for ``except``."""

    exit_code = 1


class ConfigurationError(ExplainedError, ValueError):
    """A setting that cannot work."""

    exit_code = 2


class CheckpointError(ExplainedError, RuntimeError):
    """A checkpoint that is missing, incomplete, damaged or of another model."""


class DataError(ExplainedError, ValueError):
    """Token files or texts that cannot be used."""


class TrainingError(ExplainedError, RuntimeError):
    """A run that cannot go on; the message names the update."""


def first_line(error: BaseException) -> str:
    """Return the first line of a message that may have many, or the error's type if the message is empty.

    Of an error of the operating system, only what it said: the message around it names the file.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("Error(s) in loading")), type(error).__name__)


def printable(text: str) -> str:
    """Return text that neither a terminal nor an encoder stumbles over: control codes and lone surrogates escaped."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)


def quoted(path: object) -> str:
    """Return a path as a shell takes it in a command that is suggested, on one line."""
    return printable(shlex.quote(str(path))).replace("\n", "\\n")


def cause_of(error: BaseException) -> str:
    """Return what the operating system said, if the error was raised while its error was handled.

    Of a full disk, torch says only "unexpected pos".
    """
    context: BaseException | None = error
    while context is not None and not isinstance(context, OSError):
        context = context.__context__
    return first_line(context or error)
