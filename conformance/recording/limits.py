"""What a run may not do: take for ever, or end the process."""

import contextlib
import os
import signal
import threading
import types
from collections.abc import Iterator

from conformance.errors import RunEnded, RunTimeout


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise RunTimeout inside the block when it has taken that long; only in the main thread, and not on Windows."""
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: types.FrameType | None) -> None:
        raise RunTimeout(f"the run did not end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second: a stack may swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def no_sudden_exit(everywhere: bool = True) -> Iterator[None]:
    """Raise RunEnded inside the block where ``os._exit`` is called, which would end the judge without a word.

    The number that it was called with is the error's ``status``.

    Args:
        everywhere: also in threads beside the main one, where the error ends the thread only, and the run goes on.
    """
    original, process = os._exit, os.getpid()

    def refuse(status: int) -> None:
        other = not everywhere and threading.current_thread() is not threading.main_thread()
        if os.getpid() != process or other:  # a process that the run has forked may end as it likes
            original(status)
        raise RunEnded(status)

    os._exit = refuse  # type: ignore[assignment] # which returns as little
    try:
        yield
    finally:
        os._exit = original
