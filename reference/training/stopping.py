"""Ctrl-C and SIGTERM: the first one asks the run to save and stop, a second one stops it at once.

While a run waits for other nodes there is nothing to save, and both end it.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether a run was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that asked for it."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Note SIGINT and SIGTERM instead of acting on them; afterwards they act as before.

    With the first signal the previous handlers are back: a second Ctrl-C raises KeyboardInterrupt, a second SIGTERM
    ends the process. In a thread other than the main one, where Python allows no handlers, nothing is changed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set outside Python

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number)
        put_back()

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        put_back()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the process, by the operating system; afterwards they act as before.

    PyTorch waits for other nodes in C++, for half an hour, where no handler of Python runs: not even Ctrl-C would be
    heard. In a thread other than the main one, where Python allows no handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
