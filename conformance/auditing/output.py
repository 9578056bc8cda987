"""What a run prints, logs and gives to loggers of metrics, heard as it happens.

Nothing is held back: a line reaches the terminal at once, as it would without the audit.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from conformance.recording.loggers import Hear, Loggers


class Lent:
    """The bytes below a stream, which a Tee must not close when it is thrown away."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.buffer, name)

    def close(self) -> None:
        """Keep it open: it is not ours."""

    def _dealloc_warn(self, source: object) -> None:
        """Do not complain that it is open."""


class Tee(io.TextIOWrapper):
    """A text stream that also hands on each line that is written to it."""

    hear: Hear
    pending = ""

    def write(self, text: str, /) -> int:
        self.pending += text
        *lines, self.pending = self.pending.replace("\r", "\n").split("\n")
        for said in lines:
            if said.strip():
                self.hear(said)
        return super().write(text)


@contextlib.contextmanager
def heard(hear: Hear) -> "Iterator[Loggers]":
    """Hand on every line that is printed, logged or given to a logger of metrics inside the block."""
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stack.enter_context(teed(name, hear))
        stack.enter_context(logging_heard(hear))
        loggers = Loggers(hear)
        stack.callback(loggers.leave)
        yield loggers


@contextlib.contextmanager
def teed(name: str, hear: Hear) -> Iterator[None]:
    """Put a Tee around sys.stdout or sys.stderr, if it is a stream with bytes below it."""
    original: TextIO | None = getattr(sys, name)
    if original is None:  # closed: a script prints in vain
        yield
        return
    if not isinstance(original, io.TextIOWrapper):  # a notebook's, or a test's: those are not ours to wrap
        with told_by_method(original, hear):
            yield
        return
    original.flush()
    tee = Tee(
        Lent(original.buffer),  # type: ignore[type-var] # it hands on what is asked of it
        encoding=original.encoding,
        errors=original.errors,
        line_buffering=original.line_buffering,
        write_through=original.write_through,
    )
    tee.hear = hear
    setattr(sys, name, tee)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):  # closed by the run, or nobody reads any more
            tee.flush()
            if getattr(sys, name) is tee:
                setattr(sys, name, original)
            # The stream below stays open: a logger may hold the Tee, and write to it when the run has ended.
            tee.hear = deaf


def deaf(text: str) -> None:
    """Hear nothing more."""


@contextlib.contextmanager
def told_by_method(stream: Any, hear: Hear) -> Iterator[None]:
    """Hand on what is written to a stream that does not wrap a stream of bytes."""
    write = stream.write

    def telling(text: str) -> Any:
        for said in text.splitlines():
            if said.strip():
                hear(said)
        return write(text)

    try:
        stream.write = telling
    except AttributeError:  # it allows no attribute: its lines are not heard
        yield
        return
    try:
        yield
    finally:
        stream.write = write


@contextlib.contextmanager
def logging_heard(hear: Hear) -> Iterator[None]:
    """Hand on log records. No handler is added: with one, ``logging.basicConfig`` would do nothing."""
    original = logging.Logger.callHandlers

    def call(self: logging.Logger, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a message whose arguments do not fit it
            hear(record.getMessage())
        original(self, record)

    logging.Logger.callHandlers = call  # type: ignore[method-assign] # put back
    try:
        yield
    finally:
        logging.Logger.callHandlers = original  # type: ignore[method-assign] # as it was
