"""Every exception of the suite, under one base class, and the words that messages share."""

import signal
from collections.abc import Iterable


class ConformanceError(Exception):
    """Base class of all exceptions that the suite raises on purpose."""


class UsageError(ConformanceError):
    """A mistake in how the suite was called. The message is one sentence for the user: no traceback, exit code 2."""


class UnknownCapability(ConformanceError, ValueError):
    """A capability that the suite does not know."""


class Violation(ConformanceError, AssertionError):
    """A stack breaks a rule. It is also an AssertionError, so that you can call rules in your own tests.

    Args:
        expected: what a healthy stack shows.
        seen: what was seen instead: tensors by name, numbers, the first few of many.
    """

    def __init__(self, expected: str, seen: str) -> None:
        super().__init__(f"expected: {expected}\nseen: {seen}")
        self.expected, self.seen = expected, seen


class NotApplicable(ConformanceError):
    """A clause cannot be judged on this stack or machine; the message is the reason."""


class RunFailed(ConformanceError):
    """A run that a clause needs did not end; its cause is what the stack or the adapter raised."""


class AdapterFailed(RunFailed):
    """The adapter itself raised an error, which says nothing about the stack."""


class RunTimeout(BaseException):
    """A run took too long. Not an Exception: a stack that catches those would go on."""


class RunEnded(BaseException):
    """A run tried to end the whole process. Not an Exception: a stack that catches those would go on."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the run called os._exit({status})")
        self.status = status


class NotWritten(ConformanceError, FileNotFoundError):
    """A checkpoint lacks a file that it should have."""


class ClockError(ConformanceError):
    """The bench's clock cannot be trusted on this device; nothing that it measures should be believed."""


class Unavailable(ConformanceError):
    """A case of the bench cannot run here. The message is one sentence, and becomes the row's reason."""


REFUSED = "the stack refuses what the clause asks for: "
"""What stands before a reason that train() gave with NotApplicable."""
LONGEST = 380  # characters of a message


def one_line(message: str) -> str:
    """Return a message as one line of at most ``LONGEST`` characters that do nothing to a terminal.

    What is too long, such as the name of a file, is cut in the middle: the end says what to do.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(message.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 + 5 :]}"


def sentence(error: BaseException) -> str:
    """Return the message of an error for the user: a capital letter first, and see :func:`one_line`."""
    text = one_line(str(error))
    return f"{text[:1].upper()}{text[1:]}"


def describe_error(error: BaseException) -> str:
    """Return an exception in one line: its class and the first line of its message, with the next after a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])  # load_state_dict() begins with one
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGSEGV."""
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"


def quoted(names: Iterable[object], limit: int = 4) -> str:
    """Return the first few of many names, and how many more there are."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
