"""Ctrl-C, SIGTERM and SIGHUP: the first one asks the run to save and stop, a second one stops it at once.

SIGHUP comes when the terminal is closed or the connection breaks; where nohup has it ignored, it stays ignored. While a
run waits for other nodes there is nothing to save, and each of them ends it.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

TOGETHER = 1.0  # seconds
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
ENDING = [number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number is not None]


class Stop:
    """Whether a run was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that asked for it."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Note the signals that end a run instead of acting on them; afterwards they act as before.

    With the first signal the previous handlers are back: a second Ctrl-C raises KeyboardInterrupt, a second SIGTERM
    ends the process. Another one, if it comes within a second, belongs to the first: some launchers send both.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number)

    with handled_by(note):
        yield stop


def ended_by_signals() -> contextlib.AbstractContextManager[None]:
    """Let these signals end the process, by the operating system; afterwards they act as before.

    PyTorch waits for other nodes in C++, for half an hour, where no handler of Python runs: not even Ctrl-C would be
    heard.
    """
    return handled_by(signal.SIG_DFL)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Handle the signals that end a run in the block; a function handles the first of them only.

    In a thread other than the main one, where Python allows no handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    if before.get(HANGUP) == signal.SIG_IGN:  # nohup
        del before[HANGUP]

    def put_back() -> None:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)  # None: set outside Python

    def once(number: int, frame: FrameType | None) -> None:
        put_back()
        assert callable(handler)
        handler(number, frame)
        began = time.monotonic()

        def act(number: int, frame: FrameType | None) -> None:
            if time.monotonic() - began > TOGETHER:
                put_back()
                signal.raise_signal(number)

        for other in before:
            if other != number:
                signal.signal(other, act)

    for number in before:
        signal.signal(number, handler if isinstance(handler, signal.Handlers) else once)
    try:
        yield
    finally:
        put_back()
